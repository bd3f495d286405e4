"""What has to follow when flags change, as a table: the option that asks for it, and how it is made."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import nn

from ._checkpointing import Checkpointing
from ._compiling import GraphLimit
from ._options import HALVES, Options
from ._precision import PrefixPrecision
from .freezing import Follower, FrozenEval, HeldFlags
from .optim import DropState, GroupRates, OffloadState
from .regularization import Pull, RaisedDropout

__all__ = ["followers_of"]


def followers_of(
    options: Options,
    root: nn.Module,
    optimizer: torch.optim.Optimizer,
    members: Mapping[str, nn.Parameter],
    rates: GroupRates,
) -> Iterator[Follower]:
    """Yield them in the order in which they are told, each at work as soon as it is made.

    Args:
        options: Of the run.
        root: The model without wrappers.
        optimizer: The torch optimizer without wrappers.
        members: Name → parameter, of all groups.
        rates: What gives each group its learning rate.
    """
    parameters = members.values()
    table = (
        (True, lambda: rates),
        (True, lambda: HeldFlags(root, optimizer, members)),
        (True, lambda: Checkpointing(root)),
        (True, GraphLimit),
        (options.frozen_eval, lambda: FrozenEval(root, parameters)),
        (options.pull, lambda: Pull(optimizer, members, rates.of_parameters, options.pull)),
        (options.dropout, lambda: RaisedDropout(root, options.dropout)),
        (options.drop_state, lambda: DropState(optimizer, parameters)),
        (options.offload_state, lambda: OffloadState(optimizer, parameters)),
        (options.prefix_dtype, lambda: PrefixPrecision(root, HALVES[options.prefix_dtype or ""])),
    )
    for asked, make in table:
        if asked:
            yield make()
