"""Every optimizer and scheduler the Trainer knows: exact with a schedule, or refused with the reason."""

from __future__ import annotations

import pytest
import torch
from conftest import hashes, tiny_bert
from transformers import Adafactor, SchedulerType, Trainer, TrainerCallback
from transformers.training_args import OptimizerNames

from hf_unfreeze import UnfreezeCallback, Unfreezer, layer_groups, param_groups_layer_decay
from hf_unfreeze.errors import OptimizerError

SCHEDULE = "head@0, block[-1]@1step, all@2step, -block[0]@4step"
LOW_RANK = {"optim_target_modules": ["attention.self"], "optim_args": "rank=4,update_proj_gap=2"}
BNB = ["adamw_bnb_8bit", "adamw_8bit", "ademamix", "ademamix_8bit", "lion_8bit", "lion_32bit", "paged_adamw_32bit",
       "paged_adamw_8bit", "paged_ademamix_32bit", "paged_ademamix_8bit", "paged_lion_32bit", "paged_lion_8bit",
       "rmsprop_bnb", "rmsprop_bnb_8bit", "rmsprop_bnb_32bit"]  # fmt: skip

# The package each one needs besides torch and transformers, and arguments.
EXACT: dict[str, tuple[str | None, dict]] = {
    "adamw_torch": (None, {}),
    "adamw_torch_fused": (None, {}),
    "adafactor": (None, {}),
    "sgd": (None, {"optim_args": "momentum=0.9"}),
    "adagrad": (None, {}),
    "rmsprop": (None, {"optim_args": "momentum=0.9"}),
    "adamw_torch_4bit": ("torchao", {}),
    "adamw_torch_8bit": ("torchao", {}),
    "stable_adamw": ("optimi", {}),
    **dict.fromkeys(BNB, ("bitsandbytes", {})),
}
# Exact while nothing interrupts; the Trainer itself cannot load the checkpoint of a run with one of these, or goes on
# from it otherwise than the uninterrupted run, with or without us.
NOT_RESUMED = {
    "galore_adamw": ("galore_torch", LOW_RANK),
    "galore_adafactor": ("galore_torch", LOW_RANK),
    "apollo_adamw": ("apollo_torch", LOW_RANK),
}
REFUSED = {
    "galore_adamw_layerwise": ("galore_torch", LOW_RANK, "inside the backward pass"),
    "apollo_adamw_layerwise": ("apollo_torch", LOW_RANK, "inside the backward pass"),
    "lomo": ("lomo_optim", {}, "inside the backward pass"),
    "grokadamw": ("grokadamw", {}, "clips each param group as one"),
    "schedule_free_radam": ("schedulefree", {}, "one averaging state for a whole param group"),
    "schedule_free_adamw": ("schedulefree", {}, "one averaging state for a whole param group"),
    "schedule_free_sgd": ("schedulefree", {}, "one averaging state for a whole param group"),
}
# Where a CPU cannot go. Apex's, layer-wise ones and AdaLomo are refused by the names of their classes; the next three
# keep state per parameter, as all of EXACT do; the Trainer itself cannot build GaLore's layer-wise Adafactor.
ELSEWHERE = {"adamw_apex_fused", "adamw_torch_xla", "adamw_torch_npu_fused", "adamw_anyprecision", "galore_adamw_8bit",
             "galore_adamw_8bit_layerwise", "galore_adafactor_layerwise", "adalomo"}  # fmt: skip


def wide():
    """Large enough for states of 8 bits, which begin at 4096 numbers."""
    return tiny_bert(num_hidden_layers=2, hidden_size=64, intermediate_size=64)


def run(make_trainer, optimizer, *callbacks, resume=None, **arguments):
    trainer = make_trainer(*callbacks, model=wide(), optim=optimizer, max_steps=6, **arguments)
    trainer.train(resume_from_checkpoint=resume)
    return hashes(trainer.model)


def unfreeze():
    return UnfreezeCallback(SCHEDULE, layer_decay=0.8, block_warmup="2step")


def test_the_tables_hold_every_optimizer():
    tables = [*EXACT, *NOT_RESUMED, *REFUSED, *ELSEWHERE]
    assert len(tables) == len(set(tables))
    assert {name.value for name in OptimizerNames} <= set(tables)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")  # theirs
@pytest.mark.parametrize("optimizer", [*EXACT, *NOT_RESUMED])
def test_exact(make_trainer, tmp_path, optimizer):
    package, arguments = (EXACT | NOT_RESUMED)[optimizer]
    if package:
        pytest.importorskip(package)
    plain = run(make_trainer, optimizer, **arguments)
    assert run(make_trainer, optimizer, UnfreezeCallback("all_at_once"), **arguments) == plain
    saves = {"save_strategy": "steps", "save_steps": 1} if optimizer in EXACT else {}
    first = run(make_trainer, optimizer, unfreeze(), **arguments, **saves)
    assert set(first.values()) & set(hashes(wide()).values()) == set()
    for step in (1, 3) if optimizer in EXACT else ():
        folder = str(tmp_path / "run" / f"checkpoint-{step}")
        again = run(make_trainer, optimizer, unfreeze(), resume=folder, output_dir=str(tmp_path / "b"), **arguments)
        assert again == first, f"resumed at step {step}"
    if optimizer in NOT_RESUMED:
        assert run(make_trainer, optimizer, unfreeze(), **arguments) == first


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")  # theirs
@pytest.mark.parametrize("optimizer", REFUSED)
def test_refused_with_the_reason(make_trainer, optimizer):
    package, arguments, reason = REFUSED[optimizer]
    pytest.importorskip(package)
    with pytest.raises(OptimizerError, match=reason):
        run(make_trainer, optimizer, unfreeze(), **arguments)
    with pytest.raises(OptimizerError, match=reason):
        run(make_trainer, optimizer, UnfreezeCallback("all_at_once", pull=0.1), **arguments)
    plain = run(make_trainer, optimizer, **arguments)
    assert run(make_trainer, optimizer, UnfreezeCallback("all_at_once"), **arguments) == plain, "nothing to follow"


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")  # theirs
@pytest.mark.parametrize("optimizer", EXACT)
def test_param_groups_in_parts_change_nothing(make_trainer, optimizer):
    """A weight decay per group that is everyone's own: the weights of a run without, and the same in a checkpoint."""
    package, arguments = EXACT[optimizer]
    if package:
        pytest.importorskip(package)
    ends = []
    for decay in (None, "all=0.1"):
        callback = UnfreezeCallback(SCHEDULE, group_weight_decay=decay)
        trainer = make_trainer(callback, model=wide(), optim=optimizer, max_steps=6, **arguments)
        trainer.train()
        ends.append((hashes(trainer.model), str(trainer.optimizer.state_dict()["param_groups"])))
    assert ends[0] == ends[1]


def test_apex_counts_steps_for_a_param_group_and_is_refused():
    """Apex itself needs CUDA; its class by that name counts in ``group["step"]``, which parts of a group would lose."""
    model, optimizer = wide(), type("FusedAdam", (torch.optim.AdamW,), {})
    with pytest.raises(OptimizerError, match="FusedAdam cannot be used: it counts the steps of a whole param group"):
        Unfreezer(model, optimizer(model.parameters()), "head@0, all@2step")
    Unfreezer(model, optimizer(model.parameters()), "all_at_once").close()


def rates_and_decays(make, model, layer_decay):
    """What each parameter is stepped with."""
    seen = {}

    class Look(TrainerCallback):
        def on_train_begin(self, args, state, control, model, optimizer, **kwargs):
            names = {id(parameter): name for name, parameter in model.named_parameters()}

            def look(raw, *_):
                seen.update({names[id(p)]: (g["lr"], g["weight_decay"]) for g in raw.param_groups for p in g["params"]})

            optimizer.optimizer.register_step_pre_hook(look)

    make(UnfreezeCallback("all_at_once", layer_decay=layer_decay), Look(), model=model, max_steps=1).train()
    return seen


def check_layer_decay(make, model, layer_decay=0.5):
    plain, decayed = rates_and_decays(make, model, 1.0), rates_and_decays(make, model, layer_decay)
    groups = layer_groups(model)
    for depth, group in enumerate(reversed(groups)):
        for name in group.parameter_names:
            rate, decay = plain[name]
            assert decayed[name] == (pytest.approx(rate * layer_decay**depth), decay), name
    return plain


def test_no_decay_groups_stay_under_layer_decay(make_trainer):
    decays = {name: decay for name, (_, decay) in check_layer_decay(make_trainer, tiny_bert()).items()}
    assert {decay for name, decay in decays.items() if name.endswith("bias") or "LayerNorm" in name} == {0.0}
    assert {decay for name, decay in decays.items() if "weight" in name and "LayerNorm" not in name} == {0.1}


class OwnOptimizer(Trainer):
    def create_optimizer(self, *args, **kwargs):
        groups = param_groups_layer_decay(self.model, lr=1e-2, weight_decay=0.2, layer_decay=0.9)
        self.optimizer = torch.optim.NAdam(groups)
        return self.optimizer


def check_moves(trainer):
    start = hashes(trainer.model)
    trainer.train()
    moved = {name for name, value in hashes(trainer.model).items() if value != start[name]}
    groups = {group.name: set(group.parameter_names) for group in layer_groups(trainer.model)}
    assert moved == groups["head"] | groups["block[3]"]


def test_create_optimizer_overridden(make_trainer):
    built = make_trainer()
    callback = UnfreezeCallback("head@0, block[-1]@3step", layer_decay=0.5)
    trainer = OwnOptimizer(tiny_bert(), built.args, train_dataset=built.train_dataset, callbacks=[callback])
    check_moves(trainer)
    assert type(trainer.optimizer.optimizer) is torch.optim.NAdam
    assert len(trainer.optimizer.param_groups) == 2 * 6  # its own again: matrices and vectors of six groups


def test_optimizer_cls_and_kwargs(make_trainer):
    built = make_trainer()
    callback = UnfreezeCallback("head@0, block[-1]@3step", layer_decay=0.5)
    trainer = Trainer(
        tiny_bert(), built.args, train_dataset=built.train_dataset, callbacks=[callback],
        optimizer_cls_and_kwargs=(torch.optim.RAdam, {"lr": 1e-2, "betas": (0.8, 0.9)}),
    )  # fmt: skip
    check_moves(trainer)
    assert type(trainer.optimizer.optimizer) is torch.optim.RAdam


def test_an_optimizer_and_a_lambda_scheduler_of_ones_own_resume(make_trainer, tmp_path):
    def trainer(**arguments):
        model = tiny_bert()
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-1, momentum=0.9, nesterov=True)
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step % 5))
        return make_trainer(UnfreezeCallback("head@0, block[-1]@3step, all@9step", layer_decay=0.7), model=model,
                            optimizers=(optimizer, scheduler), max_steps=14, **arguments)  # fmt: skip

    whole = trainer(save_strategy="steps", save_steps=1)
    whole.train()
    for step in (2, 4, 10):
        again = trainer(output_dir=str(tmp_path / "again"))
        again.train(resume_from_checkpoint=str(tmp_path / "run" / f"checkpoint-{step}"))
        assert hashes(again.model) == hashes(whole.model), f"resumed at step {step}"


class Rateless:
    """Stands where a scheduler has to, beside an optimizer without a rate."""

    def step(self, *args):
        pass

    def get_last_lr(self):
        return [0.0]

    def state_dict(self):
        return {}


def test_adafactor_that_derives_its_rate_takes_no_layer_decay(make_trainer):
    def trainer(layer_decay):
        model = tiny_bert()
        optimizers = (Adafactor(model.parameters(), lr=None, relative_step=True), Rateless())
        return make_trainer(UnfreezeCallback("head@0", layer_decay=layer_decay), model=model, optimizers=optimizers,
                            max_steps=1, logging_strategy="no")  # fmt: skip

    with pytest.raises(OptimizerError, match="need a learning rate, and this optimizer derives its own"):
        trainer(0.5).train()
    without = trainer(1.0)
    start = hashes(without.model)
    without.train()
    moved = {name for name, value in hashes(without.model).items() if value != start[name]}
    assert moved == set(layer_groups(without.model)[-1].parameter_names)


WITH_ARGUMENTS = {
    "cosine_with_min_lr": {"min_lr": 1e-4},
    "cosine_warmup_with_min_lr": {"min_lr": 1e-4},
    "warmup_stable_decay": {"num_decay_steps": 3},
}
EVALUATED = {"reduce_lr_on_plateau", "greedy"}  # the rate follows the metric, and so what trains


@pytest.mark.slow
@pytest.mark.parametrize("kind", [kind.value for kind in SchedulerType if kind.value not in EVALUATED])
def test_the_scheduler_is_not_touched(make_trainer, kind):
    rates = []
    for callbacks in ([], [UnfreezeCallback("head@0, all@3step", layer_decay=0.5, block_warmup="2step")]):
        trainer = make_trainer(*callbacks, lr_scheduler_type=kind, lr_scheduler_kwargs=WITH_ARGUMENTS.get(kind, {}),
                               warmup_steps=2, max_steps=8)  # fmt: skip
        trainer.train()
        rates.append([record["learning_rate"] for record in trainer.state.log_history if "loss" in record])
    assert rates[0] == rates[1] and len(rates[0]) == 8
