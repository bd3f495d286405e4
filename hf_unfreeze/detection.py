"""Structure found in a model that has no row: its lists of like blocks, and what comes before them."""

from __future__ import annotations

import re
from collections.abc import Sequence

from torch import nn

from .architectures import Architecture

__all__ = ["block_lists", "detect"]


def block_lists(model: nn.Module, paths: Sequence[str]) -> list[str]:
    """Return the paths of the blocks under the first of the alternative paths that the model has, in order."""
    modules = dict(model.named_modules(remove_duplicate=False))
    for path in paths:
        index_free = re.escape(path).replace(r"\*", "[0-9]+")
        pattern = re.compile(rf"(?:.*\.)?{index_free}")
        lists = [
            name for name, module in modules.items() if isinstance(module, nn.ModuleList) and pattern.fullmatch(name)
        ]
        lists = [name for name in lists if not any(name.startswith(f"{outer}.") for outer in lists)]
        if "*" not in path:
            lists = lists[:1]
        blocks = [f"{name}.{index}" for name in lists for index in range(len(modules[name]))]
        if blocks:
            return blocks
    return []


def detect(model: nn.Module) -> Architecture | None:
    """Return a row made for this model: its largest outermost list of like modules; None where there is none."""
    lists = [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, (nn.ModuleList, nn.Sequential)) and len(module) > 1 and _alike(module)
    ]
    lists = [(n, m) for n, m in lists if not any(n != o and n.startswith(f"{o}.") for o, _ in lists)]
    if not lists:
        return None
    name, _ = max(lists, key=lambda item: sum(p.numel() for p in item[1].parameters()))
    before: list[str] = []
    for parameter, _ in model.named_parameters():
        if parameter.startswith(f"{name}."):
            break
        before.append(parameter)
    return Architecture("", {"": (name,)}, tuple(before))


def _alike(blocks: nn.ModuleList | nn.Sequential) -> bool:
    return len({type(block) for block in blocks}) == 1 and all(
        any(True for _ in block.parameters()) for block in blocks
    )
