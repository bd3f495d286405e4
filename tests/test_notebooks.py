"""Every notebook runs from top to bottom, and shows what its code makes."""

from __future__ import annotations

from pathlib import Path

import nbformat
import pytest
import run

NOTEBOOKS = Path(__file__).parent.parent / "notebooks"

PATHS = sorted(NOTEBOOKS.glob("*.ipynb"))
every = pytest.mark.parametrize("path", PATHS, ids=[path.stem for path in PATHS])


@every
def test_no_output_is_older_than_the_code(path):
    notebook = nbformat.read(path, as_version=4)
    assert notebook.metadata[run.STAMP] == run.code_hash(notebook), f"python notebooks/run.py notebooks/{path.name}"
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    assert any("image/png" in output.get("data", {}) for cell in code for output in cell.outputs)  # told in a picture
    assert notebook.cells[-1].cell_type == "markdown"
    assert "next" in notebook.cells[-1].source


@every
def test_no_path_of_the_machine_it_ran_on_is_shown(path):
    text = path.read_text(encoding="utf-8")
    assert "/tmp/" not in text
    assert "/home/" not in text
    assert "/root/" not in text
    assert "hf_unfreeze/_" not in text  # a warning names the file that gave it


@pytest.mark.slow
@every
def test_it_runs(path):
    assert run.execute(path).cells
