"""What a criterion found, opening by opening, as a figure."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

from ._history import past_transitions
from ._timeline import group_names, history_of
from .errors import UnfreezeError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["heatmap"]

_REASON = re.compile(r"(?P<criterion>\w+): (?P<chosen>.*); next (?P<next>.*)")
_WORTH = re.compile(r"(\S*block\[\d+\]) (-?[\w.+-]*[\w.])")


def heatmap(run: Any) -> Figure:
    """Draw what an ``auto`` schedule measured: a row per group, a column per opening, a dot on what was chosen.

    The log holds the worth of what was chosen and of the next best; other cells are empty.

    Example:
        >>> heatmap(trainer).savefig("criterion.png")

    Args:
        run: A Trainer that has trained, or its ``state.log_history``.

    Raises:
        UnfreezeError: Nothing was chosen in this run.
    """
    from matplotlib.figure import Figure

    history = history_of(run)
    told = [(r["step"], _REASON.fullmatch(r.get("unfreeze/reason", ""))) for r in past_transitions(history)]
    openings = [(step, match) for step, match in told if match]
    if not openings:
        raise UnfreezeError(
            "this log_history has no choice of a criterion. Train with a schedule such as "
            "'auto(validation_gradient, every=10%)'."
        )
    worth = [dict(_WORTH.findall(f"{match['chosen']}, {match['next']}")) for _, match in openings]
    chosen = [[name for name, _ in _WORTH.findall(match["chosen"])] for _, match in openings]
    known = group_names(history) or sorted({name for column in worth for name in column})
    names = [name for name in known if "block[" in name]
    cells = [[float(column.get(name, "nan")) for column in worth] for name in names]

    figure = Figure(figsize=(2.5 + 0.7 * len(openings), 1.4 + 0.28 * len(names)), layout="constrained")
    axes = figure.subplots()
    mesh = axes.pcolormesh(cells, cmap="viridis", edgecolors="white", linewidth=1.5)
    dots = [(column + 0.5, names.index(name) + 0.5) for column, those in enumerate(chosen) for name in those]
    across, up = zip(*dots, strict=True)
    axes.scatter(across, up, s=40, color="white", edgecolor="black")
    axes.set_yticks([row + 0.5 for row in range(len(names))], names)
    axes.set_xticks([column + 0.5 for column in range(len(openings))], [str(step) for step, _ in openings])
    axes.set(xlabel="opened at step", title=f"{openings[0][1]['criterion']} (dot: chosen)")
    figure.colorbar(mesh, ax=axes, label="worth", pad=0.02)
    return figure
