"""The ways of fine-tuning that the benchmark compares, as a table, and one run by one of them."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from benchmark_tasks import Task
from torch import nn
from transformers import PrinterCallback, Trainer, TrainerCallback, set_seed

from hf_unfreeze import UnfreezeCallback, layer_groups, parse_schedule
from hf_unfreeze.schedule import RECOMMENDED

PEER = "finetuning_scheduler"
PROCESS = Path("/proc/self")


def lora(model: nn.Module) -> nn.Module:
    """Adapters of rank 8 on every linear layer of the blocks, and the head whole."""
    from peft import LoraConfig, get_peft_model

    heads = [name for name in ("classifier", "score") if hasattr(model, name)]
    return get_peft_model(
        model,
        LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", exclude_modules=heads, modules_to_save=heads),
    )


def by_hand(model: nn.Module) -> nn.Module:
    """Switch off what lies below the upper half, before the Trainer is made: what users write."""
    kept = parse_schedule("top(0.5)").phases(layer_groups(model))[0].trainable
    below = {name for group in layer_groups(model) if group.name not in kept for name in group.parameter_names}
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name not in below)
    return model


class Method(NamedTuple):
    """A row of the comparison; ``epochs`` are the lengths of run that are tried.

    ``options`` are those of UnfreezeCallback; without them there is no callback.
    """

    name: str
    epochs: Sequence[int]
    options: dict[str, Any] | None = None
    change: Callable[[nn.Module], nn.Module] = nn.Module.train
    factor: float = 1.0  # on every learning rate that is tried: adapters and heads want higher ones
    needs: str = ""  # a package; PEER trains by itself, on Lightning's trainer


CACHED = {"cache": "memory"}
UPPER = {"schedule": "top(0.5)", **CACHED}
IN_TURN = {"schedule": "head@0, block[-1]@1ep, block[-2:]@2ep"}
METHODS = [
    Method("full fine-tuning", (1, 2, 3)),
    Method("upper half, cache", (1, 2, 3), UPPER),
    Method("UnfreezeCallback(): the default", (1, 2, 3), {"schedule": RECOMMENDED, **CACHED}),
    Method("linear probing, cache", (10,), {"schedule": "head@0", **CACHED}, factor=10),
    Method("gradual, cache", (3,), {"schedule": "gradual(every=12%)", **CACHED}),
    Method("LP-FT, cache", (2,), {"schedule": "linear_probe(until=20%)", **CACHED}),
    Method("upper half, cache, bfloat16 below", (2,), {**UPPER, "prefix_dtype": "bfloat16"}),
    Method("a block an epoch, cache", (3,), {**IN_TURN, **CACHED}),
    Method("a block an epoch, finetuning-scheduler", (3,), IN_TURN, needs=PEER),
    Method("layer decay 0.8", (2,), {"schedule": "all_at_once", "layer_decay": 0.8}),
    Method("upper half, frozen by hand", (2,), None, by_hand),
    Method("LoRA", (2,), None, lora, factor=3, needs="peft"),
]


class Clock(TrainerCallback):
    """Seconds of each epoch, of the wall and of all processors, its peak of memory, and what share of blocks train."""

    def __init__(self) -> None:
        self.blocks: list[list[nn.Parameter]] = []
        self.open: list[float] = []
        self.wall: list[float] = []
        self.cpu: list[float] = []
        self.memory: list[int] = []

    def on_epoch_begin(self, *args: Any, **kwargs: Any) -> None:
        forget_peak()
        self._start = now()

    def on_epoch_end(self, *args: Any, **kwargs: Any) -> None:
        wall, cpu = now()
        self.wall.append(wall - self._start[0])
        self.cpu.append(cpu - self._start[1])
        self.memory.append(peak())
        self.open.append(statistics.mean(any(p.requires_grad for p in block) for block in self.blocks))

    def follow(self, model: nn.Module) -> None:
        """Look at the blocks of this model."""
        named = dict(model.named_parameters())
        groups = [group for group in layer_groups(model) if "block[" in group.name]
        self.blocks = [[named[name] for name in group.parameter_names] for group in groups]


def now() -> tuple[float, float]:
    """Return the seconds of the wall and of all processors, once a GPU has done what it was given."""
    if torch.accelerator.is_available():
        torch.accelerator.synchronize()
    return time.perf_counter(), time.process_time()


def forget_peak() -> None:
    """Begin to look for the highest use of memory."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    elif PROCESS.exists():
        (PROCESS / "clear_refs").write_text("5")


def peak() -> int:
    """Return the most bytes in use since then: of the GPU, else of the process; 0 where nobody says."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    lines = (PROCESS / "status").read_text().splitlines() if PROCESS.exists() else []
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:")), 0)


def trainer_of(
    task: Task, method: Method, rate: float, seed: int, clock: Clock, *callbacks: TrainerCallback, **arguments: Any
) -> Trainer:
    """Make the Trainer of one run by a method; ``arguments`` are of ``TrainingArguments``."""
    set_seed(seed)
    fixed: dict[str, Any] = {
        "learning_rate": rate * method.factor,
        "seed": seed,
        "per_device_train_batch_size": 16,
        "per_device_eval_batch_size": 64,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        **task.arguments,
    }
    model = method.change(task.load())
    clock.follow(model)
    ours = [UnfreezeCallback(**method.options)] if method.options and method.needs != PEER else []
    trainer: Trainer = task.trainer(
        model=model,
        args=task.training_arguments(**fixed, **arguments),
        train_dataset=task.data["train"],
        eval_dataset=task.data["validation"],
        data_collator=task.collate,
        compute_metrics=task.compute_metrics,
        callbacks=[*ours, *callbacks, clock],
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


def train(task: Task, method: Method, epochs: int, rate: float, seed: int, folder: str) -> dict[str, Any]:
    """Train once, evaluate once at the end, and return what was measured."""
    gc.collect()
    clock = Clock()
    trainer = trainer_of(task, method, rate, seed, clock, output_dir=folder, num_train_epochs=epochs)
    if method.options and method.needs == PEER:
        from benchmark_peer import fit

        loss, optimizer = fit(trainer, method.options["schedule"], clock)
    else:
        loss, optimizer = trainer.train().training_loss, trainer.optimizer
    state = optimizer.state.values()
    return {
        "wall": clock.wall,
        "cpu": clock.cpu,
        "memory": clock.memory,
        "open": clock.open,
        "loss": loss,
        "quality": trainer.evaluate()[f"eval_{task.metric}"],
        "optimizer_bytes": sum(v.nbytes for entry in state for v in entry.values() if isinstance(v, torch.Tensor)),
    }
