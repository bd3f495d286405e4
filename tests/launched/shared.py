"""What the launched children share: a tiny model in fp64, a training loop, and results handed to the parent."""

from __future__ import annotations

import contextlib
import json
import os
import sys
import traceback
import warnings
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import NoReturn

import torch
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).parent.parent))
warnings.simplefilter("error")
warnings.filterwarnings("ignore", "`torch.jit", DeprecationWarning)  # torch 2.13, when torch.compile is first used
warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)  # peft 0.21
warnings.filterwarnings("ignore", "`gradient_checkpointing", FutureWarning)  # the name that both versions know
warnings.filterwarnings("ignore", "'pin_memory' argument is set as true", UserWarning)  # Trainer's default
warnings.filterwarnings("ignore", ".* measures on .* batches at each choice", UserWarning)  # a short run
warnings.filterwarnings("ignore", "2 processes, and no DDP", UserWarning)  # the runs to compare with are on one rank

from conftest import hashes, tiny_bert  # noqa: E402

SCHEDULE = "head@0, block[-1]@2step, block[-2:]@4step, block[-3:]@6step, block[-4:]@8step, all@10step"  # six phases
STEPS = 13
ROWS = 4  # of a micro-batch on one rank


def start(timeout: int = 120) -> tuple[int, int]:
    """Join the process group; return the rank and the world size."""
    dist.init_process_group("gloo", timeout=timedelta(seconds=timeout))
    return dist.get_rank(), dist.get_world_size()


def fp64_bert(**config) -> torch.nn.Module:
    quiet = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    return tiny_bert(**(quiet | config)).double()


def batch(step: int, micro: int = 0, rank: int | None = None) -> dict[str, torch.Tensor]:
    """The rows of one rank, or of both; of equal number, so that the mean of the means is the mean."""
    generator = torch.Generator().manual_seed(100 * step + micro)
    ids = torch.randint(1, 50, (2 * ROWS, 8), generator=generator)
    rows = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids[:, 0] % 3}
    return rows if rank is None else {name: value[rank * ROWS : (rank + 1) * ROWS] for name, value in rows.items()}


def train(
    model, unfreezer, optimizer, rank: int | None = None, steps=range(STEPS), micros: int = 1, after=None
) -> None:
    """Take the steps; all micro-batches but the last are gathered without communication."""
    for step in steps:
        unfreezer.step(step)
        for micro in range(micros):
            silent = micro + 1 < micros and hasattr(model, "no_sync")
            with model.no_sync() if silent else contextlib.nullcontext():
                (model(**batch(step, micro, rank)).loss / micros).backward()
        optimizer.step()
        optimizer.zero_grad()
        if after is not None:
            after(step)


def everywhere(value) -> list:
    """What every rank holds."""
    values = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def ranks_equal(model: torch.nn.Module) -> bool:
    first, *others = everywhere(hashes(model))
    return all(other == first for other in others)


def distance(model: torch.nn.Module, other: torch.nn.Module) -> float:
    pairs = zip(model.parameters(), other.parameters(), strict=True)
    return max(float((mine - theirs).detach().abs().max()) for mine, theirs in pairs)


def message(action: Callable[[], object]) -> str:
    """The error that the action ends in, or an empty string."""
    try:
        action()
    except Exception as error:  # noqa: BLE001 - the parent judges it
        return f"{type(error).__name__}: {error}"
    return ""


def run(scenarios: dict[str, Callable[[], dict]]) -> None:
    """Run the scenarios named on the command line, or all; write what they return where the parent reads it."""
    output, *names = sys.argv[1:]
    results: dict[str, dict] = {}
    for name in names or scenarios:
        try:
            results[name] = scenarios[name]()
        except Exception:  # noqa: BLE001 - the parent shows it
            results[name] = {"error": traceback.format_exc()}
            print(results[name]["error"], file=sys.stderr)
            break  # the ranks may be apart now
    path = Path(f"{output}.{os.environ['RANK']}.json")
    path.write_text(json.dumps({"world_size": dist.get_world_size(), **results}))


def end() -> NoReturn:
    """Leave together, and leave nothing to the interpreter's end.

    Without the barrier about one launched run in four dies at exit; with it one was still seen to, when all was
    written: "terminate called without an active exception", from a thread of torch's.
    """
    dist.barrier()
    dist.destroy_process_group()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)
