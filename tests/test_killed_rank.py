"""A rank is killed in the middle of a run: the other ends, the checkpoint is whole, and the next life goes on."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import trainer_runs
from test_distributed import LAUNCHED, TORCHRUN, children, distance, resumes

pytestmark = [pytest.mark.slow, resumes]
SECOND_LIFE = {"from": "checkpoint-4", "equal": True, "phases": [0, 3, 7, 13, 15]}


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory) -> dict[str, torch.Tensor]:
    """The weights in which one process ends."""
    trainer = trainer_runs.make(tmp_path_factory.mktemp("one"))
    trainer.train()
    return trainer.model.state_dict()


def two_processes(script: Path, output: Path) -> list[subprocess.Popen]:
    """The two ranks without a launcher, which would end the one when the other dies."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = str(free.getsockname()[1])
    place = {**os.environ, "OMP_NUM_THREADS": "1", "MASTER_ADDR": "localhost", "MASTER_PORT": port, "WORLD_SIZE": "2"}
    return [
        subprocess.Popen(
            [sys.executable, str(script), str(output)], stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
            env={**place, "RANK": str(rank), "LOCAL_RANK": str(rank)},
        )
        for rank in range(2)
    ]  # fmt: skip


def test_a_killed_rank_ends_the_other_and_the_next_launch_ends_in_the_same_weights(undisturbed, tmp_path):
    script, output = LAUNCHED / "killed.py", tmp_path / "killed"
    survivor, killed = two_processes(script, output)
    try:
        assert killed.wait(240) == -signal.SIGKILL
        assert survivor.wait(120) > 0, "an error, long before the process group's timeout"
    finally:
        survivor.kill()
    assert "by peer" in json.loads((tmp_path / "killed.0.json").read_text())["restarted"]["error"]

    assert [path.name for path in output.iterdir()] == ["checkpoint-4"]
    (result, _) = children("killed", tmp_path)
    assert result["restarted"] == SECOND_LIFE
    torch.save(undisturbed, tmp_path / "one.pt")
    assert distance(tmp_path, "killed", "one") < 1e-12


def test_torchrun_restarts_both_ranks_and_they_end_in_the_same_weights(undisturbed, tmp_path, monkeypatch):
    # without it the second life may meet the addresses of the first in torchrun's store: pytorch issue 135712
    monkeypatch.setenv("TORCH_DISABLE_SHARE_RDZV_TCP_STORE", "1")
    (result, _) = children("killed", tmp_path, launcher=[*TORCHRUN, "--max-restarts", "1"])
    assert result["restarted"] == SECOND_LIFE
    torch.save(undisturbed, tmp_path / "one.pt")
    assert distance(tmp_path, "killed", "one") < 1e-12
