"""Wrong input that no other file covers: each is refused with the cure, and the model is left as it was.

Schedules: test_schedule.py. Options: test_regularization.py. Trainer: test_engine.py. Checkpoints: test_resume.py.
"""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
import torch
from conftest import tiny_bert
from torch import nn

from hf_unfreeze import (
    UnfreezeCallback,
    UnfreezeError,
    Unfreezer,
    criteria,
    layer_groups,
    param_groups_layer_decay,
    parse_schedule,
    set_trainable,
)
from hf_unfreeze.errors import OptimizerError, ScheduleError, StructureError
from hf_unfreeze.report import timeline
from hf_unfreeze.schedule import (
    Time,
    auto,
    auto_rates,
    freeze_converged,
    freeze_out,
    gradual,
    learn_rates,
    linear_probe,
    plateau,
    rotate,
    top,
)
from hf_unfreeze.unfreezer import Probe


def unfreezer(schedule="gradual(every=1step)", **options):
    model = tiny_bert()
    return Unfreezer(model, torch.optim.AdamW(model.parameters()), schedule, **options)


CASES = {
    "a name for a model": (lambda: layer_groups("bert-base-uncased"), StructureError, "is a torch.nn.Module, not str"),
    "a config for a model": (lambda: layer_groups(tiny_bert().config), StructureError, "not BertConfig"),
    "weights for a model": (lambda: layer_groups(tiny_bert().state_dict()), StructureError, "not OrderedDict"),
    "nothing for a model": (lambda: layer_groups(None), StructureError, "not NoneType"),
    "a model without parameters": (lambda: layer_groups(nn.ReLU()), StructureError, "has no parameters"),
    "no optimizer": (lambda: Unfreezer(tiny_bert(), None), OptimizerError, "NoneType is no torch.optim.Optimizer"),
    "a scheduler for an optimizer": (
        lambda: Unfreezer(tiny_bert(), torch.optim.lr_scheduler.LambdaLR),
        OptimizerError,
        "is no torch.optim.Optimizer",
    ),
    "epochs without their length": (lambda: unfreezer("all@0, -head@1ep"), ScheduleError, "needs steps_per_epoch"),
    "a share without the whole": (lambda: unfreezer("all@0, -head@5%"), ScheduleError, "needs total_steps"),
    "a warm-up without the whole": (
        lambda: unfreezer("all@0", block_warmup="5%"),
        ScheduleError,
        "needs total_steps",
    ),
    "asked before the first step": (lambda: unfreezer().transition, UnfreezeError, r"Call step\(global_step\)"),
    "the optimizer for the model": (
        lambda: Unfreezer(torch.optim.AdamW(tiny_bert().parameters()), tiny_bert()),
        StructureError,
        "not AdamW. Give the model first",
    ),
    "an evaluation at no step": (lambda: unfreezer().observe({}, "3"), UnfreezeError, "global_step='3' is no whole"),
    "selectors that match nothing": (lambda: set_trainable(tiny_bert(), "hed"), ScheduleError, "Did you mean 'head'"),
    "selectors that leave nothing": (
        lambda: set_trainable(tiny_bert(), "-all"),
        ScheduleError,
        r"^selection '-all' trains nothing from step 0 on\. .* for instance head or block\[-1\]\.$",
    ),
    "selectors with times": (
        lambda: set_trainable(tiny_bert(), "embeddings, -head@0"),
        ScheduleError,
        r"^selection 'embeddings, -head@0' cannot be read\.\n  entry 2: '-head@0' has a time, and selectors have "
        r"none\. Write -head\.$",
    ),
    "selectors that cannot be read": (
        lambda: set_trainable(tiny_bert(), "head, layer[0]"),
        ScheduleError,
        r"^selection 'head, layer\[0\]' cannot be read\.\n  entry 2: only blocks have an index",
    ),
    "selectors of another model": (
        lambda: set_trainable(tiny_bert(), "-hed, head"),
        ScheduleError,
        r"^selection '-hed, head' does not fit the model\.\n  -hed: hed matches nothing",
    ),
    "no selectors": (lambda: set_trainable(tiny_bert(), ""), ScheduleError, "is no selector"),
    "selectors as a list": (lambda: set_trainable(tiny_bert(), ["head"]), ScheduleError, "selectors are a string"),
    "a decay of 2": (lambda: param_groups_layer_decay(tiny_bert(), 1e-3, layer_decay=2), UnfreezeError, "outside"),
    "an empty history": (lambda: timeline([]), UnfreezeError, "no lr/<group> records"),
    "a metric that is not there": (
        lambda: timeline([{"step": 1, "lr/head": 0.1, "loss": 1.0}], metric="eval_f2"),
        UnfreezeError,
        "'eval_f2' is not in this run",
    ),
    "a fifteenth of an epoch": (
        lambda: Time(Fraction(1, 15), "ep"),
        ScheduleError,
        "1/15ep has no end as a decimal. .* 0.06667ep",
    ),
    "a time as a float": (lambda: Time(1.5, "ep"), ScheduleError, r"or a Fraction, not 1\.5\. Write Time\.parse"),
    "a time as text": (lambda: Time("1ep"), ScheduleError, "a time is a whole number or a Fraction, not '1ep'"),
    "a time as a truth": (lambda: Time(True), ScheduleError, "not True"),
    "a time before 0": (lambda: Time(Fraction(-1)), ScheduleError, r"-1step lies before the run\. Write 0 or more"),
    "a time in epochs": (
        lambda: Time(Fraction(3), "epochs"),
        ScheduleError,
        r"'epochs' in .* is no unit\. Units are step, ep and %\. Did you mean ep\?",
    ),
    "nothing in epochs": (lambda: Time(Fraction(0), "epochs"), ScheduleError, "is no unit"),
    "a time without any unit": (lambda: Time(Fraction(3), None), ScheduleError, "None in .* is no unit"),
    "a step before the first": (
        lambda: unfreezer().step(-1),
        UnfreezeError,
        "global_step=-1 is no whole number from 0",
    ),
    "half a step": (lambda: unfreezer().step(1.5), UnfreezeError, "global_step=1.5 is no whole number"),
    "a step as text": (lambda: unfreezer().step("3"), UnfreezeError, "global_step='3' is no whole number"),
    "no step": (lambda: unfreezer().step(None), UnfreezeError, "global_step=None is no whole number"),
    "a run of less than nothing": (lambda: unfreezer(total_steps=-5), UnfreezeError, "total_steps=-5 is no whole"),
    "epochs without a step": (lambda: unfreezer(steps_per_epoch=0), UnfreezeError, "steps_per_epoch=0 .* from 1 up"),
    "epochs of 2.5 steps": (lambda: unfreezer(steps_per_epoch=2.5), UnfreezeError, "steps_per_epoch=2.5 is no whole"),
    "a metric without a name": (
        lambda: unfreezer("plateau(eval_loss)").observe(0.5),
        UnfreezeError,
        r"metrics are a dict such as \{'eval_loss': 0.5\}, not 0.5",
    ),
    "a state that is none": (
        lambda: unfreezer().load_state_dict({}),
        UnfreezeError,
        "dict is no state of an Unfreezer",
    ),
    "weight decay as a number": (
        lambda: UnfreezeCallback(group_weight_decay=0.1),
        UnfreezeError,
        "'0.1' is no selector=number",
    ),
    "no rate": (lambda: param_groups_layer_decay(tiny_bert(), lr=None), UnfreezeError, "lr=None is no number from 0"),
    "a rate below 0": (lambda: param_groups_layer_decay(tiny_bert(), lr=-1.0), UnfreezeError, "lr=-1.0 is no number"),
    "a time of 5,000 digits": (lambda: parse_schedule(f"all@0, -head@{'9' * 5000}step"), ScheduleError, "is no time"),
    "an index of 5,000 digits": (lambda: parse_schedule(f"block[{'9' * 5000}]@0"), ScheduleError, "is no index"),
    "blocks of 5,000 digits": (
        lambda: parse_schedule(f"gradual(blocks={'9' * 5000})"),
        ScheduleError,
        "write a whole number",
    ),
    "times as numbers": (
        lambda: gradual(every=100),
        ScheduleError,
        r"gradual: every=100 is of no use\. Write for instance every=1ep\.",
    ),
    "no time": (lambda: gradual(every=None), ScheduleError, "every=None is of no use"),
    "a time without a unit": (
        lambda: gradual(every="1"),
        ScheduleError,
        "every=1 is of no use. 1 has no unit",
    ),
    "a probe of one": (lambda: linear_probe(until=1), ScheduleError, "Write for instance until=1ep"),
    "turns of 20": (lambda: rotate(every=20), ScheduleError, "Write for instance every=20step"),
    "a choice at each 5": (lambda: auto("fisher", every=5), ScheduleError, "every=5 is of no use"),
    "convergence at each 5": (lambda: freeze_converged(every=5), ScheduleError, "every=5 is of no use"),
    "rates at each 5": (lambda: auto_rates(every=5), ScheduleError, "every=5 is of no use"),
    "learning at each 5": (lambda: learn_rates(every=5), ScheduleError, "every=5 is of no use"),
    "patience without end": (lambda: plateau(at_most=3), ScheduleError, "Write for instance at_most=3ep"),
    "patience from 0": (lambda: plateau(at_least=0), ScheduleError, "Write for instance at_least=1ep"),
    "a gain of None": (lambda: plateau(min_delta=None), ScheduleError, "Write for instance min_delta=0.0"),
    "a metric as a number": (lambda: plateau(3), ScheduleError, "Write for instance metric=eval_loss"),
    "half as a word": (lambda: top("half"), ScheduleError, r"top: share='half' is of no use\. .* share=0\.5"),
    "a share beyond floats": (lambda: top(10**400), ScheduleError, "is of no use"),
    "yes for a share": (lambda: top(True), ScheduleError, "share=True is of no use"),
    "a first of x": (lambda: freeze_out("x"), ScheduleError, "first='x' is of no use"),
    "a start of None": (lambda: learn_rates(start=None), ScheduleError, "start=None is of no use"),
    "a schedule as bytes": (lambda: parse_schedule(b"gradual"), ScheduleError, "a string or a Schedule"),
    "a schedule as a class": (lambda: UnfreezeCallback(int), ScheduleError, "a string or a Schedule"),
}


@pytest.mark.parametrize("case", CASES)
def test_wrong_input_is_refused_with_the_cure(case):
    wrong, error, message = CASES[case]
    with pytest.raises(error, match=message):
        wrong()


def test_a_second_one_closes_the_first_and_tells_both():
    model = tiny_bert()
    optimizer = torch.optim.AdamW(model.parameters())
    first = Unfreezer(model, optimizer, "head@0")
    first.step(0)
    with pytest.raises(ScheduleError):
        Unfreezer(model, optimizer, "block[@0")
    assert not model.bert.encoder.layer[3].output.dense.weight.requires_grad and "train" in vars(model)
    with pytest.warns(UserWarning, match="an earlier Unfreezer was still at work on this model, and is closed now"):
        second = Unfreezer(model, optimizer, "block[-1]@0")
    with pytest.raises(UnfreezeError, match="this Unfreezer is closed"):
        first.step(1)
    second.step(0)
    first.close()
    open_now = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert open_now == {name for name, _ in model.named_parameters() if ".layer.3." in name}
    second.close()
    assert all(parameter.requires_grad for parameter in model.parameters()) and "train" not in vars(model)
    Unfreezer(model, optimizer, "block[-1]@0").close()


@pytest.mark.parametrize("number", [torch.tensor(0.5), torch.tensor([0.5]), np.float32(0.5), np.float64(0.5), 0.5])
def test_a_metric_may_be_a_tensor_or_of_numpy(number):
    engine = unfreezer("plateau(eval_loss, patience=1)")
    for step in range(4):
        engine.step(step)
        engine.observe({"eval_loss": number, "eval_name": "text", "eval_rows": torch.zeros(2)})
    assert [phase.start for phase in engine.phases] == [0, 2, 3]
    engine.close()


@pytest.mark.filterwarnings("ignore:.* measures on .* batches at each choice:UserWarning")
@pytest.mark.parametrize(
    "spec", ["head@0", "rotate(every=5%)", "freeze_out", "freeze_converged", "auto_rates(fisher, every=5%)"]
)
def test_a_run_of_no_steps_is_told_and_ends(make_trainer, spec):
    trainer = make_trainer(UnfreezeCallback(spec), num_train_epochs=0)
    with pytest.warns(UserWarning, match="will not reach: .* at step 0.* The run has 0 steps"):
        trainer.train()
    assert all(parameter.requires_grad for parameter in trainer.model.parameters())


def test_a_metric_that_is_not_a_number_disturbs_nothing(make_trainer):
    trainer = make_trainer(UnfreezeCallback("gradual(every=10%)"), eval_strategy="epoch")
    trainer.compute_metrics = lambda prediction: {"score": float("nan")}
    trainer.train()
    assert timeline(trainer, metric="eval_score").axes


def test_an_empty_evaluation_set_is_the_trainers_affair(make_trainer):
    trainer = make_trainer(UnfreezeCallback("gradual(every=10%)"), eval_strategy="epoch")
    trainer.eval_dataset = []
    plain = make_trainer(eval_strategy="epoch")
    plain.eval_dataset = []
    trainer.train()
    plain.train()
    evaluated = [[r for r in run.state.log_history if "eval_runtime" in r] for run in (trainer, plain)]
    assert [len(records) for records in evaluated] == [3, 3]


@pytest.mark.parametrize("value", [None, "high", torch.zeros(2)])
def test_a_criterion_that_returns_no_number_is_named(monkeypatch, value):
    monkeypatch.setattr(criteria, "_CRITERIA", dict(criteria._CRITERIA))
    criteria.register_criterion("odd", lambda evidence: value)
    model = tiny_bert()
    batch = {"input_ids": torch.ones(2, 4, dtype=torch.long), "labels": torch.zeros(2, dtype=torch.long)}
    probe = Probe(lambda model, batch: model(**batch).loss, lambda count: [batch] * count)
    engine = Unfreezer(model, torch.optim.AdamW(model.parameters()), "auto(odd, every=99step)", probe=probe)
    engine.step(0)
    with pytest.raises(ScheduleError, match=r"criterion 'odd' returned .* for block.*Return one number"):
        engine.step(99)
    engine.close()
