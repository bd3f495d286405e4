"""Finds the stacks of blocks in a module tree, without a forward."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from torch import nn

from ._blocks import (
    CONTAINERS,
    Block,
    Signature,
    elements,
    has_parameters,
    in_parts,
    is_block,
    is_sequence,
    join,
    signature,
)
from ._roles import (
    APART,
    BETWEEN_STAGES,
    FIRST_STAGE,
    HEAD,
    NEVER_BLOCK,
    NOT_STACKS,
    PARTS,
    REVERSED,
    SEQUENTIAL,
    STAGE_INNER,
    TOWER_CLASS,
    TOWERS_INSIDE,
    matches,
)

__all__ = ["Stack", "find_stacks", "join_lists"]


@dataclass
class Stack:
    """One sequence of blocks, lowest first.

    Args:
        path: Dotted path of the module that holds the sequence (its parent).
        source: Dotted path of the sequence itself, for messages.
        blocks: For each block the paths of its modules; a path may also be that of a downsampling module it owns.
        starts: Index of the first block of each member of the sequence: of each stage, where members are stages.
    """

    path: str
    source: str
    blocks: list[Block] = field(default_factory=list)
    starts: list[int] = field(default_factory=list)


def find_stacks(model: nn.Module) -> list[Stack]:
    """Every stack of blocks, in the order in which the model registers them.

    Example:
        >>> [stack.source for stack in find_stacks(bert)]
        ['encoder.layer']
    """
    no_split: set[str] = set()
    for module in model.modules():
        no_split.update(getattr(module, "_no_split_modules", None) or ())
    names = frozenset(name for name in no_split if isinstance(name, str) and not name.endswith("Embeddings"))
    return _join_siblings(_distinct(_visit(model, "", names), model), model)


def _distinct(stacks: Iterable[Stack], model: nn.Module) -> list[Stack]:
    """Leave out what is tied as a whole to stacks before it: a tower may be reached by several paths."""
    result: list[Stack] = []
    seen: set[Signature] = set()
    for stack in stacks:
        blocks = {signature(model.get_submodule(block[-1])) for block in stack.blocks}
        if not blocks <= seen:
            result.append(stack)
        seen |= blocks
    return result


def _visit(module: nn.Module, path: str, no_split: frozenset[str]) -> Iterator[Stack]:
    numbered = _numbered(module, no_split)
    done = {name for run in numbered for name in run}
    for name, child in module.named_children():
        here = join(path, name)
        if not has_parameters(child) or (matches(NOT_STACKS, name) and not _has_tower(child)):
            for part, stage in child.named_children():
                if matches(FIRST_STAGE, part) and isinstance(stage, CONTAINERS) and is_sequence(stage, no_split):
                    yield _stack(path, join(here, part), _members(stage, join(here, part)), no_split)
            continue
        if name in done:
            run = next(run for run in numbered if name in run)
            if name == run[0]:
                members = [(join(path, item), module.get_submodule(item)) for item in run]
                yield _stack(path, here, members, no_split)
        elif matches(TOWER_CLASS, type(child).__name__):
            yield Stack(path, here, [(here,)], [0])
        elif isinstance(child, CONTAINERS) and is_sequence(child, no_split) and not matches(NEVER_BLOCK, name):
            members = _members(child, here)
            backwards = matches(REVERSED, type(module).__name__)
            yield _stack(path, here, members[::-1] if backwards else members, no_split)
        else:
            yield from _visit(child, here, no_split)


def _members(container: nn.Module, path: str) -> list[tuple[str, nn.Module]]:
    return [(join(path, name), element) for name, element in elements(container)]


def _has_tower(module: nn.Module) -> bool:
    return any(matches(TOWERS_INSIDE, name) for name, _ in module.named_children())


def _stack(path: str, source: str, members: list[tuple[str, nn.Module]], no_split: frozenset[str]) -> Stack:
    stack = Stack(path, source, _blocks(members, no_split))
    for member, _ in members:
        at = (
            i
            for i, block in enumerate(stack.blocks)
            if any(p == member or p.startswith(member + ".") for p in block[-1:])
        )
        stack.starts.append(next(at, 0))
    return stack


def _numbered(module: nn.Module, no_split: frozenset[str]) -> list[list[str]]:
    """Runs of attributes that differ in a trailing number only: ``layer1 … layer4``."""
    runs: dict[str, list[str]] = {}
    for name, child in module.named_children():
        match = re.fullmatch(r"(\w*?[A-Za-z]_?)(\d+)", name)
        if match and has_parameters(child) and not isinstance(module, nn.ModuleList):
            nested = isinstance(child, CONTAINERS) and is_sequence(child, no_split)
            if nested or is_block(child, no_split):
                runs.setdefault(match[1], []).append(name)
    return [names for names in runs.values() if len(names) > 1]


def _blocks(members: list[tuple[str, nn.Module]], no_split: frozenset[str]) -> list[Block]:
    """Blocks of a sequence; a member that is a stage gives its inner blocks, loose parts go to neighbours."""
    blocks: list[Block] = []
    pending: list[str] = []  # what serves the next stage
    for path, member in members:
        inner = _inner_sequences(member, path, no_split)
        if blocks and matches(BETWEEN_STAGES, type(member).__name__):
            pending.append(path)
            continue
        if not inner:
            blocks.append((*pending, path))
            pending = []
            continue
        first = len(blocks)
        for sequence in inner:
            blocks.extend(_blocks(sequence, no_split))
        taken = [p for block in blocks[first:] for p in block]
        before, after = _loose_of(member, path, taken)
        if first == 0:  # the patch embedding of the lowest stage is the stem
            before = [item for item in before if not re.search("embed", item.rpartition(".")[2])]
        for name, part in member.named_children():
            here = join(path, name)
            beside = next((side for side in (before, after) if here in side), None)
            if beside is None or not isinstance(part, nn.ModuleList) or matches(NEVER_BLOCK, name):
                continue
            if len(part) == len(blocks) - first:  # a part of each block, as attention in a coder of images
                beside.remove(here)
                blocks[first:] = [(f"{here}.{i}", *block) for i, block in enumerate(blocks[first:])]
        blocks[first] = (*pending, *before, *blocks[first])
        pending = after
    if pending and blocks:
        blocks[-1] = (*blocks[-1], *pending)
    return blocks


def _inner_sequences(member: nn.Module, path: str, no_split: frozenset[str]) -> list[list[tuple[str, nn.Module]]]:
    """The sequences of blocks inside a stage, or nothing when the member is a block itself."""
    if in_parts(member):
        return []
    if isinstance(member, CONTAINERS):
        return [_members(member, path)] if elements(member) else []
    found: list[list[tuple[str, nn.Module]]] = []
    for name, child in member.named_children():
        if not isinstance(child, CONTAINERS) or not matches(STAGE_INNER, name):
            continue
        parts = elements(child)
        classes = {type(part) for _, part in parts}
        if parts and (len(classes) == 1 or name == "blocks") and all(is_block(part, no_split) for _, part in parts):
            found.append([(join(join(path, name), item), part) for item, part in parts])
    return found


def _loose_of(stage: nn.Module, path: str, taken: list[str]) -> tuple[list[str], list[str]]:
    """What a stage owns outside its blocks: before the first of them (its own parameters too), after the last."""
    before = [join(path, name) for name, _ in stage.named_parameters(recurse=False)]
    after: list[str] = []
    seen = False
    for name, child in stage.named_children():
        here = join(path, name)
        if any(item == here or item.startswith(here + ".") for item in taken):
            seen = True
        elif has_parameters(child):
            (after if seen and not name.endswith("projector") else before).append(here)
    return before, after


def _join_siblings(stacks: list[Stack], model: nn.Module) -> list[Stack]:
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
    return result


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
        if name == "upsampler" and count % len(child) == 0:  # a stage of a vocoder has several blocks
            for i, start in enumerate(stack.starts[:: count // len(child)]):
                stack.blocks[start] = (f"{here}.{i}", *stack.blocks[start])
        if len(child) != count or any(path.startswith(here + ".") for path in taken):
            continue
        staged = len(stack.blocks) > count
        if staged and re.search("norm", name):
            ends = [start - 1 for start in stack.starts[1:]]
            for i, end in enumerate(ends):  # the last stage's norm is the final one
                stack.blocks[end] = (*stack.blocks[end], f"{here}.{i}")
        elif re.search("embed", name):
            for i, start in enumerate(stack.starts[1:], 1):
                stack.blocks[start] = (f"{here}.{i}", *stack.blocks[start])
        elif not matches(NOT_STACKS, name):
            for i, start in enumerate(stack.starts):
                stack.blocks[start] = (f"{here}.{i}", *stack.blocks[start])


def _class_of(model: nn.Module, stack: Stack) -> type:
    return type(model.get_submodule(stack.blocks[0][-1]))
