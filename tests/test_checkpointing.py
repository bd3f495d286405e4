"""Gradient checkpointing: the weights of a run without it, no second forward below, no lost gradient above."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from conftest import BLOCKS, EXAMPLES, hashes, tiny_bert
from peft import LoraConfig, get_peft_model
from transformers import T5Config, T5ForConditionalGeneration, TrainerCallback, ViTConfig, ViTForImageClassification

from hf_unfreeze import UnfreezeCallback, Unfreezer
from hf_unfreeze.errors import EnvironmentRefused

pytestmark = pytest.mark.filterwarnings("ignore:`gradient_checkpointing:FutureWarning")  # the name both versions know
SCHEDULE = "head@0, block[-1]@1step, block[-2:]@2step, all@3step, -block[0]@4step, -embeddings@5step"
FORWARDS = [  # of each block, bottom → top, in the steps that begin the phases of SCHEDULE
    [1, 1, 1, 1],
    [1, 1, 1, 2],
    [1, 1, 2, 2],
    [2, 2, 2, 2],
    [1, 2, 2, 2],  # frozen, in eval mode: what it computed is kept for the backward that passes it
    [1, 2, 2, 2],
]
PASSED = [*FORWARDS[:4], [2, 2, 2, 2], [1, 2, 2, 2]]  # where a frozen block is in train mode and the backward passes it


class Forwards(TrainerCallback):
    """Counts the forwards of part of each block in every step: hooks on a block itself do not see the second one."""

    def __init__(self, parts):
        self.steps, self._count, self._parts = [], Counter(), parts

    def on_train_begin(self, args, state, control, model, **kwargs):
        for index, part in enumerate(self._parts(model)):
            part.register_forward_hook(lambda *_, index=index: self._count.update([index]))

    def on_step_begin(self, args, state, control, **kwargs):
        self._count.clear()

    def on_step_end(self, args, state, control, **kwargs):
        self.steps.append([self._count[index] for index in range(BLOCKS)])


KINDS = {  # the default is re-entrant in transformers 4, and not in 5
    "re-entrant": {"gradient_checkpointing_kwargs": {"use_reentrant": True}},
    "non-re-entrant": {"gradient_checkpointing_kwargs": {"use_reentrant": False}},
    "default": {},
}


def bert():
    return tiny_bert(), None


def vit():
    torch.manual_seed(0)
    config = ViTConfig(hidden_size=16, intermediate_size=32, num_attention_heads=2, num_hidden_layers=BLOCKS,
                       image_size=8, patch_size=4, num_labels=3, hidden_dropout_prob=0.1)  # fmt: skip
    data = [{"pixel_values": torch.randn(3, 8, 8), "labels": index % 3} for index in range(EXAMPLES)]
    return ViTForImageClassification(config), data


def t5():
    torch.manual_seed(0)
    config = T5Config(vocab_size=50, d_model=16, d_kv=8, d_ff=32, num_heads=2, num_layers=BLOCKS,
                      decoder_start_token_id=0)  # fmt: skip
    data = [{"input_ids": torch.randint(1, 50, (8,)), "labels": torch.randint(1, 50, (4,))} for _ in range(EXAMPLES)]
    return T5ForConditionalGeneration(config), data


def lora():
    torch.manual_seed(0)
    config = LoraConfig(target_modules=["query"], task_type="SEQ_CLS", init_lora_weights=False)
    return get_peft_model(tiny_bert(), config), None


PARTS = {
    bert: lambda model: [layer.attention for layer in model.bert.encoder.layer],
    lora: lambda model: [layer.attention for layer in model.base_model.model.bert.encoder.layer],
    vit: lambda model: [m for n, m in model.named_modules() if n.endswith("attention") and n.count("attention") == 1],
    t5: lambda model: [layer.layer[0] for layer in model.decoder.block],
}


def run(make_trainer, make_model, frozen_eval=True, **arguments):
    model, data = make_model()
    forwards = Forwards(PARTS[make_model])
    trainer = make_trainer(UnfreezeCallback(SCHEDULE, frozen_eval=frozen_eval), forwards, model=model, max_steps=6,
                           **arguments)  # fmt: skip
    trainer.train_dataset = data or trainer.train_dataset
    trainer.train()
    return hashes(model), forwards.steps


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("make_model", PARTS)
def test_weights_equal_and_the_frozen_prefix_runs_once(make_trainer, make_model, kind):
    weights, forwards = run(make_trainer, make_model)
    assert forwards == [[1] * BLOCKS] * 6
    expected = PASSED if make_model is t5 else FORWARDS  # a table of the embeddings lies in the first block of T5
    assert run(make_trainer, make_model, gradient_checkpointing=True, **KINDS[kind]) == (weights, expected)


def test_frozen_blocks_in_train_mode_are_checkpointed_where_the_backward_passes(make_trainer):
    weights, _ = run(make_trainer, bert, frozen_eval=False)
    assert run(make_trainer, bert, frozen_eval=False, gradient_checkpointing=True) == (weights, PASSED)


def functions_and_hooks(model):
    functions = [vars(module).get("_gradient_checkpointing_func") for module in model.modules()]
    return functions, [list(module._forward_hooks.values()) for module in model.modules()]


@pytest.mark.parametrize("kind", KINDS)
def test_functions_and_hooks_are_put_back(make_trainer, kind):
    before = []

    class Look(TrainerCallback):
        def on_train_begin(self, args, state, control, model, **kwargs):
            before.append(functions_and_hooks(model))

    trainer = make_trainer(Look(), max_steps=6, gradient_checkpointing=True, **KINDS[kind])
    trainer.add_callback(UnfreezeCallback(SCHEDULE))
    trainer.train()
    assert functions_and_hooks(trainer.model) == before[0]


def test_switched_on_late_in_a_loop_of_ones_own():
    model = tiny_bert()
    unfreezer = Unfreezer(model, torch.optim.AdamW(model.parameters()), "head@0, block[-1]@1step")
    unfreezer.step(0)
    model._set_gradient_checkpointing(True, torch.utils.checkpoint.checkpoint)
    unfreezer.step(1)
    model.train()
    model(input_ids=torch.ones(1, 4, dtype=torch.long), labels=torch.tensor([0])).loss.backward()
    assert all(parameter.grad is not None for parameter in model.bert.encoder.layer[3].parameters())
    unfreezer.close()
    assert model.bert.encoder.layer[3]._gradient_checkpointing_func is torch.utils.checkpoint.checkpoint


def test_a_function_of_ones_own_is_refused_unless_the_inputs_require_gradients():
    model = tiny_bert()
    optimizer = torch.optim.AdamW(model.parameters())
    model._set_gradient_checkpointing(True, lambda function, *args: function(*args))
    with pytest.raises(EnvironmentRefused, match=r"checkpoints by a function of its own, .*enable_input_require_grads"):
        Unfreezer(model, optimizer, "gradual(every=1step)")
    assert not optimizer._optimizer_step_pre_hooks and "train" not in vars(model)
    model.enable_input_require_grads()
    before = functions_and_hooks(model)
    unfreezer = Unfreezer(model, optimizer, "gradual(every=1step)")
    unfreezer.step(0)
    assert functions_and_hooks(model) == before
    unfreezer.close()
