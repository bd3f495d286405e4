"""``hf-unfreeze search`` on a script that answers at once: what is tried, kept, shown and refused."""

from __future__ import annotations

import json
import math
import re

import optuna
import pytest

from hf_unfreeze._search import SCHEDULES, _evaluations, trials_figure
from hf_unfreeze.cli import main

SCRIPT = """
import json, pathlib, sys
given = dict(word.split("=", 1) for word in sys.argv[1:])
rate, decay = float(given["--learning_rate"]), float(given["--layer_decay"])
score = (given["--schedule"] == "all_at_once") + rate + float(given.get("--bonus", 0))
print("hello from the script")
if "--fail" in given: sys.exit("out of luck")
folder = pathlib.Path(given["--output_dir"])
(folder / "all_results.json").write_text(json.dumps({"eval_accuracy": score, "eval_loss": -score, "note": "x"}))
"""


@pytest.fixture
def search(tmp_path, capsys):
    """Search with a script of four lines; return the exit code, and the rows or the line of the error."""
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)

    def call(*own, passed_on=(), metric="eval_accuracy"):
        code = main(["search", str(script), "--output", str(tmp_path / "out"), "--metric", metric, "--json", *own,
                     "--", *passed_on])  # fmt: skip
        shown = capsys.readouterr()
        return (0, json.loads(shown.out)) if code == 0 else (code, shown.err)

    return call


def test_trials_are_sorted_kept_and_gone_on_with(search, tmp_path):
    own = ["--schedule", "head@0", "--schedule", "all_at_once", "--learning-rate", "1e-4", "1e-2"]
    code, first = search(*own, "--trials", "3", passed_on=["--bonus=5"])
    assert code == 0 and len(first) == 3
    scores = [row["eval_accuracy"] for row in first]
    assert scores == sorted(scores, reverse=True) and min(scores) > 5  # the script got its own argument
    assert {row["schedule"] for row in first} <= {"head@0", "all_at_once"}
    assert all(1e-4 <= row["learning_rate"] <= 1e-2 and 0.7 <= row["layer_decay"] <= 1 for row in first)
    assert (tmp_path / "out" / "trials.png").stat().st_size
    assert "hello from the script" in (tmp_path / "out" / "trial-0" / "log.txt").read_text()
    _, more = search(*own, "--trials", "5", passed_on=["--bonus=5"])
    assert len(more) == 5 and all(row in more for row in first)
    assert len({row["learning_rate"] for row in more}) == 5  # no draw comes twice


def test_another_search_in_the_same_folder_is_refused_by_what_differs(search):
    own = ("--trials", "1", "--schedule", "head@0")
    assert search(*own)[0] == 0
    code, error = search(*own, metric="eval_loss")
    assert code == 2 and error.endswith(
        "out holds another search: metric eval_accuracy there, eval_loss here. Name another --output.\n"
    )
    code, error = search("--trials", "1", "--schedule", "block[-1]@0", passed_on=["--bonus=5"])
    assert "search: arguments none there, --bonus=5 here; schedules head@0 there, 'block[-1]@0' here. Name" in error


def test_a_schedule_that_begins_by_freezing_is_passed_on(search):
    code, rows = search("--trials", "1", "--schedule=-head@0, all@0")
    assert code == 0 and rows[0]["schedule"] == "-head@0, all@0"


def test_the_log_level_of_optuna_is_as_before(search):
    optuna.logging.set_verbosity(optuna.logging.DEBUG)
    try:
        assert search("--trials", "0")[0] == 2
        assert optuna.logging.get_verbosity() == optuna.logging.DEBUG
    finally:
        optuna.logging.set_verbosity(optuna.logging.INFO)


def test_the_help_tells_what_is_taken_by_default_and_where_the_arguments_of_the_script_stand(capsys):
    with pytest.raises(SystemExit):
        main(["search", "--help"])
    shown = " ".join(capsys.readouterr().out.split())
    assert "hf-unfreeze search SCRIPT [OPTIONS] -- ITS ARGUMENTS" in shown
    for option, default in (("--metric", "eval_loss"), ("--trials", "20"), ("--output", "runs/search"),
                            ("--schedule", SCHEDULES[-1]), ("--layer-decay", "0.7 1.0"),
                            ("--learning-rate", "1e-05 0.001"), ("--seed", "0")):  # fmt: skip
        assert default in shown.rpartition(option)[2].partition(" --")[0], option
    assert "--schedule=-head@0" in shown and "total number of trials, earlier ones included" in shown


def test_arguments_of_the_script_without_dashes_before_them(capsys):
    with pytest.raises(SystemExit, match="2"):
        main(["search", "recipe.py", "--train_file", "mine.csv"])
    error = capsys.readouterr().err
    assert "unrecognized arguments: --train_file mine.csv. What the script is to get stands after --" in error
    assert "hf-unfreeze search recipe.py -- --train_file mine.csv" in error


@pytest.mark.parametrize("words", [["plan", "model"], ["groups", "model"], ["architectures"]])
def test_an_argument_that_a_command_lacks(words, capsys):
    with pytest.raises(SystemExit, match="2"):
        main([*words, "--bogus"])
    assert capsys.readouterr().err.endswith(f"hf-unfreeze {words[0]}: error: unrecognized arguments: --bogus.\n")


def test_less_is_better_for_a_loss(search):
    _, rows = search("--trials", "3", metric="eval_loss")
    assert [row["eval_loss"] for row in rows] == sorted(row["eval_loss"] for row in rows)


def test_the_figure_has_every_trial():
    schedules = ("head@0", "auto(validation_gradient, blocks=2, every=10%, batches=16)", "head@0")
    rows = [{"trial": i, "eval_f1": i / 4, "schedule": s, "layer_decay": 0.9, "learning_rate": 10.0**-i, "seconds": 1.0}
            for i, s in enumerate(schedules)]  # fmt: skip
    figure = trials_figure(rows, "eval_f1")
    axes = figure.axes[0]
    points = {tuple(point) for dots in axes.collections for point in dots.get_offsets().tolist()}
    assert points == {(1.0, 0.0), (0.1, 0.25), (0.01, 0.5)}
    assert [text.get_text() for text in figure.legends[0].get_texts()] == [schedules[1], "head@0"]


SLOW = """
import json, pathlib, sys, time
given = dict(word.split("=", 1) for word in sys.argv[1:])
rate = float(given["--learning_rate"])
folder = pathlib.Path(given["--output_dir"])
for epoch in range(4):
    print({"loss": "1.2", "epoch": str(epoch)}, flush=True)
    print("50%|#####     | 1/2\\r", {"eval_accuracy": f"{rate * epoch:.6g}", "epoch": str(epoch)}, flush=True)
    time.sleep(0.5)
(folder / "all_results.json").write_text(json.dumps({"eval_accuracy": rate * 3}))
"""


@pytest.mark.slow
def test_what_falls_behind_the_median_of_its_schedule_is_cut_short(search, tmp_path, monkeypatch):
    from hf_unfreeze import _search

    monkeypatch.setattr(_search, "_POLL", 0.02)
    (tmp_path / "script.py").write_text(SLOW)
    low = ["--schedule", "all_at_once", "--learning-rate", "1e-5", "1e-2"]
    code, rows = search(*low, "--trials", "3")
    assert code == 0 and len(rows) == 3
    code, rows = search(*low, "--trials", "5", "--prune")
    results = [(tmp_path / "out" / f"trial-{i}" / "all_results.json").is_file() for i in range(5)]
    assert code == 0 and results[:3] == [True] * 3 and len(rows) == sum(results) < 5
    for number in (i for i in range(5) if not results[i]):
        log = (tmp_path / "out" / f"trial-{number}" / "log.txt").read_text()
        assert log.count("eval_accuracy") < 4
    code, more = search(*low, "--trials", "5", "--prune")
    assert more == rows, "what was cut short counts, and is not tried again"


@pytest.mark.parametrize("quiet", [True, False])
def test_evaluations_are_read_from_what_the_trainer_prints(make_trainer, capfd, quiet):
    trainer = make_trainer(disable_tqdm=quiet, max_steps=3, eval_strategy="steps", eval_steps=1)
    trainer.train()
    shown = "".join(capfd.readouterr())
    expected = [record["eval_loss"] for record in trainer.state.log_history if "eval_loss" in record]
    assert _evaluations(shown, "eval_loss") == pytest.approx(expected, rel=1e-3) and len(expected) == 3


def test_evaluations_among_other_lines():
    log = "{'loss': '1'}\n 3%|# | 1/3\r{'eval_loss': '0.5', 'epoch': '1'}\n{'eval_loss': nan}{'eval_loss': 0.25, 'ep"
    found = _evaluations(log + "\n{'eval_loss': 0.125, 'lr/block[0]': 1e-05}", "eval_loss")
    assert found[::2] == [0.5, 0.125] and math.isnan(found[1]), "NaN has its place, half a line has none"


@pytest.mark.parametrize(
    ("own", "options", "message"),
    [
        ((), {"metric": "eval_f1"}, "'eval_f1' is not in .* It has eval_accuracy, eval_loss, note"),
        ((), {"passed_on": ["--bonus=nan"]}, "no trial ended with a number for 'eval_accuracy'"),
        ((), {"metric": "note"}, "'note' is not in"),
        ((), {"passed_on": ["--fail=1"]}, r"ended with exit code 1: out of luck\. .*trial-0/log.txt"),
        (("--schedule", "gradul"), {}, "Did you mean 'gradual'"),
        (("--layer-decay", "0.9", "1.1"), {}, "layer_decay from 0.9 to 1.1: .* above 0 and at most 1"),
        (("--learning-rate", "1e-3", "1e-4"), {}, "learning_rate from 0.001 to 0.0001"),
    ],
)
def test_what_cannot_be_searched_is_one_line_and_exit_code_2(search, own, options, message):
    code, error = search("--trials", "1", *own, **options)
    assert code == 2
    assert re.search(message, error.splitlines()[-1]) and "Traceback" not in error


def test_a_script_that_is_not_there(capsys):
    assert main(["search", "no/such.py"]) == 2
    assert "there is no script no/such.py" in capsys.readouterr().err
