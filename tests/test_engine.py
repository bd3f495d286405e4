"""Real Trainer runs: what trains, what stays, what resumes, what is restored."""

from __future__ import annotations

import copy
import json
import os
import re
from pathlib import Path

import pytest
import torch
from conftest import hashes, tiny_bert, tiny_data
from transformers import SchedulerType, TrainerCallback, TrainingArguments

from hf_unfreeze import Schedule, UnfreezeCallback, UnfreezeError, Unfreezer, layer_groups, trainable_summary
from hf_unfreeze.errors import OptimizerError, ScheduleError

pytestmark = pytest.mark.filterwarnings("ignore:schedule .* will not reach:UserWarning")
SCHEDULE = "head@0, block[-1]@3step, block[-2:]@1ep, all@60%, -block[0]@15step"  # phases at 0, 3, 7, 13, 15


class Snapshots(TrainerCallback):
    """Hashes of all weights after every optimizer step."""

    def __init__(self):
        self.steps = []

    def on_train_begin(self, args, state, control, model, **kwargs):
        self.steps.append(hashes(model))

    def on_step_end(self, args, state, control, model, **kwargs):
        self.steps.append(hashes(model))


def phases(trainer):
    return [(r["step"], r["unfreeze/trainable"]) for r in trainer.state.log_history if "unfreeze/phase" in r]


def test_exactly_the_open_weights_move(make_trainer):
    snapshots = Snapshots()
    trainer = make_trainer(UnfreezeCallback(SCHEDULE), snapshots)
    trainer.train()
    assert phases(trainer) == [
        (0, "head"),
        (3, "block[3], head"),
        (7, "block[2:4], head"),
        (13, "all"),
        (15, "embeddings, block[1:4], head"),
    ]
    groups = {g.name: g.parameter_names for g in layer_groups(trainer.model)}
    opened = {0: ["head"], 3: ["block[3]"], 7: ["block[2]"], 13: ["block[0]", "block[1]", "embeddings"]}
    trains: set[str] = set()
    for step in range(21):
        trains |= {name for group in opened.get(step, ()) for name in groups[group]}
        if step == 15:
            trains -= set(groups["block[0]"])
        before, after = snapshots.steps[step], snapshots.steps[step + 1]
        assert {name for name in before if before[name] != after[name]} == trains, f"step {step}"


class Opens(TrainerCallback):
    """Opens a block behind the back of the schedule."""

    def on_step_begin(self, args, state, control, model, **kwargs):
        model.bert.encoder.layer[1].requires_grad_(state.global_step == 4)


def test_what_somebody_else_opens_is_an_error_before_it_moves(make_trainer):
    trainer = make_trainer(UnfreezeCallback(SCHEDULE), Opens())
    before = hashes(trainer.model)
    with pytest.raises(UnfreezeError, match=r"layer.1.* is frozen in this phase and has a gradient"):
        trainer.train()
    assert trainer.state.global_step == 4
    moved = {name for name, value in hashes(trainer.model).items() if value != before[name]}
    assert not [name for name in moved if "layer.1." in name]


@pytest.mark.parametrize("arguments", [{}, {"gradient_accumulation_steps": 3}, {"max_grad_norm": 0}])
def test_all_at_once_is_bit_identical_to_no_callback(make_trainer, arguments):
    with_callback = make_trainer(UnfreezeCallback("all_at_once"), **arguments)
    with_callback.train()
    without = make_trainer(**arguments)
    without.train()
    assert hashes(with_callback.model) == hashes(without.model)


def entries(trainer) -> list[tuple]:
    """Step and own keys of each record, without what ours adds to it and what times say."""
    added = ("lr/", "unfreeze/")
    return [(r["step"], [key for key in r if not key.startswith(added)]) for r in trainer.state.log_history]


def test_all_at_once_writes_no_record_of_its_own(make_trainer, tmp_path):
    """Whoever goes through a log by position or expects a key in each record goes on doing so."""
    arguments = {"eval_strategy": "epoch", "save_strategy": "epoch"}
    ours = make_trainer(UnfreezeCallback("all_at_once"), **arguments)
    ours.train()
    plain = make_trainer(output_dir=str(tmp_path / "plain"), **arguments)
    plain.train()
    assert entries(ours) == entries(plain)
    assert str(Schedule.from_log(ours.state.log_history)) == "all@0"
    again = make_trainer(UnfreezeCallback("all_at_once"), output_dir=str(tmp_path / "again"), **arguments)
    again.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-7"))  # tells of no other schedule
    assert hashes(again.model) == hashes(ours.model)
    other = make_trainer(UnfreezeCallback("head@0"), output_dir=str(tmp_path / "other"), **arguments)
    with pytest.warns(UserWarning, match="its log_history opens all at step 0; 'head@0' in this run opens head"):
        other.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-7"))


def test_all_at_once_leaves_frozen_what_was_frozen_and_tells(make_trainer):
    ours = make_trainer(UnfreezeCallback("all_at_once"), model=frozen_before())
    with pytest.warns(UserWarning, match=r"word_embeddings.weight and 4 more had requires_grad=False .* stays frozen"):
        ours.train()
    plain = make_trainer(model=frozen_before())
    plain.train()
    assert hashes(ours.model) == hashes(plain.model)
    assert not any(parameter.requires_grad for parameter in ours.model.bert.embeddings.parameters())


OPTIMIZERS = ["adamw_torch", "adamw_torch_fused", "sgd", "adafactor", "rmsprop"]
SCHEDULERS = {
    "linear": {},
    "cosine": {},
    "cosine_with_restarts": {},
    "polynomial": {},
    "constant": {},
    "constant_with_warmup": {},
    "inverse_sqrt": {},
    "reduce_lr_on_plateau": {"eval_strategy": "steps", "eval_steps": 2},
    "cosine_with_min_lr": {"lr_scheduler_kwargs": {"min_lr": 1e-4}},
    "cosine_warmup_with_min_lr": {"lr_scheduler_kwargs": {"min_lr": 1e-4}},
    "warmup_stable_decay": {"lr_scheduler_kwargs": {"num_decay_steps": 5}},
    "greedy": {"eval_strategy": "steps", "eval_steps": 2},
}


def check_resumed_equals_uninterrupted(make_trainer, tmp_path, steps, **arguments):
    def callback():
        return UnfreezeCallback(SCHEDULE, layer_decay=0.8, block_warmup="2step")

    whole = make_trainer(callback(), save_strategy="steps", save_steps=1, **arguments)
    whole.train()
    for step in steps:
        again = make_trainer(callback(), output_dir=str(tmp_path / f"again{step}"), **arguments)
        again.train(resume_from_checkpoint=str(tmp_path / "run" / f"checkpoint-{step}"))
        assert hashes(again.model) == hashes(whole.model), f"resumed at step {step}"
        assert phases(again) == phases(whole), f"resumed at step {step}"


def test_resume_at_every_step(make_trainer, tmp_path):
    check_resumed_equals_uninterrupted(make_trainer, tmp_path, range(1, 21))


def test_resume_with_accumulation_and_a_partial_window(make_trainer, tmp_path):
    check_resumed_equals_uninterrupted(make_trainer, tmp_path, [1, 2, 3, 5, 7], gradient_accumulation_steps=3)


# every third pair, so that each scheduler and each optimizer is there; SWEEP=all: every pair
PAIRS = [
    pytest.param(scheduler, optimizer, id=f"{scheduler}-{optimizer}")
    for i, scheduler in enumerate(SCHEDULERS)
    for j, optimizer in enumerate(OPTIMIZERS)
    if (i + j) % 3 == 0 or os.environ.get("SWEEP") == "all"
]


@pytest.mark.slow
@pytest.mark.parametrize(("scheduler", "optimizer"), PAIRS)
def test_resume_with_every_scheduler_and_optimizer(make_trainer, tmp_path, scheduler, optimizer):
    if scheduler not in {kind.value for kind in SchedulerType}:
        scheduler = "linear"  # transformers 4.57 has no greedy scheduler
    momentum = {"optim_args": "momentum=0.9"} if optimizer == "sgd" else {}
    rates = {"warmup_steps": 2} if "warmup" in scheduler or scheduler == "inverse_sqrt" else {}
    check_resumed_equals_uninterrupted(
        make_trainer, tmp_path, [2, 3, 8, 14, 16],
        optim=optimizer, lr_scheduler_type=scheduler, **SCHEDULERS[scheduler], **rates, **momentum,
    )  # fmt: skip


def test_checkpoints_serve_with_and_without_the_callback(make_trainer, tmp_path):
    with_callback = make_trainer(UnfreezeCallback(SCHEDULE), save_strategy="steps", save_steps=10)
    with_callback.train()
    plain = make_trainer(output_dir=str(tmp_path / "plain"), save_strategy="steps", save_steps=10)
    plain.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-10"))
    assert plain.state.global_step == 21
    back = make_trainer(UnfreezeCallback(SCHEDULE), output_dir=str(tmp_path / "back"))
    with pytest.warns(UserWarning, match="was trained by another schedule: its log_history opens head at step 0"):
        back.train(resume_from_checkpoint=str(tmp_path / "plain" / "checkpoint-20"))
    assert back.state.global_step == 21
    assert phases(back)[-1][1] == "embeddings, block[1:4], head"


def everything_restored(trainer):
    model = trainer.model
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert "train" not in vars(model)
    assert {module.training for module in model.modules()} == {True}
    raw = trainer.optimizer.optimizer
    assert not raw._optimizer_step_pre_hooks and not raw._optimizer_step_post_hooks
    assert not {"_run_epoch", "training_step"} & set(vars(trainer))


@pytest.mark.parametrize("way", ["constructor", "class", "add_callback"])
def test_every_way_to_pass_the_callback_and_a_second_train(make_trainer, way):
    callback = UnfreezeCallback if way == "class" else UnfreezeCallback("gradual(every=1ep)")
    trainer = make_trainer(*([] if way == "add_callback" else [callback]))
    if way == "add_callback":
        trainer.add_callback(callback)
    for _ in range(2):
        trainer.train()
        opened = ["head", "block[3], head", "block[2:4], head"]
        assert [spec for _, spec in phases(trainer)] == (opened[2:] if way == "class" else opened)
        everything_restored(trainer)


def test_model_init(make_trainer):
    trainer = make_trainer(UnfreezeCallback("head@0"), model_init=lambda: tiny_bert(seed=0))
    trainer.train()
    start = hashes(tiny_bert())
    moved = {name for name, value in hashes(trainer.model).items() if value != start[name]}
    assert moved == set(layer_groups(trainer.model)[-1].parameter_names)


@pytest.mark.parametrize("part", ["step", "clipping"])
def test_restored_after_an_exception_in_step_or_clipping(make_trainer, monkeypatch, part):
    def fail(*args, **kwargs):
        raise RuntimeError("power cut")

    class Break(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            if state.global_step == 4 and part == "step":
                trainer.optimizer.optimizer.step = fail
            elif state.global_step == 4:
                monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", fail)

    trainer = make_trainer(Break(), UnfreezeCallback("gradual"))
    with pytest.raises(RuntimeError, match="power cut"):
        trainer.train()
    everything_restored(trainer)


def test_restored_after_an_exception_while_the_plan_is_printed(make_trainer, monkeypatch):
    def fail(*args, **kwargs):
        raise OSError("broken pipe")

    monkeypatch.setattr("hf_unfreeze.callback.plan_table", fail)
    trainer = make_trainer(UnfreezeCallback("gradual"), disable_tqdm=False)
    with pytest.raises(OSError, match="broken pipe"):
        trainer.train()
    everything_restored(trainer)


@pytest.mark.parametrize("event", ["on_train_begin", "on_step_begin", "on_step_end", "on_log", "on_epoch_end"])
@pytest.mark.parametrize("way", ["constructor", "add_callback"])
def test_restored_after_an_exception(make_trainer, event, way):
    def fail(self, args, state, control, **kwargs):
        if state.global_step == 4 or event in ("on_train_begin", "on_epoch_end"):
            raise RuntimeError("power cut")

    failing = type("Failing", (TrainerCallback,), {event: fail})()
    trainer = make_trainer(*([UnfreezeCallback("gradual")] if way == "constructor" else []), failing)
    if way == "add_callback":
        trainer.add_callback(UnfreezeCallback("gradual"))
    with pytest.raises(RuntimeError, match="power cut"):
        trainer.train()
    everything_restored(trainer)
    assert "on_train_begin" not in vars(failing)


def test_a_callback_that_is_removed_in_the_middle_leaves_a_plain_run(make_trainer):
    class Remove(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 4:
                trainer.remove_callback(UnfreezeCallback)
            if state.global_step == 6:
                everything_restored(trainer)

    trainer = make_trainer(UnfreezeCallback("head@0"), Remove())
    trainer.train()
    everything_restored(trainer)
    assert set(hashes(trainer.model).values()) & set(hashes(tiny_bert()).values()) == set(), "all has trained since"


def test_restored_after_an_exception_in_the_forward(make_trainer):
    trainer = make_trainer(UnfreezeCallback("gradual"))
    left = [None] * 4
    trainer.model.bert.embeddings.register_forward_pre_hook(lambda *_: left.pop())
    with pytest.raises(IndexError):
        trainer.train()
    everything_restored(trainer)


def test_layer_decay_equals_hand_written_groups(make_trainer):
    model = tiny_bert()
    rate, decay = 1e-2, 0.5
    theirs = copy.deepcopy(model)
    groups = layer_groups(theirs)
    named = dict(theirs.named_parameters())
    by_hand = torch.optim.AdamW(
        [
            {"params": [named[n] for n in group.parameter_names], "lr": rate * decay ** (len(groups) - 1 - i)}
            for i, group in enumerate(groups)
        ],
        weight_decay=0.1,
    )
    constant = {"lr_scheduler_type": "constant", "max_grad_norm": 0}
    hand = make_trainer(model=theirs, optimizers=(by_hand, torch.optim.lr_scheduler.LambdaLR(by_hand, lambda _: 1.0)),
                        **constant)  # fmt: skip
    hand.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.1)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda _: 1.0)
    ours = make_trainer(
        UnfreezeCallback("all_at_once", layer_decay=decay), model=model, optimizers=(optimizer, scheduler), **constant
    )
    ours.train()
    assert hashes(ours.model) == hashes(hand.model)


def test_logged_rates_are_those_of_the_step(make_trainer):
    callback = UnfreezeCallback("head@0, block[-1]@5step", layer_decay=0.5, block_warmup="4step")
    trainer = make_trainer(callback, lr_scheduler_type="constant")
    trainer.train()
    rates = {r["step"]: r for r in trainer.state.log_history if "loss" in r}
    assert rates[5]["lr/head"] == 1e-2 and rates[5]["lr/block[3]"] == 0.0
    assert [rates[step]["lr/block[3]"] for step in (6, 7, 8, 9, 10)] == pytest.approx(
        [0.25 * 5e-3, 0.5 * 5e-3, 0.75 * 5e-3, 5e-3, 5e-3]
    )


def test_frozen_blocks_are_in_eval_mode(make_trainer):
    modes = []

    class Look(TrainerCallback):
        def on_substep_end(self, args, state, control, model, **kwargs):
            modes.append((model.bert.encoder.layer[0].training, model.bert.encoder.layer[3].training))

    for frozen_eval in (True, False):
        trainer = make_trainer(UnfreezeCallback("head@0, block[-1]@0", frozen_eval=frozen_eval), Look(),
                               gradient_accumulation_steps=2, max_steps=1)  # fmt: skip
        trainer.train()
    assert modes == [(False, True), (True, True)]


def test_optimizer_state_appears_only_when_a_group_opens(make_trainer):
    trainer = make_trainer(UnfreezeCallback("head@0"))
    trainer.train()
    held = {id(parameter) for parameter in trainer.optimizer.state}
    head = set(layer_groups(trainer.model)[-1].parameter_names)
    assert held == {id(p) for n, p in trainer.model.named_parameters() if n in head}


def test_log_reaches_tensorboard(make_trainer, tmp_path, monkeypatch):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "tb"))
    kwargs = {} if "logging_dir" not in TrainingArguments.__dataclass_fields__ else {
        "logging_dir": str(tmp_path / "tb")
    }  # fmt: skip
    trainer = make_trainer(UnfreezeCallback("gradual"), report_to="tensorboard", **kwargs)
    trainer.train()
    files = list(tmp_path.rglob("events.out.tfevents*"))
    events = EventAccumulator(str(files[0].parent))
    events.Reload()
    phases_seen = [event.value for event in events.Scalars("train/unfreeze/phase")]
    assert phases_seen == [0.0] * 7 + [1.0] * 7 + [2.0] * 7
    assert "train/lr/block[3]" in events.Tags()["scalars"]


def test_model_card_keeps_the_section(make_trainer, tmp_path):
    trainer = make_trainer(UnfreezeCallback("gradual"))
    trainer.train()
    for _ in range(2):
        trainer.create_model_card()
        card = (tmp_path / "run" / "README.md").read_text()
        assert card.count("## Unfreezing") == 1
        assert re.search(r"\| 1 \| 7 \| 1\.00 \| block\[3\], head \|", card)


def test_state_is_json_and_plan_is_printed_once(make_trainer, tmp_path, capsys):
    trainer = make_trainer(UnfreezeCallback("gradual"), disable_tqdm=False)
    trainer.train()
    trainer.save_state()
    state = json.loads(Path(tmp_path / "run" / "trainer_state.json").read_text())
    assert sum("unfreeze/phase" in record for record in state["log_history"]) == 3
    shown = capsys.readouterr().out
    assert shown.count("gradients") == 1 and "block[2:4], head" in shown


def test_silent_with_disable_tqdm(make_trainer, capsys):
    make_trainer(UnfreezeCallback("gradual")).train()
    assert "phase" not in capsys.readouterr().out.replace("unfreeze/phase", "")


def test_plain_loop():
    model = tiny_bert()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    start = hashes(model)
    unfreezer = Unfreezer(model, optimizer, "head@0, block[-1]@2step")
    transitions = []
    for step in range(4):
        transitions.append(unfreezer.step(step))
        batch = {key: torch.stack([torch.as_tensor(e[key]) for e in tiny_data()[:4]]) for key in tiny_data()[0]}
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    unfreezer.close()
    unfreezer.close()
    assert [t and t.trainable for t in transitions] == ["head", None, "block[3], head", None]
    groups = {g.name: set(g.parameter_names) for g in layer_groups(model)}
    assert {n for n, h in hashes(model).items() if h != start[n]} == groups["head"] | groups["block[3]"]
    assert trainable_summary(model).trainable == trainable_summary(model).total
    with pytest.raises(UnfreezeError, match="closed"):
        unfreezer.step(5)


class ScheduleFreeAdamW(torch.optim.AdamW):
    """Stands for the real one by its name, which is what the guard goes by."""


def frozen_before():
    model = tiny_bert()
    model.bert.embeddings.requires_grad_(False)
    return model


WRONG = {
    "two callbacks": (UnfreezeError, "two UnfreezeCallbacks", ["gradual", "head@0"], {}),
    "index": (ScheduleError, r"block\[9\] lies outside .*block\[0\] to block\[3\]", ["block[9]@0"], {}),
    "stack": (ScheduleError, "matches nothing", ["decoder.block@0"], {}),
    "name": (ScheduleError, "Did you mean 'block'", ["blok@0"], {}),
    "nothing": (ScheduleError, "trains nothing from step 0", ["head@1step"], {}),
    "nothing later": (ScheduleError, "nothing from step 7", ["head@0, -all@1ep"], {}),
    "frozen before": (OptimizerError, "requires_grad=False when the", ["all@0"], {"model": frozen_before}),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_use_is_refused_with_the_cure(make_trainer, case):
    error, message, schedules, arguments = WRONG[case]
    callbacks = [UnfreezeCallback(schedule) for schedule in schedules]
    if len(callbacks) > 1:
        trainer = make_trainer(callbacks[0])
        trainer.callback_handler.callbacks.append(callbacks[1])
    else:
        trainer = make_trainer(*callbacks, **{key: value() for key, value in arguments.items()})
    with pytest.raises(error, match=message):
        trainer.train()
    assert "train" not in vars(trainer.model)


def test_optimizers_are_checked():
    model = tiny_bert()
    with pytest.raises(OptimizerError, match="ScheduleFreeAdamW cannot be used"):
        Unfreezer(model, ScheduleFreeAdamW(model.parameters()), "head@0, all@2step")
    with pytest.raises(OptimizerError, match="lacks bert"):
        Unfreezer(model, torch.optim.AdamW(model.classifier.parameters()), "all_at_once")
    assert not set(vars(model)) & {"train", "forward"}


@pytest.mark.parametrize("layer_decay", [0, -1, 1.5, True, "1.1", float("nan")])
def test_layer_decay_outside_its_range(layer_decay):
    with pytest.raises(UnfreezeError, match="outside"):
        UnfreezeCallback("gradual", layer_decay=layer_decay)


def test_times_beyond_the_run_are_named(make_trainer):
    with pytest.warns(UserWarning, match=r"will not reach: all at step 21. The run has 21 steps"):
        make_trainer(UnfreezeCallback("head@0, all@3ep")).train()
