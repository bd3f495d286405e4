"""What has converged freezes from the bottom: the rule, the records, exact resumes, and the cache above it."""

from __future__ import annotations

import json
import math

import pytest
from conftest import EXAMPLES, hashes
from hypothesis import given
from hypothesis import strategies as st
from test_criteria import opened
from test_schedule import plan, single, times, towers

from hf_unfreeze import UnfreezeCallback, UnfreezeError, auto, freeze_converged, parse_schedule
from hf_unfreeze import criteria as module
from hf_unfreeze._decisions import Converged
from hf_unfreeze._openings import freezings
from hf_unfreeze.criteria import register_criterion
from hf_unfreeze.errors import ScheduleError
from hf_unfreeze.schedule import spec_of

pytestmark = pytest.mark.filterwarnings("ignore:.* measures on .* batches at each choice:UserWarning")
GROUPS = single(4)
SPEC = "freeze_converged(every=3step, batches=2)"


@pytest.fixture(autouse=True)
def own_criteria(monkeypatch):
    """A criterion by which half of what trains converges at each choice."""
    monkeypatch.setattr(module, "_CRITERIA", dict(module._CRITERIA))
    register_criterion("height", lambda evidence: int(evidence.name[6:-1]))


def test_the_spec_is_the_function():
    assert freeze_converged() == parse_schedule("freeze_converged")
    assert str(freeze_converged()) == "freeze_converged(gradient_change, percentile=50, every=10%, batches=8)"
    assert freeze_converged("fisher", 30, "1ep", 4) == parse_schedule(
        "freeze_converged(fisher, batches=4, every=1ep, percentile=30)"
    )
    assert plan("freeze_converged") == [(0, "all")]


@given(st.integers(1, 100), times.filter(lambda time: float(time.rstrip("stepn%")) > 0), st.integers(1, 99),
       st.sampled_from(["block", "parameter"]))  # fmt: skip
def test_schedules_with_criteria_round_trip(percentile, every, batches, per):
    if every.endswith("%") and float(every[:-1]) > 100:
        return
    for schedule in (
        freeze_converged("cka", percentile, every, batches),
        auto("fisher", 2, every, batches, False, per),
    ):
        assert parse_schedule(str(schedule)) == schedule and hash(parse_schedule(str(schedule))) == hash(schedule)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("freeze_converged(percentile=0)", "percentile must be more than 0"),
        ("freeze_converged(percentile=101)", "percentile=101 lies above 100. Write percentile=50"),
        ("freeze_converged(fisher, percentil=3)", "Did you mean 'percentile'"),
        ("freeze_converged(every=0)", "every must be more than 0"),
    ],
)
def test_bad_arguments(spec, message):
    with pytest.raises(ScheduleError, match=message):
        parse_schedule(spec)


class Told:
    """A measure that says what the test has written down, choice by choice."""

    def __init__(self, *worths):
        self.worths = list(worths)
        self.asked = []

    def begin(self, names):
        self.began = list(names)

    def replay(self, record):
        pass

    def __call__(self, names):
        self.asked.append([name[6:-1] for name in names])
        return dict(zip(names, self.worths.pop(0)[-len(names) :], strict=True))


def frozen(spec, *worths, groups=GROUPS, until=100):
    schedule = parse_schedule(spec)
    measure = Told(*worths)
    decisions = Converged(schedule, groups, schedule.phases(groups), measure, (100, 10))
    for step in range(until):
        decisions.advance(step)
    return [(phase.start, spec_of(phase.trainable, groups)) for phase in decisions.phases[1:]], measure.asked


@pytest.mark.parametrize(
    ("percentile", "worths", "expected"),
    [
        (50, [[1, 2, 3, 4]], "block[2:4], head"),
        (50, [[1, 4, 2, 3]], "block[1:4], head"),  # the first that is not below ends it
        (50, [[4, 1, 2, 3]], None),
        (50, [[1, 1, 1, 1]], None),  # none lies below
        (100, [[1, 2, 3, 4]], "block[3], head"),
        (100, [[4, 2, 3, 1]], None),
        (10, [[1, 2, 3, 4]], "block[1:4], head"),
        (50, [[1, math.nan, 3, 4]], "block[1:4], head"),  # what gives NaN stays
        (50, [[math.nan] * 4], None),
    ],
)
def test_below_the_percentile_and_all_below_it(percentile, worths, expected):
    phases, _ = frozen(f"freeze_converged(every=20step, percentile={percentile})", *worths, until=21)
    assert phases == ([(20, expected)] if expected else [])


def test_the_prefix_grows_until_one_block_is_left():
    phases, asked = frozen("freeze_converged(every=10%)", [1, 2, 3, 4], [9, 9], [8, 9])
    assert phases == [(10, "block[2:4], head"), (30, "block[3], head")]
    assert asked == [["0", "1", "2", "3"], ["2", "3"], ["2", "3"]], "and it is not measured any more"


def test_choices_that_fall_on_one_step_are_one():
    schedule, measure = parse_schedule("freeze_converged(every=10%)"), Told(*[[1, 1, 1, 1]] * 9)
    decisions = Converged(schedule, GROUPS, schedule.phases(GROUPS), measure, (6, 6))
    for step in range(6):
        decisions.advance(step)
    assert len(measure.asked) == 5, "nine tenths of six steps"


def test_several_stacks_and_a_head_without_parameters():
    assert freezings(towers(2, 1)) == [
        {"embeddings", "encoder.block[0]"}, {"encoder.block[1]"}, {"decoder.block[0]"},
    ]  # fmt: skip
    assert freezings(single(3)[:-1]) == [{"embeddings", "block[0]"}, {"block[1]"}], "the top block trains on"
    with pytest.raises(UnfreezeError, match="this model has none"):
        frozen(SPEC, groups=[single()[0], single()[-1]])


def run(make_trainer, spec=SPEC, resume=None, cache=None, **arguments):
    trainer = make_trainer(UnfreezeCallback(spec, cache=cache), **({"max_steps": 10} | arguments))
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def test_a_run_freezes_and_says_why(make_trainer):
    trainer = run(make_trainer, "freeze_converged(height, every=3step)")
    assert opened(trainer) == [(0, "all"), (3, "block[2:4], head"), (6, "block[3], head")]
    history = trainer.state.log_history
    reasons = [r["unfreeze/reason"] for r in history if "unfreeze/reason" in r]
    assert reasons[0] == "height: block[0] 0, block[1] 1 below 1.5, percentile 50 of what trains"
    worths = [(r["step"], r["unfreeze/worth"]) for r in history if "unfreeze/worth" in r]
    assert worths == [(3, {f"block[{i}]": i for i in range(4)}), (6, {"block[2]": 2, "block[3]": 3})]
    rates = [r for r in history if "lr/head" in r]
    assert all((r["lr/block[1]"] == r["lr/embeddings"] == 0) is (r["step"] > 3) for r in rates) and len(rates) == 10


def test_records_are_json_and_hold_what_the_next_choice_needs(make_trainer):
    history = run(make_trainer).state.log_history
    assert json.loads(json.dumps(history, allow_nan=False)) == history
    first, second, *_ = (r for r in history if "unfreeze/gradient_norms" in r)
    assert (first["step"], second["step"]) == (0, 3) and first["unfreeze/worth"] == {}
    for name, value in second["unfreeze/worth"].items():
        before, now = (r["unfreeze/gradient_norms"][name] for r in (first, second))
        assert value == abs(before - now) / before


@pytest.mark.parametrize("criterion", ["gradient_change", "height"])
def test_resume_is_exact_at_and_after_a_choice(make_trainer, tmp_path, criterion):
    spec = f"freeze_converged({criterion}, every=3step, batches=2, percentile=70)"
    whole = run(make_trainer, spec, save_strategy="steps", save_steps=1)
    for step in (3, 4):
        again = run(
            make_trainer, spec, str(tmp_path / "run" / f"checkpoint-{step}"), output_dir=str(tmp_path / "again")
        )
        assert hashes(again.model) == hashes(whole.model), step
        kept = [[r for r in trainer.state.log_history if "train_runtime" not in r] for trainer in (whole, again)]
        assert kept[0] == kept[1], step


def test_the_cache_serves_the_frozen_prefix_as_it_grows(make_trainer):
    spec = "freeze_converged(height, every=7step)"
    plain, cached = (run(make_trainer, spec, cache=cache, max_steps=28) for cache in (None, "memory"))
    assert hashes(plain.model) == hashes(cached.model) and len(opened(plain)) == 3
    stats = next(c for c in cached.callback_handler.callbacks if isinstance(c, UnfreezeCallback)).cache.stats
    assert stats.misses == 2 * EXAMPLES, "each example goes once through blocks 0 and 1, and once through block 2"
    assert stats.hits >= EXAMPLES


def test_the_cache_is_refused_where_outputs_of_frozen_blocks_are_measured(make_trainer):
    with pytest.raises(UnfreezeError, match="measures inside frozen blocks"):
        run(make_trainer, "freeze_converged(cka)", cache="memory")


def test_a_checkpoint_without_the_first_weights_is_refused(make_trainer, tmp_path):
    run(make_trainer, save_strategy="steps", save_steps=4)
    told = pytest.warns(UserWarning, match="was trained by another schedule")
    with told, pytest.raises(UnfreezeError, match=r"has no unfreeze_pretrained\.safetensors"):
        run(make_trainer, "freeze_converged(cka)", str(tmp_path / "run" / "checkpoint-4"))
