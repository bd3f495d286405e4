"""Measure what freezing and the frozen-prefix cache save on a GPU, side by side in one run.

python recipes/gpu_speed.py
    models of usual sizes with random weights, in bf16, where only time and memory are of interest
python recipes/gpu_speed.py --sizes "Whisper small" --examples host
    one of them; its examples come from main memory, through the loader and over the bus

The ways take turns, repeat by repeat. The first epoch of a run fills the cache and is told apart; the others count.
"""

from __future__ import annotations

import gc
import json
import statistics
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers
from benchmark_methods import Clock, Method, by_hand, trainer_of
from benchmark_tasks import Task
from common import parse, run
from rich.console import Console
from rich.table import Table
from torch import nn
from transformers import AutoConfig, default_data_collator

from hf_unfreeze import UnfreezeCallback


@dataclass
class SpeedArguments:
    """How much is measured."""

    sizes: list[str] = field(default_factory=lambda: [*SIZES][1:], metadata={"help": "Models, by their names here."})
    repeats: int = field(default=3, metadata={"help": "Runs of each way; the median counts."})
    epochs: int = field(default=4, metadata={"help": "Epochs of each run; the first fills the cache."})
    steps: int = field(default=8, metadata={"help": "Steps of each epoch."})
    examples: str = field(
        default="device", metadata={"help": "Where images and sounds are: device, which times no loader, or host."}
    )
    output: str = field(default="gpu_speed.json", metadata={"help": "Where the numbers go."})


class Size(NamedTuple):
    """A model and its batches; ``options`` are of its config."""

    kind: str
    head: str
    options: dict[str, Any]
    example: Callable[[int], dict[str, Any]]
    batch: int = 32


def text(length: int) -> Callable[[int], dict[str, Any]]:
    """So many tokens."""
    return lambda index: {"input_ids": torch.randint(5, 900, (length,)), "labels": index % 2}


def stream(length: int) -> Callable[[int], dict[str, Any]]:
    """Text to be continued."""
    return lambda index: {"input_ids": (ids := torch.randint(5, 900, (length,))), "labels": ids}


def image(index: int) -> dict[str, Any]:
    """224 pixels square, in colour."""
    return {"pixel_values": torch.randn(3, 224, 224), "labels": index % 2}


def sound(bins: int) -> Callable[[int], dict[str, Any]]:
    """Half a minute, and 32 tokens that are said in it."""
    return lambda index: {"input_features": torch.randn(bins, 3000), "labels": torch.randint(5, 900, (32,))}


def widths(width: int, layers: int, heads: int) -> dict[str, int]:
    """What most configs call these."""
    names = {"hidden_size": width, "intermediate_size": 4 * width}
    return {**names, "num_hidden_layers": layers, "num_attention_heads": heads}


def towers(width: int, layers: int, heads: int, bins: int) -> dict[str, int]:
    """What Whisper calls them."""
    each = {"layers": layers, "attention_heads": heads, "ffn_dim": 4 * width}
    sides = {f"{side}_{name}": value for side in ("encoder", "decoder") for name, value in each.items()}
    return {"d_model": width, "num_mel_bins": bins, **sides}


TEXT, PIXELS, SPEECH = "BertForSequenceClassification", "ViTForImageClassification", "WhisperForConditionalGeneration"
RATE = 5e-5
LLAMA = {**widths(2048, 16, 32), "intermediate_size": 5632, "num_key_value_heads": 8}
SIZES = {
    "tiny": Size("bert", TEXT, widths(32, 4, 2), text(16), batch=4),
    "BERT base": Size("bert", TEXT, widths(768, 12, 12), text(128)),
    "BERT large": Size("bert", TEXT, widths(1024, 24, 16), text(512)),
    "ViT base": Size("vit", PIXELS, widths(768, 12, 12), image),
    "ViT large": Size("vit", PIXELS, widths(1024, 24, 16), image),
    "Whisper small": Size("whisper", SPEECH, towers(768, 12, 12, 80), sound(80)),
    "Whisper large": Size("whisper", SPEECH, towers(1280, 32, 20, 128), sound(128), batch=8),
    "Llama 0.9B": Size("llama", "LlamaForCausalLM", LLAMA, stream(512), batch=8),
}
METHODS = [Method("all", ()), Method("upper half, by hand", (), None, by_hand)]
for name, schedule in {"upper half": "top(0.5)", "head": "head@0"}.items():
    METHODS.append(Method(name, (), {"schedule": schedule}))
    METHODS += [
        Method(f"{name}, {store}", (), {"schedule": schedule, "cache": store}) for store in ("memory", "device")
    ]


def build(size: Size) -> nn.Module:
    """Make the model where it will train."""
    config = AutoConfig.for_model(size.kind, **size.options)
    with torch.device(torch.accelerator.current_accelerator() or "cpu"):
        model: nn.Module = getattr(transformers, size.head)(config)
    return model


def task_of(size: Size, data: list[dict[str, Any]], pinned: bool) -> Task:
    """What a model is trained on; nothing is asked of how well."""
    arguments = {
        "per_device_train_batch_size": size.batch,
        "bf16": torch.cuda.is_available(),
        "optim": "adamw_torch_fused",
        "lr_scheduler_type": "constant",
        "dataloader_pin_memory": pinned,
        "logging_strategy": "no",
    }
    splits = {"train": data, "validation": None}
    return Task("loss", -1, (), splits, partial(build, size), default_data_collator, None, arguments)


def measure(task: Task, method: Method, epochs: int) -> dict[str, Any]:
    """Train once by a method."""
    gc.collect()
    clock = Clock()
    trainer = trainer_of(task, method, RATE, 0, clock, output_dir="runs/gpu_speed", num_train_epochs=epochs)
    loss = trainer.train().training_loss
    ours = [each for each in trainer.callback_handler.callbacks if isinstance(each, UnfreezeCallback)]
    off = "".join(callback.cache.active.off for callback in ours if callback.cache)
    return {"loss": loss, "seconds": clock.wall, "bytes": max(clock.memory), "off": off}


def table(results: dict[str, dict[str, list[dict[str, Any]]]], steps: int) -> Table:
    """Lay out milliseconds of a step once the cache is full, and the peak of memory."""
    shown = Table(title="Milliseconds of a step, GiB at most")
    for column in ("", *(method.name for method in METHODS)):
        shown.add_column(column)
    for name, ways in results.items():
        cells = []
        for runs in ways.values():
            seconds = statistics.median(epoch for each in runs for epoch in each["seconds"][1:])
            cells.append(f"{1000 * seconds / steps:.1f}, {runs[0]['bytes'] / 2**30:.1f}")
        shown.add_row(name, *cells)
    return shown


def main(arguments: list[str] | None = None) -> None:
    """Measure, print the table, write the numbers."""
    (speed,) = parse(arguments, {}, SpeedArguments)
    for given, allowed in (([speed.examples], ("device", "host")), (speed.sizes, SIZES)):
        if unknown := set(given) - set(allowed):
            raise SystemExit(f"{sorted(unknown)} is not among {', '.join(allowed)}.")
    transformers.utils.logging.set_verbosity_error()
    results: dict[str, dict[str, list[dict[str, Any]]]] = {}
    for name in speed.sizes:
        size = SIZES[name]
        torch.manual_seed(0)
        data = [size.example(index) for index in range(size.batch * speed.steps)]
        if speed.examples == "device" and torch.accelerator.is_available():
            device = torch.accelerator.current_accelerator()
            moved = ({key: value.to(device) for key, value in row.items() if _is_large(value)} for row in data)
            data = [row | there for row, there in zip(data, moved, strict=True)]
        task = task_of(size, data, torch.accelerator.is_available() and speed.examples == "host")
        results[name] = {method.name: [] for method in METHODS}
        for _ in range(speed.repeats):
            for method in METHODS:
                results[name][method.name].append(measure(task, method, speed.epochs))
        numbers = {
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU",
            "sizes": results,
        }
        Path(speed.output).write_text(json.dumps(numbers, indent=2), encoding="utf-8")
    Console(width=160).print(table(results, speed.steps))


def _is_large(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.is_floating_point()


if __name__ == "__main__":
    run(main)
