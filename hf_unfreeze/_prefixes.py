"""Which stacks of a model have a prefix that can be passed over."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from ._prefix import Prefix
from .groups import LayerGroup, layer_groups

__all__ = ["find_prefixes"]


def find_prefixes(model: nn.Module) -> list[Prefix]:
    """Return the stacks that stand on the data alone; a decoder, or text above a vision tower, is not one of them."""
    groups = layer_groups(model)
    every = list(model.named_parameters(remove_duplicate=False))
    lowest_ids = {id(parameter) for name, parameter in every if name in set(groups[0].parameter_names)}
    embeddings = {name for name, parameter in every if id(parameter) in lowest_ids}  # by all names of a tied one
    stacks: dict[str, list[LayerGroup]] = {}
    for group in groups:
        if "block[" in group.name and group.parameter_names:
            stacks.setdefault(group.stack, []).append(group)
    tops = {stack: max(group.level or 0 for group in members) for stack, members in stacks.items()}
    found = []
    for stack, members in stacks.items():
        lowest = min(group.level or 0 for group in members)
        paths = _block_paths(members)
        if not paths or any(top < lowest for other, top in tops.items() if other != stack):
            continue
        host = _host(paths[0], embeddings, paths)
        if host is not None:
            found.append(Prefix(stack, model, host, members, paths, embeddings))
    return found


def _block_paths(members: Sequence[LayerGroup]) -> list[str]:
    """The module of each block: as much of the path as its parameters share, cut where the blocks differ."""
    shared = []
    for group in members:
        parts = [name.split(".")[:-1] for name in group.parameter_names]
        shared.append(parts[0][: _differ(parts, min(map(len, parts)))])
    ends = [max((i for i, part in enumerate(path) if part.isdigit()), default=-1) for path in shared]
    if len(shared) > 1:
        ends = [_differ(shared, -1)] * len(shared)
    paths = [".".join(path[: end + 1]) for path, end in zip(shared, ends, strict=True)]
    return paths if all(paths) and len(set(paths)) == len(paths) else []


def _differ(paths: list[list[str]], otherwise: int) -> int:
    """The first place where not all paths are the same."""
    return next((i for i, level in enumerate(zip(*paths, strict=False)) if len(set(level)) > 1), otherwise)


def _host(block: str, embeddings: set[str], paths: list[str]) -> str | None:
    """The nearest module above the blocks that also holds a part of the embeddings."""
    inside = tuple(f"{path}." for path in paths)
    outside = [name for name in embeddings if not name.startswith(inside)]
    parent = block.rpartition(".")[0]
    while True:
        if any(name.startswith(f"{parent}." if parent else "") for name in outside):
            return parent
        if not parent:
            return None
        parent = parent.rpartition(".")[0]
