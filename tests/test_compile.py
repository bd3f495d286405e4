"""torch.compile: the weights of an eager run, one graph per phase, never past the limit."""

from __future__ import annotations

import pytest
import torch
from conftest import DEVICE, hashes, tiny_bert, tiny_data
from torch import _dynamo as dynamo

from hf_unfreeze import UnfreezeCallback, Unfreezer

pytestmark = pytest.mark.filterwarnings("ignore:`gradient_checkpointing:FutureWarning")  # the name both versions know
LIMITS = [name for name in ("recompile_limit", "accumulated_recompile_limit", "cache_size_limit",
                            "accumulated_cache_size_limit") if hasattr(dynamo.config, name)]  # fmt: skip


@pytest.fixture(autouse=True)
def fresh():
    """No graphs of other tests, an error where torch would go on uncompiled, and the limits as they were."""
    dynamo.reset()
    dynamo.utils.counters.clear()
    before = [getattr(dynamo.config, name) for name in LIMITS]
    with dynamo.config.patch(fail_on_recompile_limit_hit=True):
        yield
    assert [getattr(dynamo.config, name) for name in LIMITS] == before
    dynamo.reset()


def graphs():
    return dynamo.utils.counters["stats"]["unique_graphs"]


def bert(blocks, **config):
    kind = {"problem_type": "single_label_classification"}  # else set in the forward
    return tiny_bert(num_hidden_layers=blocks, **kind, **config)


def run(make_trainer, blocks, schedule, model=None, **arguments):
    callback = UnfreezeCallback(schedule, layer_decay=0.9)
    trainer = make_trainer(callback, model=model or bert(blocks), **arguments)
    trainer.train()
    return trainer


def compiled(backend):
    return {"torch_compile": True, "torch_compile_backend": backend}


@pytest.mark.slow
@pytest.mark.parametrize("extra", [
    {},
    {"eval_strategy": "steps", "eval_steps": 1},
    {"gradient_accumulation_steps": 3},
], ids=["plain", "evaluation", "accumulation"])  # fmt: skip
def test_equals_eager_with_one_graph_per_phase(make_trainer, extra):
    schedule = "head@0, block[-1]@2step, all@4step, -block[1]@6step"
    with dynamo.config.patch({LIMITS[0]: 1}):
        trainer = run(make_trainer, 2, schedule, **compiled("eager"), **extra)
    assert graphs() == 4
    assert hashes(trainer.model) == hashes(run(make_trainer, 2, schedule, **extra).model)
    assert graphs() == 4


@pytest.mark.slow
def test_a_second_run_and_another_model_have_room(make_trainer):
    with dynamo.config.patch({LIMITS[0]: 2}):
        first = run(make_trainer, 2, "gradual(every=2step)", **compiled("eager"))
        first.train()
        second = run(make_trainer, 2, "gradual(every=2step)", **compiled("eager"))
    assert graphs() == 3 * 4
    assert set(hashes(first.model)) == set(hashes(second.model))


@pytest.mark.slow
def test_gradient_checkpointing_under_compile(make_trainer):
    arguments = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}}
    schedule, dropout = "head@0, block[-1]@2step, all@4step", {}
    if DEVICE == "cuda":  # a compiled block that is computed again draws other masks there, without callback too
        dropout = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    plain = run(make_trainer, 2, schedule, bert(2, **dropout).double())
    both = run(make_trainer, 2, schedule, bert(2, **dropout).double(), **compiled("aot_eager"), **arguments)
    assert graphs() == 3
    assert hashes(both.model) == hashes(plain.model)


@pytest.mark.slow
def test_compiled_in_a_loop_of_ones_own():
    weights = []
    for compiles in (False, True):
        model = bert(1)
        forward = torch.compile(model, backend="eager") if compiles else model
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        unfreezer = Unfreezer(forward, optimizer, "gradual(every=1step)")
        batch = {key: torch.stack([torch.as_tensor(e[key]) for e in tiny_data()[:4]]) for key in tiny_data()[0]}
        torch.manual_seed(0)
        for step in range(3):
            unfreezer.step(step)
            forward.train()
            forward(**batch).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        unfreezer.close()
        weights.append(hashes(model))
    assert graphs() == 3
    assert weights[0] == weights[1]


@pytest.mark.slow
def test_twelve_blocks_one_by_one(make_trainer):
    trainer = run(make_trainer, 12, "gradual(every=1step)", max_steps=14, **compiled("eager"))
    assert graphs() == 14
    assert hashes(trainer.model) == hashes(run(make_trainer, 12, "gradual(every=1step)", max_steps=14).model)
