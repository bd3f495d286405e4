"""A run's log gives the timed schedule that repeats it, to the same weights."""

from __future__ import annotations

import json

import pytest
from conftest import hashes
from test_criteria import opened

from hf_unfreeze import Schedule, UnfreezeCallback, layer_groups, parse_schedule
from hf_unfreeze.errors import ScheduleError

pytestmark = pytest.mark.filterwarnings("ignore:.* measures on .* batches at each choice:UserWarning")
EVALUATED = {"eval_strategy": "steps", "eval_steps": 2}
RUNS = {
    "auto(fisher, every=3step, batches=2)": {},
    "rotate(blocks=1, every=2step, embeddings=false)": {},
    "plateau(eval_loss, patience=1)": EVALUATED,
    "freeze_converged(every=2step, percentile=90)": {},
    "auto_rates(fisher, every=3step)": {},
    "learn_rates(speed=0.3, start=0.5, every=3step)": {},
    "head@0, all@30%, -block[0:2]@8step": {},
}


@pytest.mark.parametrize("spec", RUNS)
def test_a_replayed_run_ends_in_the_same_weights(make_trainer, tmp_path, spec):
    def train(schedule, name):
        trainer = make_trainer(UnfreezeCallback(schedule), max_steps=12, output_dir=str(tmp_path / name), **RUNS[spec])
        trainer.train()
        trainer.save_state()
        return trainer

    decided = train(spec, "first")
    again = train(str(tmp_path / "first" / "trainer_state.json"), "again")
    assert opened(again) == opened(decided)
    assert len(opened(decided)) > 2
    assert hashes(again.model) == hashes(decided.model)
    schedule = Schedule.from_log(decided.state.log_history)
    assert parse_schedule(str(schedule)) == schedule


LOGGED = '{"log_history": [{"step": 0, "unfreeze/phase": 0, "unfreeze/trainable": "all", "unfreeze/rates": %s}]}'


@pytest.mark.parametrize(
    ("text", "message"),
    [(None, "FileNotFoundError"), ("{", "JSONDecodeError"), ("[]", "TypeError"), ("{}", "KeyError"),
     ('{"log_history": [{"loss": 1}]}', "no transition"),
     (LOGGED % '{"head": "x"}', "a rate is a number above 0"), (LOGGED % 3, "no transition"),
     ('{"log_history": 3}', "no transition")],
)  # fmt: skip
def test_what_cannot_be_replayed_is_told(tmp_path, text, message):
    path = tmp_path / "trainer_state.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(ScheduleError, match=message):
        parse_schedule(str(path))


def test_entries_by_hand():
    log = [{"step": 0, "unfreeze/phase": 0, "unfreeze/trainable": "head"}, {"step": 2, "loss": 1.0},
           {"step": 4, "unfreeze/phase": 1, "unfreeze/trainable": "block[2:6], head"},
           {"step": 8, "unfreeze/phase": 2, "unfreeze/trainable": "all"}]  # fmt: skip
    assert str(Schedule.from_log(json.loads(json.dumps(log)))) == (
        "head@0, -all@4step, block[2:6]@4step, head@4step, all@8step"
    )


def test_what_is_no_log_is_refused():
    with pytest.raises(ScheduleError, match=r"object is no log_history. Write Schedule.from_log\(trainer.state"):
        Schedule.from_log(object())
    with pytest.raises(ScheduleError, match="has no transition"):
        Schedule.from_log([{"loss": 1.0, "step": 3}])


def test_what_trained_before_the_first_transition_was_everything(make_trainer, tmp_path):
    make_trainer(UnfreezeCallback("all_at_once"), save_strategy="steps", save_steps=4).train()
    again = make_trainer(UnfreezeCallback("head@0"), output_dir=str(tmp_path / "again"))
    with pytest.warns(UserWarning, match="trained by another schedule"):
        again.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-4"))
    schedule = Schedule.from_log(again.state.log_history)
    assert str(schedule) == "all@0, -all@4step, head@4step"
    assert [phase.start for phase in schedule.phases(layer_groups(again.model))] == [0, 4]
