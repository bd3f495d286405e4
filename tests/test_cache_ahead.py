"""Filling the cache before the examples come by: less padding through the frozen blocks, and nothing else changes."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from conftest import EXAMPLES, tiny_bert, tiny_data
from hypothesis import given
from hypothesis import strategies as st
from test_cache import DOWN, SGD, assert_close_weights, both, pad, ragged_data, tell_inputs
from transformers import Trainer

from hf_unfreeze import FrozenPrefixCache, UnfreezeCallback
from hf_unfreeze._keys import by_length, read_batch

pytestmark = pytest.mark.filterwarnings("ignore:schedule .* will not reach:UserWarning")
ALONE = 2  # of the first batch one example without the others, one without its padding; later 4 at each move


@pytest.fixture(autouse=True)
def _small(monkeypatch):
    """Parts and windows of a size that shows with 28 examples."""
    for name in ("PART_COST", "PART_COST_ELSEWHERE"):
        monkeypatch.setattr(f"hf_unfreeze._activations.{name}", 4)
    monkeypatch.setattr("hf_unfreeze._ahead.WINDOW", 12)


class Ragged(torch.utils.data.Dataset):
    """Examples of several lengths, or of one, and how often each is fetched; ``changed`` draws them anew each time."""

    def __init__(self, equal: bool = False, changed: bool = False) -> None:
        self.rows, self.changed, self.fetched = tiny_data() if equal else ragged_data(), changed, Counter()

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, index):
        self.fetched[index] += 1
        row = self.rows[index]
        return row | {"input_ids": torch.randint_like(row["input_ids"], 3, 50)} if self.changed else row


def run(make_trainer, schedule=DOWN, data=None, cache="memory", kind=None, resume=None, **arguments):
    """Train in fp64 without dropout; return the Trainer, and (examples, tokens) of each call of each block."""
    model, calls = tiny_bert().double(), {}
    for index, block in enumerate(model.bert.encoder.layer):
        seen = calls.setdefault(index, [])
        tell_inputs(block.intermediate, lambda hidden, seen=seen: seen.append(tuple(hidden.shape[:2])))
    trainer = make_trainer(UnfreezeCallback(schedule, cache=cache), model=model, **(SGD | arguments))
    trainer.__class__ = kind or Trainer
    trainer.train_dataset, trainer.data_collator = data or Ragged(), pad
    trainer.train(resume_from_checkpoint=resume)
    return trainer, calls


def test_each_example_goes_once_through_each_block_with_almost_no_padding(make_trainer):
    data = Ragged()
    trainer, calls = run(make_trainer, data=data)
    _, whole = run(make_trainer, cache=None)
    lowest = calls[0]
    assert sum(count for count, _ in lowest) == EXAMPLES + ALONE + 2 * 4
    lowest = [*lowest[:1], *lowest[1 + ALONE : -2]]  # without what was computed only to check
    real = sum(len(row["input_ids"]) for row in data.rows)
    padded = sum(count * tokens for count, tokens in whole[0][: EXAMPLES // 4])
    assert sum(count * tokens for count, tokens in lowest) - real < (padded - real) / 2
    batches = lowest[1:]  # the first is the one that is checked
    assert trainer.args.train_batch_size < max(count for count, _ in batches) <= trainer.args.eval_batch_size
    assert set(data.fetched.values()) <= {4, 6}  # three epochs and once ahead, the first few twice more to compare


@pytest.mark.parametrize("workers", [0, 1])
def test_losses_and_weights_are_those_without(make_trainer, workers):
    plain, _ = run(make_trainer, cache=None)
    cached, calls = run(make_trainer, dataloader_num_workers=workers)
    assert sum(count for count, _ in calls[0]) == EXAMPLES + ALONE + 2 * 4
    assert_close_weights(plain, cached)


def test_only_passes_saved_count_as_saved(make_trainer):
    cache = FrozenPrefixCache()
    run(make_trainer, schedule="head@0", cache=cache)
    assert (cache.stats.hits, cache.stats.misses) == (2 * EXAMPLES, EXAMPLES)


def test_a_phase_that_begins_in_the_first_epoch_is_waited_for(make_trainer):
    """Up to the block that opens at step 3 every example is needed; above, only those of the first three steps."""
    _, calls = run(make_trainer, schedule="head@0, block[-1]@3step")
    assert sum(count for count, _ in calls[2]) == EXAMPLES + ALONE + 4
    # 3 batches of 4 frozen, then as in every run
    assert sum(count for count, _ in calls[3]) == 3 * EXAMPLES + ALONE + 2 * 4


class Renames(Trainer):
    """Hands its model other inputs than those of the data."""

    def compute_loss(self, model, inputs, **kwargs):
        ids = inputs.pop("input_ids")
        return model(inputs_embeds=model.get_input_embeddings()(ids), **inputs).loss


class Prepares(Trainer):
    """Does more with a batch than to move it, as trainers do that generate, and counts how often."""

    prepared = 0

    def _prepare_inputs(self, inputs):
        type(self).prepared += 1
        return super()._prepare_inputs(inputs)


class Subset(Trainer):
    """An epoch of this is a third of the data."""

    def _get_train_sampler(self, *args):
        return torch.utils.data.RandomSampler(self.train_dataset, num_samples=EXAMPLES // 3)


@pytest.mark.parametrize(
    ("options", "fetched"),
    [
        ({"data": Ragged(changed=True)}, EXAMPLES * 3 + 8),
        ({"data": Ragged(equal=True)}, EXAMPLES * 3),
        ({"max_steps": 6}, EXAMPLES),  # accelerate fetches a batch too many
        ({"kind": Subset}, 3 * (EXAMPLES // 3)),
        ({"schedule": "head@0, all@2step"}, EXAMPLES * 3),
        ({"cache": FrozenPrefixCache(max_bytes=6000)}, EXAMPLES * 3 + 8 + 12),
    ],
    ids=["drawn anew", "no padding", "less than an epoch", "a third of the data", "opened soon", "too small a store"],
)
def test_not_where_it_would_be_for_nothing(make_trainer, options, fetched):
    data = options.get("data", Ragged())
    run(make_trainer, **({"data": data} | options))
    assert sum(data.fetched.values()) == fetched


def test_a_trainer_that_makes_other_inputs(make_trainer):
    plain, _ = run(make_trainer, kind=Renames, cache=None)
    cached, _ = run(make_trainer, kind=Renames)
    assert_close_weights(plain, cached)


def test_a_trainer_that_prepares_its_inputs_in_its_own_way_does_so_once_a_step(make_trainer, monkeypatch, tmp_path):
    monkeypatch.setattr("hf_unfreeze._store.of_gpu", lambda activations: True)
    for _ in range(2):  # the second from a file that is full
        before = Prepares.prepared
        trainer, _ = run(make_trainer, kind=Prepares, cache=f"disk:{tmp_path}")
        assert Prepares.prepared - before == trainer.state.global_step


def test_random_numbers_are_those_without(make_trainer):
    """What is drawn anew each time is drawn alike, although a few examples were looked at before."""
    plain, cached, _ = both(make_trainer, DOWN, data=Ragged(changed=True), collator=pad, **SGD)
    assert_close_weights(plain, cached, rtol=1e-4, atol=1e-6)


def test_a_resumed_run_fills_again_and_ends_alike(make_trainer, tmp_path):
    whole, _ = run(make_trainer, save_strategy="steps", save_steps=3)
    again, calls = run(
        make_trainer, output_dir=str(tmp_path / "again"), resume=str(tmp_path / "run" / "checkpoint-9")
    )  # fmt: skip
    assert sum(count for count, _ in calls[0]) == EXAMPLES + ALONE + 4
    assert_close_weights(whole, again)


def test_shared_on_the_disk_it_is_computed_once(make_trainer, tmp_path):
    for expected in (EXAMPLES + ALONE, 4 + ALONE):  # the batch of the first check
        cache = FrozenPrefixCache("disk", folder=tmp_path / "cache")
        _, calls = run(make_trainer, schedule="head@0", cache=cache)
        assert sum(count for count, _ in calls[0]) == expected


@given(st.lists(st.integers(1, 12), min_size=1, max_size=30), st.integers(1, 7))
def test_no_part_is_larger_than_allowed(lengths, most):
    mask = (torch.arange(13) < torch.tensor(lengths)[:, None]).long()
    batch = read_batch({"input_ids": torch.ones_like(mask), "attention_mask": mask}, ragged=True)
    parts = by_length(batch, range(len(lengths)), 4, most)
    assert sorted(row for part, _ in parts for row in part) == list(range(len(lengths)))
    assert all(len(part) <= most and tokens == max(lengths[row] for row in part) for part, tokens in parts)
