"""Frozen blocks in half precision: only they, near the exact run, and the cache knows of it."""

from __future__ import annotations

import pytest
import torch
from conftest import hashes, tiny_bert

from hf_unfreeze import FrozenPrefixCache, UnfreezeCallback, UnfreezeError, Unfreezer

SCHEDULE = "block[-1]@0, head@0, block[-2:]@2ep"


def dtypes_of_products(model):
    """What the first product of each block computes in, call by call."""
    seen = {index: [] for index in range(len(model.bert.encoder.layer))}
    for index, block in enumerate(model.bert.encoder.layer):
        block.attention.self.query.register_forward_hook(
            lambda module, args, output, index=index: seen[index].append(output.dtype)
        )
    return seen


def test_only_frozen_blocks_compute_in_it_and_hand_on_the_models_dtype(make_trainer):
    model = tiny_bert()
    seen = dtypes_of_products(model)
    between = []
    model.bert.encoder.layer[3].register_forward_pre_hook(lambda module, args: between.append(args[0].dtype))
    make_trainer(UnfreezeCallback(SCHEDULE, prefix_dtype="bfloat16"), model=model).train()
    first, last = seen[0][0], seen[2][-1]
    assert set(seen[0]) == set(seen[1]) == {torch.bfloat16} == {first}
    assert seen[2] == [torch.bfloat16] * 14 + [torch.float32] * 7 and last == torch.float32
    assert set(seen[3]) == set(between) == {torch.float32}
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    model.cpu()(input_ids=torch.tensor([[1, 2]]))
    assert seen[0][-1] == torch.float32, "after training the model is as it was"


def test_the_run_stays_near_the_exact_one_and_is_another(make_trainer):
    ends = []
    for dtype in (None, "bfloat16"):
        trainer = make_trainer(UnfreezeCallback(SCHEDULE, prefix_dtype=dtype), optim="sgd", learning_rate=0.1)
        trainer.train()
        ends.append(trainer.model)
    assert hashes(ends[0]) != hashes(ends[1])
    for one, other in zip(ends[0].parameters(), ends[1].parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=5e-3)


def test_cached_activations_are_those_of_that_precision(make_trainer, monkeypatch):
    """One store serves both precisions, each with its own entries; the self-check allows for the rounding."""
    monkeypatch.setattr("hf_unfreeze._activations.CHECK_EVERY", 1)
    cache = FrozenPrefixCache()
    ends = []
    for dtype, used in (("bfloat16", None), (None, cache), ("bfloat16", cache)):
        cache.stats.misses = 0
        trainer = make_trainer(UnfreezeCallback("head@0", prefix_dtype=dtype, cache=used))
        trainer.train()
        ends.append(hashes(trainer.model))
    assert cache.stats.misses == len(trainer.train_dataset)
    assert ends[0] == ends[2] != ends[1]


def test_what_cannot_be_is_refused():
    model = torch.nn.Linear(2, 2)
    with pytest.raises(UnfreezeError, match=r"prefix_dtype='bf16': write bfloat16 or float16, or None"):
        UnfreezeCallback("head@0", prefix_dtype="bf16")
    with pytest.raises(UnfreezeError, match=r"no stack of blocks.*Write prefix_dtype=None"):
        Unfreezer(model, torch.optim.SGD(model.parameters()), "all_at_once", prefix_dtype="bfloat16")
