"""What the phases of a plan cost on several ranks, on paper; SCALE.md derives it."""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import nn

from ._plan import SHOWN
from .errors import UnfreezeError
from .groups import LayerGroup

if TYPE_CHECKING:
    from rich.table import Table

__all__ = ["ScaleRow", "parse_bandwidth", "scale_rows", "scale_table"]

_UNITS = {"kB/s": 1e3, "MB/s": 1e6, "GB/s": 1e9, "TB/s": 1e12, "Mbit/s": 125e3, "Gbit/s": 125e6, "Tbit/s": 125e9}


@dataclass(frozen=True)
class ScaleRow:
    """One phase on one rank: bytes that go through each collective, leave the rank and are held, and shares of time.

    ``compute_share`` is the arithmetic of a step, as a share of that of a step which trains everything.
    """

    reduced_bytes: int
    gathered_bytes: int
    sent_bytes: int
    sent_seconds: float | None
    rank_weight_bytes: int
    rank_gradient_bytes: int
    rank_optimizer_bytes: int
    compute_share: float


def parse_bandwidth(text: str) -> float:
    """Return bytes per second.

    Example:
        >>> parse_bandwidth("400Gbit/s")
        50000000000.0

    Raises:
        UnfreezeError: It is no number with a unit, or no more than 0.
    """
    match = re.fullmatch(r"(\d+\.?\d*|\.\d+)\s*(\S*)", text.strip())
    if match is None or match[2] not in _UNITS or not float(match[1]):
        raise UnfreezeError(
            f"bandwidth {text!r}: write a number above 0 and a unit, such as 100GB/s. Units are {', '.join(_UNITS)}."
        )
    return float(match[1]) * _UNITS[match[2]]


def scale_rows(
    model: nn.Module,
    groups: Sequence[LayerGroup],
    sets: Sequence[Collection[str]],
    ranks: int,
    bandwidth: float | None = None,
    sharded: bool = False,
    copies: int = 2,
) -> list[ScaleRow]:
    """List what each phase costs the rank that has most.

    Args:
        model: The model the groups belong to; the meta device will do.
        groups: The layer groups that may train, bottom → top.
        sets: Names of the groups that train, one collection for each phase.
        ranks: Processes of the run.
        bandwidth: Bytes per second that a rank sends.
        sharded: FSDP2 with the blocks as its units, instead of DDP.
        copies: Copies of a parameter in the optimizer's state, 2 for Adam.
    """
    parameters = dict(model.named_parameters())
    members = [(group.name, [parameters[name] for name in group.parameter_names]) for group in groups]
    parts = ranks if sharded else 1
    held = {name: sum(_held(p, parts) for p in own) for name, own in members}
    work = {name: sum(p.numel() for p in own) if name != "embeddings" else 0 for name, own in members}  # a look-up
    weights, names = sum(_held(p, parts) for p in parameters.values()), list(held)  # fixed ones, of no group, too
    rows = []
    for trainable in sets:
        lowest = min(map(names.index, trainable))
        gradients = sum(held[name] for name in trainable)
        again = sum(held[name] for name in _blocks_gathered_again(names, lowest))
        reduced, gathered = (ranks * gradients, ranks * (weights + again)) if sharded else (gradients, 0)
        passes = (1 if sharded else 2) * reduced + gathered  # an all-reduce is a reduce-scatter and an all-gather
        sent = -(-(ranks - 1) * passes // ranks)
        done = sum(work.values()) + sum(work[name] for name in names[lowest:]) + sum(work[name] for name in trainable)
        rows.append(
            ScaleRow(
                reduced, gathered, sent, sent / bandwidth if bandwidth else None, weights, gradients,
                copies * gradients, done / (3 * sum(work.values()) or 1),
            )
        )  # fmt: skip
    return rows


def scale_table(rows: Sequence[ScaleRow], title: str) -> Table:
    """Draw the rows as a rich table, in MB and ms."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    for column in ("phase", "reduced", "sent", "ms", "weights", "gradients", "optimizer", "compute"):
        table.add_column(column, justify="right", no_wrap=True)
    for number, row in enumerate(rows[:SHOWN]):
        ms = "?" if row.sent_seconds is None else f"{row.sent_seconds * 1e3:,.2f}"
        held = (row.rank_weight_bytes, row.rank_gradient_bytes, row.rank_optimizer_bytes)
        sizes = [f"{size / 1e6:,.1f}" for size in (row.reduced_bytes, row.sent_bytes, *held)]
        table.add_row(str(number), *sizes[:2], ms, *sizes[2:], f"{row.compute_share:.0%}")
    return table


def _held(parameter: nn.Parameter, parts: int) -> int:
    """Return the bytes of the largest of equal parts; FSDP2 divides the first dimension."""
    rows = parameter.shape[0] if parameter.ndim else 1
    return -(-rows // parts) * (parameter.numel() // (rows or 1)) * parameter.element_size()


def _blocks_gathered_again(names: Sequence[str], lowest: int) -> list[str]:
    """Return the blocks that FSDP2 gathers for the backward: down to the lowest open group, and one more ahead."""
    blocks = [name for name in names if "block[" in name]
    reached = sum(name in blocks for name in names[lowest:])
    return blocks[::-1][: reached + 1]
