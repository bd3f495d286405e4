"""What decides an activation although no key shows it: the cache sees it, or is off, and training is as without it."""

from __future__ import annotations

import random

import pytest
import torch
from conftest import EXAMPLES, tiny_bert, tiny_data
from test_cache import DOWN, SGD, assert_close_weights, batch_of, both, by_hand, pad, ragged_data
from torch import nn
from transformers import BertForTokenClassification, LlamaConfig, LlamaForSequenceClassification, Trainer

from hf_unfreeze import FrozenPrefixCache, UnfreezeCallback, UnfreezeError

pytestmark = pytest.mark.filterwarnings("ignore:schedule .* will not reach:UserWarning")


class Stack(nn.Module):
    """Embeddings, four blocks and a head, with what a kind of model adds to them."""

    def __init__(self, kind: str = "") -> None:
        super().__init__()
        torch.manual_seed(0)
        self.kind = kind
        self.tokens, self.head = nn.Embedding(50, 16), nn.Linear(16, 3)
        first = kind != "sequence first"
        self.layers = nn.ModuleList(nn.TransformerEncoderLayer(16, 2, 32, 0.0, batch_first=first) for _ in range(4))

    def forward(self, input_ids, attention_mask=None, labels=None):
        hidden = embedded = self.tokens(input_ids)
        below = None
        for index, layer in enumerate(self.layers):
            if self.kind == "the embeddings before each block":
                hidden = hidden + 0.1 * embedded
            if self.kind == "a skip" and index == 2:
                hidden = hidden + below
            if self.kind == "writes into its input" and index:
                hidden = hidden.mul_(1.5) if not hidden.requires_grad else hidden * 1.5
            hidden = layer(hidden)
            below = hidden if index == 0 else below
        logits = self.head(hidden[:, 0])
        return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}


@pytest.mark.filterwarnings("ignore:frozen-prefix cache")
@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("", ""),
        ("the embeddings before each block", ""),
        ("a skip", "something besides the blocks above them"),
        ("writes into its input", ""),
        ("sequence first", "depends on the others of its batch"),
    ],
)
def test_what_a_block_that_opens_reads_is_noticed(make_trainer, kind, reason):
    """Four tokens in batches of four, where examples and tokens could be taken for each other."""
    data = [{"input_ids": row["input_ids"][:4], "labels": row["labels"]} for row in tiny_data()]
    plain, cached, cache = both(make_trainer, DOWN, model=lambda: Stack(kind).double(), data=data, **SGD)
    assert_close_weights(plain, cached)
    assert reason in cache.active.off and (bool(reason) or cache.stats.hits > EXAMPLES)


class IgnoresItsMask(nn.Module):
    """What stands in the padding changes the rest."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.head = tiny_bert().bert.double(), nn.Linear(16, 3).double()
        own = self.encoder.forward
        self.encoder.forward = lambda input_ids, attention_mask=None: own(input_ids)

    def forward(self, input_ids, attention_mask=None, labels=None):
        hidden = self.encoder(input_ids, attention_mask=attention_mask)[0]
        logits = self.head(hidden[:, 0])
        return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}


class SumsEverything(Trainer):
    """Its loss is made of what the model returns for every token, padding included."""

    def compute_loss(self, model, inputs, **kwargs):
        inputs.pop("labels")
        return model(**inputs).logits.square().mean()


def tokens():
    torch.manual_seed(0)
    return BertForTokenClassification(tiny_bert().config).double()


@pytest.mark.parametrize(("model", "kind"), [(IgnoresItsMask, Trainer), (tokens, SumsEverything)])
def test_padding_stays_where_it_makes_a_difference(make_trainer, model, kind):
    trainers = []
    for cache in (None, FrozenPrefixCache()):
        trainer = make_trainer(UnfreezeCallback("head@0", cache=cache), model=model(), **SGD)
        trainer.__class__ = kind
        trainer.train_dataset, trainer.data_collator = ragged_data(), pad
        trainer.train()
        trainers.append(trainer)
    assert_close_weights(*trainers)


@pytest.mark.parametrize(("kind", "reason"), [("dynamic", "the longest text so far"), ("longrope", "")])
def test_positions_that_go_by_the_length_of_the_batch(make_trainer, kind, reason):
    rope = {"rope_type": kind, "factor": 4.0, "rope_theta": 10000.0}
    if kind == "longrope":
        rope |= {"short_factor": [1.0] * 4, "long_factor": [4.0] * 4, "original_max_position_embeddings": 6}
    config = LlamaConfig(vocab_size=50, hidden_size=16, intermediate_size=32, num_attention_heads=2, num_labels=3,
                         num_hidden_layers=3, pad_token_id=0, max_position_embeddings=6, rope_parameters=rope,
                         original_max_position_embeddings=6, rope_scaling=rope)  # fmt: skip

    def model():
        torch.manual_seed(0)
        return LlamaForSequenceClassification(config).double()

    arguments = {"data": ragged_data(), "collator": pad, **SGD}
    if reason:
        with pytest.warns(UserWarning, match=reason):
            plain, cached, _ = both(make_trainer, "head@0, block[-1]@0", model=model, **arguments)
    else:
        plain, cached, _ = both(make_trainer, "head@0, block[-1]@0", model=model, **arguments)
    assert_close_weights(plain, cached)


def test_autocast_is_no_other_example():
    """Rounding to half precision depends on the shape of a batch, which is no reason to switch off."""
    model, cache = tiny_bert(), FrozenPrefixCache()
    unfreezer = by_hand(model, cache)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        for _ in range(3):
            model(**batch_of(0, 1, 2))
    unfreezer.close()
    assert cache.active.off == "" and cache.stats.hits > 2


class Masks:
    """Masks a token of each example, by a generator of its own or by the one of the process."""

    def __init__(self, own: bool) -> None:
        self.draw = random.Random(0) if own else random

    def __call__(self, rows):
        batch = pad(rows)
        for row in batch["input_ids"]:
            row[self.draw.randrange(2)] = 3
        return batch


@pytest.mark.parametrize("own", [True, False])
def test_a_generator_of_the_collator_draws_what_it_draws_without(make_trainer, own):
    trainers = []
    for cache in (None, FrozenPrefixCache()):
        random.seed(0)
        trainer = make_trainer(UnfreezeCallback("head@0", cache=cache), model=tiny_bert().double(), **SGD)
        trainer.train_dataset, trainer.data_collator = ragged_data(), Masks(own)
        trainer.train()
        trainers.append(trainer)
    assert_close_weights(*trainers)


def whole_pairs(rows):
    if len(rows) % 2:
        raise AssertionError(f"{len(rows)} examples are no pairs")
    return pad(rows)


def test_filling_ahead_keeps_to_whole_batches(make_trainer):
    arguments = {"data": ragged_data()[:27], "collator": whole_pairs, "dataloader_drop_last": True, **SGD}
    plain, cached, cache = both(make_trainer, "head@0", model=lambda: tiny_bert().double(), **arguments)
    assert_close_weights(plain, cached)
    assert cache.stats.hits > EXAMPLES


class BesideATower(nn.Module):
    """A batch norm with weights runs before the text model, on as many examples."""

    def __init__(self) -> None:
        super().__init__()
        self.tower, self.text = nn.BatchNorm1d(1), tiny_bert()
        self.config = self.text.config

    def forward(self, input_ids, attention_mask=None, labels=None):
        size = self.tower(input_ids.to(self.tower.weight.dtype).mean(dim=1, keepdim=True)).mean()
        output = self.text(input_ids, attention_mask=attention_mask, labels=labels)
        return {"loss": output.loss + 0.1 * size, "logits": output.logits}


def test_what_runs_before_the_host_gets_no_thousand_examples(make_trainer):
    arguments = {"data": ragged_data(), "collator": pad, **SGD}
    plain, cached, _ = both(make_trainer, "block[-1]@0, head@0", model=lambda: BesideATower().double(), **arguments)
    assert_close_weights(plain, cached)
    torch.testing.assert_close(plain.model.tower.running_mean, cached.model.tower.running_mean)


def test_adapters_that_are_switched_off_for_a_while():
    import peft

    quiet = tiny_bert(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0).double()
    lora = peft.LoraConfig(task_type="SEQ_CLS", target_modules=["query"], init_lora_weights=False)
    model = peft.get_peft_model(quiet, lora)
    unfreezer = by_hand(model, FrozenPrefixCache(), "head@0")
    for _ in range(3):
        adapted = model(**batch_of(0, 1)).logits
    for module in model.modules():
        if hasattr(module, "disable_adapters"):
            module._disable_adapters = True
    bare = model(**batch_of(0, 1)).logits
    unfreezer.close()
    assert not torch.allclose(bare, adapted)
    torch.testing.assert_close(bare, model(**batch_of(0, 1)).logits)


def test_weights_written_past_their_version_are_seen_at_the_next_evaluation():
    model = tiny_bert(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0).double()
    unfreezer = by_hand(model, FrozenPrefixCache())
    for _ in range(3):
        model(**batch_of(0, 1))
    for parameter in model.bert.encoder.layer[1].parameters():
        parameter.data.mul_(1.5)
    model.eval()
    seen = model(**batch_of(0, 1)).logits
    unfreezer.close()
    torch.testing.assert_close(seen, model.eval()(**batch_of(0, 1)).logits, rtol=0, atol=1e-10)


def test_a_frozen_block_that_somebody_opens_is_told():
    model = tiny_bert()
    unfreezer = by_hand(model, FrozenPrefixCache())
    for _ in range(2):
        model(**batch_of(0, 1))
    model.bert.encoder.layer[2].requires_grad_(True)
    with pytest.raises(UnfreezeError, match="was made trainable by something else than the schedule"):
        model(**batch_of(0, 1))
    unfreezer.close()


def test_what_is_stored_has_to_be_what_the_check_computes(make_trainer, tmp_path):
    """The code of the model has changed since the file was written, in a way that nothing tells."""
    make_trainer(UnfreezeCallback("head@0", cache=f"disk:{tmp_path}")).train()
    model = tiny_bert()
    own = model.bert.encoder.layer[0].intermediate.forward
    model.bert.encoder.layer[0].intermediate.forward = lambda hidden: own(hidden) * 20
    trainer = make_trainer(UnfreezeCallback("head@0", cache=f"disk:{tmp_path}"), model=model)
    with pytest.raises(UnfreezeError, match=r"is off by .* when it is computed again"):
        trainer.train()
