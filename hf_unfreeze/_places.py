"""Where the tensors of a module lie, which may be others tomorrow."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import nn

__all__ = ["Place", "places_of"]


class Place(NamedTuple):
    """A name of a tensor in its module."""

    name: str
    owner: dict[str, torch.Tensor | None]
    key: str

    @classmethod
    def of(cls, model: nn.Module, name: str) -> Place:
        """Return that of a parameter."""
        path, _, key = name.rpartition(".")
        return cls(name, model.get_submodule(path)._parameters, key)  # type: ignore[arg-type]


def places_of(module: nn.Module) -> list[Place]:
    """Those of a module and what is inside it."""
    found = []
    for path, part in module.named_modules():
        owners: tuple[Any, ...] = (part._parameters, part._buffers)
        found += [Place(f"{path}.{key}".lstrip("."), owner, key) for owner in owners for key in owner]
    return found
