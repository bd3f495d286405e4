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
from multiprocessing.connection import Connection
from pathlib import Path

import pytest
from conftest import build_trainer, hashes

from hf_unfreeze import UnfreezeCallback

KILLS = int(os.environ.get("KILLS", "6"))
LIMIT = 120  # seconds that a whole run may take
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


def live(folder: Path, begun: Connection) -> None:
    """Train from the last complete checkpoint to the end, or until killed."""
    callback = UnfreezeCallback(SCHEDULE, layer_decay=0.8, block_warmup="2step")
    trainer = build_trainer(folder, callback, **ARGUMENTS)
    begun.send(True)
    trainer.train(resume_from_checkpoint=last_complete(folder))
    (folder / "end.json").write_text(json.dumps(hashes(trainer.model)))


def start(folder: Path) -> multiprocessing.process.BaseProcess:
    """A process that is about to train."""
    # forked from a server that has imported everything and run nothing: a fork of the test's own process may inherit
    # a lock that a thread of an earlier test holds, and wait for it for ever
    server = multiprocessing.get_context("forkserver")
    server.set_forkserver_preload(["transformers.trainer", "transformers.models.bert.modeling_bert", "hf_unfreeze"])
    begun, of_child = server.Pipe(duplex=False)
    child = server.Process(target=live, args=(folder, of_child))
    child.start()
    assert begun.poll(LIMIT)
    return child


@pytest.mark.slow
def test_killed_again_and_again(tmp_path):
    undisturbed = start(tmp_path / "whole")
    since = time.monotonic()
    undisturbed.join(LIMIT)
    assert undisturbed.exitcode == 0
    duration = time.monotonic() - since
    chance = random.Random(0)
    resumed_at = []
    folder = tmp_path / "killed"
    while len(resumed_at) < KILLS:
        child = start(folder)
        child.join(chance.uniform(0.1, 0.9) * duration)
        child.kill()
        child.join()
        if child.exitcode == 0:  # it had come to its end: begin another run
            assert (folder / "end.json").read_text() == (tmp_path / "whole" / "end.json").read_text()
            folder = folder.with_name(f"killed{len(resumed_at)}")
            continue
        assert child.exitcode == -signal.SIGKILL
        checkpoint = last_complete(folder)
        resumed_at.append(int(checkpoint.rpartition("-")[2]) if checkpoint else 0)
    last = start(folder)
    last.join(LIMIT)
    assert last.exitcode == 0
    assert (folder / "end.json").read_text() == (tmp_path / "whole" / "end.json").read_text()
    print("killed at steps", resumed_at)
    assert len(set(resumed_at)) > KILLS // 4  # at different moments
