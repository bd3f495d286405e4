"""The wheel, as a package index would get it: small, whole, and it runs where it is installed."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import transformers

import hf_unfreeze

PACKAGE = Path(hf_unfreeze.__file__).parent
pytestmark = pytest.mark.slow


def call(*command, **options):
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, **options)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wheel")
    call(sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", folder, PACKAGE.parent)
    (built,) = folder.glob("*.whl")
    return built


def test_it_is_small_and_holds_every_module_and_no_page(wheel):
    assert wheel.stat().st_size < 300_000  # code alone: a figure or a page would show
    with zipfile.ZipFile(wheel) as archive:
        held = {name for name in archive.namelist() if name.startswith("hf_unfreeze/")}
    files = {path.name for path in PACKAGE.iterdir() if path.is_file() and path.suffix != ".md"}
    assert held == {f"hf_unfreeze/{name}" for name in files} and "hf_unfreeze/py.typed" in held


def test_a_package_index_would_take_it(wheel):
    assert "PASSED" in call(sys.executable, "-m", "twine", "check", "--strict", wheel)


def test_the_command_runs_from_where_it_is_installed(wheel, tmp_path):
    config = transformers.BertConfig(hidden_size=16, num_attention_heads=2, num_hidden_layers=2)
    config.save_pretrained(tmp_path / "model")
    installed = tmp_path / "installed"
    call(sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--target", installed, wheel)
    where = {"cwd": tmp_path, "env": {**os.environ, "PYTHONPATH": str(installed)}}
    assert str(installed) in call(sys.executable, "-c", "import hf_unfreeze; print(hf_unfreeze.__file__)", **where)
    told = call(installed / "bin" / "hf-unfreeze", "plan", "model", "--schedule", "head@0, all@50%", "--max-steps", 4,
                "--json", **where)  # fmt: skip
    assert '"start_step": 2' in told
