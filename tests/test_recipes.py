"""The recipe in a few steps, on own data, with wrong input; and in full, as a user runs it."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
from pathlib import Path

import common
import embedded
import pytest
import tables
import text_classification
import torch
from transformers import TrainingArguments

from hf_unfreeze import UnfreezeArguments

RECIPES = Path(__file__).parent.parent / "recipes"

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
    with pytest.raises(SystemExit, match=r"the data has sentence, mood\. Name yours: --text_column"):
        text_classification.main(["--train_file", str(tmp_path / "mine.csv"), "--output_dir", str(tmp_path)])


def test_missing_package_names_the_line_to_run():
    with pytest.raises(SystemExit, match="pip install --no-deps no_such_package"):
        embedded.package("no_such_package")


def test_the_embedded_packages_are_the_installed_ones():
    wanted = (RECIPES / "embedded.txt").read_text().splitlines()
    assert [line for line in wanted if not line.startswith("#")] == list(embedded.PACKAGES.values())


def test_a_conversion_is_kept_and_a_failed_one_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    built = []

    def build(folder):
        built.append(folder)
        (folder / "weights").write_text("whole")
        if len(built) == 1:
            raise RuntimeError("torn")

    with pytest.raises(RuntimeError, match="torn"):
        embedded.converted("model", build)
    assert not list((tmp_path / "hf_unfreeze").iterdir())
    for _ in range(2):
        assert (embedded.converted("model", build) / "weights").read_text() == "whole"
    assert len(built) == 2


def write_csv(path, rows, header="text,label"):
    path.write_text("\n".join([header, *(f"{text},{label}" for text, label in rows)]) + "\n")
    return str(path)


def test_logging_less_often_than_the_run_is_long_costs_only_the_picture(tmp_path, capsys):
    data = write_csv(tmp_path / "mine.csv", [(f"text {i}", i % 2) for i in range(20)])
    text_classification.main(["--train_file", data, "--output_dir", str(tmp_path), *SHORT, "--logging_steps", "500"])
    assert "no timeline.png" in capsys.readouterr().err
    assert (tmp_path / "model.safetensors").exists()


def test_the_defaults_leave_a_timeline_of_four_steps(tmp_path):
    data = write_csv(tmp_path / "mine.csv", [(f"text {i}", i % 2) for i in range(20)])
    text_classification.main(["--train_file", data, "--output_dir", str(tmp_path), "--max_steps", "4", "--use_cpu"])
    assert all((tmp_path / name).stat().st_size for name in LEFT)


def test_the_same_seed_gives_the_same_bits_and_number_labels_keep_their_order(tmp_path):
    data = write_csv(tmp_path / "mine.csv", [(f"text {i}", (2, 10, 1)[i % 3]) for i in range(20)])
    for name in ("one", "two"):
        text_classification.main(["--train_file", data, "--output_dir", str(tmp_path / name), *SHORT])
    one, two = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("one", "two"))
    assert one == two
    config = json.loads((tmp_path / "one" / "config.json").read_text())
    assert config["id2label"] == {"0": "1", "1": "2", "2": "10"}


@pytest.mark.slow
def test_training_arguments_load_outside_the_recipe(tmp_path):
    """The recipe runs as __main__: a class of its own in training_args.bin could not be read elsewhere."""
    data = write_csv(tmp_path / "mine.csv", [(f"text {i}", i % 2) for i in range(20)])
    recipe = [sys.executable, str(RECIPES / "text_classification.py"), "--train_file", data, *SHORT]
    subprocess.run([*recipe, "--output_dir", str(tmp_path)], check=True, capture_output=True, text=True)
    arguments = torch.load(tmp_path / "training_args.bin", weights_only=False)
    assert type(arguments) is TrainingArguments


@pytest.mark.parametrize("suffix", [".yaml", ".json"])
def test_a_config_file_gives_values_and_arguments_override_it(tmp_path, suffix):
    values = {"learning_rate": "5e-4", "max_steps": 9, "text_column": "tweet"}  # YAML reads 5e-4 as text
    path = (tmp_path / "config").with_suffix(suffix)
    path.write_text(json.dumps(values))  # JSON is YAML too
    classes = (tables.TextArguments, UnfreezeArguments, TrainingArguments)
    data, unfreeze, training = common.parse([str(path), "--max_steps", "3"], text_classification.DEFAULTS, *classes)
    assert training.dataloader_pin_memory == torch.accelerator.is_available()
    assert (training.learning_rate, training.max_steps, data.text_column) == (5e-4, 3, "tweet")
    assert unfreeze.schedule == text_classification.DEFAULTS["schedule"]
    path.write_text(json.dumps({"learning_rat": 1}))
    with pytest.raises(SystemExit, match="Did you mean 'learning_rate'"):
        common.parse([str(path)], {}, *classes)


def test_a_test_split_serves_for_validation_and_train_stays_whole(tmp_path):
    write_csv(tmp_path / "train.csv", [(f"text {i}", i % 2) for i in range(10)])
    write_csv(tmp_path / "test.csv", [(f"other {i}", i % 2) for i in range(4)])
    data = tables.load_texts(tables.TextArguments(dataset_name=str(tmp_path)))
    assert {split: len(rows) for split, rows in data.items()} == {"train": 10, "validation": 4}


def test_fewer_examples_come_from_the_whole_file(tmp_path):
    path = write_csv(tmp_path / "sorted.csv", [(f"text {i}", i // 50) for i in range(100)])
    arguments = tables.TextArguments(train_file=path, validation_file=path, max_train_samples=20)
    data = tables.fewer(tables.load_texts(arguments), arguments)
    assert len(data["train"]) == 20 and set(data["train"]["label"]) == {"0", "1"}


def test_a_rare_class_is_known_even_where_no_example_of_it_is_taken(tmp_path):
    path = write_csv(tmp_path / "mine.csv", [("text", "common")] * 30 + [("text", "rare")])
    model = ["--max_train_samples", "4", "--max_eval_samples", "2"]
    text_classification.main(
        ["--train_file", path, "--validation_file", path, "--output_dir", str(tmp_path), *model, *SHORT]
    )
    assert json.loads((tmp_path / "config.json").read_text())["id2label"] == {"0": "common", "1": "rare"}


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("hollow.csv", "text,label\nfine,\n,0\n", "no row of train is left"),
        ("latin.csv", b"text,label\nsch\xf6n,1\n", "not in UTF-8 .*Save it as 'CSV UTF-8'"),
        ("mine.xlsx", "x", "is no .csv, .json, .jsonl, .txt file that exists"),
        ("torn.json", "{", "cannot be read"),
    ],
)
def test_bad_files_are_refused_in_one_line(tmp_path, name, text, message):
    (tmp_path / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    arguments = tables.TextArguments(train_file=str(tmp_path / name), validation_file=str(tmp_path / name))
    with pytest.raises(SystemExit, match=message):
        tables.load_texts(arguments)


@pytest.mark.parametrize("separator", [",", ";", "\t"])
def test_a_table_as_people_have_it(tmp_path, capsys, separator):
    """Quotes, separators and line ends in cells, empty cells, a byte order mark, labels that look like nothing."""
    rows = [
        ["Größe; gut, sagt „sie“", "None"],
        ['the "best"\nof\tall', "007"],
        ["", "007"],
        ["N/A", "None"],
        ["fine", ""],
    ]
    with (tmp_path / "mine.csv").open("w", newline="", encoding="utf-8-sig") as file:
        csv.writer(file, delimiter=separator).writerows([["Text", "Note"], *rows])
    path = str(tmp_path / "mine.csv")
    arguments = tables.TextArguments(train_file=path, validation_file=path, text_column="Text", label_column="Note")
    data = tables.load_texts(arguments)
    kept = {"text": [rows[0][0], rows[1][0], "N/A"], "label": ["None", "007", "None"]}
    assert data["train"].to_dict() == data["validation"].to_dict() == kept
    assert "2 of 5 train rows are left out: empty cells in row 3 (Text), 5 (Note)" in capsys.readouterr().err


def test_one_class_is_not_classified(tmp_path):
    data = write_csv(tmp_path / "mine.csv", [(f"text {i}", "fine") for i in range(9)])
    with pytest.raises(SystemExit, match="two classes or more; the data has fine"):
        text_classification.main(["--train_file", data, "--output_dir", str(tmp_path)])


def test_a_misspelt_schedule_ends_the_script_in_one_line(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["text_classification.py", "--schedule", "gradul"])
    with pytest.raises(SystemExit, match=r"^error: .*Did you mean 'gradual'\?$"):
        common.run(text_classification.main)


@pytest.mark.slow
def test_two_processes_leave_one_set_of_files(tmp_path):
    data = write_csv(tmp_path / "mine.csv", [(f"text {i}", i % 2) for i in range(20)])
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    recipe = [str(RECIPES / "text_classification.py"), "--train_file", data, "--output_dir", str(tmp_path), *SHORT]
    done = subprocess.run([sys.executable, *launch, *recipe], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert all((tmp_path / name).stat().st_size for name in LEFT)
    state = json.loads((tmp_path / "trainer_state.json").read_text())
    assert state["epoch"] == 2  # 16 examples, 4 steps of 4 examples: one epoch if there had been one process


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
