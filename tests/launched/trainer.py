"""The Trainer on two ranks: whole runs, bytes, resumes; and checkpoints that came from one process."""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path

import torch
from shared import end, everywhere, ranks_equal, run
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from trainer_runs import CACHES, RESUMES, RUNS, make, two_rank_options
from transformers import TrainerCallback

from hf_unfreeze import UnfreezeCallback

folder = Path(sys.argv[1]).parent


class Bytes(TrainerCallback):
    """A user's comm hook, registered on the wrapper, which counts what each step sends."""

    def __init__(self):
        self.sent, self.steps, self.trainable = 0, [], []

    def on_train_begin(self, args, state, control, **kwargs):
        def counted(hook_state, bucket):
            self.sent += bucket.buffer().nbytes
            return allreduce_hook(hook_state, bucket)

        self.trainer.model_wrapped.register_comm_hook(None, counted)

    def on_step_end(self, args, state, control, model, **kwargs):
        self.steps.append(self.sent)
        self.trainable.append(sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad))
        self.sent = 0


def whole(name: str, **options) -> dict:
    """Train, keep every checkpoint, and leave the weights for the parent."""
    count = Bytes()
    count.trainer = trainer = make(
        folder / name, count, save_strategy="steps", save_steps=1, **two_rank_options(options)
    )
    trainer.train()
    if trainer.is_world_process_zero():
        torch.save(trainer.model.state_dict(), folder / f"{name}.pt")
    return {
        "equal": ranks_equal(trainer.model), "sent": count.steps, "trainable": count.trainable,
        "ranks": everywhere(trainer.args.world_size), "wrapper": type(trainer.model_wrapped).__name__,
        "phases": [(r["step"], r["unfreeze/trainable"]) for r in trainer.state.log_history if "unfreeze/phase" in r],
        "restored": all(p.requires_grad for p in trainer.model.parameters()),
    }  # fmt: skip


def resumed(name: str, steps=range(1, 21), **options) -> dict:
    """Resume from checkpoints of the whole run, this one's weights included in what must be equal."""
    expected = torch.load(folder / f"{name}.pt")
    different = []
    for step in steps:
        trainer = make(folder / f"{name}-again", **two_rank_options(options))
        trainer.train(resume_from_checkpoint=str(folder / name / f"checkpoint-{step}"))
        weights = trainer.model.state_dict()
        if not all(torch.equal(weights[key], expected[key]) for key in expected) or not ranks_equal(trainer.model):
            different.append(step)
    return {"different": different}


def cached(name: str, cache: str) -> dict:
    """Train over a cache."""
    trainer = make(folder / name, cache=cache, **two_rank_options({}))
    trainer.train()
    if trainer.is_world_process_zero():
        torch.save(trainer.model.state_dict(), folder / f"{name}.pt")
    (used,) = [each.cache for each in trainer.callback_handler.callbacks if isinstance(each, UnfreezeCallback)]
    return {
        "equal": ranks_equal(trainer.model), "ranks": everywhere(trainer.args.world_size),
        "off": everywhere(used.active.off), "hits": everywhere(used.stats.hits),
        "misses": everywhere(used.stats.misses), "max_bytes": everywhere(used.store.max_bytes),
    }  # fmt: skip


def from_one() -> dict:
    """Go on from a checkpoint that one process has written."""
    trainer = make(folder / "from_one", save_strategy="steps", save_steps=16, **two_rank_options({}))
    trainer.train(resume_from_checkpoint=str(folder / "one" / "checkpoint-8"))
    if trainer.is_world_process_zero():
        torch.save(trainer.model.state_dict(), folder / "from_one.pt")
    return {"equal": ranks_equal(trainer.model)}


scenarios = {
    "plain": partial(whole, "plain", **RUNS["plain"]),
    "plain_resumed": partial(resumed, "plain", **RUNS["plain"]),
    "checkpointed": partial(whole, "checkpointed", **RUNS["checkpointed"]),
    "accumulated": partial(whole, "accumulated", **RUNS["accumulated"]),
    "accumulated_resumed": partial(resumed, "accumulated", (1, 4, 7, 10), **RUNS["accumulated"]),
    "from_one": from_one,
    **{name: partial(cached, name, cache.format(folder)) for name, cache in CACHES.items()},
}
if not RESUMES:
    scenarios = {name: scenario for name, scenario in scenarios.items() if name in RUNS | CACHES}
run(scenarios)
end()
