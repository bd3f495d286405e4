"""Two ranks that see other metrics and other gradients decide alike, and both end in the same weights."""

from __future__ import annotations

import torch
from shared import STEPS, batch, end, everywhere, fp64_bert, ranks_equal, run, start, train
from torch.nn.parallel import DistributedDataParallel

from hf_unfreeze import Unfreezer
from hf_unfreeze._probe import Probe
from hf_unfreeze.criteria import register_criterion

RANK, WORLD = start()
VALUES = [0.9, 0.8, 0.8, 0.8, 0.7, 0.75, 0.75, 0.75, 0.75]


def stretch(values: list[float], steps: range, saved: tuple = ()) -> tuple:
    """Train these steps in a new model, from the start or from what was saved."""
    model = fp64_bert()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    wrapped = DistributedDataParallel(model)
    unfreezer = Unfreezer(wrapped, optimizer, "plateau(eval_loss, stop=no_gain)")
    for part, state in zip((model, optimizer, unfreezer), saved, strict=False):
        part.load_state_dict(state)

    def evaluate(step: int) -> None:
        unfreezer.observe({"eval_loss": values[step] if step < len(values) else 1.0, "eval_name": "text"}, step + 1)

    train(wrapped, unfreezer, optimizer, RANK, steps, after=evaluate)
    return model, optimizer, unfreezer


def decided(values: list[float], interrupted: int = 0) -> dict:
    """Train, or train so many steps and go on from what rank 0 has saved of the decisions."""
    saved = [part.state_dict() for part in stretch(values, range(interrupted))] if interrupted else []
    saved[2:] = everywhere(saved[2:])[0]
    model, _, unfreezer = stretch(values, range(interrupted, STEPS), tuple(saved))
    phases = [(phase.start, list(phase.trainable), phase.reason) for phase in unfreezer.phases]
    unfreezer.close()
    return {"equal": ranks_equal(model), "phases": everywhere(phases)}


def chosen() -> dict:
    """Each rank alone would choose another block; the mean over both chooses the same on each."""
    worth = [{"block[0]": 9.0, "block[1]": 5.0}, {"block[3]": 9.0, "block[1]": 5.0}][RANK]
    register_criterion("own", lambda evidence: worth.get(evidence.name, 0.0))
    phases = {}
    for criterion in ("own", "fisher"):
        model = fp64_bert()
        wrapped = DistributedDataParallel(model)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        probe = Probe(
            lambda model, rows: model(**rows).loss,
            lambda count: [batch(99 + number, rank=RANK) for number in range(count)],
        )
        schedule = f"auto({criterion}, every=3step, batches=2)"
        unfreezer = Unfreezer(wrapped, optimizer, schedule, total_steps=13, probe=probe)
        train(wrapped, unfreezer, optimizer, RANK)
        phases[criterion] = everywhere([(p.start, list(p.trainable), p.reason) for p in unfreezer.phases])
        unfreezer.close()
        phases[f"{criterion} equal"] = ranks_equal(model)
    return phases


run(
    {
        "alike": lambda: decided(VALUES),
        "apart": lambda: decided([v - RANK * n for n, v in enumerate(VALUES)]),
        "resumed": lambda: decided([v - RANK * n for n, v in enumerate(VALUES)], interrupted=6),
        "chosen": chosen,
    }
)
end()
