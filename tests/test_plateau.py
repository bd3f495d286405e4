"""Validation decides: when the next group opens, where unfreezing stops, and that a resumed run decides the same."""

from __future__ import annotations

import json
import math

import pytest
import torch
from conftest import hashes, tiny_bert, tiny_data
from test_schedule import plan, single
from transformers import TrainerCallback

from hf_unfreeze import UnfreezeCallback, Unfreezer, layer_groups, parse_schedule, plateau
from hf_unfreeze._kept import BestWeights
from hf_unfreeze._plan import plan_rows, plan_table
from hf_unfreeze._plateau import Plateau, with_metric
from hf_unfreeze.errors import ScheduleError, UnfreezeError
from hf_unfreeze.schedule import spec_of

NAN = math.nan
GROUPS = single(3)


def decide(spec, values, every=1, until=None):
    """Phases after evaluations with these values at every so many steps, as (start, trainable, reason)."""
    decisions = Plateau(parse_schedule(spec), GROUPS, 100, 10)
    end = until or every * len(values) + 1
    for step in range(end):
        if step and step % every == 0 and step // every <= len(values):
            decisions.observe({"eval_loss": values[step // every - 1], "eval_acc": 0}, step)
        decisions.advance(step)
    return [(phase.start, spec_of(phase.trainable, GROUPS), phase.reason) for phase in decisions.phases]


def starts(*arguments, **options):
    return [start for start, _, _ in decide(*arguments, **options)]


def test_the_spec_is_the_function():
    assert plateau("eval_loss") == parse_schedule("plateau(eval_loss, patience=2)")
    assert plateau() == parse_schedule("plateau") and str(plateau()) == "plateau(patience=2)"
    full = plateau("eval_F1", 3, 0.005, "max", "1ep", "3ep", "no_gain", False, True, 2, False)
    assert parse_schedule(str(full)) == full and hash(parse_schedule(str(full))) == hash(full)
    assert "eval_F1" in str(full) and "at_most=3ep" in str(full)
    assert parse_schedule("plateau(metric=eval_rouge/L@10)").arguments[0] == ("metric", "eval_rouge/L@10")


CONSTANT = [1.0] * 12


@pytest.mark.parametrize(
    ("spec", "values", "expected"),
    [
        ("plateau(eval_loss)", CONSTANT, [0, 3, 5, 7, 9]),  # the first has nothing before it to improve on
        ("plateau(eval_loss, patience=1)", CONSTANT, [0, 2, 3, 4, 5]),
        ("plateau(eval_loss)", [1, 0.9, 0.8, 0.7, 0.6], [0]),
        ("plateau(eval_loss, min_delta=0.2)", [1, 0.9, 0.85, 0.8], [0, 3]),
        ("plateau(eval_loss, mode=max)", [1, 0.9, 0.8, 0.7, 0.6], [0, 3, 5]),
        ("plateau(eval_loss)", [1, 1.1, 1.2, 1.5, 1.4, 1.3, 1.2, 1.2, 1.2], [0, 3, 9]),  # recovers: is improving
        ("plateau(eval_loss)", [NAN] * 5, [0, 2, 4]),
        ("plateau(eval_loss)", [1, NAN, 0.9, NAN, NAN], [0, 5]),
        ("plateau(eval_loss, at_least=5step)", CONSTANT, [0, 5, 10]),
        ("plateau(eval_loss, at_most=2step)", [1 / n for n in range(1, 9)], [0, 2, 4, 6, 8]),
        ("plateau(eval_loss, patience=9, at_most=0.4ep)", CONSTANT, [0, 4, 8, 12]),
        ("plateau(eval_loss, blocks=3)", CONSTANT, [0, 3, 5]),
        ("plateau(eval_loss, blocks=3, embeddings=false)", CONSTANT, [0, 3]),
    ],
)
@pytest.mark.filterwarnings("ignore:eval_loss is nan after step:UserWarning")
def test_when_groups_open(spec, values, expected):
    assert starts(spec, values) == expected
    opened = [trainable for _, trainable, _ in decide(spec, values)]
    if "blocks" not in spec:
        assert opened == ["head", "block[2], head", "block[1:3], head", "block[0:3], head", "all"][: len(expected)]


def test_a_time_between_two_evaluations():
    assert starts("plateau(eval_loss, patience=1, at_least=23step)", [1, 1], every=10, until=40) == [0, 23]


def test_reasons_in_words_and_numbers():
    reasons = [reason for *_, reason in decide("plateau(eval_loss, min_delta=0.01, at_most=5step)", [0.7, 0.71, 0.71])]
    assert reasons == ["", "eval_loss 0.71 has not improved on 0.7 by more than 0.01 for 2 evaluations"]
    assert decide("plateau(eval_loss, patience=9, at_most=2step)", [1, 1])[1][2] == "at_most=2step is over"
    with pytest.warns(UserWarning, match="eval_loss is nan after step 1, which counts as no improvement") as told:
        assert "nan has not improved on any before" in decide("plateau(eval_loss, patience=1)", [NAN, NAN])[1][2]
    assert len(told) == 1


def test_stopping_where_the_last_opening_brought_nothing():
    values = [0.9, 0.8, 0.8, 0.8, 0.7, 0.7, 0.7, 0.75, 0.76, 0.6, 0.6, 0.6]
    *_, (start, trainable, reason) = decide("plateau(eval_loss, stop=no_gain)", values)
    assert (start, trainable) == (9, "block[2], head")
    assert reason == (
        "eval_loss 0.76 has not improved on 0.75 for 2 evaluations"
        "; no gain: the best eval_loss is still 0.7, at step 5 in phase 1; going back to it"
    )
    stays = decide("plateau(eval_loss, stop=no_gain, back=false)", values)
    assert stays[-1][:2] == (9, "block[1:3], head") and stays[-1][2].endswith("staying")
    assert starts("plateau(eval_loss)", values)[:4] == [0, 4, 7, 9]


def test_stopping_in_the_last_phase():
    spec = "plateau(eval_loss, patience=1, stop=no_gain, blocks=3, embeddings=false)"
    assert [t for _, t, _ in decide(spec, [1, 1, 1, 1])] == ["head", "block[0:3], head", "head"]
    assert [t for _, t, _ in decide(spec, [1, 1, 0.5, 1, 1])] == ["head", "block[0:3], head"]


@pytest.mark.parametrize("seed", range(20))
def test_a_replay_decides_the_same_from_any_step(seed):
    generator = torch.Generator().manual_seed(seed)
    values = torch.randint(5, 10, (30,), generator=generator).div(10).tolist()
    spec = f"plateau(eval_loss, patience={seed % 3 + 1}, at_least={seed}step, at_most=30step, stop=no_gain)"
    records = [{"eval_loss": value, "step": 3 * n + 3} for n, value in enumerate(values)]

    def live(decisions, first):
        for step in range(first, 91):
            if step > first and step % 3 == 0:
                decisions.observe(records[step // 3 - 1], step)
            decisions.advance(step)
        return decisions.phases

    def new():
        return Plateau(parse_schedule(spec), GROUPS, 100, 10)

    whole = live(new(), 0)
    for step in range(1, 91):
        history = json.loads(json.dumps([r for r in records if r["step"] <= step] + [{"loss": 1, "step": step}]))
        again = new()
        again.replay([*history, "somebody's", {"eval_loss": 1}], step)
        assert all(phase.start < step for phase in again.phases), "the step itself begins live"
        assert live(again, step) == whole, step


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("plateau(eval_loss, mode=up)", "none of auto, min, max"),
        ("plateau(eval_loss, stop=gain)", "none of none, no_gain. Did you mean 'no_gain'"),
        ("plateau(eval_loss, patience=0)", "patience must be more than 0"),
        ("plateau(eval_loss, min_delta=-1)", "no number from 0 up"),
        ("plateau(eval_loss, min_delta=nan)", "no number from 0 up"),
        ("plateau(eval_loss, min_delta=x)", "write a number"),
        ("plateau(eval_loss, at_most=0)", "at_most must be more than 0"),
        ("plateau(eval_loss, at_most=none)", "is no time"),
        ("plateau(eval_loss, eval_acc)", "'eval_acc' is no argument of plateau"),
        ("plateau(metric=)", "needs a metric"),
        ("plateau", "needs a metric. Write plateau"),
        ("plateau(eval_loss, at_least=2ep, at_most=5step)", "at_least is longer than at_most"),
    ],
)
def test_bad_arguments(spec, message):
    with pytest.raises(ScheduleError, match=message):
        decide(spec, [])


@pytest.mark.parametrize(
    ("metric", "data", "message"),
    [
        (
            "accuracy",
            tiny_data(1),
            "'eval_accuracy' will not be .* has no compute_metrics, and reports eval_loss. Pass",
        ),
        ("eval_los", tiny_data(1), "'eval_los' will not .* or write plateau.eval_loss.. Did you mean 'eval_loss'"),
        ("eval_loss", {"a": tiny_data(1), "b": tiny_data(2)}, "its metrics begin with eval_a_, eval_b_. Write plat"),
        ("a_los", {"a": tiny_data(1)}, "reports eval_a_loss. .* Did you mean 'eval_a_loss'"),
    ],
)
def test_a_metric_that_cannot_be_reported_is_refused_before_training(make_trainer, metric, data, message):
    trainer = make_trainer(UnfreezeCallback(f"plateau({metric})"), **EVERY_2)
    trainer.eval_dataset = data
    before = hashes(trainer.model)
    with pytest.raises(ScheduleError, match=message):
        trainer.train()
    assert hashes(trainer.model) == before and trainer.state.global_step == 0


@pytest.mark.parametrize("metric", ["eval_a_loss", "a_runtime"])
def test_metrics_of_a_dict_of_data_sets(make_trainer, metric):
    trainer = make_trainer(
        UnfreezeCallback(f"plateau({metric}, patience=1, min_delta=9)"), **(EVERY_2 | {"max_steps": 5})
    )
    trainer.eval_dataset = {"a": tiny_data(1), "b": tiny_data(2)}
    trainer.train()
    assert [t[0] for t in transitions(trainer)] == [0, 4]


@pytest.mark.parametrize(
    ("arguments", "warned"),
    [
        ({"eval_strategy": "steps", "eval_steps": 8}, True),  # that at the end comes too late
        ({"eval_strategy": "steps", "eval_steps": 7}, False),
        ({"eval_strategy": "steps", "eval_steps": 3, "eval_delay": 7}, True),
        ({"eval_strategy": "epoch"}, False),  # 7 steps
        ({"eval_strategy": "epoch", "eval_delay": 1.1}, True),
    ],
)
def test_a_run_without_an_evaluation_to_go_by_is_told(make_trainer, recwarn, arguments, warned):
    trainer = make_trainer(UnfreezeCallback("plateau(eval_loss)"), max_steps=8, **arguments)
    trainer.train()
    evaluated = [record["step"] for record in trainer.state.log_history if "eval_loss" in record]
    assert any(step < 8 for step in evaluated) != warned
    told = [str(w.message) for w in recwarn if "will see no evaluation before the last of 8 steps" in str(w.message)]
    assert bool(told) == warned


def test_metrics_that_are_wrong():
    with pytest.raises(
        ScheduleError, match=r"'eval_los' was not in the evaluation. It has eval_acc, eval_loss. Did you"
    ):
        decide("plateau(eval_los)", [1.0, 1.0])
    with pytest.raises(ScheduleError, match="eval_loss is 'low', and plateau needs a number"):
        decide("plateau(eval_loss)", ["low"])


@pytest.mark.parametrize(
    ("spec", "best", "greater", "metric", "mode"),
    [
        ("plateau", "accuracy", True, "eval_accuracy", "max"),
        ("plateau", "eval_wer", False, "eval_wer", "min"),
        ("plateau(f1)", "loss", False, "eval_f1", "auto"),
        ("plateau(eval_loss, mode=max)", "loss", False, "eval_loss", "max"),
    ],
)
def test_the_trainers_best_metric_is_the_default(spec, best, greater, metric, mode):
    given = dict(with_metric(parse_schedule(spec), best, greater, True).arguments)
    assert (given["metric"], given["mode"]) == (metric, mode)


def test_a_default_that_takes_more_errors_as_better_is_refused(make_trainer):
    told = (
        r"greater_is_better=True takes more eval_wer as better.*greater_is_better=False; or plateau\(eval_wer, mode=max"
    )
    with pytest.raises(ScheduleError, match=told):  # which TrainingArguments fills in
        run(make_trainer, "plateau(wer)", metric_for_best_model="wer")
    given = dict(with_metric(parse_schedule("plateau(wer, mode=max)"), "wer", True, True).arguments)
    assert given["mode"] == "max"


@pytest.mark.parametrize(("metric", "falls"), [("eval_wer", True), ("eval_accuracy", False), ("eval_a_loss", True)])
def test_the_name_tells_which_way_is_better(metric, falls):
    decisions = Plateau(plateau(metric, patience=1), GROUPS, 100, 10)
    for step, value in enumerate([3.0, 2.0], 1):
        decisions.observe({metric: value}, step)
        decisions.advance(step)
    assert len(decisions.phases) == (1 if falls else 2)


def test_the_plan_says_that_data_decides():
    assert plan("plateau(eval_loss)") == [(0, "head")]
    model = tiny_bert()
    groups = layer_groups(model)
    schedule = plateau("eval_loss")
    rows = plan_rows(model, groups, schedule.phases(groups), 7, decided=schedule.decided(groups))
    assert [row.start_step for row in rows] == [0, None, None, None, None, None] and rows[-1].trainable == "all"
    assert "evaluations decide" in plan_table(rows, str(schedule)).caption


EVERY_2 = {"eval_strategy": "steps", "eval_steps": 2, "max_steps": 20}
VALUES = {2: 0.9, 4: 0.7, 6: 0.8, 8: 0.8, 10: 0.6, 12: 0.65, 14: 0.65, 16: 0.66, 18: 0.67, 20: 0.5}


class Snapshots(TrainerCallback):
    """Hashes of the weights with which each step begins."""

    def __init__(self):
        self.at = {}

    def on_step_begin(self, args, state, control, model, **kwargs):
        self.at[state.global_step] = hashes(model)


def run(make_trainer, spec, *callbacks, values=None, resume=None, **arguments):
    """Train with a metric that is written down in advance."""
    values = values or VALUES
    trainer = make_trainer(UnfreezeCallback(spec), *callbacks, **(EVERY_2 | arguments))
    trainer.compute_metrics = lambda prediction: {"script": values[trainer.state.global_step]}
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def transitions(trainer):
    keys = ("step", "unfreeze/trainable", "unfreeze/reason")
    return [tuple(r.get(key) for key in keys) for r in trainer.state.log_history if "unfreeze/phase" in r]


def test_a_run_opens_when_the_metric_says_so(make_trainer, capsys):
    trainer = run(make_trainer, "plateau(script, mode=min)", disable_tqdm=False)
    assert transitions(trainer) == [
        (0, "head", None),
        (8, "block[3], head", "eval_script 0.8 has not improved on 0.7 for 2 evaluations"),
        (14, "block[2:4], head", "eval_script 0.65 has not improved on 0.6 for 2 evaluations"),
        (18, "block[1:4], head", "eval_script 0.67 has not improved on 0.66 for 2 evaluations"),
    ]
    shown = " ".join(capsys.readouterr().out.split())
    assert "0.8 has not improved on 0.7" in shown and "evaluations decide when" in shown


STOP = "plateau(script, mode=min, stop=no_gain)"
RESTORE = "plateau(script, mode=min, restore_best=true)"


def test_going_back_to_the_best_weights(make_trainer):
    look = Snapshots()
    trainer = run(make_trainer, STOP, look)
    assert [t[:2] for t in transitions(trainer)] == [
        (0, "head"), (8, "block[3], head"), (14, "block[2:4], head"), (18, "block[3], head"),
    ]  # fmt: skip
    assert "best eval_script is still 0.6, at step 10 in phase 1; going back" in transitions(trainer)[-1][2]
    assert look.at[18] == look.at[10], "the weights of step 10 are back, those of block 2 as well"
    assert look.at[17] != look.at[10] and look.at[19] != look.at[18]
    stays = Snapshots()
    run(make_trainer, STOP.replace(")", ", back=false)"), stays)
    assert stays.at[18] != stays.at[10]


def test_best_weights_at_each_transition(make_trainer):
    look = Snapshots()
    trainer = run(make_trainer, RESTORE, look)
    assert [t[0] for t in transitions(trainer)] == [0, 8, 14, 18]
    assert look.at[8] == look.at[4] and look.at[14] == look.at[10] and look.at[18] == look.at[10]
    assert transitions(trainer)[1][2].endswith("; from the best weights, of step 4")


@pytest.mark.parametrize(("spec", "steps"), [(STOP, (12, 18)), (RESTORE, (8,))])
def test_resume_is_exact_also_at_transitions(make_trainer, tmp_path, spec, steps):
    whole = run(make_trainer, spec, save_strategy="steps", save_steps=2)
    for step in steps:
        again = run(make_trainer, spec, output_dir=str(tmp_path / f"again{step}"),
                    resume=str(tmp_path / "run" / f"checkpoint-{step}"))  # fmt: skip
        assert transitions(again) == transitions(whole), step
        assert hashes(again.model) == hashes(whole.model), step


def test_best_weights_include_statistics_of_batchnorm():
    model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.BatchNorm1d(4), torch.nn.Linear(4, 2))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    best = BestWeights(dict(model.named_parameters()), model.named_buffers())
    best.update()
    best.take()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model(torch.randn(8, 4)).sum().backward()
    optimizer.step()
    best.restore()
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_a_loop_of_ones_own():
    model = tiny_bert()
    unfreezer = Unfreezer(model, torch.optim.AdamW(model.parameters()), "plateau(accuracy, patience=1)")
    seen = []
    for step, accuracy in enumerate([0.5, 0.6, 0.6, 0.7]):
        seen.append(unfreezer.step(step))
        unfreezer.observe({"accuracy": accuracy})
    assert [transition and transition.trainable for transition in seen] == ["head", None, None, "block[3], head"]
    unfreezer.close()
    assert all(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize(
    ("spec", "arguments", "message"),
    [
        ("plateau(eval_loss)", {"eval_strategy": "no"}, "needs evaluations. Set eval_strategy='epoch'"),
        ("plateau", {}, "needs a metric. Write plateau"),
        ("plateau(acuracy)", {}, "'eval_acuracy' was not in the evaluation. It has .*eval_loss.*eval_script"),
    ],
)
def test_what_cannot_work_is_refused(make_trainer, spec, arguments, message):
    with pytest.raises(UnfreezeError, match=message):
        run(make_trainer, spec, **arguments)


def test_a_checkpoint_without_best_weights_is_refused(make_trainer, tmp_path):
    run(make_trainer, "plateau(script, mode=min)", save_strategy="steps", save_steps=4)
    with pytest.raises(UnfreezeError, match=r"has no unfreeze_best\.safetensors: it was written with stop=none"):
        run(make_trainer, RESTORE, output_dir=str(tmp_path / "again"), resume=str(tmp_path / "run" / "checkpoint-8"))


def test_other_evaluations_come_first(make_trainer):
    """The second of two data sets decides, and a callback evaluates the training data before both."""

    class OnTraining(TrainerCallback):
        def on_epoch_end(self, args, state, control, **kwargs):
            if not control.should_training_stop:
                trainer.evaluate(trainer.train_dataset, metric_key_prefix="train")

    trainer = make_trainer(UnfreezeCallback("plateau(eval_b_loss, patience=1)"), OnTraining(), eval_strategy="epoch")
    trainer.eval_dataset = dict.fromkeys("ab", trainer.train_dataset)
    trainer.train()
    assert any("train_loss" in record and "train_runtime" in record for record in trainer.state.log_history)
    assert trainer.state.global_step == 21
