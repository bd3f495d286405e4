"""Quality against seconds: full fine-tuning, what freezes, and what others offer, on text, images and speech.

python recipes/benchmark.py
    three seeds of every method on every task, some hours of two CPU cores; ended and begun again, it goes on
python recipes/benchmark.py --quick true
    every method once on a few examples, in minutes: numbers without a meaning

Each method chooses its learning rate from the same few, by the first seed; every run is annealed to its own end and
evaluated once. The methods take turns, so that a busy machine slows all of them alike. Only ratios mean something.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import transformers
from benchmark_methods import METHODS, Method, train
from benchmark_report import best_rate, report
from benchmark_tasks import TASKS, Task
from common import parse, run
from tables import DataArguments


@dataclass
class BenchmarkArguments:
    """What is compared, and how often."""

    tasks: list[str] = field(default_factory=lambda: list(TASKS), metadata={"help": f"Of {', '.join(TASKS)}."})
    methods: list[str] = field(
        default_factory=lambda: [method.name for method in METHODS], metadata={"help": "Of those in METHODS."}
    )
    seeds: int = field(default=3, metadata={"help": "Runs of each method and length."})
    clock: str = field(default="wall", metadata={"help": "wall, or cpu: for one thread on a machine that is busy."})
    quick: bool = field(default=False, metadata={"help": "Two seeds, one length and one rate, on 32 examples."})
    max_train_samples: int | None = field(default=None, metadata={"help": "Examples to train on at most."})
    max_eval_samples: int | None = field(default=None, metadata={"help": "Examples to evaluate on at most."})
    output_dir: str = field(default="runs/benchmark", metadata={"help": "Where runs, table and figures go."})


def check(name: str, given: Sequence[str], known: Sequence[str]) -> None:
    """Refuse what is not there."""
    for value in given:
        if value not in known:
            raise SystemExit(f"--{name}: there is no {value!r}, only {', '.join(known)}.")


class Runs:
    """What was measured so far, one object a line, so that a benchmark that was ended goes on."""

    def __init__(self, path: Path) -> None:
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        self.all = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    def once(self, task: Task, method: Method, of: dict[str, Any]) -> None:
        """Run what ``of`` describes unless it is on record."""
        if any(of.items() <= entry.items() for entry in self.all):
            return
        measured = train(task, method, of["epochs"], of["rate"], of["seed"], str(self.path.parent / "run"))
        self.all.append({**of, **measured, "examples": len(task.data["train"]), "threads": torch.get_num_threads()})
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(self.all[-1]) + "\n")
        print(json.dumps(self.all[-1]), flush=True)


def rounds(arguments: BenchmarkArguments, tasks: dict[str, Task]) -> Iterator[tuple[str, Method, int, int]]:
    """Yield task, method, epochs and seed in the order of measuring."""
    chosen = [method for method in METHODS if method.name in arguments.methods]
    for seed in range(arguments.seeds):
        for name in tasks:
            for method in chosen:
                for epochs in method.epochs[:1] if arguments.quick else method.epochs:
                    yield name, method, epochs, seed


def main(arguments: list[str] | None = None) -> None:
    """Measure what is missing; write the table and the figures."""
    (benchmark_args,) = parse(arguments, {}, BenchmarkArguments)
    check("tasks", benchmark_args.tasks, list(TASKS))
    check("methods", benchmark_args.methods, [method.name for method in METHODS])
    check("clock", [benchmark_args.clock], ["wall", "cpu"])
    needed = {method.needs for method in METHODS if method.name in benchmark_args.methods} - {""}
    if missing := [name for name in sorted(needed) if find_spec(name) is None]:
        raise SystemExit(
            f"{' and '.join(missing)} is not installed. Run: pip install '.[benchmark]', or leave out what needs it: "
            "--methods 'full fine-tuning' 'upper half, cache' …"
        )
    if benchmark_args.quick:
        benchmark_args.seeds = 2
        benchmark_args.max_train_samples = benchmark_args.max_eval_samples = 32
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    limits = DataArguments(
        max_train_samples=benchmark_args.max_train_samples, max_eval_samples=benchmark_args.max_eval_samples
    )
    tasks = {name: TASKS[name](limits) for name in benchmark_args.tasks}
    runs = Runs(Path(benchmark_args.output_dir) / "runs.jsonl")
    for name, method, epochs, seed in rounds(benchmark_args, tasks):
        task, of = tasks[name], {"task": name, "method": method.name, "epochs": epochs, "seed": seed}
        rates = task.rates[:1] if benchmark_args.quick else task.rates
        for rate in rates if seed == 0 else [best_rate(runs.all, of, task.better)]:
            runs.once(task, method, {**of, "rate": rate})
    report(runs.all, {name: task.better for name, task in tasks.items()}, benchmark_args.clock, runs.path.parent)


if __name__ == "__main__":
    run(main)
