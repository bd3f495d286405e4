"""Little data, some of it wrong: 200 tweets with 5 % false labels, several ways to stop, and what each forgets.

python recipes/small_data.py --seeds 5
    prints accuracy on 600 other tweets and how much of the pretrained model is left, half an hour of one CPU core

A seed draws the tweets to train on, as many as half of them to validate on, the false labels in both, and the head.
Every method may take as many epochs, is evaluated after each, ends by the same early stopping and keeps its best
weights. Rates come from the guide, that of "three blocks at a time" from seed 100. A run on record is not run again.
"""

from __future__ import annotations

import itertools
import json
import random
import statistics
import tempfile
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import datasets
import torch
import transformers
from common import parse, run
from embedded import minilm, tweets
from rich.console import Console
from rich.table import Table
from scores import classification_metrics
from tables import class_names, labelled
from torch.utils.data import DataLoader
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    EarlyStoppingCallback,
    PreTrainedModel,
    Trainer,
    TrainingArguments,
    set_seed,
)

from hf_unfreeze import UnfreezeCallback
from hf_unfreeze.criteria import Evidence, cka

# Schedule, of which {} is the metric, learning rate and cache.
METHODS = {
    "full fine-tuning": ("all_at_once", 1e-4, None),
    "plateau, stop=no_gain": ("plateau({}, patience=2, stop=no_gain)", 3e-4, "memory"),
    "three blocks at a time": ("plateau({}, patience=2, at_most=2ep, blocks=3, stop=no_gain)", 2e-4, "memory"),
    "head": ("head@0", 1e-3, "memory"),
}
MEASURED = ("accuracy", "cosine", "cka", "epochs", "seconds")


@dataclass
class SmallArguments:
    """How much is tried."""

    seeds: int = field(default=5, metadata={"help": "Draws of the data."})
    first_seed: int = field(default=0, metadata={"help": "The first of them."})
    examples: int = field(default=200, metadata={"help": "Tweets to train on."})
    test_examples: int = field(default=600, metadata={"help": "Tweets to report on, at most 1,200."})
    noise: float = field(default=0.05, metadata={"help": "Share of the labels that are made false."})
    epochs: int = field(default=15, metadata={"help": "Epochs at most."})
    patience: int = field(default=3, metadata={"help": "Epochs without a better one until a run ends."})
    metrics: list[str] = field(
        default_factory=lambda: ["accuracy"], metadata={"help": "What decides on validation data: accuracy, loss."}
    )
    methods: list[str] = field(default_factory=lambda: [*METHODS], metadata={"help": "Which of the methods."})
    rate: float | None = field(default=None, metadata={"help": "Learning rate in place of that of the method."})
    output: str = field(default="small_data.jsonl", metadata={"help": "Where the numbers go, one run a line."})


class Tweets:
    """Training, validation and test tweets, encoded; a seed draws the first two from those that are no test."""

    def __init__(self, test_examples: int) -> None:
        data = tweets()
        self.labels = class_names(data)
        self.tokenizer = AutoTokenizer.from_pretrained(minilm())

        def encode(batch: dict) -> dict:
            tokens = self.tokenizer(batch["text"], truncation=True, max_length=32)
            return {**tokens, "label": [self.labels.index(label) for label in batch["label"]]}

        encoded = data.map(encode, batched=True, remove_columns=["text"])
        self.pool = encoded["train"]
        test = sorted(encoded["validation"].select(range(test_examples)), key=lambda row: len(row["input_ids"]))
        self.batches = [*DataLoader(test, 64, collate_fn=DataCollatorWithPadding(self.tokenizer))]
        self.pretrained = looked_at(AutoModelForSequenceClassification.from_pretrained(minilm()), self.batches)[0]

    def drawn(self, seed: int, examples: int, noise: float) -> tuple[datasets.Dataset, datasets.Dataset]:
        """Return what to train on and, half as many, to validate on, with the false labels of that seed."""
        drawn = random.Random(seed).sample(range(len(self.pool)), examples + examples // 2)
        parts = (self.pool.select(drawn[:examples]), self.pool.select(drawn[examples:]))
        first, second = (mislabelled(part, noise, len(self.labels), seed) for part in parts)
        return first, second


def mislabelled(rows: datasets.Dataset, share: float, classes: int, seed: int) -> datasets.Dataset:
    """Give a share of the rows another label than theirs."""
    generator, labels = random.Random(seed), list(rows["label"])
    for row in generator.sample(range(len(labels)), round(share * len(labels))):
        labels[row] = (labels[row] + generator.randrange(1, classes)) % classes
    return rows.remove_columns("label").add_column("label", labels)


@torch.no_grad()
def looked_at(model: PreTrainedModel, batches: Iterable[Any]) -> tuple[torch.Tensor, float]:
    """Return the mean over the tokens of each text, which this model was pretrained to give, and the accuracy."""
    found, right = [], []
    for batch in batches:
        inputs = {name: value.to(model.device) for name, value in batch.items() if name != "labels"}
        output = model.eval()(**inputs, output_hidden_states=True)
        mask = inputs["attention_mask"].unsqueeze(-1)
        found.append(((output.hidden_states[-1] * mask).sum(1) / mask.sum(1)).cpu())
        right.append(output.logits.argmax(-1).cpu() == batch["labels"])
    return torch.cat(found), float(torch.cat(right).float().mean())


def kept(now: torch.Tensor, before: torch.Tensor) -> dict[str, float]:
    """Return how alike the embeddings are to those of the pretrained model: 1 is nothing forgotten."""
    moved = cka(Evidence("", [], [], [], [], [], 1, output=now, pretrained=before))
    return {"cosine": float(torch.cosine_similarity(now, before).mean()), "cka": 1 - moved}


def trial(data: Tweets, args: SmallArguments, of: dict[str, Any], folder: str) -> dict[str, Any]:
    """Train once; return accuracy and similarity on the test tweets, and what happened when."""
    metric, seed = f"eval_{of['metric']}", of["seed"]
    schedule, _, cache = METHODS[of["method"]]
    set_seed(seed)
    model = AutoModelForSequenceClassification.from_pretrained(minilm(), **labelled(data.labels))
    train, validation = data.drawn(seed, args.examples, args.noise)
    arguments = TrainingArguments(
        output_dir=folder, num_train_epochs=args.epochs, learning_rate=of["rate"], warmup_steps=10, seed=seed,
        per_device_train_batch_size=16, per_device_eval_batch_size=64, eval_strategy="epoch", save_strategy="epoch",
        logging_strategy="epoch", save_only_model=True, save_total_limit=1, load_best_model_at_end=True,
        metric_for_best_model=metric, greater_is_better=metric != "eval_loss", report_to="none", disable_tqdm=True,
    )  # fmt: skip
    trainer = Trainer(
        model, arguments, train_dataset=train, eval_dataset=validation, compute_metrics=classification_metrics,
        data_collator=DataCollatorWithPadding(data.tokenizer),
        callbacks=[UnfreezeCallback(schedule.format(metric), cache=cache), EarlyStoppingCallback(args.patience)],
    )  # fmt: skip
    trainer.remove_callback(transformers.PrinterCallback)
    began = time.process_time()
    trainer.train()
    seconds = time.process_time() - began
    found, accuracy = looked_at(model, data.batches)
    told = ("epoch", "eval_loss", "eval_accuracy", "unfreeze/trainable", "unfreeze/reason")
    log = [{name: record[name] for name in told if name in record} for record in trainer.state.log_history]
    return of | {
        "accuracy": accuracy, **kept(found, data.pretrained), "epochs": trainer.state.epoch, "seconds": seconds,
        "log": [record for record in log if len(record) > 1],
    }  # fmt: skip


def table(results: list[dict[str, Any]]) -> Table:
    """Return the mean over the seeds, the spread of the accuracy, and each of them."""
    shown, shared = Table(title="Accuracy on clean tweets"), ("method", "metric", "rate")
    for column in (*shared, "accuracy", "each seed", "cosine", "cka", "epochs", "seconds"):
        shown.add_column(column)
    for of in dict.fromkeys(tuple(result[name] for name in shared) for result in results):
        mine = [result for result in results if tuple(result[name] for name in shared) == of]
        mean = {name: statistics.fmean(r[name] for r in mine) for name in MEASURED}
        spread = statistics.stdev(r["accuracy"] for r in mine) if len(mine) > 1 else 0.0
        each = " ".join(f"{r['accuracy']:.3f}".lstrip("0") for r in mine)
        shown.add_row(*map(str, of), f"{mean['accuracy']:.3f} ± {spread:.3f}", each, f"{mean['cosine']:.3f}",
                      f"{mean['cka']:.3f}", f"{mean['epochs']:.1f}", f"{mean['seconds']:.0f}")  # fmt: skip
    return shown


def main(arguments: list[str] | None = None) -> None:
    """Run what is not on record yet, and print the table."""
    (args,) = parse(arguments, {}, SmallArguments)
    if unknown := [name for name in args.methods if name not in METHODS]:
        raise SystemExit(f"{', '.join(unknown)} is none of the methods: {', '.join(METHODS)}.")
    transformers.utils.logging.set_verbosity_error()
    data, path = Tweets(args.test_examples), Path(args.output)
    results = [json.loads(line) for line in path.read_text("utf-8").splitlines()] if path.is_file() else []
    done = [{name: result[name] for name in ("method", "metric", "rate", "seed")} for result in results]
    for metric, seed, method in itertools.product(
        args.metrics, range(args.first_seed, args.first_seed + args.seeds), args.methods
    ):
        wanted = {"method": method, "metric": metric, "rate": args.rate or METHODS[method][1], "seed": seed}
        if wanted not in done:
            with tempfile.TemporaryDirectory() as folder:
                results.append(trial(data, args, wanted, folder))
            with path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(results[-1]) + "\n")
    Console(width=140).print(table(results))


if __name__ == "__main__":
    run(main)
