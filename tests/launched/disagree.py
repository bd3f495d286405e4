"""Ranks that are not of one mind: every one of them must raise, and none may wait for ever."""

from __future__ import annotations

import sys
from functools import partial

import torch
from shared import distance, end, everywhere, fp64_bert, message, run, start, train
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from hf_unfreeze import Unfreezer

rank, world = start(timeout=10)


def ddp_and_optimizer() -> tuple:
    model = fp64_bert().train()
    return DistributedDataParallel(model), torch.optim.SGD(model.parameters(), lr=1e-2)


def disagree(schedules, first_step=(0, 0), options=({}, {})) -> dict:
    """Each rank goes by a schedule, a step and options of its own."""
    ddp, optimizer = ddp_and_optimizer()
    unfreezer = Unfreezer(ddp, optimizer, schedules[rank], **options[rank])
    error = message(lambda: train(ddp, unfreezer, optimizer, rank, range(first_step[rank], 6)))
    unfreezer.close()
    return {"errors": everywhere(error), "moved": distance(ddp, fp64_bert())}


def sharded() -> dict:
    """The same under FSDP2, which has no reducer to be wrong, but waits for other collectives."""
    model = fully_shard(fp64_bert().train(), mesh=init_device_mesh("cpu", (world,)))
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    before = [parameter.to_local().clone() for parameter in model.parameters()]
    unfreezer = Unfreezer(model, optimizer, ("head@0, all@2step", "block[-1:]@0, all@2step")[rank])
    error = message(lambda: train(model, unfreezer, optimizer, rank))
    unfreezer.close()
    moved = sum(not torch.equal(p.to_local(), q) for p, q in zip(model.parameters(), before, strict=True))
    return {"errors": everywhere(error), "moved": moved}


def apart() -> dict:
    """One rank counts its steps wrongly, so that a transition of the others finds it in an all-reduce."""
    ddp, optimizer = ddp_and_optimizer()
    unfreezer = Unfreezer(ddp, optimizer, "head@0, all@2step")
    steps = range(6) if rank == 0 else [0, 0, 0, 0, 0]
    return {"raised": message(lambda: train(ddp, unfreezer, optimizer, rank, steps))}


def late() -> dict:
    """A phase begins after rank 1 ran out of data."""
    ddp, optimizer = ddp_and_optimizer()
    unfreezer = Unfreezer(ddp, optimizer, "head@0, all@4step")

    def loop() -> None:
        with ddp.join():
            train(ddp, unfreezer, optimizer, rank, range(6 if rank == 0 else 3))

    return {"raised": message(loop)}


TOGETHER = {
    "schedule": partial(disagree, ("head@0, all@2step", "head@0, block[-1:]@2step")),
    "set": partial(disagree, ("head@0, all@2step", "block[-1:]@0, all@2step")),
    "step": partial(disagree, ("head@0, all@2step",) * 2, (0, 3)),
    "options": partial(disagree, ("head@0, all@2step",) * 2, options=({"layer_decay": 0.9}, {})),
    "sharded": sharded,
}
run(TOGETHER | {"apart": apart, "late": late})
if set(sys.argv[2:]) <= set(TOGETHER):  # after the others the ranks cannot meet any more
    end()
