"""Ways of calling a model, and of changing it in mid-run: what the cache has seen of one is not taken for another."""

from __future__ import annotations

from inspect import signature

import pytest
import torch
from conftest import tiny_bert
from test_cache import pad, ragged_data
from torch import nn
from transformers import (
    BertConfig,
    BertForTokenClassification,
    CLIPConfig,
    CLIPModel,
    GPT2Config,
    GPT2LMHeadModel,
)

from hf_unfreeze import FrozenPrefixCache, UnfreezeCallback, UnfreezeError, Unfreezer

pytestmark = pytest.mark.filterwarnings("ignore:schedule .* will not reach:UserWarning")
SIZES = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2, "num_hidden_layers": 3}
EPOCH = 6


def batches(length: int | None = 8) -> list[dict]:
    """An epoch of texts, of one length or of many."""
    rows = ragged_data()[: 4 * EPOCH]
    if length:
        texts = [(torch.arange(3, 3 + length) + index) % 50 for index in range(len(rows))]
        alike = [{"input_ids": ids, "attention_mask": torch.ones_like(ids)} for ids in texts]
        rows = [row | text for row, text in zip(rows, alike, strict=True)]
    return [pad(rows[first : first + 4]) for first in range(0, len(rows), 4)]


def trained(make, loss, cache, data, schedule):
    """Losses of three epochs, and what the model holds then."""
    torch.manual_seed(0)
    model = make().train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    unfreezer = Unfreezer(model, optimizer, schedule, cache=cache)
    losses = []
    for step in range(3 * len(data)):
        unfreezer.step(step)
        found = loss(model, data[step % len(data)], step)
        found.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(found.detach()))
    unfreezer.close()
    return losses, [*model.parameters(), *model.buffers()]


def assert_alike(make, loss=None, data=None, schedule="head@0", within=1e-10):
    """Train without a cache and with one, which is returned."""
    cache = FrozenPrefixCache()
    loss = loss or (lambda model, batch, step: model(**batch)["loss"])
    data = data or batches()
    (losses, held), (others, others_held) = (trained(make, loss, used, data, schedule) for used in (None, cache))
    assert others == pytest.approx(losses, rel=within, abs=within)
    for one, other in zip(held, others_held, strict=True):
        torch.testing.assert_close(other, one, rtol=within, atol=within)
    return cache


class Keeps(nn.TransformerEncoderLayer):
    """Keeps a number beside what it returns, as layers of experts keep the loss that balances them."""

    def forward(self, hidden):
        output = super().forward(hidden)
        self.aside = (output - hidden).square().mean(dim=(1, 2))
        return output


class Plain(nn.Module):
    """Embeddings, three blocks and a head; the root runs the blocks."""

    def __init__(self, kind: str = "") -> None:
        super().__init__()
        torch.manual_seed(0)
        self.kind = kind
        self.tokens, self.head = nn.Embedding(50, 16), nn.Linear(16, 3)
        block = Keeps if "aside" in kind else nn.TransformerEncoderLayer
        self.layers = nn.ModuleList(block(16, 2, 32, 0.0, batch_first=True) for _ in range(3))
        self.teacher = nn.Parameter(torch.zeros(16), requires_grad=False)
        self.register_buffer("shift", torch.zeros(16))
        self.register_buffer("queue", torch.zeros(8, 16))
        self.double()

    def forward(self, input_ids, attention_mask=None, labels=None, skip=False):
        embedded = hidden = self.tokens(input_ids)
        if self.kind == "scaled by the head":
            hidden = hidden * self.head.bias.sum().exp()
        hidden = hidden + self.shift
        for layer in self.layers:
            hidden = layer(hidden)
        if skip or (self.kind == "more in eval mode" and not self.training):
            hidden = hidden + embedded
        if self.kind == "a momentum teacher":
            with torch.no_grad():
                self.teacher.lerp_(hidden.detach().mean((0, 1)), 0.1)
            hidden = hidden + self.teacher
        logits = self.head(hidden[:, 0])
        loss = nn.functional.cross_entropy(logits, labels) if labels is not None else logits.sum()
        if self.kind == "reads what is kept aside":
            loss = loss + 0.1 * sum(layer.aside.mean() for layer in self.layers)
        if self.kind.startswith("queue"):
            loss = loss + (logits[:, :1] * self.queue[:, 0].clone()).mean()
            with torch.no_grad():
                new = torch.cat([self.queue[4:], hidden[:, 0].detach()])
                self.queue = self.queue.copy_(new) if self.kind == "queue in place" else new
        return {"loss": loss, "logits": logits}


def with_a_flag_later(model, batch, step):
    return model(**batch, skip=step >= EPOCH + 2)["loss"]


def evaluates(model, batch, step):
    model.eval()
    with torch.no_grad():
        more = model(**batch)["loss"]
    model.train()
    return model(**batch)["loss"] + more


def first_without_a_graph(model, batch, step):
    with torch.no_grad():
        more = model(**batch)["loss"]
    return model(**batch)["loss"] + more


def edits_a_buffer(model, batch, step):
    if step == EPOCH + 2:
        model.shift.fill_(1.0)
    return model(**batch)["loss"]


def replaces_a_weight(model, batch, step):
    if step == EPOCH + 2:
        model.layers[0].linear1.weight = nn.Parameter(model.layers[0].linear1.weight * 1.5, requires_grad=False)
    return model(**batch)["loss"]


def runs_part_of_it_on_nothing(model, batch, step):
    return model(**batch)["loss"] + model(batch["input_ids"][:0])["logits"].sum()


def traces(model, batch, step):
    """As TensorBoard does to draw a graph."""
    if step == EPOCH:
        torch.jit.trace(model, batch["input_ids"], check_trace=False, strict=False)
    return model(**batch)["loss"]


def other_weights_for_a_call(model, batch, step):
    weights = {name: 1.5 * parameter for name, parameter in model.layers.named_parameters(prefix="layers")}
    other = torch.func.functional_call(model, weights, (), dict(batch)) if step >= EPOCH + 2 else None
    return model(**batch)["loss"] + (other["loss"].detach() if other else 0)


@pytest.mark.filterwarnings("ignore:frozen-prefix cache", "ignore:.*torch.jit.*deprecated:DeprecationWarning")
@pytest.mark.parametrize(
    ("kind", "loss", "reason"),
    [
        ("", with_a_flag_later, ""),
        ("more in eval mode", evaluates, ""),
        ("scaled by the head", first_without_a_graph, "head.bias is trainable and runs below"),
        ("", edits_a_buffer, ""),
        ("", replaces_a_weight, ""),
        ("", runs_part_of_it_on_nothing, ""),
        ("", traces, ""),
        ("", other_weights_for_a_call, ""),
        ("aside", None, ""),
        ("reads what is kept aside", None, "something besides the blocks"),
        ("a momentum teacher", None, "writes into its parameters"),
        ("queue in place", None, ""),
        ("queue replaced", None, ""),
    ],
)
def test_a_plain_model(kind, loss, reason):
    cache = assert_alike(lambda: Plain(kind), loss)
    assert reason in cache.active.off and (reason or cache.stats.hits >= 4)


class Grows(nn.TransformerEncoderLayer):
    """Keeps a table of positions as long as the longest text so far, which nobody else reads."""

    def __init__(self) -> None:
        super().__init__(16, 2, 32, 0.0, batch_first=True, dtype=torch.float64)
        self.register_buffer("table", torch.zeros(0, 1))

    def forward(self, hidden):
        if len(self.table) < hidden.shape[1]:
            self.table = torch.arange(hidden.shape[1])[:, None] / 10
        return super().forward(hidden + self.table)


def test_a_buffer_inside_of_what_is_passed_over():
    def make():
        model = Plain()
        model.layers = nn.ModuleList(Grows() for _ in range(3))
        return model

    cache = FrozenPrefixCache()
    losses = [trained(make, lambda m, b, step: m(**b)["loss"], used, batches(), "head@0")[0] for used in (None, cache)]
    assert losses[1] == pytest.approx(losses[0], rel=1e-10)
    assert cache.active.off == "" and cache.stats.hits


def test_ways_of_calling_have_an_end():
    model = Plain()
    unfreezer = Unfreezer(model, torch.optim.SGD(model.parameters(), lr=0.1), "head@0", cache="memory")
    unfreezer.step(0)
    with pytest.warns(UserWarning, match="called in more than 32 ways; such a forward runs in full"):
        for number in range(40):
            model(**batches()[0], skip=f"{number}")
    unfreezer.close()


def reads_the_padding(model, batch, step):
    found = model(**batch)
    return found.loss + found.logits.square().mean()


def reads_the_padding_without_a_loss(model, batch, step):
    return model(**batch).loss + model(batch["input_ids"], attention_mask=batch["attention_mask"]).logits.mean()


@pytest.mark.parametrize("loss", [reads_the_padding, reads_the_padding_without_a_loss])
def test_padding_that_a_loss_of_ones_own_reads(loss):
    data = batches(None)
    data = [b | {"labels": b["input_ids"].masked_fill(b["attention_mask"] == 0, -100)} for b in data]
    config = BertConfig(**SIZES, vocab_size=50, num_labels=50)
    cache = assert_alike(lambda: BertForTokenClassification(config).double(), loss, data)
    assert cache.active.off == "" and cache.stats.hits


@pytest.mark.filterwarnings("ignore:frozen-prefix cache")
def test_padding_that_a_trainer_of_ones_own_reads(make_trainer):
    config = BertConfig(**SIZES, vocab_size=50, num_labels=50)
    rows = [row | {"labels": row["input_ids"]} for row in ragged_data()]

    def collate(rows):
        batch = pad([row | {"labels": 0} for row in rows])
        return batch | {"labels": batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)}

    def run(cache):
        torch.manual_seed(0)
        model = BertForTokenClassification(config).double()
        trainer = make_trainer(UnfreezeCallback("head@0", cache=cache), model=model, optim="sgd")
        trainer.train_dataset, trainer.data_collator = rows, collate
        trainer.compute_loss = lambda model, inputs, **kwargs: reads_the_padding(model, inputs, 0)
        trainer.train()
        return [p.detach().clone() for p in model.parameters()]

    for one, other in zip(run(None), run("memory"), strict=True):
        torch.testing.assert_close(other, one, rtol=0, atol=1e-10)


class Reads(list):
    """A hook that keeps what a module inside of a frozen block returns."""

    def __call__(self, module, args, output):
        self[:] = [output.mean()]


@pytest.mark.parametrize("start", [0, EPOCH + 2])
def test_a_hook_inside_of_a_block_at_any_time(start):
    def loss(model, batch, step):
        if step == start:
            model.seen = Reads()
            model.bert.encoder.layer[1].intermediate.register_forward_hook(model.seen)
        found = model(**batch).loss
        return found + model.seen[0] if step >= start else found

    with pytest.warns(UserWarning, match="a forward hook on a frozen BertIntermediate would see what is passed over"):
        assert_alike(lambda: tiny_bert().double(), loss)


def clip():
    part = SIZES | {"num_hidden_layers": 2}
    text = part | {"vocab_size": 50, "eos_token_id": 2, "max_position_embeddings": 16}
    vision = part | {"image_size": 8, "patch_size": 4}
    return CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=8))  # no fp64 in transformers 4


@pytest.mark.parametrize("first", ["text", "image"])
def test_two_towers_called_one_by_one(first):
    pictures = torch.rand(4 * EPOCH, 3, 8, 8, generator=torch.Generator().manual_seed(0)).split(4)
    data = [batch | {"pixel_values": picture} for batch, picture in zip(batches(), pictures, strict=True)]

    def features(output):  # a tensor up to transformers 5.0
        return output if isinstance(output, torch.Tensor) else output.pooler_output

    def loss(model, batch, step):
        calls = {
            "text": lambda: features(model.get_text_features(batch["input_ids"])),
            "image": lambda: features(model.get_image_features(batch["pixel_values"])),
        }
        found = {name: calls[name]() for name in sorted(calls, reverse=first == "text")}
        return nn.functional.cross_entropy(found["text"] @ found["image"].T, torch.arange(4))

    cache = assert_alike(clip, loss, data, within=1e-5)
    assert cache.stats.hits == 2 * 2 * 4 * EPOCH


def gpt2():
    return GPT2LMHeadModel(GPT2Config(n_layer=3, n_embd=16, n_head=2, vocab_size=50)).double()


def in_two_parts(model, batch, step, **first):
    ids = batch["input_ids"]
    past = model(ids[:, :4], **first).past_key_values
    past = {"cache" if "cache" in signature(model.forward).parameters else "past_key_values": past}
    logits = model(ids[:, 4:], attention_mask=torch.ones_like(ids), **past).logits
    return nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 5:].flatten())


def test_keys_and_values_that_are_handed_on_in_training():
    def loss(model, batch, step):
        return in_two_parts(model, batch, step, use_cache=True)

    assert_alike(gpt2, loss, schedule="block[-1]@0")
    with pytest.raises(UnfreezeError, match="past_key_values lack those of the frozen blocks"):
        trained(gpt2, in_two_parts, "memory", batches(), "block[-1]@0")
