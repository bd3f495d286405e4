"""The plan of a run as rows of data, and the two ways to show it: a rich table and Markdown."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import nn

from ._decisions import decisions_of
from ._history import past_transitions
from ._plateau import with_metric
from .criteria import AGREEMENT, find_criterion
from .groups import LayerGroup
from .schedule import Phase, Schedule, spec_of

if TYPE_CHECKING:
    from rich.table import Table

__all__ = [
    "SHOWN",
    "PlanRow",
    "model_card_section",
    "not_reached",
    "plan_rows",
    "plan_table",
    "planned",
    "state_copies",
]

# Copies of a parameter that an optimizer keeps as state. Adafactor keeps one row and one column instead: nearly none.
_STATE_COPIES = {"Adam": 2, "AdamW": 2, "NAdam": 2, "RAdam": 2, "RMSprop": 1, "Adagrad": 1, "Lion": 1, "Adafactor": 0}
_CAPTIONS = {
    "plateau": "data: the evaluations decide when",
    "auto": "as if from the top: a criterion decides which blocks",
    "auto_rates": "data: a criterion sets the rate of each group",
    "learn_rates": "data: validation sets the rate of each group, and may freeze it",
    "freeze_converged": "data: a criterion decides when, and may pass phases over",
}
SHOWN = 50  # phases in a table for people: a schedule that rotates has thousands


@dataclass(frozen=True)
class PlanRow:
    """One phase of a plan, and what it costs.

    Example:
        >>> plan_rows(model, layer_groups(model), [Phase(0, ("head",))])[0].trainable_params
        148995

    Args:
        phase: Number of the phase, from 0.
        start_step: Optimizer step at which it begins; None where the data decides.
        start_epoch: The same in epochs; None where their length is not known.
        trainable: What trains, as selectors.
        trainable_params: Number of parameters in it.
        trainable_share: Their share of all parameters, from 0 to 1.
        gradient_bytes: Bytes of their gradients.
        optimizer_bytes: Bytes of the optimizer's state of them; None where that is not known.
    """

    phase: int
    start_step: int | None
    start_epoch: float | None
    trainable: str
    trainable_params: int
    trainable_share: float
    gradient_bytes: int
    optimizer_bytes: int | None


def state_copies(optimizer: Any) -> int | None:
    """Return how many copies of a parameter the optimizer keeps as state; None where that is not known."""
    name = type(optimizer).__name__
    if name == "SGD":
        return int(any(group.get("momentum") for group in optimizer.param_groups))
    return _STATE_COPIES.get(name)


def planned(
    schedule: Schedule, groups: Sequence[LayerGroup], total_steps: int, steps_per_epoch: int | None
) -> tuple[Phase, ...]:
    """List every phase, as ``Schedule.phases`` does.

    Raises:
        ScheduleError: A run would refuse the schedule: it does not fit the model, names no criterion, or contradicts
            itself.
    """
    criterion: Any = dict(schedule.arguments).get("criterion")

    def measure(interval: int) -> Any:
        return find_criterion(criterion) if criterion else AGREEMENT

    whole = with_metric(schedule, "loss", greater=None, evaluates=True)  # a run may name the metric elsewhere
    decisions_of(whole, groups, total_steps, steps_per_epoch, measure)
    return schedule.phases(groups, total_steps, steps_per_epoch)


def not_reached(phases: Sequence[Phase], groups: Sequence[LayerGroup], total_steps: int) -> str:
    """End a title: which phases begin after the last step, the first of them and how many; empty without any."""
    late = [phase for phase in phases if phase.start >= total_steps]
    if not late:
        return ""
    first = f"{spec_of(late[0].trainable, groups)} at step {late[0].start}"
    return f"; not reached: {first}" + (f" and {len(late) - 1} more" if late[1:] else "")


def plan_rows(
    model: nn.Module,
    groups: Sequence[LayerGroup],
    phases: Sequence[Phase],
    steps_per_epoch: int | None = None,
    copies: int | None = 2,
    decided: Sequence[tuple[str, ...]] = (),
) -> list[PlanRow]:
    """List the phases with their cost.

    Example:
        >>> groups = layer_groups(model)
        >>> phases = parse_schedule("head@0, all@40step").phases(groups)
        >>> [row.start_step for row in plan_rows(model, groups, phases)]
        [0, 40]

    Args:
        model: The model the groups belong to; the meta device will do.
        groups: Its layer groups, bottom → top.
        phases: As ``Schedule.phases`` gives them.
        steps_per_epoch: Optimizer updates in one epoch.
        copies: Copies of a parameter in the optimizer's state, 2 for Adam.
        decided: Trainable sets that follow when the data says so, as ``Schedule.decided`` gives them.
    """
    parameters = dict(model.named_parameters())
    total = sum(parameter.numel() for parameter in parameters.values())
    rows = []
    known = [(phase.start, phase.trainable, phase.rates) for phase in phases]
    for number, (start, trainable, rates) in enumerate([*known, *((None, trainable, ()) for trainable in decided)]):
        names = set(trainable)
        members = [parameters[name] for group in groups if group.name in names for name in group.parameter_names]
        count, size = sum(p.numel() for p in members), sum(p.numel() * p.element_size() for p in members)
        epoch = start / steps_per_epoch if steps_per_epoch and start is not None else None
        state = None if copies is None else size * copies
        spec = ", ".join([spec_of(trainable, groups), *(f"{name}*{rate:.4g}" for name, rate in rates)])
        rows.append(PlanRow(number, start, epoch, spec, count, count / total, size, state))
    return rows


def plan_table(rows: Sequence[PlanRow], title: str) -> Table:
    """Draw the plan as a rich table.

    Example:
        >>> rich.print(plan_table(plan_rows(model, groups, phases), "gradual(every=1ep)"))

    Args:
        rows: As ``plan_rows`` gives them; the first 50 are shown.
        title: What stands above them.
    """
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    # no lines between columns: a terminal of 80 columns would cut numbers
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    for column in ("phase", "step", "epoch"):
        table.add_column(column, justify="right", no_wrap=True)
    table.add_column("trainable", overflow="fold")
    for column in ("parameters", "share", "gradients", "optimizer"):
        table.add_column(column, justify="right", no_wrap=True)
    for row in rows[:SHOWN]:
        table.add_row(
            str(row.phase),
            "data" if row.start_step is None else str(row.start_step),
            "data" if row.start_step is None else "?" if row.start_epoch is None else f"{row.start_epoch:.2f}",
            row.trainable.replace("[", r"\["),
            f"{row.trainable_params:,}",
            f"{row.trainable_share:.1%}",
            _megabytes(row.gradient_bytes),
            "?" if row.optimizer_bytes is None else _megabytes(row.optimizer_bytes),
        )
    if len(rows) > SHOWN:
        table.caption = _more(rows)
    else:
        table.caption = _CAPTIONS.get(title.partition("(")[0])
    return table


def _more(rows: Sequence[Any]) -> str:
    return f"and {len(rows) - SHOWN:,} more phases"


def model_card_section(schedule: str, log_history: Sequence[dict[str, Any]]) -> str:
    """Write the Markdown section for a model card: the schedule, and each transition that happened.

    Example:
        >>> section = model_card_section("head@0, all@1ep", trainer.state.log_history)
        >>> section.splitlines()[0]
        '## Unfreezing'

    Args:
        schedule: As it was given.
        log_history: ``trainer.state.log_history``.
    """
    lines = [
        "## Unfreezing",
        "",
        f"Trained from the top down with hf_unfreeze, schedule `{schedule}`.",
        "",
        "| phase | step | epoch | trainable | parameters |",
        "|---|---|---|---|---|",
    ]
    records = past_transitions(log_history)
    for record in records[:SHOWN]:
        lines.append(
            f"| {record['unfreeze/phase']} | {record['step']} | {record.get('epoch') or 0:.2f} "
            f"| {record['unfreeze/trainable']} | {record.get('unfreeze/trainable_params', 0):,} |"
        )
    if len(records) > SHOWN:
        lines += ["", f"({_more(records)})"]
    if not records:
        lines.append("| 0 | 0 | 0.00 | all | |")
    return "\n".join(lines) + "\n"


def _megabytes(size: int) -> str:
    return f"{size / 1e6:,.1f} MB"
