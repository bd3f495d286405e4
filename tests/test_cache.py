"""The frozen-prefix cache: the same bits as without it, each example once through each frozen block, or off."""

from __future__ import annotations

import copy
import itertools
import pickle
from collections import Counter

import pytest
import torch
from conftest import BLOCKS, DEVICE, EXAMPLES, hashes, tiny_bert, tiny_data
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from transformers import BertConfig, BertForSequenceClassification

from hf_unfreeze import FrozenPrefixCache, UnfreezeCallback, Unfreezer
from hf_unfreeze._keys import by_length, read_batch, take

pytestmark = pytest.mark.filterwarnings("ignore:schedule .* will not reach:UserWarning")
DOWN = "head@0, block[-1]@1ep, block[-2:]@2ep"
UP_AND_DOWN = "head@0, block[-2:]@1ep, -block[-2]@2ep, block[-2:]@3ep"
SGD = {"optim": "sgd", "learning_rate": 0.1}


def count_rows(model: nn.Module) -> Counter:
    """Examples that go through each block from now on."""
    counts: Counter = Counter()
    for index, block in enumerate(model.bert.encoder.layer):
        tell_inputs(block.intermediate, lambda hidden, index=index: counts.update({index: len(hidden)}))
    return counts


def tell_inputs(module: nn.Module, tell) -> None:
    """Call ``tell`` with each input of a module. No hook: under one of the user's own the cache is off."""
    own = module.forward

    def forward(hidden):
        tell(hidden)
        return own(hidden)

    module.forward = forward


def ragged_data(dtype=None) -> list[dict]:
    generator = torch.Generator().manual_seed(0)
    rows = []
    for _ in range(EXAMPLES):
        length = int(torch.randint(3, 12, (1,), generator=generator))
        ids = torch.randint(3, 50, (length,), generator=generator)
        rows.append({"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": int(ids[0]) % 3})
    return rows


def pad(rows: list[dict], left: bool = False) -> dict:
    length = max(len(row["input_ids"]) for row in rows)
    batch = {}
    for name in ("input_ids", "attention_mask"):
        gaps = [(length - len(row[name]), 0) if left else (0, length - len(row[name])) for row in rows]
        batch[name] = torch.stack([nn.functional.pad(row[name], gap) for row, gap in zip(rows, gaps, strict=True)])
    batch["labels"] = torch.tensor([row["labels"] for row in rows])
    return batch


def losses(trainer) -> list[float]:
    history = trainer.state.log_history
    return [entry[name] for entry in history for name in ("loss", "eval_loss") if name in entry]


def assert_close_weights(one, other, rtol=0, atol=1e-10) -> None:
    """By default what fp64 leaves of rounding."""
    for weights, others in zip(one.model.parameters(), other.model.parameters(), strict=True):
        torch.testing.assert_close(weights, others, rtol=rtol, atol=atol)


def both(make_trainer, schedule, model=tiny_bert, data=None, collator=None, cache=None, **arguments):
    """Train without and with a cache; return the two Trainers and the cache."""
    trainers = []
    cache = cache or FrozenPrefixCache()
    for used in (None, cache):
        trainer = make_trainer(UnfreezeCallback(schedule, cache=used), model=model(), **arguments)
        trainer.train_dataset = data or trainer.train_dataset
        trainer.data_collator = collator or trainer.data_collator
        trainer.train()
        trainers.append(trainer)
    return *trainers, cache


@pytest.mark.parametrize(
    "arguments",
    [
        {"eval_strategy": "epoch", "num_train_epochs": 4},
        {"gradient_accumulation_steps": 3},
        {"per_device_train_batch_size": 5, "dataloader_num_workers": 1},
    ],
    ids=["eval", "accumulation", "partial batch, worker"],
)
def test_bits_are_those_of_a_run_without_it(make_trainer, arguments):
    plain, cached, cache = both(make_trainer, DOWN, **arguments)
    assert hashes(plain.model) == hashes(cached.model)
    assert losses(plain) == losses(cached)
    evaluated = EXAMPLES if "eval_strategy" in arguments else 0
    assert cache.stats.misses == EXAMPLES + evaluated
    checked = 2 * cached.args.train_batch_size  # a batch runs in full when the boundary has moved
    checked += 2 * cached.args.eval_batch_size if evaluated else 0  # and one of the evaluation
    assert cache.stats.hits == (cached.args.num_train_epochs - 1) * cache.stats.misses - checked
    assert cache.active.off == ""


def test_an_example_goes_once_through_each_frozen_block(make_trainer):
    trainer = make_trainer(UnfreezeCallback(DOWN, cache="memory"), eval_strategy="epoch", num_train_epochs=4)
    counts = count_rows(trainer.model)
    trainer.train()
    both_sets = 2 * EXAMPLES
    # checks: one example alone; at each of two transitions a batch of 4 and one of 8, in full and once more above the
    # boundary
    assert counts == {0: both_sets + 1 + 24, 1: both_sets + 1 + 24, 2: (1 + 2) * both_sets + 1 + 24 + 12,
                      3: (1 + 3) * both_sets + 1 + 24 + 24}  # fmt: skip


def test_a_cache_named_between_two_runs(make_trainer):
    callback = UnfreezeCallback(DOWN)
    callback.cache = "memory"
    trainer = make_trainer(callback)
    trainer.train()
    assert callback.cache.stats.hits
    callback.cache = "off"
    trainer.train()
    assert callback.cache is None


def test_boundary_moves_up_and_down(make_trainer):
    counts = []

    def model():
        made = tiny_bert()
        counts.append(count_rows(made))
        return made

    plain, cached, _ = both(make_trainer, UP_AND_DOWN, model=model, num_train_epochs=5)
    assert hashes(plain.model) == hashes(cached.model)
    # block 2: once frozen, once trained in epoch 1, once frozen again with new weights, trained in epochs 3 and 4
    # and the checks: one example alone, a batch at each of three transitions, once more above the boundary
    checks = {0: 1 + 12, 1: 1 + 12, 2: 1 + 12 + 4, 3: 1 + 12 + 12}
    assert counts[1] == {block: rows * EXAMPLES + checks[block] for block, rows in enumerate((1, 1, 5, 5))}


def test_resumed_run_ends_in_the_same_bits(make_trainer, tmp_path):
    whole = make_trainer(UnfreezeCallback(DOWN, cache="memory"), save_strategy="steps", save_steps=1)
    whole.train()
    for step in (3, 9, 15):
        again = make_trainer(UnfreezeCallback(DOWN, cache="memory"), output_dir=str(tmp_path / f"again{step}"))
        again.train(resume_from_checkpoint=str(tmp_path / "run" / f"checkpoint-{step}"))
        if DEVICE == "cpu":
            assert hashes(again.model) == hashes(whole.model), f"resumed at step {step}"
        # a GPU rounds otherwise where fewer examples of a batch are missing, and Adam makes much of little
        assert losses(again) == pytest.approx(losses(whole), rel=1e-2), f"resumed at step {step}"


def test_padding_to_different_lengths(make_trainer):
    """The activation of an example is the same in batches of every length, but for rounding: 1e-10 in fp64."""
    arguments = {"data": ragged_data(), "collator": pad, "num_train_epochs": 4, **SGD}
    plain, cached, cache = both(make_trainer, DOWN, model=lambda: tiny_bert().double(), **arguments)
    assert_close_weights(plain, cached)
    checked = 2 * plain.args.train_batch_size
    assert (cache.stats.hits, cache.stats.misses) == (3 * EXAMPLES - checked, EXAMPLES)


def test_padding_is_left_out_where_the_frozen_blocks_run(monkeypatch):
    """Missing examples run in parts of like length, one alone at its own; a batch that was padded on stays so wide."""
    monkeypatch.setattr("hf_unfreeze._activations.PART_COST", 4)
    data = ragged_data()
    batches = [pad(data[:7]), pad(data[7:14]), pad(data[14:21]), pad(data[21:22]), pad(data[5:9])]
    batches[3] = {k: nn.functional.pad(v, (0, 3)) if k != "labels" else v for k, v in batches[3].items()}

    def losses_and_positions(cache):
        model, counts = tiny_bert().double().train(), Counter()
        lowest = model.bert.encoder.layer[0].intermediate
        tell_inputs(lowest, lambda hidden: counts.update(positions=hidden.shape[:2].numel()))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        unfreezer = Unfreezer(model, optimizer, "head@0", cache=cache)
        found = []
        for step, batch in enumerate(batches):
            unfreezer.step(step)
            loss = model(**batch).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            found.append((loss.item(), counts.pop("positions", 0)))
        unfreezer.close()
        return zip(*found, strict=True)

    (plain, whole), (cached, computed) = losses_and_positions(None), losses_and_positions("memory")
    assert cached == pytest.approx(plain, abs=1e-10)
    lengths = [[len(row["input_ids"]) for row in rows] for rows in (data[7:14], data[14:21], data[21:22])]
    for own, padded, run in zip(lengths, whole[1:4], computed[1:4], strict=True):
        assert sum(own) <= run < padded
    # the first forward is checked at its own shape, one of its examples alone, and the shortest without padding
    assert computed[0] == whole[0] + batches[0]["input_ids"].shape[1] + min(len(row["input_ids"]) for row in data[:7])
    assert (computed[3], computed[4]) == (lengths[2][0], 0)


def test_an_example_that_is_computed_again_is_computed_without_its_padding(monkeypatch):
    monkeypatch.setattr("hf_unfreeze._activations.CHECK_EVERY", 7)
    model, seen = tiny_bert().double(), []
    tell_inputs(model.bert.encoder.layer[0].intermediate, lambda hidden: seen.append(tuple(hidden.shape[:2])))
    unfreezer = Unfreezer(model, torch.optim.SGD(model.parameters(), lr=0.1), "head@0", cache="memory")
    unfreezer.step(0)
    batch = pad(ragged_data()[:7])
    model(**batch)
    seen.clear()
    for _ in range(7):
        model(**batch)
    lengths = batch["attention_mask"].sum(dim=1).tolist()
    assert sorted(seen) == sorted((1, length) for length in lengths), "another of the batch each time"
    unfreezer.close()


@given(st.lists(st.integers(1, 12), min_size=1, max_size=7), st.integers(0, 40))
def test_no_other_parts_would_cost_less(lengths, part_cost):
    def cost(parts):
        return sum(max(part) * len(part) + part_cost for part in parts)

    mask = (torch.arange(13) < torch.tensor(lengths)[:, None]).long()
    batch = read_batch({"input_ids": torch.ones_like(mask), "attention_mask": mask}, ragged=True)
    parts = by_length(batch, range(len(lengths)), part_cost, len(lengths))
    assert sorted(row for part, _ in parts for row in part) == list(range(len(lengths)))
    assert all(tokens == max(lengths[row] for row in part) for part, tokens in parts)
    ordered = sorted(lengths)
    others = [
        [ordered[first:end] for first, end in itertools.pairwise((0, *cuts, len(ordered)))]
        for count in range(len(ordered))
        for cuts in itertools.combinations(range(1, len(ordered)), count)
    ]
    assert cost([[lengths[row] for row in part] for part, _ in parts]) == min(map(cost, others))


def test_what_is_one_number_for_an_example_goes_with_it():
    table = torch.arange(12).reshape(3, 4)
    taken = take(read_batch({"input_ids": table, "language": torch.tensor([7, 8, 9])}, ragged=True), [2, 0])
    assert taken["language"].tolist() == [9, 7] and taken["input_ids"].tolist() == table[[2, 0]].tolist()
    turned = take(read_batch({"input_ids": table}, ragged=True), [2, 0, 1])
    assert turned["input_ids"].tolist() == table[[2, 0, 1]].tolist()


def test_padding_on_the_left_belongs_to_the_key(make_trainer):
    arguments = {"data": ragged_data(), "collator": lambda rows: pad(rows, left=True), **SGD}
    plain, cached, cache = both(make_trainer, DOWN, model=lambda: tiny_bert().double(), **arguments)
    assert_close_weights(plain, cached)
    assert cache.stats.misses > EXAMPLES


class ReadsPadding(BertForSequenceClassification):
    """Its head takes the mean over all positions, padding as well."""

    def forward(self, input_ids, attention_mask=None, labels=None):
        hidden = self.bert(input_ids, attention_mask=attention_mask).last_hidden_state
        logits = self.classifier(hidden.mean(dim=1))
        return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}


def test_a_head_that_reads_padding_gets_it(make_trainer):
    def model():
        torch.manual_seed(0)
        sizes = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2, "num_hidden_layers": 2}
        return ReadsPadding(BertConfig(vocab_size=50, num_labels=3, **sizes))

    plain, cached, cache = both(make_trainer, "head@0", model=model, data=ragged_data(), collator=pad, **SGD)
    assert losses(plain) == pytest.approx(losses(cached), rel=1e-6)
    assert cache.stats.hits + cache.stats.misses == 3 * EXAMPLES
    assert cache.stats.misses > EXAMPLES  # keys with the padded length


def test_augmented_examples_only_miss(make_trainer):
    class Augmented(torch.utils.data.Dataset):
        def __len__(self):
            return EXAMPLES

        def __getitem__(self, index):
            ids = torch.randint(1, 50, (8,))  # the Trainer's seed makes both runs draw the same
            return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": index % 3}

    plain, cached, cache = both(make_trainer, DOWN, data=Augmented())
    assert hashes(plain.model) == hashes(cached.model)
    assert (cache.stats.hits, cache.stats.misses) == (0, 3 * EXAMPLES)


def by_hand(model, cache, schedule="head@0"):
    unfreezer = Unfreezer(model, torch.optim.SGD(model.parameters(), lr=0.1), schedule, cache=cache)
    unfreezer.step(0)
    model.train()
    return unfreezer


def batch_of(*indices) -> dict:
    rows = [tiny_data()[index] for index in indices]
    return {
        "input_ids": torch.stack([r["input_ids"] for r in rows]),
        "labels": torch.tensor([r["labels"] for r in rows]),
    }


def test_hits_and_misses_in_one_batch():
    model, cache = tiny_bert().double(), FrozenPrefixCache()
    unfreezer = by_hand(model, cache)
    counts = count_rows(model)
    for indices, computed in (((0, 1, 2), 3 + 1), ((2, 3, 0, 4), 2), ((4, 4), 0), ((5,), 1)):
        counts.clear()
        torch.manual_seed(7)
        logits = model(**batch_of(*indices)).logits
        assert counts == (dict.fromkeys(range(BLOCKS), computed) if computed else {})  # the first: one alone besides
        twin = tiny_bert().double()
        twin.bert.embeddings.eval(), twin.bert.encoder.eval()
        torch.manual_seed(7)
        torch.testing.assert_close(logits, twin(**batch_of(*indices)).logits, rtol=0, atol=1e-12)
    unfreezer.close()


def test_closing_restores_the_model_and_copies_are_free_of_the_cache():
    model, cache = tiny_bert(), FrozenPrefixCache()
    before = hashes(model)
    unfreezer = by_hand(model, cache)
    model(**batch_of(0, 1))
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert not any("forward" in vars(module) and "Shadow" in repr(module.forward) for module in twin.modules())
        with torch.no_grad():
            twin.bert.encoder.layer[0].output.dense.weight.add_(1.0)
        assert not torch.equal(twin.eval()(**batch_of(0, 1)).logits, model.eval()(**batch_of(0, 1)).logits)
    unfreezer.close()
    assert not any("forward" in vars(module) for module in model.modules())
    assert hashes(model) == before


def test_new_frozen_weights_are_never_served_old_activations():
    model = tiny_bert().eval()
    unfreezer = by_hand(model, "memory")
    model.eval()
    model(**batch_of(0, 1))
    with torch.no_grad():
        model.bert.encoder.layer[0].output.dense.weight.add_(0.5)
    cached = model(**batch_of(0, 1)).logits
    unfreezer.close()
    assert torch.equal(cached, model.eval()(**batch_of(0, 1)).logits)
