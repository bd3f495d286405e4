"""The timeline figure, and the command line as a user types it."""

from __future__ import annotations

import contextlib
import json
import re
from pathlib import Path

import pytest
import torch
import transformers
from rich.console import Console
from transformers import BertConfig, BertForSequenceClassification

from hf_unfreeze import UnfreezeCallback, UnfreezeError, Unfreezer, layer_groups, parse_schedule
from hf_unfreeze.cli import main
from hf_unfreeze.report import plan_rows, plan_table, timeline


@pytest.fixture
def folder(tmp_path):
    config = transformers.BertConfig(hidden_size=16, num_attention_heads=2, num_hidden_layers=12, num_labels=3)
    config.architectures = ["BertForSequenceClassification"]
    config.save_pretrained(tmp_path / "model")
    return str(tmp_path / "model")


@pytest.mark.filterwarnings("ignore:schedule .* will not reach:UserWarning")
def test_timeline_of_a_run_and_of_its_saved_state(make_trainer, tmp_path):
    trainer = make_trainer(UnfreezeCallback("gradual"), eval_strategy="epoch")
    trainer.train()
    trainer.save_state()
    path = tmp_path / "run" / "trainer_state.json"
    saved = json.loads(path.read_text())
    for run in (trainer, trainer.state, trainer.state.log_history, path, str(path), saved, saved["log_history"]):
        top, bottom, _ = timeline(run).axes
        assert [label.get_text() for label in top.get_yticklabels()] == [
            "embeddings", "block[0]", "block[1]", "block[2]", "block[3]", "head"
        ]  # fmt: skip
        cells = top.collections[0].get_array().reshape(6, -1)
        assert cells.mask[0].all() and not cells.mask[5].any() and cells.mask[4].sum() == 7
        assert len(bottom.lines[0].get_xdata()) == 3 and bottom.get_ylabel() == "loss (evaluation)"
    with pytest.raises(UnfreezeError, match="It has eval_loss"):
        timeline(trainer, metric="eval_accuracy")


def test_timeline_without_records():
    with pytest.raises(UnfreezeError, match="no lr/<group> records"):
        timeline([{"loss": 1.0, "step": 1}])


@pytest.mark.parametrize(
    ("run", "message"),
    [
        (3, "3 is no run. Give a Trainer that has trained"),
        ({"loss": 1}, "is no run"),
        ("no/such.json", r"'no/such.json' cannot be read as a trainer_state.json \(FileNotFoundError"),
        ("README.md", "JSONDecodeError"),
    ],
)
def test_what_is_no_run_is_told(run, message, monkeypatch):
    monkeypatch.chdir(Path(__file__).parents[1])
    with pytest.raises(UnfreezeError, match=message):
        timeline(run)


def test_plan(folder, capsys):
    assert main(["plan", folder, "--schedule", "head@0, block[-4:]@1ep, all@50%", "--epochs", "4",
                 "--steps-per-epoch", "10", "--json"]) == 0  # fmt: skip
    rows = json.loads(capsys.readouterr().out)
    assert [(row["start_step"], row["trainable"]) for row in rows] == [
        (0, "head"), (10, "block[8:12], head"), (20, "all")
    ]  # fmt: skip
    assert rows[2]["trainable_share"] == 1.0 and rows[0]["optimizer_bytes"] == 8 * rows[0]["trainable_params"]
    assert main(["plan", folder, "--max-steps", "5", "--schedule", "head@0, all@9step"]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "5 steps; not reached: all at step 9 phase" in shown
    assert main(["plan", folder, "--max-steps", "5", "--schedule", "gradual(every=4step)"]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "not reached: block[10:12], head at step 8 and 11 more" in shown


def test_a_plan_counts_what_a_run_trains(tmp_path, capsys):
    sizes = {"d_model": 8, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 8, "decoder_ffn_dim": 8,
             "encoder_attention_heads": 1, "decoder_attention_heads": 1, "vocab_size": 9, "pad_token_id": 0,
             "max_source_positions": 10}  # fmt: skip
    config = transformers.WhisperConfig(**sizes, architectures=["WhisperForConditionalGeneration"])
    config.save_pretrained(tmp_path)
    command = ["plan", str(tmp_path), "--max-steps", "5", "--schedule", "head@0, all@1step", "--world-size", "2"]
    assert main([*command, "--json"]) == 0
    model = transformers.WhisperForConditionalGeneration(config)
    optimizer = torch.optim.AdamW(model.parameters())
    with contextlib.closing(Unfreezer(model, optimizer, "all@0")) as unfreezer:
        trained = unfreezer.step(0).trainable_params
    row, held = json.loads(capsys.readouterr().out)[1], sum(p.numel() for p in model.parameters())
    assert row["trainable_params"] == trained == held - 10 * 8  # the sinusoids
    assert row["rank_weight_bytes"] == 4 * held


def test_a_plan_fits_a_terminal_of_80_columns():
    with torch.device("meta"):
        model = BertForSequenceClassification(BertConfig())
    groups = layer_groups(model)
    phases = parse_schedule("head@0, block[-2:]@1ep, all@50%").phases(groups, 1200, 100)
    console = Console(width=80)
    with console.capture() as shown:
        console.print(plan_table(plan_rows(model, groups, phases, 100), "plan"))
    text = shown.get()
    for whole in (
        "109,483,778",
        "14,767,874",
        "437.9 MB",
        "875.9 MB",
        "100.0%",
        "block[10:12],",
        "parameters",
        "gradients",
    ):
        assert whole in text
    assert "…" not in text and max(map(len, text.splitlines())) <= 80


def test_plan_on_many_ranks(folder, capsys):
    command = ["plan", folder, "--schedule", "head@0, block[0]@1step, all@2step", "--max-steps", "3", "--json"]
    assert main([*command, "--world-size", "64", "--bandwidth", "8Mbit/s"]) == 0
    head, bottom, whole = json.loads(capsys.readouterr().out)
    for row in (head, bottom, whole):
        assert row["reduced_bytes"] == row["rank_gradient_bytes"] == row["gradient_bytes"]
        assert row["sent_bytes"] == pytest.approx(2 * 63 / 64 * row["gradient_bytes"], abs=1)
        assert row["sent_seconds"] == row["sent_bytes"] / 1e6
        assert row["rank_weight_bytes"] == whole["gradient_bytes"]
        assert row["rank_optimizer_bytes"] == row["optimizer_bytes"]
    # forward and all of the backward, but gradients of the weights of one block in twelve
    assert bottom["compute_share"] == pytest.approx((2 + 1 / 12) / 3, abs=0.01) and whole["compute_share"] == 1

    assert main([*command, "--world-size", "8", "--sharded"]) == 0
    head, bottom, whole = json.loads(capsys.readouterr().out)
    assert whole["rank_optimizer_bytes"] == 2 * whole["rank_weight_bytes"] == 2 * whole["rank_gradient_bytes"]
    assert whole["gradient_bytes"] / 8 <= whole["rank_weight_bytes"] < 1.01 * whole["gradient_bytes"] / 8
    assert head["gathered_bytes"] < bottom["gathered_bytes"] == whole["gathered_bytes"]
    assert whole["sent_bytes"] == 7 / 8 * (whole["gathered_bytes"] + whole["reduced_bytes"])
    assert whole["sent_seconds"] is None
    assert main([*command[:-1], "--world-size", "8", "--sharded"]) == 0
    assert "Each of 8 ranks, FSDP2: MB" in capsys.readouterr().out


def test_groups_and_architectures(folder, capsys):
    assert main(["groups", folder, "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert [row["group"] for row in rows][:3] == ["head", "block[11]", "block[10]"]
    assert main(["groups", folder, "--head", "token-classification"]) == 0
    assert "BertForTokenClassification" in capsys.readouterr().out
    assert main(["architectures", "--json"]) == 0
    assert {"model_type": "whisper"} in json.loads(capsys.readouterr().out)


def test_groups_say_why(folder, capsys):
    assert main(["groups", folder, "--explain", "--json"]) == 0
    why = {row["parameter"]: (row["group"], row["why"]) for row in json.loads(capsys.readouterr().out)}
    assert why["bert.embeddings.LayerNorm.bias"] == ("embeddings", "row bert: embeddings")
    assert why["bert.encoder.layer.3.output.dense.bias"] == ("block[3]", "row bert: encoder.layer")
    assert why["classifier.bias"] == ("head", "row bert: outside the base model")
    assert main(["groups", folder, "--head", "masked-lm", "--explain"]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "Outside the blocks, and why" in shown and "tie with" in shown


def test_the_page_of_architectures_and_that_others_are_detected(capsys):
    assert main(["architectures", "--markdown"]) == 0
    assert capsys.readouterr().out.startswith("# Architectures with a row")
    assert main(["architectures"]) == 0
    assert "structure of any other model is detected" in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--schedule", "gradul", "--max-steps", "9"], "Did you mean 'gradual'"),
        (["--schedule", "block[20]@0", "--max-steps", "9"], "lies outside this model"),
        (["--epochs", "3"], "Give --epochs with --steps-per-epoch, or --max-steps"),
        (["--max-steps", "0"], "--max-steps 0: write a number above 0"),
        (["--epochs", "-1", "--steps-per-epoch", "5"], "--epochs -1.0: write a number above 0"),
        (["--max-steps", "9", "--world-size", "-2"], "--world-size -2: write a number above 0"),
        (["--max-steps", "9", "--world-size", "2", "--bandwidth", "100Gb/s"], "Units are kB/s, MB/s, GB/s"),
        (["--max-steps", "9", "--world-size", "2", "--bandwidth", "0GB/s"], "write a number above 0 and a unit"),
        (["--max-steps", "9", "--sharded"], "Give --world-size too"),
        (["--schedule", "auto(nope, every=10%)", "--max-steps", "9"], "'nope' is no criterion"),
        (
            ["--schedule", "auto(fisher)", "--max-steps", "9"],
            "Write the time in step or % instead, or give --steps-per-",
        ),
        (["--schedule", "plateau(at_least=5step, at_most=2step)", "--max-steps", "9"], "at_least is longer than"),
        (
            ["--head", "seq2seq-lm", "--max-steps", "9"],
            "bert has no head 'seq2seq-lm'. It has causal-lm, masked-lm, sequ",
        ),
        (["--epochs", "nan", "--steps-per-epoch", "5"], "--epochs nan: write a number above 0"),
    ],
)
def test_a_bad_argument_is_one_line_and_exit_code_2(folder, capsys, arguments, message):
    assert main(["plan", folder, *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


@pytest.mark.parametrize("schedule", ["plateau", "learn_rates", "auto_rates", "auto(fisher)", "freeze_converged"])
def test_a_plan_of_what_data_decides(folder, schedule, capsys):
    assert main(["plan", folder, "--epochs", "4", "--steps-per-epoch", "10", "--schedule", schedule]) == 0
    assert "data" in capsys.readouterr().out or schedule == "auto(fisher)"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_size": 15}, "no bert can be built from the config of .*: The hidden size \\(15\\) is not a multiple"),
        ({"architectures": ["Trainer"]}, "names 'Trainer', which is no model. Write --head none"),
        (
            {"model_type": "mine"},
            "has a config, and transformers .* knows no model_type 'mine'. .*layer_groups\\(",
        ),
        ({"model_type": "timm_wrapper", "architecture": "resnet18"}, "the config of .* cannot be read: .*Timm|timm"),
        ({"model_type": "mine", "auto_map": {"AutoConfig": "mine.Mine"}}, "has a config, .*layer_groups"),
    ],
)
def test_a_config_of_which_no_model_can_be_built_is_one_line(folder, capsys, changes, message):
    path = Path(folder, "config.json")
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    assert main(["groups", folder]) == 2
    error = capsys.readouterr().err
    assert re.search(message, error) and error.count("\n") == 1


def test_a_model_that_needs_a_package_is_one_line(folder, capsys, monkeypatch):
    def lacking(config):
        raise ImportError("this model requires the timm library.\nRun pip install timm.")

    monkeypatch.setattr(transformers.BertForSequenceClassification, "_from_config", lacking)
    assert main(["groups", folder]) == 2
    assert "can be built from the config of" in (error := capsys.readouterr().err)
    assert error.endswith("this model requires the timm library. Run pip install timm.\n")


def test_a_file_that_is_no_config(folder, capsys):
    Path(folder, "config.json").write_text("{")
    assert main(["groups", folder]) == 2
    assert "is no folder with a config" in capsys.readouterr().err


def test_a_model_that_is_not_there(capsys):
    assert main(["groups", "/no/such/model"]) == 2
    assert "no folder with a config" in capsys.readouterr().err
