"""A loop of one's own goes on where another ended: what data decided and the weights kept are in its checkpoint too."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from conftest import hashes, tiny_bert, tiny_data
from transformers import default_data_collator

from hf_unfreeze import UnfreezeError, Unfreezer
from hf_unfreeze.unfreezer import Probe

pytestmark = pytest.mark.filterwarnings(
    "ignore:schedule .* will not reach:UserWarning", "ignore:.* measures on .* batches at each choice:UserWarning"
)
STEPS = 7
RUNS = {
    "gradual(every=2step)": {"layer_decay": 0.8, "block_warmup": "2step"},
    "head@0, block[-1]@2step, -head@4step": {"pull": 0.5},
    "plateau(eval_loss, patience=1, min_delta=0.5)": {},
    "plateau(eval_loss, patience=1, min_delta=0.5, stop=no_gain, restore_best=true)": {},
    "auto(gradient_change, every=2step, batches=2)": {},
    "auto(cka, every=3step, batches=2)": {},
    "freeze_converged(every=2step, batches=2, percentile=100)": {},
    "auto_rates(every=2step, batches=2)": {},
    "learn_rates(speed=0.3, start=0.5, every=2step, batches=2)": {},
}


@pytest.fixture(autouse=True)
def first_of_its_process():
    """Accelerate keeps the accumulation of an earlier test's Trainer for the whole process."""
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


QUICK = list(RUNS)[1], list(RUNS)[3], list(RUNS)[5]


def batches(count, first=0):
    return [default_data_collator(tiny_data()[(first + 2 * n) % 28 :][:2]) for n in range(count)]


def made(schedule, **options):
    """A loop's objects, prepared and registered."""
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    model = tiny_bert()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-2)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step % 3))
    model, optimizer, scheduler = accelerator.prepare(model, optimizer, scheduler)
    probe = Probe(lambda model, batch: model(**batch).loss, batches, lambda count: batches(count, 14), per_step=2)
    unfreezer = Unfreezer(model, optimizer, schedule, total_steps=STEPS, probe=probe, **options)
    accelerator.register_for_checkpointing(unfreezer)
    return accelerator, model, optimizer, scheduler, unfreezer


def train(folder, schedule, begin=0, source=None, saves=(), **options):
    """Train from a checkpoint or the start, and leave a checkpoint after some steps."""
    accelerator, model, optimizer, scheduler, unfreezer = made(schedule, **options)
    torch.manual_seed(0)
    if source:
        accelerator.load_state(str(source / f"after-{begin}"))
    for step in range(begin, STEPS):
        unfreezer.step(step)
        model.train()
        for batch in batches(2, 4 * step):
            with accelerator.accumulate(model):
                accelerator.backward(model(**batch).loss)
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                scheduler.step()
                optimizer.zero_grad()
        model.eval()
        with torch.no_grad():
            unfreezer.observe({"eval_loss": float(model(**batches(1, 14)[0]).loss), "eval_name": "text"})
        if step + 1 in saves:
            accelerator.save_state(str(folder / f"after-{step + 1}"))
    phases = unfreezer.phases
    unfreezer.close()
    return hashes(model), phases


@pytest.mark.parametrize(
    "schedule", [pytest.param(spec, marks=[] if spec in QUICK else [pytest.mark.slow]) for spec in RUNS]
)
def test_a_loop_resumed_and_resumed_again_decides_and_ends_the_same(tmp_path, schedule):
    first, second = tmp_path / "first", tmp_path / "second"
    whole = train(first, schedule, saves=(1, 2, 3), **RUNS[schedule])
    assert len(whole[1]) > 1
    for step in (1, 2, 3):
        again = train(second, schedule, step, first, saves=(5,) if step == 3 else (), **RUNS[schedule])
        assert again == whole, f"resumed at step {step}"
    assert train(second, schedule, 5, second, **RUNS[schedule]) == whole


def test_a_state_saved_right_after_loading_is_the_one_that_was_loaded(tmp_path):
    whole = train(tmp_path, "all_at_once", saves=(3,), pull=0.1)
    accelerator, *_, unfreezer = made("all_at_once", pull=0.1)
    accelerator.load_state(str(tmp_path / "after-3"))
    accelerator.save_state(str(tmp_path / "again" / "after-3"))
    unfreezer.close()
    assert train(tmp_path, "all_at_once", 3, tmp_path / "again", pull=0.1) == whole


def test_an_evaluation_before_the_first_step_is_not_of_its_weights():
    *_, unfreezer = made("plateau(eval_loss, patience=1)")
    unfreezer.observe({"eval_loss": 1.0})
    unfreezer.step(0)
    unfreezer.observe({"eval_loss": 2.0})
    assert [record["step"] for record in unfreezer.state_dict()["records"] if "eval_loss" in record] == [0, 1]
    unfreezer.close()


def test_only_what_data_decides_is_remembered():
    *_, unfreezer = made("rotate(blocks=1, every=1step)")
    for step in range(STEPS):
        unfreezer.step(step)
    assert unfreezer.state_dict() == {
        "schedule": str(unfreezer.schedule), "step": STEPS, "records": [], "weights": {}
    }  # fmt: skip
    unfreezer.load_state_dict(unfreezer.state_dict())  # a schedule of set times may go back at any moment
    unfreezer.close()


def test_the_state_is_plain():
    *_, unfreezer = made("auto(cka, every=1step, batches=2)")
    for step in range(3):
        unfreezer.step(step)
    state = copy.deepcopy(unfreezer.state_dict())
    weights = state.pop("weights")
    assert json.loads(json.dumps(state)) == state
    assert all(isinstance(w, torch.Tensor) for kept in weights.values() for w in kept.values())
    unfreezer.close()


@pytest.mark.parametrize(
    ("schedule", "options", "lost"),
    [("plateau(eval_loss)", {}, "what it decided"), ("all_at_once", {"pull": 0.1}, "the weights to return to")],
)
def test_a_run_of_which_nothing_is_known_is_refused_in_the_middle(schedule, options, lost):
    *_, unfreezer = made(schedule, **options)
    with pytest.raises(UnfreezeError, match=f"begins at step 3, and {lost} .*register_for_checkpointing"):
        unfreezer.step(3)
    unfreezer.step(0)
    with pytest.raises(UnfreezeError, match="comes before the first step"):
        unfreezer.load_state_dict(unfreezer.state_dict())
    unfreezer.close()


def test_a_state_of_another_schedule_or_without_weights_is_told():
    *_, first = made("head@0, all@2step")
    first.step(0)
    *_, other = made("head@0, all@3step")
    with pytest.warns(UserWarning, match="saved by another schedule, 'head@0, all@2step'. .*'head@0, all@3step'"):
        other.load_state_dict(first.state_dict())
    *_, pulled = made("head@0, all@2step", pull=0.1)
    with pytest.raises(UnfreezeError, match=r"the state of step 1 has no unfreeze_anchors.safetensors.*Write pull=0"):
        pulled.load_state_dict(first.state_dict())
    for unfreezer in (first, other, pulled):
        unfreezer.close()
