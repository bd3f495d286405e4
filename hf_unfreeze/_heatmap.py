"""What a criterion found, opening by opening, as a figure."""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING, Any

from ._history import past_transitions
from ._timeline import group_names, history_of, trains
from .errors import UnfreezeError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["heatmap"]


def heatmap(run: Any) -> Figure:
    """Draw what a criterion measured: a row per group, a column per measurement, a dot on what changed then.

    Example:
        >>> heatmap(trainer).savefig("criterion.png")

    Args:
        run: A Trainer that has trained with a schedule that measures, such as ``auto``, or its ``state.log_history``.

    Raises:
        UnfreezeError: Nothing was measured in this run.
    """
    from matplotlib.figure import Figure

    history = history_of(run)
    measured = [record for record in history if record.get("unfreeze/worth")]
    if not measured:
        raise UnfreezeError(
            "this log_history has no choice of a criterion. Train with a schedule such as "
            "'auto(validation_gradient, every=10%)'."
        )
    known = group_names(history) or sorted({name for record in measured for name in record["unfreeze/worth"]})
    names = [name for name in known if any(name in record["unfreeze/worth"] for record in measured)]
    cells = [[record["unfreeze/worth"].get(name, float("nan")) for record in measured] for name in names]
    past = [(record["step"], record["unfreeze/trainable"]) for record in past_transitions(history)]
    changed = {
        step: [name for name in names if trains(old, name) != trains(new, name)]
        for (_, old), (step, new) in pairwise([(0, ""), *past])
    }

    figure = Figure(figsize=(2.5 + 0.7 * len(measured), 1.4 + 0.28 * len(names)), layout="constrained")
    axes = figure.subplots()
    mesh = axes.pcolormesh(cells, cmap="viridis", edgecolors="white", linewidth=1.5)
    steps = [record["step"] for record in measured]
    dots = [(column, names.index(name)) for column, step in enumerate(steps) for name in changed.get(step, ())]
    axes.scatter([x + 0.5 for x, _ in dots], [y + 0.5 for _, y in dots], s=40, color="white", edgecolor="black")
    axes.set_yticks([row + 0.5 for row in range(len(names))], names)
    axes.set_xticks([column + 0.5 for column in range(len(measured))], [str(step) for step in steps])
    axes.set(xlabel="measured at step", title=f"{measured[0]['unfreeze/criterion']} (dot: opened or frozen then)")
    figure.colorbar(mesh, ax=axes, label="worth", pad=0.02)
    return figure
