"""The other text recipes in a few steps, on own data, with wrong input; labels and blocks exactly."""

from __future__ import annotations

import importlib
import json
import math
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import causal_lm
import continual
import embedded
import numpy as np
import pytest
import scores
import summarization
import token_classification
import torch
from test_recipes import LEFT
from transformers import (
    AutoTokenizer,
    BertConfig,
    BertForSequenceClassification,
    T5Config,
    T5ForConditionalGeneration,
)

pytestmark = [
    pytest.mark.filterwarnings("ignore:schedule .* will not reach:UserWarning"),
    pytest.mark.filterwarnings("ignore:'pin_memory' argument is set as true:UserWarning"),  # Trainer's default
]
SHORT = ["--max_steps", "4", "--logging_steps", "1", "--per_device_train_batch_size", "4", "--use_cpu",
         "--disable_tqdm", "true", "--eval_strategy", "no"]  # fmt: skip
FEW = ["--max_train_samples", "16", "--max_eval_samples", "8"]
TAGGED = [{"tokens": ["In", "Ghent", str(i)], "tags": ["O", "B-place", "O"]} for i in range(10)]
TEXTS = [{"text": f"number {i} is {mood}", "label": mood} for i in range(10) for mood in ("good", "bad")]
# recipe: its metrics, and rows of own data
RECIPES = {
    "token_classification": (["f1", "precision", "recall", "accuracy"], TAGGED),
    "summarization": (["rouge1", "rouge2", "rougeL"], [{"text": f"{i} is one", "summary": "one"} for i in range(10)]),
    "causal_lm": (["perplexity"], TEXTS),
    "continual": (["old_accuracy", "new_accuracy"], TEXTS),
}


def write(path, rows):
    path.write_text("\n".join(map(json.dumps, rows)))
    return str(path)


def tiny_classifier(folder, labels=("bad", "good")):
    """A saved classifier of two tiny blocks with the embedded tokenizer."""
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(embedded.minilm())
    names = {"id2label": dict(enumerate(labels)), "label2id": {label: i for i, label in enumerate(labels)}}
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2, "num_hidden_layers": 2}
    BertForSequenceClassification(BertConfig(vocab_size=len(tokenizer), **sizes, **names)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.mark.slow
@pytest.mark.parametrize("recipe", RECIPES)
def test_four_steps_on_embedded_data(tmp_path, recipe):
    importlib.import_module(recipe).main(["--output_dir", str(tmp_path), *FEW, *SHORT])
    assert all((tmp_path / name).stat().st_size for name in LEFT)
    results = json.loads((tmp_path / "all_results.json").read_text())
    assert {f"eval_{name}" for name in RECIPES[recipe][0]} <= set(results)
    assert "## Unfreezing" in (tmp_path / "README.md").read_text()


def test_tags_of_own_data_are_in_the_config(tmp_path):
    data = write(tmp_path / "mine.jsonl", TAGGED)
    token_classification.main(["--train_file", data, "--model_name_or_path", tiny_classifier(tmp_path / "model"),
                               "--output_dir", str(tmp_path), *SHORT])  # fmt: skip
    assert json.loads((tmp_path / "config.json").read_text())["id2label"] == {"0": "B-place", "1": "O"}


@pytest.mark.slow
def test_the_launch_file_for_two_processes_runs_a_recipe(tmp_path):
    recipes = Path(token_classification.__file__).parent
    launch = ["-m", "accelerate.commands.launch", "--config_file", str(recipes / "launch" / "two_cpu_processes.yaml")]
    own = ["--train_file", write(tmp_path / "mine.jsonl", TAGGED), "--output_dir", str(tmp_path / "out"),
           "--model_name_or_path", tiny_classifier(tmp_path / "model")]  # fmt: skip
    recipe = [str(recipes / "token_classification.py"), *own, *SHORT, "--per_device_train_batch_size", "1"]
    done = subprocess.run([sys.executable, *launch, *recipe], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert all((tmp_path / "out" / name).stat().st_size for name in LEFT)
    state = json.loads((tmp_path / "out" / "trainer_state.json").read_text())
    assert state["epoch"] == 1  # 8 examples, 4 steps of 2: with one process half an epoch


def test_a_text_file_trains_a_language_model(tmp_path):
    (tmp_path / "mine.txt").write_text("\n".join(f"one line of text, number {i}" for i in range(20)))
    causal_lm.main(
        ["--train_file", str(tmp_path / "mine.txt"), "--block_size", "16", "--output_dir", str(tmp_path), *SHORT]
    )
    results = json.loads((tmp_path / "all_results.json").read_text())
    assert results["eval_perplexity"] == pytest.approx(math.exp(results["eval_loss"]), rel=1e-4)
    assert "trained from scratch" in (tmp_path / "README.md").read_text()


def test_blocks_longer_than_the_model_takes_are_refused(tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(embedded.minilm())
    causal_lm.small_gpt2(tokenizer, 16).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    (tmp_path / "mine.txt").write_text("a line of text\n" * 20)
    own = ["--model_name_or_path", str(tmp_path / "model"), "--train_file", str(tmp_path / "mine.txt")]
    with pytest.raises(SystemExit, match="--block_size 17 is more than the 16 tokens"):
        causal_lm.main([*own, "--block_size", "17", "--output_dir", str(tmp_path), "--use_cpu"])
    with pytest.raises(SystemExit, match="the 4 texts of validation are shorter than one block"):
        causal_lm.main([*own, "--block_size", "70", "--output_dir", str(tmp_path), "--use_cpu"])


def test_summaries_of_own_data(tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(embedded.minilm())
    sizes = {"d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_heads": 2, "vocab_size": len(tokenizer)}
    ends = {"eos_token_id": tokenizer.sep_token_id, "decoder_start_token_id": tokenizer.pad_token_id}
    T5ForConditionalGeneration(T5Config(**sizes, **ends)).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    data = write(tmp_path / "news.json", [{"article": f"{i} is one", "highlights": "one"} for i in range(10)])
    columns = ["--text_column", "article", "--summary_column", "highlights"]
    model = ["--model_name_or_path", str(tmp_path / "model")]
    summarization.main(["--train_file", data, *columns, *model, "--output_dir", str(tmp_path), *SHORT])
    assert "eval_rouge1" in json.loads((tmp_path / "all_results.json").read_text())


def test_new_labels_are_added_and_both_accuracies_told(tmp_path, capsys):
    old = write(tmp_path / "old.json", TEXTS)
    new = write(tmp_path / "new.json", [*TEXTS, *[{"text": "so so", "label": "fair"}] * 5])
    model = tiny_classifier(tmp_path / "model", labels=("good", "bad"))
    continual.main(["--model_name_or_path", model, "--old_file", old, "--train_file", new,
                    "--output_dir", str(tmp_path), *SHORT, "--schedule", "head@0"])  # fmt: skip
    results = json.loads((tmp_path / "all_results.json").read_text())
    assert {f"{stage}_{data}_accuracy" for stage in ("before", "eval") for data in ("old", "new")} <= set(results)
    shown = capsys.readouterr().out
    assert all(f"{results[f'before_old_{score}']:.3f}" in shown for score in ("accuracy", "f1"))
    assert json.loads((tmp_path / "config.json").read_text())["id2label"] == {"0": "good", "1": "bad", "2": "fair"}


def test_a_widened_head_keeps_its_old_rows(tmp_path):
    name = tiny_classifier(tmp_path)
    old, new = continual.with_labels(name, ["bad"]), continual.with_labels(name, ["bad", "fair"])
    assert old.classifier.weight.shape[0] == 2 and new.classifier.weight.shape[0] == 3
    assert torch.equal(new.classifier.weight[:2], old.classifier.weight)
    assert torch.equal(new.classifier.bias[:2], old.classifier.bias)


@pytest.mark.parametrize(("replay", "steps"), [("0", 4), ("0.5", 6), ("9", 8)])
def test_replay_is_a_share_of_the_new_examples_and_at_most_all_old_ones(tmp_path, replay, steps):
    data, model = write(tmp_path / "mine.json", TEXTS), tiny_classifier(tmp_path / "model")
    files = ["--old_file", data, "--train_file", data, "--output_dir", str(tmp_path)]
    one_epoch = [*SHORT[2:], "--num_train_epochs", "1", "--schedule", "head@0"]
    continual.main(["--model_name_or_path", model, *files, *one_epoch, "--replay", replay])
    assert json.loads((tmp_path / "trainer_state.json").read_text())["global_step"] == steps  # of 4; 16 are new


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_wrong_column_is_refused_in_one_line(tmp_path, recipe):
    rows = [{"words": "a", "kind": "b"}] * 3
    data = write(tmp_path / "mine.json", rows)
    own = ["--old_file", data, "--model_name_or_path", "none"] if recipe == "continual" else []
    with pytest.raises(SystemExit, match=r"there is no column '(text|tokens)'; the data has words, kind\."):
        importlib.import_module(recipe).main(["--train_file", data, "--output_dir", str(tmp_path), *own])


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"tokens": ["In", "Ghent"], "tags": ["O"]}, "two lists of one length"),
        ({"tokens": "In Ghent", "tags": "O O"}, "two lists of one length"),
        ({"tokens": ["In"], "tags": ["place"]}, "tags are O, B-name or I-name, and the data has place"),
    ],
)
def test_tags_that_cannot_be_scored_are_refused(tmp_path, row, message):
    arguments = token_classification.TagArguments(train_file=write(tmp_path / "mine.json", [row] * 5))
    with pytest.raises(SystemExit, match=message):
        token_classification.load_tags(arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--train_file", "new.csv"], "name both, or neither"),
        (["--train_file", "new.csv", "--old_file", "old.csv"], "--old_file needs --model_name_or_path"),
        (["--replay", "-1"], "is no share"),
    ],
)
def test_half_of_what_continual_needs_is_refused(tmp_path, arguments, message):
    with pytest.raises(SystemExit, match=message):
        continual.main([*arguments, "--output_dir", str(tmp_path)])


def test_a_model_that_does_not_know_the_old_labels_is_refused(tmp_path):
    data, model = write(tmp_path / "mine.json", TEXTS), tiny_classifier(tmp_path / "model", labels=("x", "y"))
    new = write(tmp_path / "new.json", [{"text": "so", "label": "x"}] * 5)
    with pytest.raises(SystemExit, match="does not know the old data's labels bad, good, only x, y"):
        continual.main(
            ["--model_name_or_path", model, "--old_file", data, "--train_file", new, "--output_dir", str(tmp_path)]
        )


def test_a_missing_package_of_a_metric_names_the_line_to_run():
    with pytest.raises(SystemExit, match="pip install no_such_package"):
        scores.required("no_such_package")


def test_the_first_token_of_a_word_carries_its_label():
    tokenizer = AutoTokenizer.from_pretrained(embedded.minilm())
    encode = token_classification.encoder(tokenizer, ["B-x", "I-x", "O"], max_length=7)
    words = [["go", "unfreezing"], ["so", "@paulwalk", "unfreezing"]]
    encoded = encode({"tokens": words, "tags": [["O", "B-x"], ["O", "B-x", "I-x"]]})
    assert " ".join(tokenizer.convert_ids_to_tokens(encoded["input_ids"][0])) == "[CLS] go un ##free ##zing [SEP]"
    assert encoded["labels"] == [[-100, 2, 0, -100, -100, -100], [-100, 2, 0, -100, -100, 1, -100]]


def test_texts_are_packed_into_full_blocks():
    tokenizer = AutoTokenizer.from_pretrained(embedded.minilm())
    the, cat, sat, end = tokenizer.convert_tokens_to_ids(["the", "cat", "sat", "[SEP]"])
    packed = causal_lm.packer(tokenizer, 3)({"text": ["the cat", "", "sat the cat", "sat"]})
    assert packed["input_ids"] == [[the, cat, end], [sat, the, cat], [end, sat, end]]
    assert packed["labels"] == [[-100, cat, end], [-100, the, cat], [-100, sat, end]]
    assert causal_lm.packer(tokenizer, 4)({"text": ["the cat", "sat the cat", "sat"]})["input_ids"] == [
        [the, cat, end, sat],
        [the, cat, end, sat],
    ]  # a last, shorter block is left out


def test_entities_count_as_wholes():
    names, labels = ["B-x", "I-x", "O"], np.array([[-100, 0, 1, 2, 0, -100]])
    chosen = np.array([[2, 0, 1, 2, 0, 2]])
    scored = {}
    for part in ("whole", "cut short"):
        prediction = SimpleNamespace(predictions=np.eye(3)[chosen], label_ids=labels)
        scored[part] = scores.entity_metrics(names)(prediction)
        chosen[0, 2] = 2  # the first of two entities ends too early
    assert set(scored["whole"].values()) == {1.0}
    assert scored["cut short"] == {"accuracy": 0.75, "precision": 0.5, "recall": 0.5, "f1": 0.5}


def test_perplexity_of_a_guess_is_the_size_of_the_vocabulary():
    losses = scores.token_losses(torch.zeros(2, 5, 7), torch.randint(7, (2, 5)))
    assert losses.shape == (2, 4)
    scored = scores.perplexity_metrics(SimpleNamespace(predictions=losses.numpy()))
    assert scored == {"perplexity": pytest.approx(7)}


def test_rouge_counts_words_and_leaves_out_filled_up_tokens():
    tokenizer = AutoTokenizer.from_pretrained(embedded.minilm())
    said, wanted = (tokenizer.encode(text) for text in ("the cat", "the dog"))
    prediction = SimpleNamespace(predictions=np.array([[*said, -100]]), label_ids=np.array([[*wanted, -100]]))
    assert scores.rouge_metrics(tokenizer)(prediction) == {"rouge1": 0.5, "rouge2": 0.0, "rougeL": 0.5}


def test_the_subjects_of_the_embedded_tweets():
    assert embedded.subject_of("@United late again") == "airlines" and embedded.subject_of("hello") == "other"
    cars = embedded.tweets("cars", 30)
    assert {split: len(rows) for split, rows in cars.items()} == {"train": 20, "validation": 10}
    assert all(embedded.subject_of(text) == "cars" for rows in cars.values() for text in rows["text"])
