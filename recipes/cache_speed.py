"""Measure what freezing and the frozen-prefix cache save, side by side in one run.

python recipes/cache_speed.py
    a MiniLM on tweets: full fine-tuning; gradual unfreezing, the top half, the head alone, without and with cache
python recipes/cache_speed.py --max_train_samples 64 --repeats 1
    a look at it in a minute

The methods take turns, repeat by repeat, so that a busy machine slows all of them alike. Only ratios mean something.
With ``--trials 10`` it also makes the trials of a search, for the head alone and with the top half, at several rates.
They share one store on the disk, so that only the first of them computes what is frozen in all.
"""

from __future__ import annotations

import itertools
import json
import statistics
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from benchmark_methods import Clock, Method, trainer_of
from benchmark_tasks import Task, text
from common import parse, run
from rich.console import Console
from rich.table import Table
from tables import TextArguments
from transformers import TrainerCallback

from hf_unfreeze import FrozenPrefixCache, UnfreezeCallback

TRIALS = list(itertools.product((1e-4, 3e-4, 1e-3, 3e-3, 1e-2), ("head@0", "top(0.5)")))


@dataclass
class SpeedArguments:
    """How much is measured."""

    repeats: int = field(default=3, metadata={"help": "Runs of each method; the median counts."})
    epochs: int = field(default=5, metadata={"help": "Epochs of each run."})
    overhead_steps: int = field(default=30, metadata={"help": "Steps that measure the cost of the callback itself."})
    trials: int = field(default=0, metadata={"help": f"Trials of a search, {len(TRIALS)} at most."})
    output: str = field(default="cache_speed.json", metadata={"help": "Where the numbers go."})


SCHEDULES = {
    "gradual, to 3 blocks": "head@0, block[-1]@1ep, block[-2:]@2ep, block[-3:]@3ep",
    "top 3 blocks": "block[-3:]@0, head@0",
    "head alone": "head@0",
}
METHODS = [Method("full fine-tuning", ())]
for name, schedule in SCHEDULES.items():
    METHODS += [
        Method(name, (), {"schedule": schedule}),
        Method(f"{name}, cache", (), {"schedule": schedule, "cache": "memory"}),
    ]
WAYS = ("without", "with cache")
RATE = 3e-4
FOLDER = "runs/cache_speed"


def measure(task: Task, method: Method, epochs: int, rate: float = RATE) -> dict[str, Any]:
    """Train once by a method."""
    clock = Clock()
    trainer = trainer_of(task, method, rate, 0, clock, output_dir=FOLDER, num_train_epochs=epochs)
    return {"loss": trainer.train().training_loss, "seconds": clock.wall}


def search(task: Task, trials: int, epochs: int) -> dict[str, list[dict[str, Any]]]:
    """Make the trials without a cache and with one on the disk that they share, trial by trial in turns."""
    done: dict[str, list[dict[str, Any]]] = {way: [] for way in WAYS}
    with tempfile.TemporaryDirectory() as folder:
        for rate, schedule in TRIALS[:trials]:
            for way in WAYS:
                cache = FrozenPrefixCache("disk", folder=folder) if way == "with cache" else None
                method = Method(schedule, (), {"schedule": schedule, "cache": cache})
                done[way].append({"schedule": schedule, "rate": rate, **measure(task, method, epochs, rate)})
    return done


class OwnTime(TrainerCallback):
    """Seconds spent in the events and optimizer hooks of an UnfreezeCallback, and seconds of all steps."""

    def __init__(self, callback: UnfreezeCallback) -> None:
        self.callback = callback
        self.own = self.total = 0.0

    def on_train_begin(self, args: Any, state: Any, control: Any, optimizer: Any = None, **kwargs: Any) -> None:
        for event in ("on_step_begin", "on_step_end", "on_log"):
            vars(self.callback)[event] = self._timed(getattr(self.callback, event))
        raw = getattr(optimizer, "optimizer", optimizer)
        for hooks in (raw._optimizer_step_pre_hooks, raw._optimizer_step_post_hooks):
            hooks.update({key: self._timed(hook) for key, hook in hooks.items()})
        self._start = time.perf_counter()

    def on_train_end(self, *args: Any, **kwargs: Any) -> None:
        self.total = time.perf_counter() - self._start

    def _timed(self, call: Any) -> Any:
        def timed(*args: Any, **kwargs: Any) -> Any:
            start = time.perf_counter()
            result = call(*args, **kwargs)
            self.own += time.perf_counter() - start
            return result

        return timed


def overhead(task: Task, steps: int) -> float:
    """Return the share of a step that the callback takes when everything trains and nothing is frozen."""
    callback = UnfreezeCallback("all_at_once")
    own = OwnTime(callback)
    trainer_of(task, METHODS[0], RATE, 0, Clock(), callback, own, output_dir=FOLDER, max_steps=steps).train()
    return own.own / own.total


def median_epochs(runs: list[dict[str, Any]]) -> list[float]:
    """Return the median over repeats of the seconds of each epoch."""
    return [statistics.median(epoch) for epoch in zip(*(entry["seconds"] for entry in runs), strict=True)]


def table(results: dict[str, list[dict[str, Any]]]) -> Table:
    """Lay out the ratios; the first method is the measure."""
    shown = Table(title="Seconds, full fine-tuning = 1")
    for column in ("method", "each epoch", "whole run", "with cache ÷ without", "training loss"):
        shown.add_column(column)
    full = median_epochs(next(iter(results.values())))
    for name, runs in results.items():
        epochs = median_epochs(runs)
        without = results.get(name.removesuffix(", cache")) if name.endswith(", cache") else None
        shown.add_row(
            name,
            " ".join(f"{seconds / statistics.median(full):.2f}" for seconds in epochs),
            f"{sum(epochs) / sum(full):.2f}",
            f"{sum(epochs) / sum(median_epochs(without)):.2f}" if without else "",
            f"{runs[0]['loss']:.4f}",
        )
    return shown


def main(arguments: list[str] | None = None) -> None:
    """Measure, print the table, write the numbers."""
    speed_args, data_args = parse(arguments, {}, SpeedArguments, TextArguments)
    transformers.utils.logging.set_verbosity_error()
    task = text(data_args)
    results: dict[str, list[dict[str, Any]]] = {method.name: [] for method in METHODS}
    for _ in range(speed_args.repeats):
        for method in METHODS:
            results[method.name].append(measure(task, method, speed_args.epochs))
    share = overhead(task, speed_args.overhead_steps)
    console = Console(width=120)
    console.print(table(results))
    console.print(f"the callback itself, with nothing frozen: {100 * share:.4f} % of a step")
    found = search(task, speed_args.trials, speed_args.epochs)
    if speed_args.trials:
        without, cached = (sum(sum(trial["seconds"]) for trial in found[way]) for way in WAYS)
        console.print(f"{speed_args.trials} trials that share a store, with cache ÷ without: {cached / without:.2f}")
    versions = {"torch": torch.__version__, "transformers": transformers.__version__}
    numbers = versions | {
        "examples": len(task.data["train"]),
        "threads": torch.get_num_threads(),
        "callback_share": share,
        "trials": found,
        "methods": {name: {"seconds": median_epochs(runs), "runs": runs} for name, runs in results.items()},
    }
    Path(speed_args.output).write_text(json.dumps(numbers, indent=2), encoding="utf-8")


if __name__ == "__main__":
    run(main)
