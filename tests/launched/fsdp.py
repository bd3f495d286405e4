"""FSDP2 by torch's own fully_shard over gloo; Accelerate's is in fsdp_accelerate.py; and FSDP1."""

from __future__ import annotations

import contextlib
import functools
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from shared import STEPS, batch, end, everywhere, fp64_bert, message, run, start, train
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.checkpoint import load, save
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, FullyShardedDataParallel, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from hf_unfreeze import Unfreezer

rank, world = start()
folder = Path(sys.argv[1]).parent
mesh = init_device_mesh("cpu", (world,))
RESUMED = (1, 2, 7, 8, 11)  # of each phase its last step, or its first
SCHEDULE = "head@0, block[-1]@2step, block[-2:]@4step, all@8step, -block[0]@10step"


def sharded(activations: bool = False, **options) -> torch.nn.Module:
    """A BERT, its blocks sharded one by one, then the rest."""
    model = fp64_bert().train()
    for index, block in enumerate(model.bert.encoder.layer):
        if activations:
            block = model.bert.encoder.layer[index] = checkpoint_wrapper(block)
        fully_shard(block, mesh=mesh, **options)
    return fully_shard(model, mesh=mesh, **options)


def adamw(model: torch.nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=1e-2, foreach=False)


def whole_weights(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Gathered, and named as without wrappers."""
    return {name.replace("_checkpoint_wrapped_module.", ""): p.full_tensor() if isinstance(p, DTensor) else p
            for name, p in model.state_dict().items()}  # fmt: skip


def apart(model: torch.nn.Module, other: torch.nn.Module) -> float:
    mine, theirs = whole_weights(model), whole_weights(other)
    return max(float((mine[name].double() - theirs[name].double()).abs().max()) for name in theirs)


@functools.cache
def one_process() -> torch.nn.Module:
    model = fp64_bert().train()
    optimizer = adamw(model)
    train(model, Unfreezer(model, optimizer, SCHEDULE, layer_decay=0.9), optimizer)
    return model


# of torch 2.13, and of releases before
REDUCE = next(n for n in ("reduce_scatter_single", "reduce_scatter_tensor") if hasattr(dist, n))
GATHER = next(n for n in ("all_gather_single", "all_gather_into_tensor") if hasattr(dist, n))


def padded_bytes(model: torch.nn.Module) -> int:
    """What a reduce-scatter of the trainable parameters takes: the first dimension is divided among the ranks."""
    trainable = [p for p in model.parameters() if p.requires_grad]
    return sum(-(-len(p) // world) * world * (p.numel() // len(p)) * p.element_size() for p in trainable)


@contextlib.contextmanager
def counted(collective: str, sizes: list[int]):
    """Note the bytes of the whole: the larger one of the two tensors."""
    original = getattr(dist, collective)

    def counted(*args, **kwargs):
        sizes.append(max(a.nbytes for a in (*args, *kwargs.values()) if isinstance(a, torch.Tensor)))
        return original(*args, **kwargs)

    setattr(dist, collective, counted)
    try:
        yield
    finally:
        setattr(dist, collective, original)


def against_one(evaluate: bool = False, **options) -> dict:
    """Train on two ranks and on one process, and count what is reduced in each step."""
    model = sharded(**options)
    optimizer = adamw(model)
    unfreezer = Unfreezer(model, optimizer, SCHEDULE, layer_decay=0.9)
    sent, received = [], []
    steps, gathered, trainable = [], [], []

    def after(step: int) -> None:
        for sizes, of_steps in ((sent, steps), (received, gathered)):
            of_steps.append(sum(sizes))
            sizes.clear()
        trainable.append(padded_bytes(model))
        if evaluate:  # the root keeps whole parameters afterwards
            model.eval()
            with torch.no_grad():
                model(**batch(step, rank=rank))
            model.train()

    with counted(REDUCE, sent), counted(GATHER, received):
        train(model, unfreezer, optimizer, rank, after=after)
    state = len(optimizer.state)
    unfreezer.close()
    held = sum(parameter.to_local().nbytes for parameter in model.parameters())
    return {"distance": apart(model, one_process()), "sent": steps, "trainable": trainable, "state": state,
            "schedule": SCHEDULE, "gathered": gathered, "held": max(everywhere(held)),
            "restored": all(p.requires_grad for p in model.parameters())}  # fmt: skip


def fsdp1() -> dict:
    model = FullyShardedDataParallel(fp64_bert(), device_id=torch.device("cpu"), use_orig_params=True)
    return {"raised": message(lambda: Unfreezer(model, adamw(model), SCHEDULE))}


def resumed(full: bool) -> dict:
    """Save in every phase, go on from there, and compare the bits."""
    options = StateDictOptions(full_state_dict=full, cpu_offload=full)
    model = sharded()
    optimizer = adamw(model)
    kept = []

    def after(step: int) -> None:
        if step not in RESUMED:
            return
        weights, state = get_state_dict(model, optimizer, options=options)
        kept.append(len(optimizer.state))
        path = folder / f"{'full' if full else 'sharded'}-{step}"
        if not full:
            save({"model": weights, "optim": state}, checkpoint_id=str(path))
        elif rank == 0:
            torch.save({"model": weights, "optim": state}, f"{path}.pt")
        dist.barrier()

    train(model, Unfreezer(model, optimizer, SCHEDULE, layer_decay=0.9), optimizer, rank, after=after)
    expected = {name: value.to_local() for name, value in model.state_dict().items()}
    different = []
    for step in RESUMED:
        again = sharded()
        optimizer = adamw(again)
        unfreezer = Unfreezer(again, optimizer, SCHEDULE, layer_decay=0.9)
        path = folder / f"{'full' if full else 'sharded'}-{step}"
        if full:
            stored = torch.load(f"{path}.pt") if rank == 0 else {"model": {}, "optim": {}}
            broadcast = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
            set_model_state_dict(again, stored["model"], options=broadcast)
            set_optimizer_state_dict(again, optimizer, stored["optim"], options=broadcast)
        else:
            weights, state = get_state_dict(again, optimizer)
            stored = {"model": weights, "optim": state}
            load(stored, checkpoint_id=str(path))
            set_model_state_dict(again, stored["model"])
            set_optimizer_state_dict(again, optimizer, stored["optim"])
        train(again, unfreezer, optimizer, rank, range(step + 1, STEPS))
        if not all(torch.equal(value.to_local(), expected[name]) for name, value in again.state_dict().items()):
            different.append(step)
    return {"different": everywhere(different), "kept": kept}


SCENARIOS = {
    "plain": against_one,
    "evaluated": lambda: against_one(evaluate=True),
    "activations": lambda: against_one(activations=True),
    "kept_whole": lambda: against_one(reshard_after_forward=False),
    "mixed_precision": lambda: against_one(mp_policy=MixedPrecisionPolicy(torch.bfloat16, torch.float64)),
    "offloaded": lambda: against_one(offload_policy=CPUOffloadPolicy(pin_memory=False)),
    "fsdp1": fsdp1,
    "sharded_state": lambda: resumed(full=False),
    "full_state": lambda: resumed(full=True),
}
run(SCENARIOS)
end()
