"""FSDP2 through Accelerate's own code, and through the Trainer's.

On CPUs AcceleratorState takes no FSDP plugin, for its list of distributed types lacks MULTI_CPU, and what comes is DDP.
The processes here are told to be GPUs' at that one place; all that follows is Accelerate's own and runs over gloo.
"""

from __future__ import annotations

import contextlib
import sys
from pathlib import Path
from unittest import mock

import torch
from accelerate import Accelerator, FullyShardedDataParallelPlugin
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType
from shared import SCHEDULE, STEPS, batch, end, everywhere, fp64_bert, run
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from trainer_runs import make, two_rank_options

from hf_unfreeze import Unfreezer

folder = Path(sys.argv[1]).parent
rank = PartialState(cpu=True).process_index
SAVED = (1, 4, 9, 11)  # after these steps, in four of the phases


@contextlib.contextmanager
def as_of_gpus():
    """Let accelerators made here take an FSDP plugin."""
    original = AcceleratorState.__init__

    def init(self, *args, **kwargs):
        PartialState().distributed_type = DistributedType.MULTI_GPU
        original(self, *args, **kwargs)

    with mock.patch.object(AcceleratorState, "__init__", init):
        yield


def accelerator() -> Accelerator:
    AcceleratorState._reset_state(reset_partial_state=True)
    PartialState(cpu=True)
    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2, cpu_ram_efficient_loading=False, auto_wrap_policy="transformer_based_wrap",
        transformer_cls_names_to_wrap=["BertLayer"], state_dict_type="SHARDED_STATE_DICT",
    )  # fmt: skip
    return Accelerator(cpu=True, fsdp_plugin=plugin)


def loop(to: Accelerator, begin: int = 0, saves: bool = False) -> torch.nn.Module:
    """Train as recipes/accelerate_loop.py does, from the start or from what was saved before a step."""
    model = fp64_bert().train()
    model, optimizer = to.prepare(model, torch.optim.AdamW(model.parameters(), lr=1e-2, foreach=False))
    unfreezer = Unfreezer(model, optimizer, SCHEDULE, layer_decay=0.9)
    if begin:
        to.load_state(str(folder / f"before-{begin}"))
    for step in range(begin, STEPS):
        unfreezer.step(step)
        to.backward(model(**batch(step, rank=rank)).loss)
        to.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if saves and step in SAVED:
            to.save_state(str(folder / f"before-{step + 1}"))
    unfreezer.close()
    to.free_memory()
    return model


def local(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.to_local() if isinstance(p, DTensor) else p for name, p in model.state_dict().items()}


def whole(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.full_tensor() if isinstance(p, DTensor) else p for name, p in model.state_dict().items()}


def apart(model: torch.nn.Module, other: torch.nn.Module) -> float:
    mine, theirs = whole(model), whole(other)
    return max(float((mine[name] - theirs[name]).abs().max()) for name in theirs)


def equal(mine: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(mine[name], theirs[name]) for name in theirs)


def units(model: torch.nn.Module) -> int:
    return sum(isinstance(module, FSDPModule) for module in model.modules())


def in_a_loop() -> dict:
    """Shard, save in the middle, go on from there; then what a CPU gets by itself."""
    with as_of_gpus():
        to = accelerator()
    model = loop(to, saves=True)
    expected = local(model)
    different = [step for step in SAVED if not equal(local(loop(to, step + 1)), expected)]
    ddp = loop(accelerator())
    return {"units": units(model), "different": everywhere(different), "distance": apart(model, ddp.module),
            "by_itself": type(ddp).__name__}  # fmt: skip


def in_the_trainer() -> dict:
    """The same with the Trainer's fsdp_config."""
    config = {"version": 2, "cpu_ram_efficient_loading": False, "state_dict_type": "SHARDED_STATE_DICT",
              "transformer_layer_cls_to_wrap": ["BertLayer"]}  # fmt: skip
    options = two_rank_options({"fsdp": True, "fsdp_config": config})
    with as_of_gpus():
        trainer = make(folder / "trainer", save_strategy="steps", save_steps=4, **options)
        trainer.train()
        expected = local(trainer.model)
        different = []
        for step in (4, 8, 12, 16):
            again = make(folder / "again", **options)
            again.train(resume_from_checkpoint=str(folder / "trainer" / f"checkpoint-{step}"))
            different += [] if equal(local(again.model), expected) else [step]
    ddp = make(folder / "ddp", **options)
    ddp.train()
    return {
        "units": units(trainer.model), "different": everywhere(different), "distance": apart(trainer.model, ddp.model),
        "by_itself": type(ddp.model_wrapped).__name__,
        "phases": [r["unfreeze/trainable"] for r in trainer.state.log_history if "unfreeze/phase" in r],
    }  # fmt: skip


run({"in_a_loop": in_a_loop, "in_the_trainer": in_the_trainer})
end()
