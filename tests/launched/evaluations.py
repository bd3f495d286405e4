"""Two ranks that see other metrics: those of rank 0 decide, on both, and both go back to the same weights."""

from __future__ import annotations

import torch
from shared import end, everywhere, fp64_bert, ranks_equal, run, start, train
from torch.nn.parallel import DistributedDataParallel

from hf_unfreeze import Unfreezer

RANK, WORLD = start()
VALUES = [0.9, 0.8, 0.8, 0.8, 0.7, 0.75, 0.75, 0.75, 0.75]


def decided(values: list[float]) -> dict:
    model = fp64_bert()
    wrapped = DistributedDataParallel(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    unfreezer = Unfreezer(wrapped, optimizer, "plateau(eval_loss, stop=no_gain)")

    def evaluate(step: int) -> None:
        unfreezer.observe({"eval_loss": values[step] if step < len(values) else 1.0, "eval_name": "text"}, step + 1)

    train(wrapped, unfreezer, optimizer, RANK, after=evaluate)
    phases = [(phase.start, list(phase.trainable), phase.reason) for phase in unfreezer.phases]
    unfreezer.close()
    return {"equal": ranks_equal(model), "phases": everywhere(phases)}


run({"alike": lambda: decided(VALUES), "apart": lambda: decided([v - RANK * n for n, v in enumerate(VALUES)])})
end()
