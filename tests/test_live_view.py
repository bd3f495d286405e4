"""The phase on the Trainer's own progress display, while it trains."""

from __future__ import annotations

import io
import re
import sys

import pytest
from transformers.utils.notebook import NotebookProgressCallback

from hf_unfreeze import UnfreezeCallback


class Terminal(io.StringIO):
    """A stream that is a terminal, or not."""

    def __init__(self, interactive: bool) -> None:
        super().__init__()
        self.interactive = interactive

    def isatty(self) -> bool:
        return self.interactive


@pytest.fixture
def shown(make_trainer, monkeypatch):
    """Train, and return what a terminal showed."""

    def train(schedule, *, interactive=True, cache=None, **arguments):
        terminal = Terminal(interactive)
        monkeypatch.setattr(sys, "stderr", terminal)
        monkeypatch.setenv("COLUMNS", "300")
        trainer = make_trainer(UnfreezeCallback(schedule, cache=cache), **{"disable_tqdm": False, **arguments})
        trainer.train()
        return terminal.getvalue()

    return train


def test_a_terminal_shows_phase_share_next_and_cache(shown):
    text = shown("head@0, block[2:]@8step, all@90%", cache="memory")
    assert re.search(r"▯▯▯▯▯▮ phase 0: head \(1\.8%\), next block\[2:4\], head at 8", text)
    assert re.search(r"▯▯▯▮▮▮ phase 1: block\[2:4\], head \(26\.1%\), next all at 19, cache \d\d%", text)
    assert "▮▮▮▮▮▮ phase 2: all (100.0%), cache" in text


@pytest.mark.filterwarnings("ignore:.* measures on .* batches at each choice:UserWarning")
def test_what_the_data_decides_has_no_time(shown):
    assert "next when the data says" in shown("plateau(eval_loss)", max_steps=2, eval_strategy="steps", eval_steps=1)
    assert re.search("phase 0: .*, next at 4", shown("auto(spectrum_snr, every=4step)", max_steps=6))


@pytest.mark.parametrize("arguments", [{"interactive": False}, {"disable_tqdm": True}])
def test_nothing_is_added_where_nobody_looks(shown, arguments):
    assert "▮" not in shown("head@0", max_steps=3, **arguments)


@pytest.mark.parametrize("evaluates", [True, False])
def test_the_table_of_a_notebook_gains_phase_and_a_bar_of_open_groups(make_trainer, evaluates):
    seen = {}

    class Looking(NotebookProgressCallback):
        """Keeps the display, which the Trainer forgets at the end."""

        def on_train_end(self, *args, **kwargs):
            seen["html"] = self.training_tracker.html_code
            seen["table"] = self.training_tracker.inner_table

    strategy = {"eval_strategy": "epoch"} if evaluates else {"logging_steps": 7}
    trainer = make_trainer(UnfreezeCallback("head@0, block[2:]@8step"), Looking(), **strategy)
    trainer.train()
    columns, *rows = seen["table"]
    phases = [row[columns.index("Phase")] for row in rows]
    assert phases == [0, 1, 1]
    opened = [re.findall("#2a788e|#d9d9d9", row[columns.index("Open")]) for row in rows]
    assert [colours.count("#2a788e") for colours in opened] == [1, 3, 3]
    assert [len(colours) for colours in opened] == [6, 6, 6] and opened[1][-1] == "#2a788e"
    assert "phase 1: block[2:4], head (" in seen["html"]
