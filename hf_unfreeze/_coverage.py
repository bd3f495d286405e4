"""What a schedule reaches in a run, and whether the optimizer can train it."""

from __future__ import annotations

import warnings
from collections.abc import Collection, Iterable, Mapping, Sequence

import torch
from torch import nn

from .errors import OptimizerError
from .groups import LayerGroup, leave_out
from .optim import unsuitable
from .schedule import Phase, Schedule, spec_of

__all__ = ["check_optimizer", "opened_since", "train_everything", "warn_unreached", "without_frozen"]


def opened_since(phases: Sequence[Phase]) -> dict[str, int]:
    """Return for each group of the last phase the step from which it has trained without a break."""
    opened: dict[str, int] = {}
    for phase in phases:
        opened = {name: opened.get(name, phase.start) for name in phase.trainable}
    return opened


def train_everything(phases: Sequence[Phase], groups: Sequence[LayerGroup]) -> bool:
    """Whether nothing opens or closes after the first step, and every group trains at the optimizer's own rate."""
    every = {group.name for group in groups if group.parameter_names}
    return len(phases) == 1 and set(phases[0].trainable) == every and not phases[0].rates


def without_frozen(groups: Sequence[LayerGroup], parameters: Mapping[str, nn.Parameter]) -> tuple[LayerGroup, ...]:
    """Leave out what the user froze before, and tell of it: ``all_at_once`` changes nothing."""
    names = [name for group in groups for name in group.parameter_names if not parameters[name].requires_grad]
    if names:
        warnings.warn(
            f"{_first_of(names)} had requires_grad=False before training, and stays frozen. "
            "Leave requires_grad alone where it is to train.",
            UserWarning,
            stacklevel=3,
        )
    return leave_out(groups, names)


def warn_unreached(
    schedule: Schedule, phases: Sequence[Phase], groups: Sequence[LayerGroup], total_steps: int | None
) -> None:
    """Tell of phases that begin after the last step."""
    late = [phase for phase in phases if total_steps is not None and phase.start >= total_steps]
    if late:
        names = "; ".join(f"{spec_of(phase.trainable, groups)} at step {phase.start}" for phase in late)
        warnings.warn(
            f"schedule '{schedule}' will not reach: {names}. The run has {total_steps} steps. "
            "Shorten the times, write them in %, or train longer.",
            UserWarning,
            stacklevel=3,
        )


def check_optimizer(
    schedule: Schedule,
    optimizer: torch.optim.Optimizer,
    members: Sequence[tuple[LayerGroup, Sequence[nn.Parameter]]],
    opened: Collection[str],
    idle: bool,
) -> None:
    """Refuse an optimizer that cannot train what the schedule opens, which would be frozen for ever in silence.

    ``idle`` is a run in which nothing opens, closes or has a rate of its own: any optimizer will do.
    """
    if reason := unsuitable(optimizer):
        if idle:
            return
        raise OptimizerError(
            f"{type(optimizer).__name__} cannot be used: it {reason}. Write optim='adamw_torch' (or another "
            "optimizer with state per parameter), or train without UnfreezeCallback."
        )
    grouped = [
        named
        for group, parameters in members
        if group.name in opened
        for named in zip(group.parameter_names, parameters, strict=True)
    ]
    missing = _absent(optimizer, grouped)
    if not missing:
        return
    told = _first_of([name for name, _ in missing])
    if not missing[0][1].requires_grad:
        raise OptimizerError(
            f"{told} had requires_grad=False when the optimizer was built, so it is not in it, and the "
            f"schedule '{schedule}' would open it. Do not freeze before training: the schedule does that. "
            "Leave requires_grad alone, or leave these groups out of the schedule."
        )
    raise OptimizerError(
        f"the optimizer lacks {told}, which the schedule '{schedule}' opens. Build it over all "
        "parameters, for instance AdamW(model.parameters()) or param_groups_layer_decay(model, lr=…)."
    )


def _absent(
    optimizer: torch.optim.Optimizer, named: Iterable[tuple[str, nn.Parameter]]
) -> list[tuple[str, nn.Parameter]]:
    """Return the parameters that the optimizer does not hold."""
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    return [(name, parameter) for name, parameter in named if id(parameter) not in held]


def _first_of(names: Sequence[str]) -> str:
    """Name the first, and say how many more there are."""
    return f"{names[0]} and {len(names) - 1} more" if len(names) > 1 else names[0]
