"""The longest run of like layers: the blocks of a model in which nothing looks like a block."""

from __future__ import annotations

from torch import nn

from ._blocks import CONTAINERS, Block, Stack, elements, join
from ._siblings import join_lists

__all__ = ["repeated_runs"]

Run = tuple[list[Block], int]  # the blocks, and how many parameters they have together


def repeated_runs(model: nn.Module) -> list[Stack]:
    """The longest run of equal neighbours in any container, or in all containers of one container.

    Two neighbours are equal when their class agrees and, for a single layer such as ``Linear``, their shapes too.

    Example:
        >>> repeated_runs(nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 3), nn.Linear(3, 3)))[0].blocks
        [('1',), ('2',)]
    """
    best, weight = Stack("", ""), 0
    for path, module in model.named_modules():
        if not isinstance(module, CONTAINERS):
            continue
        for blocks, size in (_nested(module, path), _longest(module, path)):
            if len(blocks) > 1 and size > weight:
                best, weight = Stack(path.rpartition(".")[0], path, blocks, list(range(len(blocks)))), size
    if best.blocks and isinstance(model.get_submodule(best.source), nn.ModuleList):
        join_lists(best, model, [item for block in best.blocks for item in block])
    return [best] if best.blocks else []


def _longest(container: nn.Module, path: str) -> Run:
    """The heaviest run of equal neighbours among the members of a container."""
    best: Run = ([], 0)
    run: list[Block] = []
    size, last = 0, object()
    for name, child in elements(container):
        leaf = next(child.children(), None) is None
        kind: object = (type(child), tuple(tuple(p.shape) for p in child.parameters()) if leaf else ())
        if kind != last:
            run, size, last = [], 0, kind
        run.append((join(path, name),))
        size += sum(p.numel() for p in child.parameters())
        if len(run) > 1 and size > best[1]:
            best = (list(run), size)
    return best


def _nested(container: nn.Module, path: str) -> Run:
    """The runs of all members together, where each member is a container with a run of its own."""
    members = elements(container)
    runs = [_longest(child, join(path, name)) for name, child in members if isinstance(child, nn.ModuleList)]
    if len(runs) < len(members) or len(runs) < 2 or not all(blocks for blocks, _ in runs):
        return [], 0
    return [block for blocks, _ in runs for block in blocks], sum(size for _, size in runs)
