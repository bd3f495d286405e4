"""Run notebooks from top to bottom and keep their outputs, with a hash of the code that made them.

python notebooks/run.py
    all of them, in place
python notebooks/run.py notebooks/01_first_steps.ipynb
    one
"""

from __future__ import annotations

import hashlib
import sys
from pathlib import Path

import nbformat
from nbclient import NotebookClient

HERE = Path(__file__).parent
LIMIT = 600  # seconds that a cell may take
STAMP = "code_sha256"


def code_hash(notebook: nbformat.NotebookNode) -> str:
    """Return a hash of the code cells, which the outputs are as old as."""
    code = [cell.source for cell in notebook.cells if cell.cell_type == "code"]
    return hashlib.sha256("\n\n".join(code).encode()).hexdigest()


def execute(path: Path) -> nbformat.NotebookNode:
    """Run a notebook in its folder and return it with new outputs.

    Raises:
        CellExecutionError: A cell raised.
    """
    notebook = nbformat.read(path, as_version=4)
    where = {"metadata": {"path": str(HERE)}}
    NotebookClient(notebook, timeout=LIMIT, kernel_name="python3", resources=where).execute()
    for cell in notebook.cells:
        cell.metadata.pop("execution", None)  # times of day: they would be a difference at each run
    notebook.metadata[STAMP] = code_hash(notebook)
    return notebook


if __name__ == "__main__":
    for path in map(Path, sys.argv[1:] or sorted(map(str, HERE.glob("*.ipynb")))):
        print(path, flush=True)
        nbformat.write(execute(path), path)
