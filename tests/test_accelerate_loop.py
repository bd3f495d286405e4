"""The loop without a Trainer, in this process and launched; and the launch files."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import accelerate_loop
import pytest
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.state import AcceleratorState, GradientState, PartialState

RECIPES = Path(__file__).parent.parent / "recipes"
LAUNCH_FILES = sorted((RECIPES / "launch").glob("*.yaml"))
# `accelerate launch` without the other commands of accelerate: one of them imports timm, where that is installed
ACCELERATE = [sys.executable, "-m", "accelerate.commands.launch", "--config_file"]

ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
SHORT = ["--per_device_train_batch_size", "2", "--schedule", "head@0, block[-1]@2step, all@1ep"]


@pytest.fixture
def data(tmp_path) -> list[str]:
    path = tmp_path / "mine.csv"
    path.write_text("text,label\n" + "".join(f"text {i} is {i % 2},{i % 2}\n" for i in range(20)))
    return ["--train_file", str(path)]


@pytest.fixture(autouse=True)
def own_accelerator():
    """The state of accelerate is one for the whole process."""
    yield
    for state in (AcceleratorState, PartialState, GradientState):
        state._reset_state()


def launched(file: str, recipe: str, *arguments: str) -> str:
    command = [*ACCELERATE, str(RECIPES / "launch" / file), str(RECIPES / recipe), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=ENVIRONMENT)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.mark.slow
@pytest.mark.parametrize(
    ("schedule", "phases"),
    [
        ("head@0, block[-1]@2step, all@1ep", ["step 0: head", "step 2: block[5], head", "step 4: all"]),
        ("plateau(accuracy, patience=1, min_delta=1)", ["step 0: head", "step 8: block[5], head"]),
    ],
)
def test_a_run_resumed_after_an_epoch_ends_in_the_same_bits(tmp_path, data, capsys, schedule, phases):
    whole, again = tmp_path / "whole", tmp_path / "again"
    short = [*data, *SHORT, "--schedule", schedule]
    if schedule.startswith("plateau"):
        short += ["--num_train_epochs", "3"]
    accelerate_loop.main([*short, "--output_dir", str(whole)])
    printed = capsys.readouterr().out
    assert [line.split(" (")[0] for line in printed.splitlines() if line.startswith("step ")] == phases
    accelerate_loop.main([*short, "--output_dir", str(again), "--resume_from", str(whole / "epoch-1")])
    assert (again / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()
    results = json.loads((whole / "all_results.json").read_text())
    assert results["step"] in (8, 12) and results["processes"] == 1 and 0 <= results["accuracy"] <= 1


def test_max_steps_ends_the_run(tmp_path, data):
    accelerate_loop.main([*data, *SHORT, "--output_dir", str(tmp_path), "--max_steps", "5"])
    assert json.loads((tmp_path / "all_results.json").read_text())["step"] == 5


@pytest.mark.slow
def test_the_loop_on_two_processes(tmp_path, data):
    printed = launched("two_cpu_processes.yaml", "accelerate_loop.py", *data, *SHORT, "--output_dir", str(tmp_path))
    assert printed.count("step 0: head") == 1, "only the main process prints"
    results = json.loads((tmp_path / "all_results.json").read_text())
    assert results["processes"] == 2 and results["step"] == 4
    assert (tmp_path / "epoch-1" / "random_states_1.pkl").exists()


@pytest.mark.slow
@pytest.mark.parametrize(("file", "epoch"), [("two_cpu_processes.yaml", 1.0), ("one_cpu_process.yaml", 0.5)])
def test_the_text_recipe_under_the_launch_files_for_cpus(tmp_path, data, file, epoch):
    short = ["--max_steps", "2", "--per_device_train_batch_size", "4", "--eval_strategy", "no", "--logging_steps", "1"]
    printed = launched(file, "text_classification.py", *data, *short, "--output_dir", str(tmp_path))
    once = ["optimizer", "step 0: phase 0 trains head", "'train_runtime'", "***** eval metrics"]
    assert [printed.count(words) for words in once] == [1] * 4, "only the main process prints"
    assert json.loads((tmp_path / "trainer_state.json").read_text())["epoch"] == epoch, "16 examples, 2 steps"


@pytest.mark.parametrize("path", LAUNCH_FILES, ids=lambda path: path.stem)
def test_launch_files_are_read_by_accelerate_and_say_how_to_use_them(path):
    config = load_config_from_file(str(path))
    assert config.num_processes == yaml.safe_load(path.read_text())["num_processes"]
    assert f"# accelerate launch --config_file recipes/launch/{path.name}" in path.read_text()
