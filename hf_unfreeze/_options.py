"""How groups train once they are open: the arguments that Unfreezer and UnfreezeCallback share, checked at once."""

from __future__ import annotations

import operator
from dataclasses import dataclass, fields
from typing import Any

import torch

from ._rates import parse_decay, parse_warmup
from .errors import UnfreezeError, near_match
from .optim import group_weight_decay

__all__ = ["HALVES", "Options", "whole_number"]

HALVES = {"bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class Options:
    """The arguments, documented at ``Unfreezer``; raises UnfreezeError for a value that no model could use."""

    layer_decay: float | str = 1.0
    block_warmup: str | None = None
    frozen_eval: bool = True
    pull: float = 0.0
    dropout: float = 0.0
    group_weight_decay: str | None = None
    drop_state: bool = False
    offload_state: bool = False
    prefix_dtype: str | None = None

    def __post_init__(self) -> None:
        parse_decay(self.layer_decay)
        parse_warmup(self.block_warmup)
        _check_number("pull", self.pull, float("inf"))
        _check_number("dropout", self.dropout, 1.0)
        group_weight_decay(self.group_weight_decay, ())
        for name in ("frozen_eval", "drop_state", "offload_state"):
            if not isinstance(getattr(self, name), bool):
                raise UnfreezeError(f"{name}={getattr(self, name)!r} is neither True nor False. Write one of them.")
        if self.drop_state and self.offload_state:
            raise UnfreezeError("drop_state and offload_state exclude each other. Choose one.")
        if self.prefix_dtype is not None and self.prefix_dtype not in HALVES:
            raise UnfreezeError(
                f"prefix_dtype={self.prefix_dtype!r}: write {' or '.join(HALVES)}, or None for that of the model."
                + near_match(str(self.prefix_dtype), HALVES)
            )

    @property
    def told(self) -> str:
        """What is not as by default: ``layer_decay=0.9, pull=0.01``."""
        given = ((option.name, getattr(self, option.name), option.default) for option in fields(self))
        return ", ".join(f"{name}={value!r}" for name, value, default in given if value != default)

    @property
    def own_rates(self) -> bool:
        """Whether every group has the rate and the decay that its optimizer has for it."""
        return parse_decay(self.layer_decay) == (1.0, 1.0) and not self.pull and not self.group_weight_decay


def whole_number(name: str, value: Any, least: int) -> int:
    """Return an argument that counts steps; raise UnfreezeError for one that does not."""
    try:
        number = least - 1 if isinstance(value, bool) else operator.index(value)
    except TypeError:
        number = least - 1
    if number < least:
        raise UnfreezeError(f"{name}={value!r} is no whole number from {least} up. Write for instance {name}=100.")
    return number


def _check_number(name: str, value: object, below: float) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < below:
        raise UnfreezeError(f"{name}={value!r} lies outside [0, {below:g}). Write 0 for none, or for instance 0.1.")
