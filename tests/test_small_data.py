"""The experiment on little, partly wrong data: its false labels, its measure of what is kept, and a short run of it."""

from __future__ import annotations

import json

import datasets
import pytest
import small_data
import torch
from transformers import AutoTokenizer, BertConfig, BertModel

pytestmark = [
    pytest.mark.filterwarnings("ignore:'pin_memory' argument is set as true:UserWarning"),  # Trainer's default
    pytest.mark.filterwarnings("ignore:mtime may not be reliable on this filesystem:UserWarning"),  # transformers 4
]


def test_so_many_labels_are_false_and_the_same_ones_each_time():
    rows = datasets.Dataset.from_dict({"label": [number % 3 for number in range(40)], "text": ["x"] * 40})
    found = [small_data.mislabelled(rows, 0.05, 3, seed)["label"] for seed in (1, 1, 2)]
    wrong = [{number for number, label in enumerate(labels) if label != number % 3} for labels in found]
    assert [len(numbers) for numbers in wrong] == [2, 2, 2] and wrong[0] == wrong[1] != wrong[2]
    assert set(found[0]) == {0, 1, 2}
    assert list(small_data.mislabelled(rows, 0.0, 3, 1)["label"]) == list(rows["label"])


def test_what_is_kept_is_1_until_embeddings_move():
    before = torch.randn(20, 6, generator=torch.Generator().manual_seed(0))
    assert small_data.kept(before, before) == {"cosine": pytest.approx(1), "cka": 1}
    assert small_data.kept(-before, before) == {"cosine": pytest.approx(-1), "cka": pytest.approx(1)}
    other = torch.randn(20, 6, generator=torch.Generator().manual_seed(1))
    assert all(value < 0.6 for value in small_data.kept(other, before).values())


def test_a_short_run_then_nothing_again(tmp_path, monkeypatch, capsys):
    tokenizer = AutoTokenizer.from_pretrained(small_data.minilm())
    config = BertConfig(hidden_size=16, intermediate_size=16, num_attention_heads=2, num_hidden_layers=2)
    BertModel(config).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    monkeypatch.setattr(small_data, "minilm", lambda: str(tmp_path / "model"))
    arguments = ["--examples", "64", "--test_examples", "10", "--epochs", "2", "--seeds", "1", "--metrics", "accuracy",
                 "--rate", "0.01", "--output", str(tmp_path / "out.jsonl")]  # fmt: skip
    small_data.main(arguments)
    runs = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [run["method"] for run in runs] == [*small_data.METHODS]
    kept = {run["method"]: run["cosine"] for run in runs}
    assert kept["head"] == pytest.approx(1) and kept["full fine-tuning"] < 0.9999
    assert all(any("eval_accuracy" in record for record in run["log"]) for run in runs)
    small_data.main([*arguments, "--methods", "head"])
    assert len((tmp_path / "out.jsonl").read_text().splitlines()) == len(runs)
    assert "full fine-tuning" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="hed is none of the methods"):
        small_data.main(["--methods", "hed"])


def test_no_tweet_is_drawn_twice(monkeypatch):
    pool = datasets.Dataset.from_dict({"number": [*range(60)], "label": [0] * 60})
    data = object.__new__(small_data.Tweets)
    data.pool, data.labels = pool, ["a", "b"]
    train, validation = data.drawn(3, 20, 0.1)
    assert (len(train), len(validation)) == (20, 10) and not set(train["number"]) & set(validation["number"])
    assert [sum(part["label"]) for part in (train, validation)] == [2, 1]
    assert list(data.drawn(3, 20, 0.1)[0]["number"]) == list(train["number"]) != list(data.drawn(4, 20, 0)[0]["number"])
