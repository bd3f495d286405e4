"""The ways of fine-tuning that the benchmark compares, as a table, and one run by one of them."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from benchmark_tasks import Task
from torch import nn
from transformers import PrinterCallback, Trainer, TrainerCallback, set_seed

from hf_unfreeze import UnfreezeCallback, layer_groups, parse_schedule


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


CACHED = {"cache": "memory"}
METHODS = [
    Method("full fine-tuning", (1, 2, 3)),
    Method("upper half, cache", (1, 2, 3), {"schedule": "top(0.5)", **CACHED}),
    Method("upper third, cache", (2, 3), {"schedule": "top(0.33)", **CACHED}),
    Method("linear probing, cache", (10,), {"schedule": "head@0", **CACHED}, factor=10),
    Method("gradual, cache", (3,), {"schedule": "gradual(every=12%)", **CACHED}),
    Method("LP-FT, cache", (2,), {"schedule": "linear_probe(until=20%)", **CACHED}),
    Method("layer decay 0.8", (2,), {"schedule": "all_at_once", "layer_decay": 0.8}),
    Method("upper half, frozen by hand", (2,), None, by_hand),
    Method("LoRA", (2,), None, lora, factor=3),
]


class Clock(TrainerCallback):
    """Seconds of each epoch: of the wall, and of all processors."""

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        self.wall: list[float] = []
        self.cpu: list[float] = []

    def on_epoch_begin(self, *args: Any, **kwargs: Any) -> None:
        self._start = time.perf_counter(), time.process_time()

    def on_epoch_end(self, *args: Any, **kwargs: Any) -> None:
        self.wall.append(time.perf_counter() - self._start[0])
        self.cpu.append(time.process_time() - self._start[1])


def train(task: Task, method: Method, epochs: int, rate: float, seed: int, folder: str) -> dict[str, Any]:
    """Train once, evaluate once at the end, and return what was measured."""
    set_seed(seed)
    model = method.change(task.load())
    arguments: dict[str, Any] = {
        "output_dir": folder,
        "num_train_epochs": epochs,
        "learning_rate": rate * method.factor,
        "seed": seed,
        "per_device_train_batch_size": 16,
        "per_device_eval_batch_size": 64,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        **task.arguments,
    }
    clock = Clock()
    trainer: Trainer = task.trainer(
        model=model,
        args=task.training_arguments(**arguments),
        train_dataset=task.data["train"],
        eval_dataset=task.data["validation"],
        data_collator=task.collate,
        compute_metrics=task.compute_metrics,
        callbacks=[clock] if method.options is None else [UnfreezeCallback(**method.options), clock],
    )
    trainer.remove_callback(PrinterCallback)
    loss = trainer.train().training_loss
    state = trainer.optimizer.state.values()
    return {
        "wall": clock.wall,
        "cpu": clock.cpu,
        "loss": loss,
        "quality": trainer.evaluate()[f"eval_{task.metric}"],
        "optimizer_bytes": sum(v.nbytes for entry in state for v in entry.values() if isinstance(v, torch.Tensor)),
    }
