"""The data of a recipe: files, folders, data sets of the hub, or the embedded default."""

from __future__ import annotations

import random
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import datasets
import pandas
from accelerate import PartialState
from embedded import tweets

FORMATS = {".csv": "csv", ".json": "json", ".jsonl": "json", ".txt": "text"}
SEPARATORS = ",;\t"  # of the columns of a csv: the one that its first line has most often


@dataclass
class DataArguments:
    """Model and data of a recipe; without any of them the embedded default is used, and no hub."""

    model_name_or_path: str | None = field(default=None, metadata={"help": "Folder or hub id of a pretrained model."})
    dataset_name: str | None = field(default=None, metadata={"help": "Hub id or folder for datasets.load_dataset."})
    train_file: str | None = field(
        default=None, metadata={"help": "Training data: .csv, .json (one object a line) or .txt (one text a line)."}
    )
    validation_file: str | None = field(
        default=None, metadata={"help": "Validation data; without it a fifth of the training data is held out."}
    )
    max_train_samples: int | None = field(default=None, metadata={"help": "Examples to train on at most."})
    max_eval_samples: int | None = field(default=None, metadata={"help": "Examples to evaluate on at most."})


@dataclass
class TextArguments(DataArguments):
    """Columns of a text and its class."""

    text_column: str = field(default="text", metadata={"help": "Column with the text."})
    label_column: str = field(default="label", metadata={"help": "Column with the label, text or number."})
    max_length: int = field(default=64, metadata={"help": "Tokens kept of each text."})


def load_splits(
    arguments: DataArguments, columns: Sequence[str], embedded: Callable[[], datasets.DatasetDict]
) -> datasets.DatasetDict:
    """Return the splits train and validation, which have the ``columns``, of the files named or of ``embedded``.

    Where no split serves for validation, a fifth of train is held out, the same one every time. Rows where one of the
    columns is empty are left out, and told.
    """
    return _with_validation(_read(arguments, embedded), columns, arguments)


def fewer(data: datasets.DatasetDict, arguments: DataArguments) -> datasets.DatasetDict:
    """Return as many examples as are asked for; take the names of the classes before, of which the rare may go."""
    limits = {"train": arguments.max_train_samples, "validation": arguments.max_eval_samples}
    return datasets.DatasetDict(
        {split: data[split] if limit is None else _sample(data[split], limit) for split, limit in limits.items()}
    )


def load_texts(arguments: TextArguments, embedded: Callable[[], datasets.DatasetDict] = tweets) -> datasets.DatasetDict:
    """Return the splits train and validation with the columns text and label (class names)."""
    data = load_splits(arguments, [arguments.text_column, arguments.label_column], embedded)
    return datasets.DatasetDict({split: _two_columns(rows, arguments) for split, rows in data.items()})


def model_card(arguments: DataArguments, **embedded: str) -> dict[str, Any]:
    """Return what ``create_model_card`` takes: what is said of the embedded default, or what is named instead."""
    card: dict[str, Any] = dict(embedded)
    if arguments.model_name_or_path:
        card |= {"finetuned_from": arguments.model_name_or_path, "license": None}  # None: looked up on the hub
    if arguments.train_file or arguments.dataset_name:
        card["dataset"] = arguments.train_file or arguments.dataset_name
    return card


def _with_validation(
    data: datasets.DatasetDict, columns: Sequence[str], arguments: DataArguments
) -> datasets.DatasetDict:
    if "train" not in data:
        raise SystemExit(f"the data has no split 'train', only {', '.join(data)}.")
    held = next((name for name in ("validation", "test") if name in data), None)
    for name in ("train", held) if held else ("train",):
        _check_columns(data[name], columns, arguments)
        data[name] = _filled(name, data[name], columns)
    if held:
        return datasets.DatasetDict(train=data["train"], validation=data[held])
    if len(data["train"]) < 2:
        raise SystemExit(f"{len(data['train'])} rows are too few: a fifth of them is held out for validation.")
    split = data["train"].train_test_split(test_size=0.2, seed=0)
    return datasets.DatasetDict(train=split["train"], validation=split["test"])


def _read(arguments: DataArguments, embedded: Callable[[], datasets.DatasetDict]) -> datasets.DatasetDict:
    if arguments.train_file is None and arguments.dataset_name is None:
        if arguments.validation_file:
            raise SystemExit("--validation_file needs --train_file.")
        return embedded()
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
    if path.suffix == ".csv":
        return _read_csv(path)
    return datasets.load_dataset(FORMATS[path.suffix], data_files=str(path), split="train")


def _read_csv(path: Path) -> datasets.Dataset:
    """Read every cell as text: None, NA and 007 are labels like others, and only a cell without anything is empty."""
    try:
        with path.open(encoding="utf-8") as file:
            separator = max(SEPARATORS, key=file.readline().count)
        cells = pandas.read_csv(path, sep=separator, dtype=str, keep_default_na=False, na_values=[""])
    except UnicodeDecodeError as error:
        raise ValueError(f"it is not in UTF-8 ({error}). Save it as 'CSV UTF-8'.") from None
    return datasets.Dataset.from_pandas(cells, preserve_index=False)


def _check_columns(rows: datasets.Dataset, columns: Sequence[str], arguments: DataArguments) -> None:
    for column in columns:
        if column not in rows.column_names:
            named = {value: name for name, value in vars(arguments).items() if name.endswith("_column")}
            raise SystemExit(
                f"there is no column {column!r}; the data has {', '.join(rows.column_names)}. "
                f"Name yours: --{named[column]} NAME"
                + ("; or put the images into one folder for each class." if rows.column_names == ["image"] else "")
            )


def _filled(split: str, rows: datasets.Dataset, columns: Sequence[str]) -> datasets.Dataset:
    """Return the rows that have something in each of the columns, and tell which are left out."""
    empty: dict[int, str] = {}  # row: its empty column
    for column in columns:
        # as arrow, so that no image is decoded
        batches = rows.select_columns([column]).with_format("arrow").iter(1000)
        nulls = (null for batch in batches for null in batch[column].is_null().to_pylist())
        empty |= {number: column for number, null in enumerate(nulls) if null}
    if empty:
        told = ", ".join(f"{number + 1} ({column})" for number, column in sorted(empty.items())[:5])
        more = ", …" if len(empty) > 5 else ""
        if PartialState().is_main_process:
            message = f"{len(empty)} of {len(rows)} {split} rows are left out: empty cells in row {told}{more}"
            print(message, file=sys.stderr)
        if len(empty) == len(rows):
            raise SystemExit(f"no row of {split} is left.")
        rows = rows.select([number for number in range(len(rows)) if number not in empty])
    return rows


def _sample(rows: datasets.Dataset, count: int) -> datasets.Dataset:
    """Take rows from everywhere: files are often sorted by label, and the first rows would be of one class."""
    chosen = random.Random(0).sample(range(len(rows)), min(count, len(rows)))
    return rows.select(sorted(chosen))


def _two_columns(split: datasets.Dataset, arguments: TextArguments) -> datasets.Dataset:
    texts = [str(text) for text in split[arguments.text_column]]
    return datasets.Dataset.from_dict({"text": texts, "label": label_names(split, arguments.label_column)})


def label_names(rows: datasets.Dataset, column: str) -> list[str]:
    """Return the label of each row as text."""
    feature = rows.features[column]
    return [
        feature.int2str(label) if isinstance(feature, datasets.ClassLabel) else str(label) for label in rows[column]
    ]


def class_names(data: datasets.DatasetDict, column: str = "label") -> list[str]:
    """Return every label in a fixed order: numbers by value, so that class 2 comes before class 10; else as text."""
    names = {name for split in data.values() for name in label_names(split, column)}
    try:
        return sorted(names, key=int)
    except ValueError:
        return sorted(names)


def labelled(labels: Sequence[str]) -> dict[str, Any]:
    """Return what ``from_pretrained`` takes for a head over these labels, numbered in their order."""
    if len(labels) < 2:
        raise SystemExit(f"a classifier needs two classes or more; the data has {', '.join(labels) or 'none'}.")
    numbers = {label: number for number, label in enumerate(labels)}
    return {"num_labels": len(labels), "id2label": dict(enumerate(labels)), "label2id": numbers}
