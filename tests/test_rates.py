"""Rates that change over the run: FreezeOut's cosines and a layer decay that moves, by formula, and resumed exactly."""

from __future__ import annotations

import math
from fractions import Fraction

import pytest
import torch
from conftest import DEVICE, EXAMPLES, hashes, tiny_bert
from hypothesis import given, settings
from hypothesis import strategies as st
from test_cache import assert_close_weights
from test_schedule import plan, single, towers
from transformers import EarlyStoppingCallback, HfArgumentParser

from hf_unfreeze import (
    Schedule,
    UnfreezeArguments,
    UnfreezeCallback,
    UnfreezeError,
    Unfreezer,
    freeze_out,
    layer_groups,
    parse_schedule,
)
from hf_unfreeze._plan import plan_rows
from hf_unfreeze.errors import ScheduleError

LEVELS = [["embeddings", "block[0]"], ["block[1]"], ["block[2]"], ["block[3]"], ["head"]]


def run(make_trainer, spec, resume=None, cache=None, layer_decay=1.0, **arguments):
    callback = UnfreezeCallback(spec, cache=cache, layer_decay=layer_decay)
    trainer = make_trainer(callback, **({"max_steps": 10, "lr_scheduler_type": "constant"} | arguments))
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def rates(trainer):
    """Step → group → the rate that it got in that step, steps from 0."""
    logs = [record for record in trainer.state.log_history if "loss" in record]
    return {r["step"] - 1: {key[3:]: r[key] for key in r if key.startswith("lr/")} for r in logs}


def test_the_spec_is_the_function():
    assert (
        freeze_out() == parse_schedule("freeze_out") and str(freeze_out()) == "freeze_out(0.8, cubed=true, scaled=true)"
    )
    assert freeze_out(0.5, False, False) == parse_schedule("freeze_out(first=0.5, scaled=false, cubed=false)")


def test_shares_of_the_run_by_hand():
    assert plan("freeze_out(0.5, cubed=false)", total_steps=80) == [
        (0, "all"), (40, "block[1:4], head"), (50, "block[2:4], head"), (60, "block[3], head"), (70, "head"),
    ]  # fmt: skip
    assert [start for start, _ in plan("freeze_out", total_steps=1000)] == [0, 512, 615, 729, 858]
    assert plan("freeze_out(1)") == [(0, "all")], "nothing freezes at the very end"
    assert plan("freeze_out(0.5, cubed=false)", towers(2, 1), 90) == [
        (0, "all"), (45, "encoder.block[1], decoder.block[0], head"), (60, "decoder.block[0], head"), (75, "head"),
    ]  # fmt: skip
    assert plan("freeze_out(0.5, cubed=false)", single(2)[:-1], 10) == [(0, "all"), (5, "block[1]")]


@settings(max_examples=50)
@given(st.floats(0.1, 1), st.booleans(), st.booleans(), st.integers(1, 12), st.integers(1, 400))
def test_every_level_freezes_in_its_turn_at_its_share(first, cubed, scaled, blocks, total):
    schedule = freeze_out(first, cubed, scaled)
    assert parse_schedule(str(schedule)) == schedule and hash(parse_schedule(str(schedule))) == hash(schedule)
    phases, annealed = schedule.phases(single(blocks), total), schedule.annealed(single(blocks))
    assert annealed["embeddings"] == annealed["block[0]"] and annealed["head"] == (1.0, 1)
    shares = [annealed[f"block[{i}]"][1] for i in range(blocks)]
    assert shares == sorted(shares) and shares[0] == Fraction(str(first)) ** (3 if cubed else 1)
    for phase in phases:
        frozen = [share for i, share in enumerate(shares) if f"block[{i}]" not in phase.trainable]
        assert frozen == [share for share in shares if share * total <= phase.start]


@pytest.mark.parametrize("scaled", [True, False])
def test_rates_are_the_papers(make_trainer, scaled):
    trainer = run(make_trainer, f"freeze_out(0.5, scaled={str(scaled).lower()})", layer_decay=0.9)
    seen = rates(trainer)
    assert set(seen) == set(range(10))
    decay = {"embeddings": 0.9**5} | {f"block[{i}]": 0.9 ** (4 - i) for i in range(4)} | {"head": 1.0}
    for level, names in enumerate(LEVELS):
        share = (0.5 + 0.5 * level / 4) ** 3
        for step, name in ((step, name) for step in seen for name in names):
            full = 1e-2 * decay[name] / (share if scaled else 1)
            expected = full * 0.5 * (1 + math.cos(math.pi * step / (share * 10))) if step < share * 10 else 0.0
            assert seen[step][name] == pytest.approx(expected, rel=1e-9), (step, name)
    assert seen[1]["block[0]"] > 0 and seen[2]["block[0]"] == 0.0


def test_the_scheduler_of_the_trainer_multiplies(make_trainer):
    plain = rates(run(make_trainer, "freeze_out"))
    falling = rates(run(make_trainer, "freeze_out", lr_scheduler_type="linear"))
    assert falling[5]["head"] == pytest.approx(plain[5]["head"] * 0.5)


def resume_at(make_trainer, tmp_path, spec, decay, steps):
    whole = run(make_trainer, spec, layer_decay=decay, max_steps=8, save_strategy="steps", save_steps=1)
    for step in steps:
        checkpoint = str(tmp_path / "run" / f"checkpoint-{step}")
        again = run(make_trainer, spec, checkpoint, None, decay, max_steps=8, output_dir=str(tmp_path / "again"))
        assert hashes(again.model) == hashes(whole.model), step
        assert rates(again) == rates(whole)


@pytest.mark.parametrize(("spec", "decay"), [("freeze_out(0.5)", 1.0), ("head@0, all*0.3@2step", "0.35->1.0")])
def test_resume_is_exact(make_trainer, tmp_path, spec, decay):
    resume_at(make_trainer, tmp_path, spec, decay, [3])


@pytest.mark.slow
def test_resume_is_exact_at_every_step(make_trainer, tmp_path):
    resume_at(make_trainer, tmp_path, "freeze_out(0.5)", "0.35->1.0", range(1, 8))


def test_rates_of_entries_hold_until_the_group_is_named_again(make_trainer):
    spec = "all*0.1@0, head@0, -block[0]@2step, block[-1]*0.5@4step, block[0]@4step"
    trainer = run(make_trainer, spec, max_steps=6)
    seen = {step: [groups[name] / 1e-2 for name in ("embeddings", "block[0]", "block[1]", "block[3]", "head")]
            for step, groups in rates(trainer).items()}  # fmt: skip
    assert [seen[step] for step in (1, 3, 5)] == [
        pytest.approx(row) for row in ([0.1] * 4 + [1], [0.1, 0, 0.1, 0.1, 1], [0.1, 1, 0.1, 0.5, 1])
    ]
    told = [r.get("unfreeze/rates") for r in trainer.state.log_history if "unfreeze/phase" in r]
    assert [len(rates) for rates in told] == [5, 4, 4]
    again = run(make_trainer, Schedule.from_log(trainer.state.log_history), max_steps=6)
    assert hashes(again.model) == hashes(trainer.model)


def test_a_phase_of_rates_alone_gives_early_stopping_no_new_patience(make_trainer):
    stopping = EarlyStoppingCallback(early_stopping_patience=2, early_stopping_threshold=10.0)
    trainer = make_trainer(
        UnfreezeCallback("all@0, all*0.5@1step, all*0.4@2step, all*0.3@3step"), stopping, eval_strategy="steps",
        eval_steps=1, save_strategy="steps", save_steps=1, load_best_model_at_end=True,
        metric_for_best_model="eval_loss", max_steps=6,
    )  # fmt: skip
    trainer.train()
    assert trainer.state.global_step == 3


def test_the_plan_tells_them():
    model = tiny_bert()
    phases = parse_schedule("head@0, block[-2:]*0.25@1step, all@2step").phases(layer_groups(model))
    rows = plan_rows(model, layer_groups(model), phases)
    assert [row.trainable for row in rows] == ["head", "block[2:4], head, block[2]*0.25, block[3]*0.25", "all"]


def test_selectors_have_no_rates():
    with pytest.raises(ScheduleError, match="selectors are a string"):
        UnfreezeCallback(reinitialize="block[-1]*0.5")


def test_the_cache_serves_what_is_frozen_by_then(make_trainer):
    plain, cached = (
        run(make_trainer, "freeze_out(0.3, scaled=false)", cache=cache, max_steps=28, model=tiny_bert().double())
        for cache in (None, "memory")
    )
    if DEVICE == "cpu":
        assert hashes(plain.model) == hashes(cached.model)
    assert_close_weights(plain, cached)  # on a GPU the last bits go by the size of the batch
    stats = next(c for c in cached.callback_handler.callbacks if isinstance(c, UnfreezeCallback)).cache.stats
    assert stats.hits >= 20 and stats.misses <= 4 * EXAMPLES, (
        "the head trains alone for 12 of 28 steps, 5 in its second epoch"
    )


def test_a_decay_that_moves(make_trainer):
    trainer = run(make_trainer, "all_at_once", layer_decay="0.35->1.0", max_steps=6)
    for step, groups in rates(trainer).items():
        decay = 0.35 + 0.65 * step / 5
        assert groups["block[3]"] == pytest.approx(1e-2 * decay) and groups["head"] == 1e-2
        assert groups["embeddings"] == pytest.approx(1e-2 * decay**5)
    assert rates(trainer)[5]["embeddings"] == 1e-2


def test_the_arguments_have_a_help_that_can_be_shown():
    shown = " ".join(HfArgumentParser(UnfreezeArguments).format_help().split())
    assert "'head@0, block[-4:]@1ep, all@50%' or a named schedule" in shown and "0.1ep or 2%." in shown


def test_a_decay_as_text_is_the_number(make_trainer, text="0.9"):
    (parsed,) = HfArgumentParser(UnfreezeArguments).parse_args_into_dataclasses(
        ["--schedule", "all_at_once", "--layer_decay", text]
    )
    callback = UnfreezeCallback.from_arguments(parsed)
    assert callback.layer_decay == text
    trainer = make_trainer(callback, max_steps=3)
    trainer.train()
    assert hashes(trainer.model) == hashes(run(make_trainer, "all_at_once", layer_decay=0.9, max_steps=3,
                                               lr_scheduler_type="linear").model)  # fmt: skip


@pytest.mark.parametrize(
    ("decay", "message"),
    [("fast", "is no number. Write 0.9, or '0.35->1.0'"), ("0.3->0.6->1", "is no number"), ("0.3->", "is no number"),
     ("0.5->2", r"2.0 lies outside \(0, 1\]"), ("0->1", "outside"), ([0.9], "outside")],
)  # fmt: skip
def test_bad_decays(decay, message):
    with pytest.raises(UnfreezeError, match=message):
        UnfreezeCallback(layer_decay=decay)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("freeze_out(0)", "first must be more than 0"),
        ("freeze_out(1.5)", "first=1.5 lies above 1.0. Write first=0.8"),
        ("freeze_out(cubd=true)", "Did you mean 'cubed'"),
        ("freeze_out(cubed=3)", "write cubed=true or cubed=false"),
    ],
)
def test_bad_arguments(spec, message):
    with pytest.raises(ScheduleError, match=message):
        parse_schedule(spec)


def test_the_length_of_the_run_is_asked_for():
    model = tiny_bert()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(ScheduleError, match="freeze_out goes on to the end of the run and needs its length"):
        Unfreezer(model, optimizer, "freeze_out")
    with pytest.raises(UnfreezeError, match="changes up to the last step, which is not known here"):
        Unfreezer(model, optimizer, "all_at_once", layer_decay="0.5->1")
    with pytest.raises(ScheduleError, match="this model has none"):
        plan("freeze_out", [single()[0], single()[-1]])
