"""Finds the stacks of blocks in a module tree, without a forward."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator

from torch import nn

from ._blocks import (
    CONTAINERS,
    Block,
    Signature,
    Stack,
    elements,
    has_parameters,
    in_parts,
    is_block,
    is_checkpointed,
    is_second_half,
    is_sequence,
    join,
    signature,
)
from ._roles import (
    BETWEEN_STAGES,
    FIRST_STAGE,
    FIRST_STEM,
    NEVER_BLOCK,
    NOT_STACKS,
    REVERSED,
    STAGE_END,
    STAGE_INNER,
    TOWER_CLASS,
    TOWERS_INSIDE,
    matches,
)
from ._siblings import join_siblings

__all__ = ["find_stacks"]


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
    return join_siblings(_distinct(_visit(model, "", names), model), model)


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
                stack = _stack(path, here, members, no_split)
                _join_between(stack, module, run)
                yield stack
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
    return any(matches(TOWERS_INSIDE, name) or _is_tower(name, part) for name, part in module.named_children())


def _is_tower(name: str, part: nn.Module) -> bool:
    """Checkpointed layers in a projector: an adaptor (Fun-ASR) is a small encoder of its own."""
    members = [child for _, child in elements(part)]
    return name == "layers" and isinstance(part, nn.ModuleList) and bool(members) and all(map(is_checkpointed, members))


def _stack(path: str, source: str, members: list[tuple[str, nn.Module]], no_split: frozenset[str]) -> Stack:
    blocks, rest = _blocks(members, no_split)
    if rest and blocks:
        blocks[-1] = (*blocks[-1], *rest)
    stack = Stack(path, source, blocks)
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


def _join_between(stack: Stack, module: nn.Module, run: list[str]) -> None:
    """Attention that is registered between two numbered blocks (coders of images) goes to the lower one."""
    if len(run) != len(stack.blocks):
        return
    at = -1
    for name, _ in module.named_children():
        at += name in run
        if name.startswith("attn") and 0 <= at < len(run) - 1:
            stack.blocks[at] = (join(stack.path, name), *stack.blocks[at])


def _blocks(members: list[tuple[str, nn.Module]], no_split: frozenset[str]) -> tuple[list[Block], list[str]]:
    """Blocks of a sequence, and what comes after them; a member that is a stage gives its inner blocks.

    Loose parts go to their neighbours: what leads from one stage to the next goes to the next.
    """
    blocks: list[Block] = []
    pending: list[str] = []  # what serves the next stage
    ends: list[tuple[int, list[str]]] = []  # the last block of each stage, and what closes the stage
    for path, member in members:
        inner = _inner_sequences(member, path, no_split)
        if blocks and matches(BETWEEN_STAGES, type(member).__name__):
            pending.append(path)
            continue
        if blocks and is_second_half(member):
            if pending:
                pending.append(path)
            else:
                blocks[-1] = (*blocks[-1], path)
            continue
        if not inner:
            blocks.append((*pending, path))
            pending = []
            continue
        first = len(blocks)
        rest: list[str] = []
        for sequence in inner:
            own, rest = _blocks(sequence, no_split)
            blocks.extend(own)
        taken = [p for block in blocks[first:] for p in block] + rest
        before, after = _loose_of(member, path, taken)
        if first == 0:  # the patch embedding of the lowest stage is the stem
            before = [item for item in before if not matches(FIRST_STEM, item.rpartition(".")[2])]
        for name, part in member.named_children():
            here = join(path, name)
            beside = next((side for side in (before, after) if here in side), None)
            if beside is None or not isinstance(part, nn.ModuleList) or matches(NEVER_BLOCK, name):
                continue
            if len(part) == len(blocks) - first:  # a part of each block, as attention in a coder of images
                beside.remove(here)
                blocks[first:] = [(f"{here}.{i}", *block) for i, block in enumerate(blocks[first:])]
        blocks[first] = (*pending, *before, *blocks[first])
        closing = [item for item in after if matches(STAGE_END, item.rpartition(".")[2])]
        ends.append((len(blocks) - 1, closing))
        pending = [*rest, *(item for item in after if item not in closing)]
    for at, closing in ends:
        last = at == ends[-1][0]  # its norm is the final one
        blocks[at] = (*(i for i in closing if not (last and "norm" in i.rpartition(".")[2])), *blocks[at])
    return blocks, pending


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
        own = [part for _, part in parts if not matches(BETWEEN_STAGES, type(part).__name__)]
        if own and (len(set(map(type, own))) == 1 or name == "blocks") and all(is_block(p, no_split) for p in own):
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
