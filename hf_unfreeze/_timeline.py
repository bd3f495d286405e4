"""The timeline of a run as a figure, from its ``log_history``: which group trained when and how fast."""

from __future__ import annotations

import json
import os
from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from ._history import past_transitions
from ._naming import arrange
from ._spec import BLOCK
from .distributed import unwrap
from .errors import UnfreezeError
from .groups import layer_groups

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["group_names", "history_of", "timeline", "trains"]

_METRICS = ("accuracy", "f1", "wer", "loss")
_COLOURS = ("#d1495b", "#00798c", "#edae49", "#66a182")
_ROW = 0.28  # inches
_PEFT = ("base.", "adapter.")  # bottom → top, where the base of a PEFT model opens too

Records = Sequence[dict[str, Any]]


def timeline(run: Any, metric: str | None = None, *, pretrained: Any = None) -> Figure:
    """Draw a run: one row per group, bottom → top, coloured by its learning rate, grey where frozen.

    Example:
        >>> timeline(trainer).savefig("timeline.png")

    Args:
        run: A Trainer that has trained, its ``state`` or ``state.log_history``; or a ``trainer_state.json``, as a dict
            or by its path.
        metric: Key of the evaluation metric drawn below; by default accuracy, else F1, word errors or the loss, of
            each data set that was evaluated.
        pretrained: The model as it was, or its ``state_dict()``: draws beside each row how far the weights of the
            group have gone from there (L2 distance); ``run`` is then the Trainer.

    Raises:
        UnfreezeError: The run is none of these, its history holds no learning rate of a group or no such metric, or the
            weights cannot be compared.
    """
    from matplotlib.figure import Figure

    history = history_of(run)
    names = group_names(history)
    if not names:
        raise UnfreezeError(
            "this log_history has no lr/<group> records. Train with UnfreezeCallback, and with logging_steps no "
            "larger than the number of steps."
        )
    gone = None if pretrained is None else _drift(run, names, pretrained)
    height = _ROW * len(names)
    figure = Figure(figsize=(9, 1.6 + height + 1.6), layout="constrained")
    columns = 1 if gone is None else 2
    axes = figure.subplots(
        2, columns, sharex="col", squeeze=False, height_ratios=[height + 0.6, 1.6], width_ratios=[6, 1][:columns]
    )
    top, bottom = axes[:, 0]
    mesh = _draw_rates(top, names, history)
    figure.colorbar(mesh, ax=top, label="learning rate", pad=0.01)
    if gone is not None:
        axes[1, 1].remove()
        axes[0, 1].barh([row + 0.5 for row in range(len(names))], gone, height=0.7, color=_COLOURS[1])
        axes[0, 1].set(ylim=(0, len(names)), yticks=[])
        axes[0, 1].set_title("L2 distance\nfrom before", loc="left", fontsize="medium")
        axes[0, 1].tick_params(labelbottom=True)
        axes[0, 1].spines[["top", "right"]].set_visible(False)
    _draw_metric(bottom, history, metric)
    opened = [record["step"] for record in past_transitions(history) if record["step"]]
    bottom.vlines(opened, 0, 1, transform=bottom.get_xaxis_transform(), color="#bbbbbb", linewidth=0.8, zorder=0)
    bottom.set_xlabel("optimizer step")
    bottom.spines[["top", "right"]].set_visible(False)
    return figure


def history_of(run: Any) -> Records:
    """Return the ``log_history`` of a run: a Trainer, its state, that as a dict or a file, or the history itself."""
    found = _read(run) if isinstance(run, (str, os.PathLike)) else getattr(run, "state", run)
    found = found.get("log_history") if isinstance(found, Mapping) else getattr(found, "log_history", found)
    if not isinstance(found, (list, tuple)):
        raise UnfreezeError(
            f"{run!r:.200} is no run. Give a Trainer that has trained, its state.log_history, or the path of a "
            "trainer_state.json."
        )
    return [record for record in found if isinstance(record, dict)]


def _read(path: str | os.PathLike[str]) -> Any:
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UnfreezeError(
            f"{os.fspath(path)!r} cannot be read as a trainer_state.json ({type(error).__name__}: {error}). Give the "
            "path of one, as trainer.save_state() and every checkpoint write it."
        ) from None


def group_names(history: Records) -> list[str]:
    """Return the groups that have a learning rate in a history, bottom → top."""
    names = list(dict.fromkeys(key[3:] for record in history for key in record if key.startswith("lr/")))
    if names != sorted(names):
        return names  # as they were logged
    if not all(name.startswith(_PEFT) for name in names):
        return _arranged(names)
    parts = {part: [name.removeprefix(part) for name in names if name.startswith(part)] for part in _PEFT}
    return [part + name for part, own in parts.items() for name in _arranged(own)]


def _arranged(names: Sequence[str]) -> list[str]:
    """Order groups by their names alone, bottom → top."""
    stacks = dict.fromkeys(_place(name)[1] for name in names)  # a saved history has its keys sorted as text
    order = [stack for tier in arrange(stacks, parallel=False) for stack in tier]
    return sorted(names, key=lambda name: (_place(name)[0], order.index(_place(name)[1]), _place(name)[2]))


def _place(name: str) -> tuple[int, str, int]:
    """Return height, stack and index of a group as its name tells them."""
    match = BLOCK.fullmatch(name)
    if match:
        return 1, match[1] or "", int(match[2])
    return {"embeddings": 0, "head": 2}.get(name, 1), name, 0


def _draw_rates(axes: Any, names: Sequence[str], history: Records) -> Any:
    from matplotlib.colors import LogNorm

    edges = sorted({0, *(record["step"] for record in history if isinstance(record.get("step"), int))})
    rates = [_rates(name, edges, history) for name in names]
    positive = [rate for row in rates for rate in row if rate > 0] or [1.0]
    low, high = min(positive), max(positive)
    masked = [[rate if rate > 0 else float("nan") for rate in row] for row in rates]
    norm = LogNorm(low if low < high else high / 10, high)
    axes.set_facecolor("#d9d9d9")
    mesh = axes.pcolormesh(edges, range(len(names) + 1), masked, norm=norm, cmap="viridis", rasterized=True)
    axes.set_yticks([row + 0.5 for row in range(len(names))], names)
    for row in range(1, len(names)):
        axes.axhline(row, color="white", linewidth=1.5)
    axes.set_title("Learning rate of each layer group (grey: frozen)", loc="left")
    axes.set_title(_cache(history), loc="right", fontsize="small")
    return mesh


def _cache(history: Records) -> str:
    """Say what the frozen-prefix cache did by the last log, or nothing where there was none."""
    last = next((record for record in reversed(history) if "unfreeze/cache_hits" in record), {})
    asked = last.get("unfreeze/cache_hits", 0) + last.get("unfreeze/cache_misses", 0)
    if not asked:
        return ""
    share, saved = last["unfreeze/cache_hits"] / asked, last["unfreeze/cache_seconds_saved"]
    return f"cache: {share:.0%} found, {saved:.3g} s saved"


def trains(spec: str, name: str) -> bool:
    """Tell whether a record's selectors hold a group: they are ``all``, names of groups, and blocks by their index."""
    group, _, number = name.rstrip("]").partition("[")
    for part in spec.split(", "):
        base, _, bounds = part.rstrip("]").partition("[")
        first, _, stop = bounds.partition(":")
        if part == "all" or part == name:
            return True
        if base == group and stop and int(first) <= int(number) < int(stop):
            return True
    return False


def _rates(name: str, edges: Sequence[int], history: Records) -> list[float]:
    """Return the rate of a group between each two edges: that of the next log, 0.0 where it was frozen.

    Where it trained and no log says how fast, as after the last one, its nearest rate serves; else the log's highest.
    """
    logs = [record for record in history if f"lr/{name}" in record]
    steps = [record["step"] for record in logs]
    own = [(record["step"], float(record[f"lr/{name}"])) for record in logs if record[f"lr/{name}"] > 0]
    opened = [(r["step"], trains(r["unfreeze/trainable"], name)) for r in past_transitions(history)]
    if opened and opened[0][0] > 0:
        opened.insert(0, (0, True))  # as all_at_once, and a run without the callback, which record nothing
    starts = [step for step, _ in opened]
    rates = []
    for start, end in pairwise(edges):
        record = logs[min(bisect_left(steps, end), len(logs) - 1)]
        rate = float(record[f"lr/{name}"])
        trained = opened[bisect_right(starts, start) - 1][1] if opened else rate > 0
        if trained and rate <= 0:
            near = min(own, key=lambda pair: abs(pair[0] - end), default=(0, 0.0))
            rate = near[1] or max(value for key, value in record.items() if key.startswith("lr/"))
        rates.append(rate if trained else 0.0)
    return rates


def _draw_metric(axes: Any, history: Records, metric: str | None) -> None:
    seen = {key: None for record in history for key in record if key.startswith("eval_")}
    if metric and metric not in seen:
        raise UnfreezeError(f"metric {metric!r} is not in this run. It has {', '.join(sorted(seen)) or 'none'}.")
    keys, what = ([metric], metric.removeprefix("eval_")) if metric else _metric_keys(seen)
    for key, colour in zip(keys, _COLOURS * len(keys), strict=False):
        points = [(record["step"], record[key]) for record in history if key in record]
        label = key.removeprefix("eval_").removesuffix(f"_{what}")
        axes.plot(*zip(*points, strict=True), color=colour, marker="o", markersize=4, label=label)
    if len(keys) > 1:
        axes.legend(frameon=False)
    axes.set_ylabel(what + (" (training)" if keys == ["loss"] else " (evaluation)"))


def _metric_keys(seen: Iterable[str]) -> tuple[list[str], str]:
    """Return the keys of the first metric that there is, of each data set, and its name."""
    for name in _METRICS:
        if f"eval_{name}" in seen:
            return [f"eval_{name}"], name
        if several := [key for key in seen if key.endswith(f"_{name}")]:
            return several, name
    return ["loss"], "loss"


def _drift(run: Any, names: Sequence[str], pretrained: Any) -> list[float]:
    """Return how far the weights of each group are from where they were; NaN where they were not there."""
    model = getattr(run, "model", None)
    weights: Mapping[str, Any] = pretrained.state_dict() if isinstance(pretrained, nn.Module) else pretrained
    if not isinstance(model, nn.Module) or not isinstance(weights, Mapping):
        raise UnfreezeError(
            "pretrained compares weights: give the Trainer as run, and a model or its state_dict() as pretrained."
        )
    model = unwrap(model)
    parameters = dict(model.named_parameters())
    members = {group.name: group.parameter_names for group in layer_groups(model)}
    gone = []
    for name in names:
        known = [key for key in members.get(name, ()) if key in weights and weights[key].shape == parameters[key].shape]
        pairs = ((parameters[key].detach().float().cpu(), weights[key].detach().float().cpu()) for key in known)
        squares = sum(float((now - before).square().sum()) for now, before in pairs)
        gone.append(squares**0.5 if known else float("nan"))
    if all(value != value for value in gone):
        raise UnfreezeError(
            "pretrained has none of the weights of the Trainer's model. Give the model of the same class, as it was "
            "before training: copy.deepcopy(model.state_dict())."
        )
    return gone
