"""The speed of the cache on a few examples: it compares what it says, and leaves its numbers."""

from __future__ import annotations

import json
from pathlib import Path

import cache_speed
import gpu_speed
import pytest

pytestmark = [
    pytest.mark.filterwarnings("ignore:schedule .* will not reach:UserWarning"),
    pytest.mark.filterwarnings("ignore:'pin_memory' argument is set as true:UserWarning"),  # Trainer's default
    pytest.mark.slow,
]


def test_cache_speed_on_a_few_examples(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    cache_speed.main(["--max_train_samples", "16", "--max_eval_samples", "4", "--repeats", "2", "--epochs", "2",
                    "--overhead_steps", "3", "--trials", "2", "--output", "numbers.json"])  # fmt: skip
    numbers = json.loads(Path("numbers.json").read_text())
    methods = numbers["methods"]
    assert set(methods) == {method.name for method in cache_speed.METHODS}
    assert all(len(entry["runs"]) == 2 and len(entry["seconds"]) == 2 for entry in methods.values())
    for name in methods:
        if name.endswith(", cache"):  # what the cache must not change
            assert methods[name]["runs"][0]["loss"] == pytest.approx(
                methods[name[: -len(", cache")]]["runs"][0]["loss"]
            )
    assert 0 < numbers["callback_share"] < 1
    plain, cached = numbers["trials"].values()
    assert [trial["schedule"] for trial in cached] == ["head@0", "top(0.5)"]
    assert [trial["loss"] for trial in cached] == pytest.approx([trial["loss"] for trial in plain])
    shown = capsys.readouterr().out
    assert "full fine-tuning" in shown and "2 trials that share a store" in shown


def test_gpu_speed_without_one(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    gpu_speed.main(["--sizes", "tiny", "--repeats", "1", "--steps", "2"])
    ways = json.loads(Path("gpu_speed.json").read_text())["sizes"]["tiny"]
    assert set(ways) == {method.name for method in gpu_speed.METHODS} and not any(
        run["off"] for runs in ways.values() for run in runs
    )
    for part in ("upper half", "head"):
        losses = {ways[f"{part}{cache}"][0]["loss"] for cache in ("", ", memory", ", device")}
        assert len(losses) == 1, "the cache does not change what is computed"
    assert "tiny" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="is not among"):
        gpu_speed.main(["--sizes", "huge"])
