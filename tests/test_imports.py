"""Imports go one way, and importing the package costs nothing heavy."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import hf_unfreeze

PACKAGE = Path(hf_unfreeze.__file__).parent
ORDER = ["errors", "_time", "_spec", "_openings", "_top", "_named", "_arguments", "_phases", "_deciding", "schedule",
         "architectures", "_roles", "_quirks", "_blocks", "_siblings", "_structure", "_runs", "_naming", "_loose",
         "_trace", "detection", "_rows", "_matcher", "groups", "_fixed", "_quantised", "_adapters", "_shadow",
         "freezing", "_parts", "optim", "_rates", "_compiling", "_checkpointing", "_options", "_kept", "_fresh",
         "regularization", "_agreement", "_reducer", "_sharded", "distributed", "_keys", "_slabs", "_store", "_disk",
         "_tiers", "_coming", "_places", "_prefix", "_prefixes", "_precision", "_fingerprints", "_exact",
         "_activations", "_stacks", "_ahead", "_caching", "cache", "criteria", "_outputs", "_probe", "_plateau",
         "_measured", "_learnt", "_decisions", "_coverage", "_at_work", "_transition", "_resume", "_followers",
         "unfreezer", "_history", "_plan", "_scale", "_watch", "_timeline", "_heatmap", "_trainer", "_resumed",
         "_live", "_training_arguments", "callback", "report", "_search", "cli", "__main__"]  # fmt: skip


@pytest.mark.parametrize("module", ORDER)
def test_a_file_imports_only_from_files_above_it(module):
    tree = ast.parse((PACKAGE / f"{module}.py").read_text())
    imported = {node.module.split(".")[0] for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.level}
    assert imported <= set(ORDER[: ORDER.index(module)])


def test_every_file_is_in_the_order():
    assert {path.stem for path in PACKAGE.glob("*.py")} == {*ORDER, "__init__"}


@pytest.mark.parametrize(
    ("code", "absent"),
    [
        ("import hf_unfreeze", ["torch", "transformers", "matplotlib", "rich", "lmdb"]),
        ("import hf_unfreeze.schedule, hf_unfreeze.architectures", ["torch", "transformers"]),
        ("from hf_unfreeze import Unfreezer", ["transformers", "matplotlib", "lmdb"]),
    ],
)
def test_what_an_import_costs(code, absent):
    script = f"{code}; import sys; print([name for name in {absent!r} if name in sys.modules])"
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


def test_every_public_name_is_there():
    assert all(getattr(hf_unfreeze, name) is not None for name in hf_unfreeze.__all__)
    assert set(hf_unfreeze.__all__) <= set(dir(hf_unfreeze))
    with pytest.raises(AttributeError, match="no attribute 'thaw'"):
        hf_unfreeze.thaw  # noqa: B018
