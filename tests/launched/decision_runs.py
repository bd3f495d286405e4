"""Runs in which data or chance decides, and what must be equal when one is interrupted and resumed."""

from __future__ import annotations

import sys
import warnings
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from conftest import build_trainer, hashes

from hf_unfreeze import UnfreezeCallback
from hf_unfreeze.criteria import _CRITERIA

STEPS = 6
EVALUATED = {"eval_strategy": "steps", "eval_steps": 1}
RUNS = {
    **{f"auto({criterion}, every=2step, batches=2)": {} for criterion in _CRITERIA},
    "freeze_converged(every=2step, batches=2, percentile=100)": {},
    "freeze_converged(cka, every=2step)": {},
    "rotate(blocks=1, every=2step)": {},
    "rotate(blocks=1, every=1step, order=descending, embeddings=false, head=false)": {},
    "freeze_out(0.5, cubed=false)": {},
    "auto_rates(every=2step, batches=2)": {},
    "learn_rates(speed=0.3, start=0.5, every=2step, batches=2)": {},
    "plateau(eval_loss, patience=1, min_delta=0.5)": EVALUATED,
    "plateau(eval_loss, patience=1, min_delta=0.5, restore_best=true)": EVALUATED,
    "plateau(eval_loss, patience=1, min_delta=0.5, stop=no_gain)": EVALUATED,
}


def train(folder: Path, spec: str, checkpoint: Path | None = None, **options):
    """Train by a schedule, from the beginning or a checkpoint; a checkpoint of each step is kept if it begins."""
    saved = {} if checkpoint else {"save_strategy": "steps", "save_steps": 1}
    options = {"max_steps": STEPS, "dataloader_pin_memory": False, **RUNS.get(spec, {}), **saved, **options}
    trainer = build_trainer(folder, UnfreezeCallback(spec), **options)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "schedule .* will not reach", UserWarning)
        warnings.filterwarnings("ignore", ".* measures on .* batches at each choice", UserWarning)
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    return trainer


def outcome(trainer) -> tuple:
    """What was decided and measured, and the weights; timings and learning rates are left out."""
    history = [record for record in trainer.state.log_history if any("unfreeze/" in key for key in record)]
    return [{k: v for k, v in r.items() if k.startswith("unfreeze/") or k == "step"} for r in history], hashes(
        trainer.model
    )
