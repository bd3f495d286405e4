"""What a block is: which members of a container look like blocks, and which containers are sequences of them."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import nn

from ._roles import BETWEEN_STAGES, BLOCK_CLASS, MIXES_TOKENS, NEVER_CLASS, NO_BLOCK_CLASS, SECOND_HALF, matches

__all__ = [
    "CONTAINERS",
    "Block",
    "Signature",
    "Stack",
    "elements",
    "has_parameters",
    "in_parts",
    "is_block",
    "is_checkpointed",
    "is_second_half",
    "is_sequence",
    "join",
    "signature",
]

Block = tuple[str, ...]  # the paths of the modules that make one block
Signature = tuple[type, tuple[int, ...]]  # class, and identity of each parameter
CONTAINERS = (nn.ModuleList, nn.Sequential, nn.ModuleDict)


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


def has_parameters(module: nn.Module) -> bool:
    """Whether a module or one below it owns a parameter."""
    return next(module.parameters(), None) is not None


def join(path: str, name: str) -> str:
    """``join("a.b", "c")`` → ``a.b.c``; the path may be empty."""
    return f"{path}.{name}" if path else name


def is_block(module: nn.Module, no_split: frozenset[str]) -> bool:
    """Whether one element of a sequence looks like a block: by base class, by ``_no_split_modules``, by name."""
    name = type(module).__name__
    if matches(NEVER_CLASS, name):
        return False
    if is_checkpointed(module) or name in no_split:
        return True
    return (
        matches(BLOCK_CLASS, name) and not matches(NO_BLOCK_CLASS, name) and next(module.children(), None) is not None
    )


def is_checkpointed(module: nn.Module) -> bool:
    """Whether transformers can checkpoint the gradients of a module as a whole."""
    return any(base.__name__ == "GradientCheckpointingLayer" for base in type(module).__mro__)


def _packs_weights(module: nn.Module) -> bool:
    """Whether weights without a parameter are in a module: buffers, or what torch.ao.quantization packs."""
    packed = any(hasattr(child, "_packed_params") for child in module.modules())
    return packed or next(module.buffers(), None) is not None


def elements(module: nn.Module) -> list[tuple[str, nn.Module]]:
    """The members of a container that own weights, be they quantised and no parameters."""
    return [
        (name, child)
        for name, child in module.named_children()
        if has_parameters(child) or (name.isdigit() and _packs_weights(child))
    ]


def signature(module: nn.Module) -> Signature:
    """What two modules share that are tied as a whole."""
    return type(module), tuple(id(parameter) for parameter in module.parameters())


def is_sequence(container: nn.Module, no_split: frozenset[str]) -> bool:
    """Whether a container is a sequence of blocks, or of lists of blocks."""
    members = [child for _, child in elements(container)]
    members = members[:1] + [child for child in members[1:] if not matches(BETWEEN_STAGES, type(child).__name__)]
    if not members:
        return False
    inner = [
        all(is_block(c, no_split) for _, c in elements(m)) and bool(elements(m)) if isinstance(m, CONTAINERS) else False
        for m in members
    ]
    good = [is_block(m, no_split) or nested or in_parts(m) for m, nested in zip(members, inner, strict=True)]
    if isinstance(container, (nn.Sequential, nn.ModuleDict)):
        return all(good) and len({type(m) for m in members}) == 1
    return all(good)


def in_parts(member: nn.Module) -> bool:
    """Whether a list is one block in parts, as in Flamingo's resampler: attention and feed-forward, no block itself."""
    classes = [type(part).__name__ for _, part in elements(member)]
    return (
        isinstance(member, nn.ModuleList)
        and len(set(classes)) > 1
        and any(matches(MIXES_TOKENS, name) for name in classes)
        and not any(matches(BLOCK_CLASS, name) for name in classes)
    )


def is_second_half(member: nn.Module) -> bool:
    """Whether a member of a list only wraps a feed-forward: LeViT's blocks are two members, attention and this."""
    children = [child for child in member.children() if has_parameters(child)]
    own = next(member.parameters(recurse=False), None)
    return own is None and len(children) == 1 and matches(SECOND_HALF, type(children[0]).__name__)
