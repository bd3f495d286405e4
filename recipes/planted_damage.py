"""Which criterion finds the block that is broken: one of four blocks of a trained model is disturbed, and each chooses.

python recipes/planted_damage.py --seeds 10
    prints how often the first choice of each criterion is a block that repairs the model, ten minutes of one CPU core

A choice counts where training that block alone brings at least 90 % of what the best single block brings. The task is
made up: find the value that goes with a key, in a list of pairs; a BERT of 75,000 parameters learns it in seconds.
"""

from __future__ import annotations

import copy
import json
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from common import parse, run
from rich.console import Console
from rich.table import Table
from scores import classification_metrics
from transformers import BertConfig, BertForSequenceClassification, Trainer, TrainingArguments, set_seed

from hf_unfreeze import UnfreezeCallback
from hf_unfreeze.criteria import Evidence, find_criterion, register_criterion

CRITERIA = ("validation_gradient", "relative_gradient_norm", "gradient_snr", "fisher", "spectrum_snr",
            "gradient_change", "cka")  # fmt: skip
BLOCKS, KEYS, VALUES, PAIRS = 4, 8, 4, 5
BASE_STEPS, HEAD_STEPS, BLOCK_STEPS = 500, 60, 300


@dataclass
class DamageArguments:
    """How much is tried."""

    seeds: int = field(default=10, metadata={"help": "Models, each with another task, damage and order of data."})
    noise: float = field(default=6.0, metadata={"help": "Size of the noise, in spreads of each weight."})
    output: str = field(default="planted_damage.json", metadata={"help": "Where the numbers go."})


def task(count: int, generator: torch.Generator) -> list[dict[str, Any]]:
    """Lists of pairs (key, value) and a key that is asked for; the label is its value."""
    keys = torch.stack([torch.randperm(KEYS, generator=generator)[:PAIRS] for _ in range(count)])
    values = torch.randint(VALUES, (count, PAIRS), generator=generator)
    asked = torch.randint(PAIRS, (count, 1), generator=generator)
    ids = torch.cat((keys.gather(1, asked), KEYS + keys * VALUES + values), dim=1)
    labels = values.gather(1, asked)[:, 0].tolist()
    return [{"input_ids": row, "labels": label} for row, label in zip(ids, labels, strict=True)]


class Damaged:
    """A trained model with one disturbed block, and what each block and criterion makes of it."""

    def __init__(self, seed: int, noise: float) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.seed, self.block = seed, seed % BLOCKS
        self.data = {"train": task(2000, generator), "validation": task(500, generator)}
        set_seed(seed)
        self.model = BertForSequenceClassification(
            BertConfig(vocab_size=KEYS * (VALUES + 1), hidden_size=32, intermediate_size=64, num_attention_heads=2,
                       num_hidden_layers=BLOCKS, num_labels=VALUES, max_position_embeddings=8)
        )  # fmt: skip
        self.whole = self._train(self.model, BASE_STEPS)
        with torch.no_grad():
            for weight in self.model.bert.encoder.layer[self.block].parameters():
                weight += noise * weight.std() * torch.randn(weight.shape, generator=generator)

    def repaired_by(self, schedule: str) -> float:
        """Return the accuracy after training by a schedule."""
        return self._train(copy.deepcopy(self.model), HEAD_STEPS + BLOCK_STEPS, UnfreezeCallback(schedule))

    def worth(self) -> dict[str, dict[str, float]]:
        """Return what every criterion finds each block worth, after the head has trained."""
        found: dict[str, dict[str, float]] = {name: {} for name in CRITERIA}

        def record(evidence: Evidence) -> float:
            for name in CRITERIA:
                found[name][evidence.name] = find_criterion(name).function(evidence)
            return 0.0

        register_criterion("record", record, validation=True, before=True, outputs=True)
        schedule = f"auto(record, every={HEAD_STEPS}step)"
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", ".* measures on .*", UserWarning)  # 4 batches for one choice in 60 steps
            self._train(copy.deepcopy(self.model), HEAD_STEPS + 1, UnfreezeCallback(schedule))
        return found

    def _train(self, model: torch.nn.Module, steps: int, *callbacks: Any) -> float:
        args = TrainingArguments(
            output_dir="runs/planted_damage", max_steps=steps, per_device_train_batch_size=64, learning_rate=3e-3,
            per_device_eval_batch_size=500, seed=self.seed, save_strategy="no", report_to="none", disable_tqdm=True,
            logging_strategy="no", use_cpu=True,
        )  # fmt: skip
        data = {"train_dataset": self.data["train"], "eval_dataset": self.data["validation"]}
        trainer = Trainer(model, args, **data, compute_metrics=classification_metrics, callbacks=list(callbacks))
        trainer.remove_callback(transformers.PrinterCallback)
        trainer.train()
        return trainer.evaluate()["eval_accuracy"]


def trial(seed: int, noise: float) -> dict[str, Any]:
    """Return what the head alone and each block with it reach, and what each criterion finds the blocks worth."""
    damaged = Damaged(seed, noise)
    reached = {
        f"block[{index}]": damaged.repaired_by(f"head@0, block[{index}]@{HEAD_STEPS}step") for index in range(BLOCKS)
    }
    numbers = {"seed": seed, "damaged": f"block[{damaged.block}]", "before": damaged.whole}
    return numbers | {"head": damaged.repaired_by("head@0"), "reached": reached, "worth": damaged.worth()}


def repairs(result: dict[str, Any], block: str) -> bool:
    """Whether a block alone brings at least 90 % of what the best one brings."""
    gains = {name: accuracy - result["head"] for name, accuracy in result["reached"].items()}
    return gains[block] >= 0.9 * max(gains.values())


def first_choices(result: dict[str, Any]) -> dict[str, str]:
    """Return the block that each criterion would open first, of equals the upper, and that of gradual unfreezing."""
    chosen = {name: max(reversed(worth), key=worth.__getitem__) for name, worth in result["worth"].items()}
    return chosen | {"top first": f"block[{BLOCKS - 1}]"}


def main(arguments: list[str] | None = None) -> None:
    """Try every seed, print the table, write the numbers."""
    (args,) = parse(arguments, {}, DamageArguments)
    transformers.utils.logging.set_verbosity_error()
    results = [trial(seed, args.noise) for seed in range(args.seeds)]
    shown = Table(title=f"First choice, {args.seeds} damaged models")
    for column in ("criterion", "repairs the model", "is the damaged block"):
        shown.add_column(column)
    for name in first_choices(results[0]):
        chosen = [(result, first_choices(result)[name]) for result in results]
        right = sum(repairs(result, block) for result, block in chosen)
        shown.add_row(name, str(right), str(sum(block == result["damaged"] for result, block in chosen)))
    Console(width=100).print(shown)
    Path(args.output).write_text(json.dumps(results, indent=2), encoding="utf-8")


if __name__ == "__main__":
    run(main)
