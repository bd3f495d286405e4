"""Gradients decide which block opens, and measuring them leaves no trace in the run."""

from __future__ import annotations

import copy
import math
import random
import warnings
from functools import partial

import pytest
import torch
from conftest import EXAMPLES, hashes, tiny_bert
from test_schedule import plan
from transformers import TrainerCallback, default_data_collator

from hf_unfreeze import UnfreezeCallback, UnfreezeError, Unfreezer, parse_schedule
from hf_unfreeze import criteria as module
from hf_unfreeze._outputs import group_modules, outputs_of
from hf_unfreeze._probe import Probe, Prober
from hf_unfreeze.criteria import Evidence, register_criterion
from hf_unfreeze.errors import ScheduleError
from hf_unfreeze.schedule import auto

BUILT_IN = [*module._CRITERIA]
pytestmark = [
    pytest.mark.filterwarnings("ignore:schedule .* will not reach:UserWarning"),
    pytest.mark.filterwarnings("ignore:.* measures on .* batches at each choice:UserWarning"),
]


@pytest.fixture(autouse=True)
def own_criteria(monkeypatch):
    """Criteria that choose by position, and one that uses every random state there is."""
    monkeypatch.setattr(module, "_CRITERIA", dict(module._CRITERIA))

    def top(evidence: Evidence) -> float:
        torch.rand(3), random.random()
        return int(evidence.name[6:-1])

    register_criterion("top", top)
    register_criterion("bottom", lambda evidence: -top(evidence))
    register_criterion("nothing", lambda evidence: math.nan)


def run(make_trainer, spec, resume=None, prepare=lambda trainer: None, **arguments):
    trainer = make_trainer(UnfreezeCallback(spec), **arguments)
    prepare(trainer)
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def opened(trainer):
    return [(r["step"], r["unfreeze/trainable"]) for r in trainer.state.log_history if "unfreeze/phase" in r]


@pytest.mark.parametrize(
    ("name", "function", "message"),
    [
        ("my criterion", module.fisher, "criterion='my criterion' is no word. Write it without spaces"),
        ("a,b", module.fisher, "is no word"),
        ("", module.fisher, "needs a criterion"),
        (3, module.fisher, "criterion=3 is of no use"),
        ("fisher", module.cka, "'fisher' is a criterion that is built in. .*such as my_fisher"),
        ("mine", 0.5, "criterion 'mine': 0.5 is no function"),
    ],
)
def test_a_name_that_cannot_be_used_is_refused_when_it_is_given(name, function, message):
    known = dict(module._CRITERIA)
    with pytest.raises(ScheduleError, match=message):
        register_criterion(name, function)
    assert known == module._CRITERIA


def test_the_same_criterion_and_one_of_your_own_may_be_given_again():
    register_criterion("cka", module.cka, outputs=True)
    register_criterion("top", module.fisher)
    assert module.find_criterion("top").function is module.fisher


def test_the_spec_is_the_function():
    assert auto("fisher", blocks=2, every="20%") == parse_schedule("auto(fisher, blocks=2, every=20%)")
    assert parse_schedule(str(auto("fisher"))) == auto("fisher")
    assert plan("auto(fisher, every=5step)") == plan("gradual(every=5step)"), "the plan tells times and sizes"


@pytest.mark.parametrize("arguments", [{}, {"gradient_accumulation_steps": 2}])
@pytest.mark.parametrize("criterion", ["top", "nothing"])
def test_always_choosing_the_top_equals_the_timed_run(make_trainer, criterion, arguments):
    arguments = {"max_steps": 9, **arguments}
    ours = run(make_trainer, f"auto({criterion}, every=2step, batches=2)", **arguments)
    timed = run(make_trainer, "gradual(every=2step)", **arguments)
    assert opened(ours) == opened(timed)
    assert hashes(ours.model) == hashes(timed.model)


def test_what_the_criterion_chooses_opens_and_the_record_says_why(make_trainer):
    trainer = run(make_trainer, "auto(bottom, every=2step, blocks=2)", max_steps=7)
    assert opened(trainer) == [(0, "head"), (2, "block[0:2], head"), (4, "block[0:4], head"), (6, "all")]
    reasons = [r.get("unfreeze/reason") for r in trainer.state.log_history if "unfreeze/phase" in r]
    assert reasons == [None, "bottom: block[0] 0, block[1] -1; next block[2] -2", None, None]


@pytest.mark.parametrize("criterion", ["validation_gradient", "gradient_snr"])
def test_resume_is_exact_at_and_after_a_choice(make_trainer, tmp_path, criterion):
    spec = f"auto({criterion}, every=2step)"
    whole = run(make_trainer, spec, max_steps=6, save_strategy="steps", save_steps=1)
    for step in (2, 3):
        again = run(make_trainer, spec, str(tmp_path / "run" / f"checkpoint-{step}"), max_steps=6,
                    output_dir=str(tmp_path / f"again{step}"))  # fmt: skip
        assert opened(again) == opened(whole) and hashes(again.model) == hashes(whole.model), step


@pytest.mark.parametrize("criterion", BUILT_IN)
def test_every_criterion_gives_finite_numbers(make_trainer, criterion):
    trainer = run(make_trainer, f"auto({criterion}, every=1step)", max_steps=2)
    told = next(r["unfreeze/reason"] for r in trainer.state.log_history if "unfreeze/reason" in r)
    assert told.startswith(f"{criterion}: block[") and "nan" not in told and "inf" not in told


def evidence(weights, gradients, squares, steps=(), validation=()):
    as_tensors = [[torch.tensor(x)] for x in (weights, gradients, squares)]
    return Evidence("block[0]", *as_tensors, [torch.tensor(steps)], [torch.tensor(validation)], 2)


def test_the_numbers_are_those_of_the_formulas():
    known = evidence([3.0, 4.0], [0.6, 0.8], [1.0, 1.0], [1.0, -1.0], [0.5, 0.25])
    assert module.relative_gradient_norm(known) == pytest.approx(0.2)
    assert module.gradient_snr(known) == pytest.approx(1.0 / (2.0 - 1.0))
    assert module.fisher(known) == pytest.approx(2.0)
    assert module.validation_gradient(known) == pytest.approx(0.25)
    torch.manual_seed(0)
    noise = torch.randn(60, 60)
    spike = noise + 5 * torch.outer(torch.randn(60), torch.randn(60))
    wide, low = (module.spectrum_snr(Evidence("", [w], [], [], [], [], 1)) for w in (spike, noise))
    assert wide != low and math.isnan(module.spectrum_snr(Evidence("", [torch.ones(3)], [], [], [], [], 1)))


def test_change_of_the_gradient_is_that_of_its_norm_relative_to_before():
    def change(norm, before):
        return module.gradient_change(Evidence("", [], [], [], [], [], 2, norm, before))

    assert change(3.0, 4.0) == change(5.0, 4.0) == 0.25
    assert all(math.isnan(change(3.0, before)) for before in (0.0, math.nan))


def similarity(rows, other):
    """Linear CKA by the definition, from the centred matrices of inner products."""
    centre = torch.eye(len(rows), device=rows.device) - 1 / len(rows)
    first, second = (centre @ x @ x.T @ centre for x in (rows, other))
    return float((first * second).sum() / (first.norm() * second.norm()))


def test_cka_is_that_of_the_definition_and_blind_to_rotation_and_size():
    generator = torch.Generator().manual_seed(0)
    rows, other = torch.randn(40, 6, generator=generator), torch.randn(40, 6, generator=generator)
    rotation = torch.linalg.qr(other[:6])[0]

    def moved(output, pretrained):
        return module.cka(Evidence("", [], [], [], [], [], 1, output=output, pretrained=pretrained))

    assert moved(rows, other) == pytest.approx(1 - similarity(rows, other), abs=1e-5)
    assert 0.3 < moved(rows, other) < 1
    assert moved(3 * rows @ rotation + 1, rows) == pytest.approx(0, abs=1e-6) and moved(rows, rows.clone()) == 0
    assert math.isnan(moved(rows, torch.ones(40, 6))) and math.isnan(module.cka(evidence([1.0], [1.0], [1.0])))


def test_outputs_of_blocks_are_compared_with_the_model_that_the_run_began_with(make_trainer, tmp_path):
    """By hand: the models at the first and at the fourth step, the batch that the probe draws, and CKA as defined."""
    models = {}

    class Look(TrainerCallback):
        def on_step_begin(self, args, state, control, model, **kwargs):
            models[state.global_step] = copy.deepcopy(model).eval()

    spec, saved = "freeze_converged(cka, every=4step)", {"save_strategy": "steps", "save_steps": 2}
    trainer = make_trainer(UnfreezeCallback(spec), Look(), max_steps=5, **saved)
    trainer.train()
    (record,) = (r for r in trainer.state.log_history if "unfreeze/worth" in r)
    drawn = torch.randperm(EXAMPLES, generator=torch.Generator().manual_seed(3))[:4].tolist()
    ids = torch.stack([trainer.train_dataset[i]["input_ids"] for i in drawn])
    with torch.no_grad():
        first, fourth = (
            models[step].bert(ids.to(models[step].device), output_hidden_states=True).hidden_states[1:]
            for step in (0, 4)
        )
    for block, (before, now) in enumerate(zip(first, fourth, strict=True)):
        expected = float(1 - similarity(now.flatten(0, 1), before.flatten(0, 1)))
        assert record["unfreeze/worth"][f"block[{block}]"] == pytest.approx(expected, abs=1e-5) and expected > 1e-4
    again = run(make_trainer, spec, str(tmp_path / "run" / "checkpoint-2"), max_steps=5, output_dir=str(tmp_path / "a"))
    assert record in again.state.log_history and hashes(again.model) == hashes(trainer.model)


def test_channels_of_an_image_are_features():
    layers = torch.nn.Sequential(torch.nn.Conv2d(3, 5, 1), torch.nn.Flatten(), torch.nn.Linear(20, 2))
    found = outputs_of({"block[0]": layers[0], "block[1]": layers[2]}, lambda: layers(torch.ones(4, 3, 2, 2)))
    assert {name: tuple(rows.shape) for name, rows in found.items()} == {"block[0]": (16, 5), "block[1]": (4, 2)}
    with pytest.raises(ScheduleError, match=r"block\[0\] and block\[1\] are no modules of their own"):
        group_modules(layers, {"block[0]": ["0.weight"], "block[1]": ["0.bias"]})


@pytest.mark.parametrize(("per", "first"), [("block", "block[3]"), ("parameter", "block[1]")])
def test_worth_by_block_or_by_parameter(per, first):
    sizes = {f"block[{i}]": {f"{i}": torch.nn.Parameter(torch.ones(10 * i))} for i in range(1, 4)}
    parameters = [p for block in sizes.values() for p in block.values()]
    probe = Probe(lambda model, batch: sum(p.sum() for p in parameters) * batch, lambda count: [1.0] * count)
    register_criterion("root", lambda evidence: module.fisher(evidence) ** 0.5)
    worth = Prober(torch.nn.Module(), sizes, torch.optim.SGD(parameters), auto("root", per=per), probe, 1000)([*sizes])
    assert max(worth, key=worth.__getitem__) == first


def test_what_measuring_may_cost():
    """8 batches, or 5 % of those trained on; validation batches count; below 2 a warning."""
    model = torch.nn.Linear(2, 1)
    probe = Probe(lambda model, batch: model(batch).sum(), list, list, per_step=2)
    members = {"block[0]": dict(model.named_parameters())}

    def prober(criterion, interval):
        return Prober(model, members, torch.optim.SGD(model.parameters()), auto(criterion), probe, interval)

    assert [prober("fisher", steps).batches for steps in (20, 50, 80, 1000)] == [2, 5, 8, 8]
    assert prober("validation_gradient", 80).batches == 4 and prober("validation_gradient", 80).cost == 0.05
    with pytest.warns(UserWarning, match="on 4 batches at each choice and trains on 20 until the next: it costs 20%"):
        assert prober("validation_gradient", 10).batches == 2


def test_no_evaluation_sets_are_no_validation_data(make_trainer):
    trainer = make_trainer(UnfreezeCallback("gradual"), max_steps=1)
    trainer.eval_dataset = {}
    trainer.train()
    with pytest.raises(UnfreezeError, match="needs validation data"):
        run(make_trainer, "auto(validation_gradient)", prepare=lambda trainer: setattr(trainer, "eval_dataset", {}))


def test_measuring_leaves_no_trace():
    model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.BatchNorm1d(4), torch.nn.Dropout(0.5))
    model[0].requires_grad_(False)
    model[2].eval()
    optimizer = torch.optim.AdamW(model.parameters())
    state = {name: value.clone() for name, value in model.state_dict().items()}

    def batches(count):
        return [torch.rand(8, 4) + random.random() for _ in range(count)]

    probe = Probe(lambda model, batch: model(batch).square().sum(), batches)
    members = {"block[0]": {f"0.{name}": parameter for name, parameter in model[0].named_parameters()}}
    prober = Prober(model, members, optimizer, auto("fisher", batches=4), probe, 60)
    assert prober.batches == 3
    before = torch.random.get_rng_state(), random.getstate()
    assert prober(["block[0]"])["block[0]"] > 0
    assert torch.equal(before[0], torch.random.get_rng_state()) and before[1] == random.getstate()
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert [m.training for m in model] == [True, True, False]
    assert [p.requires_grad for p in model.parameters()] == [False, False, True, True]
    assert all(p.grad is None for p in model.parameters()) and not optimizer.state


def test_the_damaged_block_is_found():
    """One step of plain gradient descent repairs a shifted bias: validation agrees with the training gradient there."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(*(torch.nn.Linear(6, 6) for _ in range(4)))
    inputs = torch.randn(64, 6)
    targets = model(inputs).detach()
    members = {f"block[{i}]": {f"{i}.{n}": p for n, p in layer.named_parameters()} for i, layer in enumerate(model)}
    with torch.no_grad():
        model[3].bias += 1.0
    probe = Probe(
        lambda model, part: (model(inputs[part]) - targets[part]).square().mean(),
        lambda count: [slice(8 * n, 8 * n + 8) for n in range(count)],
        lambda count: [slice(32 + 8 * n, 40 + 8 * n) for n in range(count)],
    )
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    worth = Prober(model, members, optimizer, auto("validation_gradient", batches=4), probe, 1000)(list(members))
    assert max(worth, key=worth.__getitem__) == "block[3]"


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("auto(fischer)", "'fischer' is no criterion. There are .*Did you mean 'fisher'"),
        ("auto", r"auto needs a criterion, which has no default. Write auto\(relative_gradient_norm\)"),
        ("auto(fisher, per=weight)", "per=weight is none of block, parameter"),
        ("auto(fisher, batches=0)", "batches must be more than 0"),
        ("auto(validation_gradient)", "needs validation data. Pass eval_dataset"),
    ],
)
def test_what_cannot_work_is_refused_before_training(make_trainer, spec, message):
    with pytest.raises(UnfreezeError, match=message):
        run(make_trainer, spec, prepare=lambda trainer: setattr(trainer, "eval_dataset", None))


def test_a_loop_without_batches_to_measure_on():
    model = tiny_bert()
    with pytest.raises(ScheduleError, match="needs batches to measure on"):
        Unfreezer(model, torch.optim.AdamW(model.parameters()), "auto(fisher, every=1step)")
    assert "train" not in vars(model)


def test_the_cache_is_refused_beside_auto(make_trainer):
    trainer = make_trainer(UnfreezeCallback("auto(top, every=1ep)", cache="memory"))
    with pytest.raises(UnfreezeError, match="Write cache=None, or another schedule"):
        trainer.train()
    assert not [name for module in trainer.model.modules() for name in ("train", "forward") if name in vars(module)]


class Masks:
    """Collates, and hides tokens at random as masked language modelling does."""

    def __init__(self, generator=None):
        self.generator = generator

    def __call__(self, examples):
        batch = default_data_collator(examples)
        hidden = torch.rand(batch["input_ids"].shape, generator=self.generator) < 0.5
        return {**batch, "input_ids": batch["input_ids"].masked_fill(hidden, 0)}

    def collate(self, examples):
        return self(examples)


COLLATORS = {
    "the state of torch": Masks,
    "its own": lambda: Masks(torch.Generator().manual_seed(7)),
    "that of a method": lambda: Masks(torch.Generator().manual_seed(7)).collate,
    "that of a part": lambda: partial(Masks.collate, Masks(torch.Generator().manual_seed(7))),
}


@pytest.mark.parametrize("collator", COLLATORS.values(), ids=COLLATORS)
def test_measuring_sees_the_same_masks_and_draws_none_of_the_runs(make_trainer, collator):
    def train(spec, **arguments):
        return run(
            make_trainer, spec, prepare=lambda trainer: vars(trainer).update(data_collator=collator()), **arguments
        )

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # measures too often
        still = train("freeze_converged(gradient_change, every=2step)", learning_rate=0.0, max_steps=5)
        measured = train("freeze_converged(spectrum_snr, percentile=1, every=2step)", max_steps=5)
    found = [r["unfreeze/worth"] for r in still.state.log_history if r.get("unfreeze/worth")]
    assert len(found) == 2 and not any(worth for values in found for worth in values.values())
    assert hashes(measured.model) == hashes(train("all_at_once", max_steps=5).model)
