"""A rank is killed in the middle of the first run; the second goes on from the last checkpoint."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

import torch
from shared import end, ranks_equal, run
from trainer_runs import make, two_rank_options
from transformers import TrainerCallback
from transformers.trainer_utils import get_last_checkpoint

folder = Path(sys.argv[1]).parent
output = folder / "killed"
last = get_last_checkpoint(str(output)) if output.exists() else None


class Killed(TrainerCallback):
    def on_step_begin(self, args, state, control, **kwargs):
        if last is None and state.global_step == 6 and args.process_index == 1:
            os.kill(os.getpid(), signal.SIGKILL)


def restarted() -> dict:
    """Train as a user does who is ready for a restart."""
    trainer = make(output, Killed(), save_strategy="steps", save_steps=4, **two_rank_options({}))
    trainer.train(resume_from_checkpoint=last)
    if trainer.is_world_process_zero():
        torch.save(trainer.model.state_dict(), folder / "killed.pt")
    return {
        "from": last and Path(last).name, "equal": ranks_equal(trainer.model),
        "phases": [r["step"] for r in trainer.state.log_history if "unfreeze/phase" in r],
    }  # fmt: skip


run({"restarted": restarted})
end()
