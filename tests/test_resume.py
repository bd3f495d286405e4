"""Interrupted runs, beside everything else that Trainer can do with a checkpoint."""

from __future__ import annotations

import json
import re
import warnings
from pathlib import Path

import pytest
from conftest import hashes, tiny_bert, tiny_data
from transformers import BertForSequenceClassification, EarlyStoppingCallback, TrainerCallback

from hf_unfreeze import UnfreezeCallback, layer_groups

SCHEDULE = "head@0, block[-1]@3step, block[-2:]@1ep, all@14step"
SAVING = {"save_strategy": "steps", "save_steps": 2}


def transitions(trainer):
    return [(r["step"], r["unfreeze/trainable"]) for r in trainer.state.log_history if "unfreeze/phase" in r]


@pytest.fixture
def whole(make_trainer):
    """An undisturbed run of 21 steps that leaves a checkpoint at every second step."""
    trainer = make_trainer(UnfreezeCallback(SCHEDULE), **SAVING)
    trainer.train()
    return trainer


def resume(make_trainer, tmp_path, step, schedule=SCHEDULE, before=lambda trainer: None, **arguments):
    trainer = make_trainer(UnfreezeCallback(schedule), output_dir=str(tmp_path / "again"), **arguments)
    before(trainer)
    trainer.train(resume_from_checkpoint=str(tmp_path / "run" / f"checkpoint-{step}"))
    return trainer


@pytest.mark.parametrize("restore", [True, False])
def test_callback_states_restored_or_not(make_trainer, tmp_path, whole, restore):
    again = resume(make_trainer, tmp_path, 8, restore_callback_states_from_checkpoint=restore)
    assert hashes(again.model) == hashes(whole.model)
    assert transitions(again) == transitions(whole)


@pytest.mark.parametrize("look", ["evaluate", "predict"])
def test_evaluation_before_and_after_leaves_no_trace(make_trainer, tmp_path, whole, look):
    def use(trainer):
        trainer.evaluate() if look == "evaluate" else trainer.predict(tiny_data(2))

    again = resume(make_trainer, tmp_path, 4, before=use)
    assert hashes(again.model) == hashes(whole.model)
    use(again)
    assert hashes(again.model) == hashes(whole.model)


def test_another_schedule_is_allowed_and_told(make_trainer, tmp_path, whole):
    with pytest.warns(UserWarning, match=r"opens head at step 0; block\[3\], head at step 3.*'head@0, all@12step'"):
        again = resume(make_trainer, tmp_path, 8, schedule="head@0, all@12step")
    assert transitions(again) == [*transitions(whole)[:3], (8, "head"), (12, "all")]


@pytest.mark.parametrize(
    ("before", "after", "opens"),
    [
        ("head@0, block[-1]@3step", "learn_rates(every=10step)", "all"),
        ("head@0, block[-1]@3step", "auto_rates(every=10step)", "all"),
        ("head@0, block[-1]@3step", "freeze_converged(every=20step)", "all"),
        ("rotate(blocks=1, every=1step)", "auto(spectrum_snr, every=3step)", r"block\[\d.*, head"),
    ],
)
@pytest.mark.filterwarnings("ignore:.* measures on")
def test_a_schedule_that_measures_takes_nothing_over_from_another(make_trainer, tmp_path, before, after, opens):
    make_trainer(UnfreezeCallback(before), **SAVING).train()
    ends = []
    for folder, step in (("run", 6), ("again", 12)):  # and goes on from itself to the same bits
        callback = UnfreezeCallback(after, block_warmup="4step")
        trainer = make_trainer(callback, output_dir=str(tmp_path / "again"), eval_strategy="epoch", **SAVING)
        with pytest.warns(UserWarning, match="was trained by another schedule"):
            trainer.train(resume_from_checkpoint=str(tmp_path / folder / f"checkpoint-{step}"))
        ends.append((hashes(trainer.model), transitions(trainer)))
    seen = dict(ends[0][1])
    assert re.fullmatch(opens, seen[6])
    assert not before.startswith("rotate") or (len({*seen}.difference(range(7))) == 3 and seen[15] == "all")
    assert ends[0] == ends[1]


@pytest.mark.filterwarnings("ignore:.* measures on")
def test_a_log_of_before_schedules_were_on_record_is_read_as_it_was(make_trainer, tmp_path):
    whole = make_trainer(UnfreezeCallback("auto(spectrum_snr, every=5step)"), **SAVING)
    whole.train()
    path = tmp_path / "run" / "checkpoint-8" / "trainer_state.json"
    state = json.loads(path.read_text())
    for record in state["log_history"]:
        record.pop("unfreeze/schedule", None)
    path.write_text(json.dumps(state))
    again = resume(make_trainer, tmp_path, 8, "auto(spectrum_snr, every=5step)")
    assert (hashes(again.model), transitions(again)) == (hashes(whole.model), transitions(whole))


def test_more_epochs_move_a_share_and_that_is_told(make_trainer, tmp_path):
    make_trainer(UnfreezeCallback("head@0, all@30%"), **SAVING).train()  # 30 % of 21 steps: step 7
    with pytest.warns(UserWarning, match="A share such as 30% moves"):
        longer = resume(make_trainer, tmp_path, 10, schedule="head@0, all@30%", num_train_epochs=6)
    assert transitions(longer) == [(0, "head"), (7, "all"), (10, "head"), (13, "all")]


def test_more_epochs_with_times_in_steps_say_nothing(make_trainer, tmp_path, whole):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        longer = resume(make_trainer, tmp_path, 20, num_train_epochs=4)
    assert transitions(longer) == transitions(whole) and longer.state.global_step == 28


def test_a_plain_checkpoint_is_told_apart(make_trainer, tmp_path):
    make_trainer(**SAVING).train()
    with pytest.warns(UserWarning, match="its log_history opens all at step 0; 'head@0"):
        again = resume(make_trainer, tmp_path, 4)
    assert transitions(again)[0] == (4, "block[3], head")


def test_a_history_that_somebody_edited(make_trainer, tmp_path, whole):
    path = tmp_path / "run" / "checkpoint-8" / "trainer_state.json"
    state = json.loads(path.read_text())
    state["log_history"] += [{"unfreeze/phase": "x"}, {"unfreeze/phase": 1}, {"step": 3}, {}]
    path.write_text(json.dumps(state))
    again = resume(make_trainer, tmp_path, 8)
    assert hashes(again.model) == hashes(whole.model)


BEST = {"load_best_model_at_end": True, "metric_for_best_model": "eval_loss", "eval_strategy": "steps", "eval_steps": 2}


def test_best_model_is_loaded_and_everything_is_open_again(make_trainer, tmp_path):
    trainer = make_trainer(UnfreezeCallback(SCHEDULE), **SAVING, **BEST)
    trainer.train()
    best = BertForSequenceClassification.from_pretrained(trainer.state.best_model_checkpoint)
    assert hashes(trainer.model) == hashes(best)
    assert all(parameter.requires_grad for parameter in trainer.model.parameters())


def test_early_stopping_stops_and_restores(make_trainer):
    stopping = EarlyStoppingCallback(early_stopping_patience=1, early_stopping_threshold=10.0)
    trainer = make_trainer(UnfreezeCallback(SCHEDULE), stopping, **SAVING, **BEST)
    trainer.train()
    assert trainer.state.global_step == 4  # the second evaluation was not better by 10
    assert all(parameter.requires_grad for parameter in trainer.model.parameters())
    assert "train" not in vars(trainer.model)


def test_skipping_no_data_trains_as_the_plain_trainer_does(make_trainer, tmp_path):
    make_trainer(**SAVING).train()
    ends = []
    for callbacks in ([], [UnfreezeCallback("all_at_once")]):
        trainer = make_trainer(*callbacks, output_dir=str(tmp_path / "again"), ignore_data_skip=True)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that the checkpoint is a plain one
            trainer.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-4"))
        ends.append(hashes(trainer.model))
    assert ends[0] == ends[1]


def test_a_crash_while_saving_leaves_the_last_complete_checkpoint(make_trainer, tmp_path, whole, monkeypatch):
    class PowerCut(RuntimeError):
        pass

    def crash(*args, **kwargs):
        raise PowerCut

    class CutAt8(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 8:
                monkeypatch.setattr(type(trainer), "_save_optimizer_and_scheduler", crash)

    trainer = make_trainer(UnfreezeCallback(SCHEDULE), CutAt8(), output_dir=str(tmp_path / "cut"), **SAVING)
    with pytest.raises(PowerCut):
        trainer.train()
    monkeypatch.undo()
    assert (tmp_path / "cut" / "checkpoint-8").exists()  # the torn one
    again = make_trainer(UnfreezeCallback(SCHEDULE), output_dir=str(tmp_path / "again"))
    again.train(resume_from_checkpoint=str(tmp_path / "cut" / "checkpoint-6"))
    assert hashes(again.model) == hashes(whole.model)


def test_a_saved_model_is_a_plain_one(make_trainer, tmp_path, whole):
    whole.save_model(str(tmp_path / "saved"))
    model = BertForSequenceClassification.from_pretrained(tmp_path / "saved")
    assert hashes(model) == hashes(whole.model)
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert not any("unfreeze" in path.name for path in Path(tmp_path / "saved").iterdir())


@pytest.mark.filterwarnings("ignore::optuna.exceptions.ExperimentalWarning")
def test_search_over_schedules(make_trainer):
    """The schedule as a search parameter: each trial trains what its own schedule says, from the same start."""
    callback = UnfreezeCallback("head@0")
    seen = {}

    class Remember(TrainerCallback):
        def on_train_end(self, args, state, control, model, **kwargs):
            start = hashes(tiny_bert())
            seen[str(callback.schedule)] = {n for n, value in hashes(model).items() if value != start[n]}

    def space(trial):
        callback.schedule = trial.suggest_categorical("schedule", ["head@0", "all_at_once"])
        return {}

    trainer = make_trainer(callback, Remember(), model_init=lambda: tiny_bert(), max_steps=2)
    import optuna

    sampler = optuna.samplers.GridSampler({"schedule": ["head@0", "all_at_once"]}, seed=0)
    trainer.hyperparameter_search(space, n_trials=2, backend="optuna", sampler=sampler, compute_objective=len)
    groups = {group.name: set(group.parameter_names) for group in layer_groups(tiny_bert())}
    assert seen["head@0"] == groups["head"]
    assert len(seen["all_at_once"]) == len(list(tiny_bert().parameters()))


@pytest.mark.parametrize("norm", [0.0, 1e-3, 1.0])
def test_the_norm_is_that_of_what_trains(make_trainer, norm):
    """Clipping sees the trainable parameters only: the same weights as from an optimizer over the head alone."""
    ours = make_trainer(UnfreezeCallback("head@0", frozen_eval=False), max_grad_norm=norm, max_steps=5)
    ours.train()
    theirs = tiny_bert()
    head = set(layer_groups(theirs)[-1].parameter_names)
    for name, parameter in theirs.named_parameters():
        parameter.requires_grad_(name in head)
    plain = make_trainer(model=theirs, max_grad_norm=norm, max_steps=5)
    plain.train()
    assert hashes(ours.model) == hashes(plain.model)


def test_a_checkpoint_may_be_a_path(make_trainer, tmp_path):
    whole = make_trainer(UnfreezeCallback(SCHEDULE, pull=0.1), **SAVING)
    whole.train()
    again = make_trainer(UnfreezeCallback(SCHEDULE, pull=0.1), output_dir=str(tmp_path / "again"))
    again.train(resume_from_checkpoint=tmp_path / "run" / "checkpoint-8")
    assert hashes(again.model) == hashes(whole.model)
