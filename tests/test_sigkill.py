"""A run that is killed at random moments, over and over, ends in the weights of an undisturbed one.

CI kills 6 times; ``KILLS=50 pytest tests/test_sigkill.py -m slow`` is the long form.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import signal
import time
from pathlib import Path

import pytest
from conftest import hashes

from hf_unfreeze import UnfreezeCallback

KILLS = int(os.environ.get("KILLS", "6"))
SCHEDULE = "head@0, block[-1]@3step, block[-2:]@1ep, all@60%, -block[0]@15step"
ARGUMENTS = {"save_strategy": "steps", "save_steps": 1, "save_total_limit": 3}


def last_complete(folder: Path) -> str | None:
    """The Trainer writes trainer_state.json last: a checkpoint where it can be read is whole."""
    for checkpoint in sorted(folder.glob("checkpoint-*"), key=lambda path: -int(path.name.split("-")[1])):
        try:
            json.loads((checkpoint / "trainer_state.json").read_text())
        except (OSError, ValueError):
            continue
        return str(checkpoint)
    return None


def live(make_trainer, folder: Path) -> None:
    """Train from the last complete checkpoint to the end, or until killed."""
    callback = UnfreezeCallback(SCHEDULE, layer_decay=0.8, block_warmup="2step")
    trainer = make_trainer(callback, output_dir=str(folder), **ARGUMENTS)
    trainer.train(resume_from_checkpoint=last_complete(folder))
    (folder / "end.json").write_text(json.dumps(hashes(trainer.model)))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_killed_again_and_again(make_trainer, tmp_path):
    fork = multiprocessing.get_context("fork")  # a forked child has everything imported
    undisturbed = fork.Process(target=live, args=(make_trainer, tmp_path / "whole"))
    begun = time.monotonic()
    undisturbed.start()
    undisturbed.join()
    duration = time.monotonic() - begun
    chance = random.Random(0)
    resumed_at = []
    folder = tmp_path / "killed"
    while len(resumed_at) < KILLS:
        child = fork.Process(target=live, args=(make_trainer, folder))
        child.start()
        child.join(chance.uniform(0.3, 0.9) * duration)
        child.kill()
        child.join()
        if child.exitcode == 0:  # it had come to its end: begin another run
            assert (folder / "end.json").read_text() == (tmp_path / "whole" / "end.json").read_text()
            folder = folder.with_name(f"killed{len(resumed_at)}")
            continue
        assert child.exitcode == -signal.SIGKILL
        checkpoint = last_complete(folder)
        resumed_at.append(int(checkpoint.rpartition("-")[2]) if checkpoint else 0)
    live_child = fork.Process(target=live, args=(make_trainer, folder))
    live_child.start()
    live_child.join()
    assert (folder / "end.json").read_text() == (tmp_path / "whole" / "end.json").read_text()
    print("killed at steps", resumed_at)
    assert len(set(resumed_at)) > KILLS // 4  # at different moments
