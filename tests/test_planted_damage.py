"""The experiment on criteria: its task, its count of right choices, and a short run of all of it."""

from __future__ import annotations

import json
from pathlib import Path

import planted_damage
import pytest
import torch

from hf_unfreeze import criteria

RESULT = {
    "damaged": "block[1]",
    "head": 0.5,
    "reached": {"block[0]": 0.95, "block[1]": 0.9, "block[2]": 0.6, "block[3]": 0.5},
    "worth": {"fisher": {"block[0]": 1.0, "block[1]": 3.0, "block[2]": 2.0, "block[3]": 0.0}},
}


def test_the_label_is_the_value_of_the_key_that_is_asked_for():
    for row in planted_damage.task(50, torch.Generator().manual_seed(0)):
        key, *pairs = row["input_ids"].tolist()
        values = {(pair - planted_damage.KEYS) // planted_damage.VALUES: pair % planted_damage.VALUES for pair in pairs}
        assert len(values) == planted_damage.PAIRS
        assert values[key] == row["labels"]


def test_of_equals_the_upper_block_is_the_choice():
    equal = RESULT | {"worth": {"cka": dict.fromkeys(RESULT["reached"], 0.0)}}
    assert planted_damage.first_choices(equal) == {"cka": "block[3]", "top first": "block[3]"}


def test_a_choice_is_right_where_it_brings_nine_tenths_of_the_best():
    assert planted_damage.first_choices(RESULT) == {"fisher": "block[1]", "top first": "block[3]"}
    assert [planted_damage.repairs(RESULT, f"block[{index}]") for index in range(4)] == [True, False, False, False]
    assert planted_damage.repairs(RESULT | {"reached": RESULT["reached"] | {"block[0]": 0.94}}, "block[1]")


@pytest.mark.filterwarnings("ignore:schedule .* will not reach:UserWarning")
def test_a_short_run(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(criteria, "_CRITERIA", dict(criteria._CRITERIA))
    for name, steps in {"BASE_STEPS": 3, "HEAD_STEPS": 2, "BLOCK_STEPS": 2}.items():
        monkeypatch.setattr(planted_damage, name, steps)
    planted_damage.main(["--seeds", "1", "--output", "out.json"])
    (result,) = json.loads(Path("out.json").read_text())
    blocks = {f"block[{index}]" for index in range(planted_damage.BLOCKS)}
    assert set(result["reached"]) == blocks
    assert {name: set(worth) for name, worth in result["worth"].items()} == dict.fromkeys(
        planted_damage.CRITERIA, blocks
    )
    assert "First choice, 1 damaged models" in capsys.readouterr().out
