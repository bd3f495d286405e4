"""Wrappers on one process: each works, or is refused with the cure. Nothing in the library names a device."""

from __future__ import annotations

import ast
from pathlib import Path

import accelerate
import pytest
import torch
from conftest import hashes, tiny_bert, tiny_data
from transformers import default_data_collator

import hf_unfreeze
from hf_unfreeze import UnfreezeCallback, Unfreezer
from hf_unfreeze.errors import EnvironmentRefused

SCHEDULE = "head@0, block[-2:]@2step, all@4step"
WRAPPERS = {
    "DataParallel": torch.nn.DataParallel,
    "torch.compile": lambda model: torch.compile(model, backend="eager"),
    "device_map": lambda model: accelerate.dispatch_model(model, {"": "cpu"}, force_hooks=True),
}


def trained(wrap=lambda model: model) -> dict[str, str]:
    model = tiny_bert(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    wrapped = wrap(model).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    unfreezer = Unfreezer(wrapped, optimizer, SCHEDULE, layer_decay=0.9)
    for step in range(6):
        unfreezer.step(step)
        batch = default_data_collator(tiny_data()[4 * step : 4 * step + 4])
        wrapped(**{key: value.to(model.device) for key, value in batch.items()}).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    unfreezer.close()
    return hashes(model)


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] * (name == "torch.compile")) for name in WRAPPERS]
)
def test_a_wrapped_model_trains_as_the_bare_one(name):
    moved = name == "DataParallel" and torch.cuda.is_available()
    assert trained(WRAPPERS[name]) == trained(lambda model: model.to("cuda" if moved else "cpu"))


def test_offloaded_weights_are_refused(tmp_path):
    model = tiny_bert()
    optimizer = torch.optim.AdamW(model.parameters())
    offloaded = accelerate.disk_offload(model, str(tmp_path), execution_device=torch.device("cpu"))
    with pytest.raises(EnvironmentRefused, match="meta device: device_map has offloaded it"):
        Unfreezer(offloaded, optimizer, SCHEDULE)


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_deepspeed_is_refused(make_trainer, stage):
    """Named in the arguments, and as the engine that wraps the model where `accelerate config` names it."""
    trainer = make_trainer(UnfreezeCallback(SCHEDULE))
    trainer.args.deepspeed = {"zero_optimization": {"stage": stage}}
    with pytest.raises(EnvironmentRefused, match=r"DeepSpeed keeps .* Train with DDP or FSDP2"):
        trainer.callback_handler.on_train_begin(trainer.args, trainer.state, trainer.control)
    engine = type("DeepSpeedEngine", (torch.nn.Sequential,), {"__module__": "deepspeed.runtime.engine"})(tiny_bert())
    with pytest.raises(EnvironmentRefused, match=r"DeepSpeed keeps .* Train with DDP or FSDP2"):
        Unfreezer(engine, torch.optim.SGD(engine.parameters(), lr=0.1), SCHEDULE)


# The cache copies stored activations to the device of the batch, weights kept go into a file and back, and the
# generators of a device are looked after; offload_state moves what the user asks for, and a figure compares weights.
MAY_COPY = {"_activations", "_keys", "_kept", "_probe", "_shadow", "_timeline", "optim"}
FILES = [path for path in sorted(Path(hf_unfreeze.__file__).parent.glob("*.py")) if path.stem not in MAY_COPY]


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_the_library_names_no_device_and_moves_nothing(path):
    tree = ast.parse(path.read_text(encoding="utf-8"))
    literals = {node.value for node in ast.walk(tree) if isinstance(node, ast.Constant) and isinstance(node.value, str)}
    assert not {"cpu", "cuda", "mps", "xpu", "npu", "hpu"} & {text.partition(":")[0] for text in literals}
    calls = {
        node.func.attr for node in ast.walk(tree) if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)
    }
    assert not {"to", "cpu", "cuda", "xpu", "to_empty"} & calls
