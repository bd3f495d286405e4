"""The benchmark on a few examples: every method runs on every task, what is on record is not run again."""

from __future__ import annotations

import json

import benchmark
import pytest
from benchmark_methods import METHODS
from benchmark_report import best_rate, fastest_equal, rows_of, table
from conftest import tiny_bert

pytestmark = [
    pytest.mark.filterwarnings("ignore:'pin_memory' argument is set as true:UserWarning"),  # Trainer's default
    pytest.mark.filterwarnings("ignore:schedule .* will not reach:UserWarning"),
]


def entry(method, epochs, seed, rate, quality, seconds):
    of = {"task": "text", "method": method, "epochs": epochs, "seed": seed, "rate": rate}
    return {**of, "quality": quality, "wall": [seconds] * epochs, "cpu": [0.0] * epochs, "memory": [2_000_000] * epochs,
            "open": [0.5] * epochs, "optimizer_bytes": 0}  # fmt: skip


RUNS = [
    entry("full fine-tuning", 2, 0, 1e-4, 0.75, 50),
    entry("full fine-tuning", 2, 0, 3e-4, 0.70, 50),
    entry("full fine-tuning", 2, 1, 1e-4, 0.74, 50),
    entry("half", 1, 0, 1e-4, 0.72, 20),
    entry("half", 1, 1, 1e-4, 0.72, 20),
    entry("half", 2, 0, 1e-4, 0.742, 20),
    entry("half", 2, 1, 1e-4, 0.742, 20),
    entry("head", 9, 0, 1e-3, 0.65, 1),
]


def test_the_rate_is_the_best_of_the_first_seed_in_both_directions():
    of = {"task": "text", "method": "full fine-tuning", "epochs": 2}
    assert best_rate(RUNS, of, 1) == 1e-4
    assert best_rate(RUNS, of, -1) == 3e-4


def test_time_at_equal_quality_is_of_the_shortest_run_within_the_margin():
    rows = rows_of(RUNS, "text", 1, "wall")
    assert [(row.method, row.epochs, len(row.qualities)) for row in rows] == [
        ("full fine-tuning", 2, 2), ("half", 1, 2), ("half", 2, 2), ("head", 9, 1)]  # fmt: skip
    assert fastest_equal(rows, "half", 0.745, 1) == 40
    assert fastest_equal(rows, "head", 0.745, 1) is None
    text = table(rows, 1)
    assert "* half: 0.40" in text and "* head: not reached" in text
    assert "| 20 20 | 25 25 |" in text  # seconds of each epoch, and half of full fine-tuning's 50


def test_the_peer_gets_the_same_phases():
    from benchmark_peer import phases_of

    phases = phases_of(tiny_bert(), "head@0, block[-1]@1ep, block[-2:]@2ep", epochs=3, steps_per_epoch=7)
    kinds = [{name.split(".")[4] for name in phase["params"] if ".layer." in name} for phase in phases.values()]
    assert kinds == [set(), {"3"}, {"2"}]
    assert [phase["max_transition_epoch"] for phase in phases.values()] == [1, 2, 3]
    assert phases[0]["params"][-1] == "model.classifier.bias"


@pytest.mark.slow
def test_every_method_on_text_then_nothing_again(tmp_path, monkeypatch, capsys):
    arguments = ["--quick", "true", "--tasks", "text", "--output_dir", str(tmp_path)]
    benchmark.main(arguments)
    runs = [json.loads(line) for line in (tmp_path / "runs.jsonl").read_text().splitlines()]
    assert {run["method"] for run in runs} == {method.name for method in METHODS}
    assert len(runs) == 2 * len(METHODS)
    opened = {run["method"]: run["open"] for run in runs if run["seed"] == 0}
    expected = {
        "full fine-tuning": [1.0], "upper half, cache": [0.5], "LoRA": [1.0, 1.0], "layer decay 0.8": [1.0, 1.0],
        "linear probing, cache": [0.0] * 10, "LP-FT, cache": [1.0, 1.0], "upper half, frozen by hand": [0.5, 0.5],
        "a block an epoch, finetuning-scheduler": [0.0, 1 / 6, 2 / 6],
    }  # fmt: skip
    assert {name: opened[name] for name in expected} == expected
    assert "## text: 32 examples" in (tmp_path / "benchmark.md").read_text()
    assert all((tmp_path / name).stat().st_size > 5000 for name in ("frontier.png", "epochs.png"))
    monkeypatch.setattr(benchmark, "train", lambda *of: pytest.fail("a run on record ran again"))
    benchmark.main(arguments)


def test_what_is_not_there_is_refused():
    with pytest.raises(SystemExit, match="there is no 'music', only text, images, speech"):
        benchmark.main(["--tasks", "music"])
