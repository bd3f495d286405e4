"""Beside other features of Trainer: the same weights as without us, and exactly what is open moves."""

from __future__ import annotations

import pytest
import torch
from conftest import DEVICE, hashes, tiny_bert
from transformers import TrainerCallback, TrainingArguments

from hf_unfreeze import UnfreezeCallback, layer_groups

BY_LENGTH = (
    {"group_by_length": True}
    if "group_by_length" in TrainingArguments.__dataclass_fields__  # transformers 4
    else {"train_sampling_strategy": "group_by_length"}
)
FEATURES = {
    "bf16": {"bf16": True},
    "bf16 evaluation": {"bf16_full_eval": True, "eval_strategy": "epoch"},
    "accumulation with a partial window": {"gradient_accumulation_steps": 3},
    "no clipping": {"max_grad_norm": 0.0},
    "hard clipping": {"max_grad_norm": 1e-3},
    "NEFTune": {"neftune_noise_alpha": 5.0},
    "label smoothing": {"label_smoothing_factor": 0.1},
    "by length": BY_LENGTH,
    "emptied caches": {"torch_empty_cache_steps": 2},
    "a batch size that is looked for": {"auto_find_batch_size": True},
    "workers": {"dataloader_num_workers": 2, "max_steps": 5},
    "no last batch": {"dataloader_drop_last": True, "per_device_train_batch_size": 5},
    "accumulated evaluation": {"eval_strategy": "steps", "eval_steps": 3, "eval_accumulation_steps": 1},
}
if DEVICE == "cuda":
    FEATURES |= {
        "fp16 and a scaler": {"fp16": True},
        "fp16, a scaler inside the optimizer": {"fp16": True, "optim": "adamw_torch_fused"},
        "tf32": {"tf32": True},
        "compiled": {"torch_compile": True},
    }
pytestmark = pytest.mark.filterwarnings("ignore:\nOnline softmax is disabled:UserWarning")  # inductor, of itself


@pytest.fixture(params=FEATURES)
def feature(request):
    return FEATURES[request.param]


def test_all_at_once_changes_nothing(make_trainer, feature):
    ours = make_trainer(UnfreezeCallback("all_at_once"), **feature)
    ours.train()
    plain = make_trainer(**feature)  # only now: a Trainer sets the seed when it is made
    plain.train()
    assert hashes(ours.model) == hashes(plain.model)
    assert hashes(plain.model) != hashes(tiny_bert())


def test_only_the_open_groups_move(make_trainer, feature):
    trainer = make_trainer(UnfreezeCallback("head@0, block[-1]@1step"), **feature)
    trainer.train()
    start = hashes(tiny_bert())
    groups = {group.name: group.parameter_names for group in layer_groups(trainer.model)}
    moved = {name for name, value in hashes(trainer.model).items() if value != start[name]}
    assert moved == {*groups["head"], *groups["block[3]"]}


class OutOfMemoryOnce(TrainerCallback):
    """What a too large batch does at the second step of the first try."""

    def __init__(self):
        self.raised = False

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == 1 and not self.raised:
            self.raised = True
            raise torch.cuda.OutOfMemoryError("CUDA out of memory.")


def test_a_second_try_with_smaller_batches_starts_with_its_first_phase(make_trainer):
    trainer = make_trainer(UnfreezeCallback("head@0, all@50%"), OutOfMemoryOnce(), auto_find_batch_size=True)
    trainer.train()
    records = [(r["step"], r["unfreeze/trainable"]) for r in trainer.state.log_history if "unfreeze/phase" in r]
    assert trainer._train_batch_size < 4
    assert records == [(0, "head"), (trainer.state.max_steps // 2 + trainer.state.max_steps % 2, "all")]
    assert all(parameter.requires_grad for parameter in trainer.model.parameters())


def test_a_transition_inside_an_accumulation_window_waits_for_its_end(make_trainer):
    """Three batches make a step; the flags of a window are those of its step from the first batch to the last."""
    flags = []

    class Look(TrainerCallback):
        def on_substep_end(self, args, state, control, model, **kwargs):
            flags.append((state.global_step, model.bert.encoder.layer[3].output.dense.weight.requires_grad))

        def on_pre_optimizer_step(self, args, state, control, model, **kwargs):
            self.on_substep_end(args, state, control, model)

    make_trainer(UnfreezeCallback("head@0, block[-1]@40%"), Look(), gradient_accumulation_steps=3).train()
    assert {step: {flag for at, flag in flags if at == step} for step in range(9)} == {
        step: {step >= 4} for step in range(9)
    }
