"""The Trainer on two ranks, where data or chance decides: alike on both, and again after a resume."""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path

from decision_runs import RUNS, outcome, train
from shared import end, everywhere, run

from hf_unfreeze.criteria import Evidence, fisher, register_criterion

folder = Path(sys.argv[1]).parent


def decided(name: str, spec: str) -> dict:
    trainer = train(folder / name, spec)
    whole = outcome(trainer)
    first, second = everywhere(whole)
    different = []
    for step in (2, 3):
        again = train(folder / f"{name}-again", spec, folder / name / f"checkpoint-{step}")
        different += [step] if not all(everywhere(outcome(again) == whole)) else []
    return {
        "ranks": everywhere(trainer.args.world_size), "alike": first == second, "different": different,
        "phases": [(r["step"], r["unfreeze/trainable"]) for r in whole[0] if "unfreeze/trainable" in r],
    }  # fmt: skip


def apart() -> dict:
    """What one rank measures by itself is not what the other does."""
    mine: dict[str, float] = {}

    def watched(evidence: Evidence) -> float:
        mine[evidence.name] = fisher(evidence)
        return mine[evidence.name]

    register_criterion("watched", watched)
    trainer = train(folder / "apart", "auto(watched, every=2step, batches=2)", max_steps=3)
    (agreed,) = (r["unfreeze/worth"] for r in trainer.state.log_history if "unfreeze/worth" in r)
    return {"mine": everywhere(mine), "agreed": everywhere(agreed)}


run({"apart": apart} | {spec: partial(decided, f"run{number}", spec) for number, spec in enumerate(RUNS)})
end()
