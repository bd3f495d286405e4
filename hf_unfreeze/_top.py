"""What the schedule top does: an upper share of the blocks, and of an encoder for a while. Needs no torch."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence, Set
from fractions import Fraction
from typing import Any

from ._openings import Change, Length, blocks_of, openings
from ._spec import BLOCK, Group
from ._time import Time

__all__ = ["top_changes"]

NORM = re.compile(r"(?:norm|(?:^|[._])ln)[^.]*\.(?:weight|bias)$")
STACK_OF = re.compile(r"(.*?)[^.]+\.\d+\.")  # "model.encoder." of "model.encoder.layers.0.fc1.weight"


def top_changes(groups: Sequence[Group], arguments: dict[str, Any], length: Length) -> list[Change]:
    """Open the head and a share of the blocks; of encoder and decoder each by itself where the encoder has a time."""
    head, *blocks = openings(groups, {"blocks": 1, "embeddings": False})
    if any(map(BLOCK.fullmatch, head)):  # no parameters of a head's own: the top block stands in its place
        head, blocks = frozenset(), [head, *blocks]
    share, until = arguments["share"], arguments["encoder_until"]
    encoder, decoder = (
        [block.name for block in blocks_of(groups) if block.stack == stack] for stack in ("encoder", "decoder")
    )
    if until is None or not (encoder and decoder):
        opened = frozenset[str]().union(*blocks[: _count(share, blocks)])
        return [(Time(Fraction(0)), opened | _trainable_head(groups, head, opened), False)]
    opened = frozenset(decoder[-_count(share, decoder) :]) | _between(groups, encoder[-1], decoder[0])
    opened |= _trainable_head(groups, head, opened)
    briefly = frozenset(encoder[-_count(share, encoder) :])
    return [(Time(Fraction(0)), opened | briefly, False), (until, briefly, True)]


def _count(share: float, blocks: Sequence[Any]) -> int:
    return math.ceil(share * len(blocks) - 1e-9)  # 0.6 * 5 blocks are three, whatever floats say


def _between(groups: Sequence[Group], below: str, above: str) -> frozenset[str]:
    """Return what lies between two blocks and is none: a projection, which may be fresh."""
    names = [group.name for group in groups if group.parameter_names]
    between = names[names.index(below) + 1 : names.index(above)]
    return frozenset(name for name in between if not BLOCK.fullmatch(name))


def _trainable_head(groups: Sequence[Group], head: frozenset[str], opened: Set[str]) -> frozenset[str]:
    """Return the head, but nothing where it is norms alone, one of them of a stack that stays frozen.

    An encoder's last norm learns little, but its gradient goes back through all of the decoder's attention to it.
    """
    names = [name for group in groups if group.name in head for name in group.parameter_names]
    blocks = blocks_of(groups)
    open_stacks = {group.stack for group in blocks if group.name in opened}
    found = [STACK_OF.match(group.parameter_names[0]) for group in blocks if group.stack not in open_stacks]
    frozen = tuple(match[1] for match in found if match and match[1])
    norms_alone = all(map(NORM.search, names)) and any(name.startswith(frozen) for name in names)
    return frozenset() if norms_alone else head
