"""Joins the lists that one module holds side by side: parallel, woven, in a row, or parts of the blocks beside."""

from __future__ import annotations

import re

from torch import nn

from ._blocks import CONTAINERS, Stack, has_parameters, join
from ._roles import APART, BESIDE, FIRST_STEM, HEAD, MIDWAY, NOT_STACKS, PARTS, SEQUENTIAL, matches

__all__ = ["join_lists", "join_siblings"]


def join_siblings(stacks: list[Stack], model: nn.Module) -> list[Stack]:
    """Merge the sequences that one module holds: parallel lists by index, woven lists by index, stages in order."""
    result: list[Stack] = []
    for stack in stacks:
        name = stack.source.rpartition(".")[2]
        role = next((part for part, pattern in PARTS if re.search(pattern, name)), "")
        twin = None
        for other in result:
            other_name = other.source.rpartition(".")[2]
            other_role = next((part for part, pattern in PARTS if re.search(pattern, other_name)), "")
            if other.path == stack.path and role == other_role and not matches(APART, name):
                twin = other
        if twin is None:
            result.append(stack)
            continue
        kind = _class_of(model, twin), _class_of(model, stack)
        woven = len(stack.blocks) <= len(twin.blocks) and (kind[0] != kind[1] or _modality(stack) != _modality(twin))
        woven = woven and not any(matches(SEQUENTIAL, word) for word in (name, twin.source.rpartition(".")[2]))
        if woven:
            step = max(1, len(twin.blocks) // len(stack.blocks))
            for i, block in enumerate(stack.blocks):
                at = i if len(stack.blocks) == len(twin.blocks) else min(i * step, len(twin.blocks) - 1)
                twin.blocks[at] = (*twin.blocks[at], *block)
        else:
            twin.starts.extend(len(twin.blocks) + start for start in stack.starts)
            twin.blocks.extend(stack.blocks)
    taken = [path for stack in result for block in stack.blocks for path in block]
    for stack in result:
        join_lists(stack, model, taken)
        _join_midway(stack, model)
    return result


def _join_midway(stack: Stack, model: nn.Module) -> None:
    """What runs between two blocks although it lies beside all of them: it serves the upper one."""
    outer = stack.path.rpartition(".")[0]
    owner = model.get_submodule(outer)
    for name, value in MIDWAY:
        at = getattr(getattr(owner, "config", None), value, -1) + 1
        if hasattr(owner, name) and 0 < at < len(stack.blocks):
            stack.blocks[at] = (join(outer, name), *stack.blocks[at])
    holder = model.get_submodule(stack.path)
    for kind, word, share in BESIDE:
        if re.search(kind, type(holder).__name__):
            at = max(0, int(share * len(stack.blocks)) - 1)
            parts = (join(stack.path, name) for name, _ in holder.named_children() if re.search(word, name))
            stack.blocks[at] = (*parts, *stack.blocks[at])


def _modality(stack: Stack) -> str:
    """The modality that the name of a list itself tells: BridgeTower has one list of cross layers for each."""
    name = stack.source.rpartition(".")[2]
    return next((word for word in ("text", "image") if word in name), "")


def join_lists(stack: Stack, model: nn.Module, taken: list[str]) -> None:
    """Lists beside the blocks with one entry per block or stage: attention, norm, patch embedding of that stage."""
    count = len(stack.starts)
    for name, child in model.get_submodule(stack.path).named_children():
        here = join(stack.path, name)
        if not isinstance(child, CONTAINERS) or not has_parameters(child) or count < 2 or matches(HEAD, name):
            continue
        if name.endswith("link_tower") and len(child) == count - 1:  # one between two blocks
            for i, start in enumerate(stack.starts[1:]):
                stack.blocks[start] = (f"{here}.{i}", *stack.blocks[start])
        if re.search("downsampl", name) and len(child) < count and not any(p.startswith(here + ".") for p in taken):
            for i, start in enumerate(stack.starts[-len(child) :]):
                stack.blocks[start] = (f"{here}.{i}", *stack.blocks[start])
        if name in ("upsampler", "ups") and count % len(child) == 0:  # a stage of a vocoder has several blocks
            for i, start in enumerate(stack.starts[:: count // len(child)]):
                stack.blocks[start] = (f"{here}.{i}", *stack.blocks[start])
        if len(child) != count or any(path.startswith(here + ".") for path in taken):
            continue
        staged = len(stack.blocks) > count
        if staged and re.search("norm", name):
            ends = [start - 1 for start in stack.starts[1:]]
            for i, end in enumerate(ends):  # the last stage's norm is the final one
                stack.blocks[end] = (*stack.blocks[end], f"{here}.{i}")
        elif matches(FIRST_STEM, name):
            for i, start in enumerate(stack.starts[1:], 1):
                stack.blocks[start] = (f"{here}.{i}", *stack.blocks[start])
        elif not matches(NOT_STACKS, name):
            for i, start in enumerate(stack.starts):
                stack.blocks[start] = (f"{here}.{i}", *stack.blocks[start])


def _class_of(model: nn.Module, stack: Stack) -> type:
    return type(model.get_submodule(stack.blocks[0][-1]))
