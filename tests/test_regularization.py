"""Pull, dropout, weight decay per group, fresh blocks, dropped state, and early stopping in phases."""

from __future__ import annotations

import inspect
from dataclasses import fields

import pytest
import torch
from conftest import hashes, tiny_bert
from transformers import ConvNextConfig, ConvNextForImageClassification, EarlyStoppingCallback, TrainerCallback

from hf_unfreeze import UnfreezeArguments, UnfreezeCallback, UnfreezeError, Unfreezer, layer_groups
from hf_unfreeze.errors import OptimizerError, ScheduleError
from hf_unfreeze.regularization import reinitialize

pytestmark = pytest.mark.filterwarnings("ignore:schedule .* will not reach:UserWarning")
SCHEDULE = "head@0, block[-1]@3step, block[-2:]@7step, -block[-1]@12step, all@14step"


def distance(model, start):
    moved = [(p.cpu() - q).detach().norm() for p, q in zip(model.parameters(), start.parameters(), strict=True)]
    return float(torch.stack(moved).norm())


def test_callback_arguments_and_engine_have_the_same_options():
    ours = inspect.signature(UnfreezeCallback.__init__).parameters
    dataclass = {field.name: field.default for field in fields(UnfreezeArguments)}
    dataclass["layer_decay"] = float(dataclass["layer_decay"])  # text, so that a command line may write 0.35->1.0
    assert {name: p.default for name, p in ours.items() if name != "self"} == dataclass
    engine = inspect.signature(Unfreezer.__init__).parameters
    shared = set(ours) - {"self", "reinitialize"}
    assert {name: engine[name].default for name in shared} == {name: ours[name].default for name in shared}


def test_pull_is_the_hand_written_update():
    """One group at a rate of 0.1 with pull 0.5: after the step of SGD, w moves 5 % of its way back."""
    model, reference = tiny_bert(hidden_dropout_prob=0.0), tiny_bert(hidden_dropout_prob=0.0)
    ids = torch.arange(8)[None]
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.1) for m in (model, reference)]
    unfreezer = Unfreezer(model.eval(), optimizers[0], "all_at_once", pull=0.5)
    start = {name: p.detach().clone() for name, p in reference.named_parameters()}
    for step in range(3):
        unfreezer.step(step)
        for m, optimizer in zip((model, reference.eval()), optimizers, strict=True):
            m(input_ids=ids, labels=torch.tensor([1])).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        with torch.no_grad():
            for name, parameter in reference.named_parameters():
                parameter.lerp_(start[name], 0.05)
    unfreezer.close()
    assert hashes(model) == hashes(reference)
    assert not optimizers[0]._optimizer_step_post_hooks


def test_pull_leaves_out_the_step_that_a_scaler_leaves_out():
    """A fused optimizer is called with the news of an overflow; any other is not called at all."""
    model = tiny_bert()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, fused=True)
    scaler = torch.amp.GradScaler("cpu")
    unfreezer = Unfreezer(model, optimizer, "all_at_once", pull=0.5)
    ends = [hashes(model)]
    for step, factor in enumerate((1.0, float("inf"), 1.0)):
        unfreezer.step(step)
        loss = model(input_ids=torch.arange(8)[None], labels=torch.tensor([1])).loss
        scaler.scale(loss * factor).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        ends.append(hashes(model))
    unfreezer.close()
    assert ends[1] == ends[2]
    assert len({ends[i]["classifier.weight"] for i in (0, 1, 3)}) == 3


def test_pull_keeps_weights_nearer_and_copies_only_what_opened(make_trainer):
    ends = []
    for pull in (0.0, 5.0):
        callback = UnfreezeCallback("head@0, block[-1]@3step", pull=pull, frozen_eval=False)
        kept = {}

        class Look(TrainerCallback):
            def on_step_end(self, args, state, control, callback=callback, kept=kept, **kwargs):
                if callback.unfreezer.pull:
                    kept[state.global_step] = set(callback.unfreezer.pull.anchors)

        trainer = make_trainer(callback, Look())
        trainer.train()
        ends.append(distance(trainer.model, tiny_bert()))
    assert ends[1] < 0.9 * ends[0]
    groups = {group.name: set(group.parameter_names) for group in layer_groups(tiny_bert())}
    assert kept[1] == groups["head"] and kept[21] == groups["head"] | groups["block[3]"]


@pytest.mark.parametrize(
    "options", [{"pull": 0.5}, {"dropout": 0.4}, {"drop_state": True}, {"group_weight_decay": "head=0.3, block=0"}]
)
def test_resume_is_exact(make_trainer, tmp_path, options):
    whole = make_trainer(UnfreezeCallback(SCHEDULE, **options), save_strategy="steps", save_steps=1)
    whole.train()
    plain = make_trainer(UnfreezeCallback(SCHEDULE))
    plain.train()
    assert hashes(plain.model) != hashes(whole.model)  # the option does something
    for step in (2, 3, 8, 13, 15):
        again = make_trainer(UnfreezeCallback(SCHEDULE, **options), output_dir=str(tmp_path / f"again{step}"))
        again.train(resume_from_checkpoint=str(tmp_path / "run" / f"checkpoint-{step}"))
        assert hashes(again.model) == hashes(whole.model), step


def test_pull_from_a_checkpoint_without_it_is_refused(make_trainer, tmp_path):
    make_trainer(UnfreezeCallback(SCHEDULE), save_strategy="steps", save_steps=4).train()
    again = make_trainer(UnfreezeCallback(SCHEDULE, pull=0.1), output_dir=str(tmp_path / "again"))
    with pytest.raises(UnfreezeError, match="written with pull=0"):
        again.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-4"))
    assert not [name for module in again.model.modules() for name in ("train", "forward") if name in vars(module)]


def test_pull_of_a_model_in_channels_last_and_where_less_may_open(make_trainer, tmp_path):
    def train(spec, folder, resume=None, embeddings=True):
        torch.manual_seed(0)
        sizes = {"hidden_sizes": [8, 16], "depths": [2, 2], "num_stages": 2, "image_size": 16, "num_labels": 3}
        model = ConvNextForImageClassification(ConvNextConfig(**sizes)).to(memory_format=torch.channels_last)
        model.convnext.embeddings.requires_grad_(embeddings)
        trainer = make_trainer(UnfreezeCallback(spec, pull=0.5), model=model, output_dir=str(tmp_path / folder),
                               save_strategy="steps", save_steps=3, max_steps=6)  # fmt: skip
        generator = torch.Generator().manual_seed(0)
        trainer.train_dataset = [
            {"pixel_values": torch.randn(3, 16, 16, generator=generator), "labels": i % 3} for i in range(16)
        ]
        trainer.train(resume_from_checkpoint=resume and str(tmp_path / resume / "checkpoint-3"))
        return hashes(trainer.model)

    assert train("head@0, all@2step", "run") == train("head@0, all@2step", "again", resume="run")
    (tmp_path / "run" / "checkpoint-3" / "optimizer.pt").unlink()  # which has the state of more
    with pytest.warns(UserWarning, match="and stays frozen"), pytest.warns(UserWarning, match="another schedule"):
        train("all_at_once", "less", resume="run", embeddings=False)


def test_dropout_rises_where_blocks_are_open_and_returns(make_trainer):
    seen = []

    class Look(TrainerCallback):
        def on_step_end(self, args, state, control, model, **kwargs):
            layers = model.bert.encoder.layer
            seen.append((layers[0].output.dropout.p, layers[3].output.dropout.p, model.dropout.p))

    trainer = make_trainer(UnfreezeCallback("head@0, block[-1]@3step, -block[-1]@5step", dropout=0.3), Look())
    trainer.train()
    assert seen[2] == (0.1, 0.1, 0.1) and seen[3] == (0.1, 0.3, 0.1) and seen[6] == (0.1, 0.1, 0.1)
    assert {m.p for m in trainer.model.modules() if isinstance(m, torch.nn.Dropout)} == {0.1}


def test_weight_decay_by_group_leaves_biases_and_other_groups_alone():
    model = tiny_bert()
    matrices = [p for p in model.parameters() if p.ndim > 1]
    vectors = [p for p in model.parameters() if p.ndim < 2]
    optimizer = torch.optim.AdamW([{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0}])
    unfreezer = Unfreezer(model, optimizer, "all_at_once", group_weight_decay="head=0.5, block[0]=0")
    unfreezer.step(0)
    used = {}

    def look(optimizer, args, kwargs):
        for group in optimizer.param_groups:
            used.update(dict.fromkeys(map(id, group["params"]), group["weight_decay"]))

    optimizer.register_step_pre_hook(look)
    model(input_ids=torch.arange(8)[None], labels=torch.tensor([1])).loss.backward()
    optimizer.step()
    assert used[id(model.classifier.weight)] == 0.5
    assert used[id(model.classifier.bias)] == 0
    assert used[id(model.bert.encoder.layer[0].output.dense.weight)] == 0
    assert used[id(model.bert.encoder.layer[1].output.dense.weight)] == 0.1
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.1, 0]


def test_state_is_dropped_when_a_group_is_frozen_again(make_trainer):
    sizes = {}

    class Look(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            raw = trainer.optimizer.optimizer
            sizes[state.global_step] = sum(
                value.numel() * value.element_size()
                for entry in raw.state.values()
                for key, value in entry.items()
                if key != "step"
            )

    schedule = "block[-1]@0, head@0, -block[-1]@7step"
    model = tiny_bert()
    size = {g.name: sum(model.get_parameter(n).numel() for n in g.parameter_names) for g in layer_groups(model)}
    for drop, after in ((False, size["head"] + size["block[3]"]), (True, size["head"])):
        trainer = make_trainer(UnfreezeCallback(schedule, drop_state=drop), Look())
        trainer.train()
        assert sizes[7] == 2 * 4 * (size["head"] + size["block[3]"])  # two moments of four bytes
        assert sizes[8] == 2 * 4 * after


def test_dropping_what_adagrad_holds_is_refused():
    model = tiny_bert()
    optimizer = torch.optim.Adagrad(model.parameters())
    with pytest.raises(OptimizerError, match="Write drop_state=False"):
        Unfreezer(model, optimizer, "gradual(every=1step)", drop_state=True)
    assert "train" not in vars(model) and not optimizer._optimizer_step_pre_hooks


def test_fresh_blocks_are_drawn_as_a_new_model_draws_them():
    model = tiny_bert()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(7.0)
    before, state = hashes(model), torch.random.get_rng_state()
    assert reinitialize(model, "block[-2:], head", seed=5) == ("block[2]", "block[3]", "head")
    assert torch.equal(state, torch.random.get_rng_state())
    changed = {name for name, value in hashes(model).items() if value != before[name]}
    groups = {group.name: group.parameter_names for group in layer_groups(model)}
    assert changed == {*groups["block[2]"], *groups["block[3]"], *groups["head"]}
    dense = model.bert.encoder.layer[3].intermediate.dense
    assert float(dense.weight.detach().std()) == pytest.approx(model.config.initializer_range, rel=0.15)
    assert not dense.bias.any() and float(model.bert.encoder.layer[3].output.LayerNorm.weight.detach().min()) == 1.0
    again = tiny_bert(seed=1)
    reinitialize(again, "block[-2:], head", seed=5)
    assert torch.equal(again.classifier.weight, model.classifier.weight)


def test_fresh_blocks_only_before_the_first_step(make_trainer, tmp_path):
    schedule = "head@0, block[-1]@3step"
    whole = make_trainer(UnfreezeCallback(schedule, reinitialize="block[-1]"), save_strategy="steps", save_steps=2)
    whole.train()
    again = make_trainer(UnfreezeCallback(schedule, reinitialize="block[-1]"), output_dir=str(tmp_path / "again"))
    again.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-4"))
    assert hashes(again.model) == hashes(whole.model)
    assert not torch.equal(
        whole.model.bert.encoder.layer[3].output.dense.weight.cpu(),
        tiny_bert().bert.encoder.layer[3].output.dense.weight,
    )


def test_early_stopping_waits_for_its_phase(make_trainer):
    """Nothing is ever better by 10, so a patience of 2 evaluations ends the run at step 6, but for new phases."""
    ends = {}
    for schedule in ("head@0", "head@0, block[-1]@3step, block[-2]@5step"):
        trainer = make_trainer(
            UnfreezeCallback(schedule),
            EarlyStoppingCallback(early_stopping_patience=2, early_stopping_threshold=10.0),
            save_strategy="steps", save_steps=2, eval_strategy="steps", eval_steps=2,
            load_best_model_at_end=True, metric_for_best_model="eval_loss",
        )  # fmt: skip
        trainer.train()
        ends[schedule] = trainer.state.global_step
    assert list(ends.values()) == [6, 8]


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"pull": -1}, UnfreezeError, r"pull=-1 lies outside \[0, inf\)"),
        ({"pull": "0.1"}, UnfreezeError, "pull='0.1' lies outside"),
        ({"pull": float("nan")}, UnfreezeError, "pull=nan lies outside"),
        ({"dropout": 1.0}, UnfreezeError, r"dropout=1.0 lies outside \[0, 1\)"),
        ({"dropout": True}, UnfreezeError, "dropout=True lies outside"),
        ({"frozen_eval": "yes"}, UnfreezeError, "frozen_eval='yes' is neither True nor False"),
        ({"drop_state": 1}, UnfreezeError, "drop_state=1 is neither True nor False"),
        ({"group_weight_decay": "head"}, UnfreezeError, "'head' is no selector=number"),
        ({"group_weight_decay": "head=-0.1"}, UnfreezeError, "'head=-0.1' is no selector=number"),
        ({"group_weight_decay": "he ad=0.1"}, ScheduleError, "'he ad' is no selector"),
        ({"block_warmup": "5"}, ScheduleError, "block_warmup='5': 5 has no unit"),
        ({"block_warmup": "fast"}, ScheduleError, "block_warmup='fast': 'fast' is no time"),
        ({"reinitialize": "block[x]"}, ScheduleError, r"\[x\] is no index"),
        ({"reinitialize": 3}, ScheduleError, "selectors are a string"),
    ],
)
def test_values_are_refused_at_once(options, error, message):
    with pytest.raises(error, match=message):
        UnfreezeCallback("gradual", **options)


def test_unknown_group_of_a_weight_decay_is_refused_before_anything_changes(make_trainer):
    trainer = make_trainer(UnfreezeCallback("gradual", group_weight_decay="bloc=0.1"))
    with pytest.raises(ScheduleError, match="Did you mean 'block'"):
        trainer.train()
    assert all(p.requires_grad for p in trainer.model.parameters())
    assert not trainer.optimizer.optimizer._optimizer_step_pre_hooks


def test_weight_decay_by_group_where_none_decays_is_refused(make_trainer):
    trainer = make_trainer(UnfreezeCallback("gradual", group_weight_decay="head=0.1"), weight_decay=0.0)
    with pytest.raises(OptimizerError, match="in this optimizer none has"):
        trainer.train()


@pytest.mark.parametrize("number", [0, 0.0])
def test_dropout_rises_from_a_whole_number_too(number):
    model = tiny_bert(hidden_dropout_prob=number, attention_probs_dropout_prob=number)
    unfreezer = Unfreezer(model, torch.optim.AdamW(model.parameters()), "all@0", dropout=0.3)
    unfreezer.step(0)
    assert {module.p for module in model.modules() if isinstance(module, torch.nn.Dropout)} == {0.3}
    unfreezer.close()
    assert {module.p for module in model.modules() if isinstance(module, torch.nn.Dropout)} == {number}


def test_fresh_blocks_that_never_open_are_told(make_trainer):
    callback = UnfreezeCallback("head@0", reinitialize="block[-1], head")
    with pytest.warns(UserWarning, match=r"has drawn block\[3\] anew, which 'head@0' never opens"):
        make_trainer(callback, max_steps=1).train()


def test_fresh_blocks_only_where_the_run_can_begin(make_trainer):
    before = tiny_bert()
    trainer = make_trainer(UnfreezeCallback("hed@0", reinitialize="block[-1]"), model=before)
    start = hashes(before)
    with pytest.raises(ScheduleError, match="Did you mean 'head'"):
        trainer.train()
    assert hashes(before) == start
