"""Rates set by what is measured: the rule, that it follows the validation loss, the log, and exact resumes."""

from __future__ import annotations

import math

import pytest
import torch
from conftest import hashes, tiny_bert, tiny_data
from hypothesis import given, settings
from hypothesis import strategies as st
from test_converged import Told as Worths
from test_rates import rates
from test_schedule import single
from transformers import default_data_collator

from hf_unfreeze import UnfreezeCallback, UnfreezeError, auto_rates, layer_groups, learn_rates, parse_schedule
from hf_unfreeze import criteria as module
from hf_unfreeze._learnt import Learnt
from hf_unfreeze._probe import Probe, Prober
from hf_unfreeze.criteria import register_criterion
from hf_unfreeze.errors import ScheduleError

pytestmark = pytest.mark.filterwarnings("ignore:.* measures on .* batches at each choice:UserWarning")
GROUPS = single(2)
LEARNT = "learn_rates(speed=0.3, start=0.5, every=3step, batches=2)"


class Told(Worths):
    name = "told"

    def __call__(self, names):
        return dict(zip(names, self.worths.pop(0), strict=True))


@pytest.fixture(autouse=True)
def own_criteria(monkeypatch):
    monkeypatch.setattr(module, "_CRITERIA", dict(module._CRITERIA))
    register_criterion("equal", lambda evidence: 0.3)


def decided(spec, *worths, until=100):
    """Step → factor of each group at each change; 0 is frozen."""
    decisions = Learnt(parse_schedule(spec), GROUPS, Told(*worths), (100, 10))
    for step in range(until):
        decisions.advance(step)
    return {
        phase.start: [dict(phase.rates).get(g.name, float(g.name in phase.trainable)) for g in GROUPS]
        for phase in decisions.phases
    }


def run(make_trainer, spec, resume=None, cache=None, **arguments):
    trainer = make_trainer(
        UnfreezeCallback(spec, cache=cache), **({"max_steps": 9, "lr_scheduler_type": "constant"} | arguments)
    )
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def test_the_spec_is_the_function():
    assert auto_rates("fisher", "20%", 4) == parse_schedule("auto_rates(fisher, batches=4, every=20%)")
    assert learn_rates(2, 0.1, "1ep") == parse_schedule("learn_rates(every=1ep, start=0.1, speed=2)")
    for text in ("learn_rates(start=1.1)", "learn_rates(start=0)", "learn_rates(speed=0)", "auto_rates(every=0)"):
        with pytest.raises(ScheduleError, match=r"more than 0|above 1"):
            parse_schedule(text)


@settings(max_examples=50)
@given(st.floats(0.001, 9), st.floats(0.001, 1), st.integers(1, 99), st.integers(1, 99))
def test_round_trip(speed, start, every, batches):
    for schedule in (learn_rates(speed, start, f"{every}%", batches), auto_rates("cka", f"{every}step", batches)):
        assert parse_schedule(str(schedule)) == schedule and hash(parse_schedule(str(schedule))) == hash(schedule)


def test_factors_are_shares_of_the_largest_worth():
    assert decided("auto_rates(every=40%)", [1, 2, 4, 3], [-1, 0, math.nan, 2], [math.nan] * 4) == {
        0: [0.25, 0.5, 1, 0.75],
        40: [0, 0, 1, 1],  # what has no worth is frozen, NaN leaves a factor as it was
    }
    assert decided("auto_rates(every=60%)", [0, 0, 0, 0], [1, 1, 1, 2]) == {0: [1] * 4, 60: [0.5, 0.5, 0.5, 1]}


def test_factors_move_with_the_agreement_and_stay_between_0_and_1():
    assert decided("learn_rates(speed=0.5, start=0.5, every=25%)", [1, -1, 0.5], [1, 0.25, math.nan], [-1, 1, 1]) == {
        0: [0.5, 0.5, 0.5, 1],
        25: [1, 0, 0.75, 1],
        50: [1, 0.125, 0.75, 1],  # what was frozen opens again
        75: [0.5, 0.625, 1, 1],
    }
    assert decided("learn_rates(every=50%)", [1, 1, 1]) == {0: [1] * 4}, "nothing changes, no phase begins"
    assert decided("learn_rates(speed=1, every=50%)", [-1, -1, -1]) == {0: [1] * 4, 50: [0, 0, 0, 1]}


@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.AdamW])
def test_the_agreement_is_what_a_step_of_the_group_does_to_the_validation_loss(optimizer):
    model = tiny_bert().double().eval()
    train, held_out = (default_data_collator(tiny_data(seed)[:8]) for seed in (0, 1))
    probe = Probe(lambda model, batch: model(**batch).loss, lambda n: [train], lambda n: [held_out], 1)
    named = dict(model.named_parameters())
    members = {group.name: {name: named[name] for name in group.parameter_names} for group in layer_groups(model)}
    found = Prober(model, members, optimizer(model.parameters()), learn_rates(), probe, 1000)([*members])
    validation, gradients = (
        dict(zip(named, torch.autograd.grad(model(**batch).loss, [*named.values()]), strict=True))
        for batch in (held_out, train)
    )
    for name, parameters in members.items():
        adam = optimizer is torch.optim.AdamW
        step = {n: g / (g.abs() + 1e-8) if adam else g for n, g in gradients.items() if n in parameters}
        sizes = [math.sqrt(sum(float(t.square().sum()) for t in ts)) for ts in
                 (step.values(), [validation[n] for n in step])]  # fmt: skip
        losses, small = [], 1e-5 / sizes[0]
        for sign in (-1, 1):
            with torch.no_grad():
                for n, direction in step.items():
                    named[n].add_(direction, alpha=sign * small)
                losses.append(float(model(**held_out).loss))
                for n, direction in step.items():
                    named[n].sub_(direction, alpha=sign * small)
        gained = (losses[1] - losses[0]) / (2 * small)  # lowered by a step of that length
        assert found[name] == pytest.approx(gained / (sizes[0] * sizes[1]), abs=2e-3), name
    assert len({round(value, 3) for value in found.values()}) > 3


def test_a_run_at_rates_by_worth(make_trainer):
    trainer = run(make_trainer, "auto_rates(every=4step, batches=2)")
    history = trainer.state.log_history
    worths = {r["step"]: r["unfreeze/worth"] for r in history if "unfreeze/worth" in r}
    assert set(worths) == {0, 4, 8}
    for step, groups in rates(trainer).items():
        worth = worths[step // 4 * 4]
        assert groups == {name: pytest.approx(1e-2 * worth[name] / max(worth.values())) for name in worth}
    reasons = [r["unfreeze/reason"] for r in history if "unfreeze/phase" in r]
    assert len(reasons) == 3 and all(r.startswith("relative_gradient_norm: from ") for r in reasons)


def test_a_run_that_learns_its_rates(make_trainer):
    trainer = run(make_trainer, LEARNT)
    worths = {r["step"]: r["unfreeze/worth"] for r in trainer.state.log_history if "unfreeze/worth" in r}
    assert set(worths) == {3, 6} and "head" not in worths[3]
    factors = dict.fromkeys(worths[3], 0.5)
    for step, groups in rates(trainer).items():
        for name, agreement in worths.get(step, {}).items():
            assert -1 <= agreement <= 1
            factors[name] = min(1.0, max(0.0, factors[name] + 0.3 * agreement))
        assert groups == {name: pytest.approx(1e-2 * factor) for name, factor in (factors | {"head": 1.0}).items()}
    assert len(set(factors.values())) > 1


def test_measuring_leaves_no_trace(make_trainer):
    measured, plain = (run(make_trainer, spec) for spec in ("auto_rates(equal, every=2step)", "all_at_once"))
    assert hashes(measured.model) == hashes(plain.model)


@pytest.mark.parametrize("spec", ["auto_rates(gradient_change, every=3step, batches=2)", LEARNT])
def test_resume_is_exact_at_and_after_a_measurement(make_trainer, tmp_path, spec):
    whole = run(make_trainer, spec, save_strategy="steps", save_steps=1)
    for step in (1, 3, 4):
        again = run(
            make_trainer, spec, str(tmp_path / "run" / f"checkpoint-{step}"), output_dir=str(tmp_path / "again")
        )
        assert hashes(again.model) == hashes(whole.model), step
        kept = [[r for r in trainer.state.log_history if "train_runtime" not in r] for trainer in (whole, again)]
        assert kept[0] == kept[1], step


def test_what_it_cannot_do_is_refused(make_trainer):
    with pytest.raises(UnfreezeError, match="measures inside frozen blocks"):
        run(make_trainer, LEARNT, cache="memory")
    trainer = make_trainer(UnfreezeCallback(LEARNT), max_steps=1)
    trainer.eval_dataset = None
    with pytest.raises(ScheduleError, match="needs validation data"):
        trainer.train()
