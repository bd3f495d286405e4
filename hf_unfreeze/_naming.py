"""Names the stacks of a model and orders them bottom → top, from their paths and the classes of their blocks."""

from __future__ import annotations

import re
from collections.abc import Iterable

from torch import nn

from ._blocks import Stack
from ._roles import AUDIO_CLASS, CLASS_MODALITIES, MODALITIES, PARALLEL, PARTS, RANKS, STACK_NAMES, matches

__all__ = ["BOTTOM", "arrange", "height", "in_parallel", "name_stacks", "settle"]

Tiers = tuple[tuple[str, ...], ...]

UNKNOWN = 45  # height of a stack that no word describes: above text, below the encoder
# Stacks that tell that text is read beside the rest: by a detector, a video model, a decoder of codes.
TEXT_BESIDE = ({"text", "vision", "encoder"}, {"text", "temporal"}, {"text", "codec.encoder", "decoder"})
BOTTOM = 10  # height of the towers that read the input


def arrange(stacks: Iterable[str], parallel: bool) -> Tiers:
    """Order the stacks bottom → top: vision or audio, connector, text or encoder, decoder, cross.

    Example:
        >>> arrange(["decoder", "encoder"], parallel=False)
        (('encoder',), ('decoder',))

    Args:
        stacks: Names, in the order of registration.
        parallel: Whether the text tower stands beside the others (CLIP) and not on them (LLaVA).
    """
    tiers: dict[tuple[int, int, int], list[str]] = {}
    for order, name in enumerate(stacks):
        first, _, inner = name.partition(".")
        rank = height(name)
        if parallel and first == "text":
            rank = BOTTOM
        alone = order + 1 if inner and name not in RANKS else 0  # a second stack of its kind opens before the first
        if rank == UNKNOWN:
            alone = order + 1
        whole = inner.removesuffix("connector").rstrip(".0123456789")
        part = RANKS.get(whole, 0) + (whole != inner and inner.endswith("connector"))  # right above its stack
        tiers.setdefault((rank, part, alone), []).append(name)
    result = [tuple(names) for _, names in sorted(tiers.items())]
    if result[:1] == [("connector",)] and len(result) > 2:  # no tower below: it leads from an encoder to a decoder
        result[:2] = reversed(result[:2])
    return tuple(result)


def settle(connectors: Iterable[str], tiers: Tiers, parallel: bool) -> tuple[dict[str, str], Tiers]:
    """Name what lies between stacks, and put it there: one ``connector``, or one for each height, ``vision.connector``.

    Example:
        >>> settle(["vision.connector", "connector"], (("vision",), ("text",)), parallel=False)
        ({'vision.connector': 'connector', 'connector': 'connector'}, (('vision',), ('connector',), ('text',)))

    Args:
        connectors: Each with the stack right below it before the dot; without one, where a projector belongs.
        tiers: The stacks bottom → top.
        parallel: As for ``arrange``.
    """
    order = arrange([*(name for names in tiers for name in names), "connector"], parallel)
    usual = min(order.index(("connector",)), len(tiers) - 1)
    above = {name: index + 1 for index, names in enumerate(tiers) for name in names}
    at = {name: above.get(name.removesuffix(".connector"), usual) for name in connectors}
    single = len({index for index in at.values() if index < len(tiers)}) == 1

    def name_at(index: int) -> str:
        if index == len(tiers):
            return "head"  # above everything
        return "connector" if single else f"{tiers[index - 1][0] if index else 'embeddings'}.connector"

    called = {name: name_at(index) for name, index in at.items()}
    result: list[tuple[str, ...]] = []
    for index, names in enumerate(tiers):
        result += [(name,) for name in dict.fromkeys(called[c] for c, i in at.items() if i == index)]
        result.append(names)
    return called, tuple(result)


def height(stack: str) -> int:
    """Height of a stack, by its name or the first word of it; the towers that read the input are at ``BOTTOM``.

    Example:
        >>> height("vision.decoder"), height("decoder")
        (10, 60)
    """
    whole = stack.removesuffix(".connector")
    return RANKS.get(whole, RANKS.get(whole.partition(".")[0], UNKNOWN))


def in_parallel(names: Iterable[str], model: nn.Module) -> bool:
    """Whether the text tower stands beside the others: a cross stack joins them, or a temperature compares them."""
    stacks = set(names)
    if "cross" in stacks or any(beside <= stacks for beside in TEXT_BESIDE):
        return True
    return len(stacks) > 1 and any(
        matches(PARALLEL, part) for name, _ in model.named_parameters() for part in name.split(".")
    )


def name_stacks(stacks: list[Stack], model: nn.Module) -> list[str]:
    """One name per stack; an empty one when the model has only one.

    Example:
        >>> name_stacks(find_stacks(llava), llava)
        ['vision', 'text']
    """
    if len(stacks) == 1:
        return [""]
    described = [_describe(stack, model) for stack in stacks]
    if any(modality for modality, _ in described) and _reads_tokens(model):
        described = [(m or ("text" if not r else ""), r) for m, r in described]
    names = [_join(i, described) for i in range(len(stacks))]
    if "cross" in names and "text" not in names:
        names = ["text" if name == "encoder" else name for name in names]
    if "text" in names and "encoder" in names and "decoder" not in {role for m, role in described if not m}:
        block = _block_class(stacks[names.index("encoder")], model)
        heard = "audio" if re.search(AUDIO_CLASS, block) else "vision"
        names = [heard if name == "encoder" and heard not in names else name for name in names]
    return _distinct(names, stacks)


def _join(index: int, described: list[tuple[str, str]]) -> str:
    """``vision``, or ``vision.encoder`` where one modality has several parts."""
    modality, role = described[index]
    twins = [r for m, r in described if m == modality]
    apart = len(twins) > 1 and len(set(twins)) == len(twins)
    return f"{modality}.{role}" if modality and role and apart else modality or role or "main"


def _distinct(names: list[str], stacks: list[Stack]) -> list[str]:
    """Give a second stack of the same name the word of its path that tells it from the first."""
    result: list[str] = []
    for i, name in enumerate(names):
        unique = name
        if name in result:
            other = stacks[result.index(name)].source.split(".")
            own = [part for part in stacks[i].source.split(".") if not part.isdigit() and part not in other]
            word, number = next(iter(own), "part"), 2
            unique = f"{name}.{word}"
            while unique in result:
                unique, number = f"{name}.{word}{number}", number + 1
        result.append(unique)
    return result


def _describe(stack: Stack, model: nn.Module) -> tuple[str, str]:
    """Modality and part of a stack: from its path, the outermost word first, then from the class of its blocks."""
    known = next((name for name, pattern in STACK_NAMES if re.search(pattern, stack.source)), "")
    base = getattr(model, "base_model_prefix", "")  # the name of the whole tells nothing of its parts: speecht5
    parts = stack.source.split(".")
    parts = parts[1:] if len(parts) > 1 and parts[0] == base else parts
    role = next((r for part in parts for r, pattern in PARTS if re.search(pattern, part)), "")
    if known:
        return known, "" if "." in known else role
    modality = next((m for part in parts for m, pattern in MODALITIES if re.search(pattern, part)), "")
    if not modality and not role:
        block = _block_class(stack, model)
        modality = next((m for m, pattern in CLASS_MODALITIES if re.search(pattern, block)), "")
    return modality, role


def _block_class(stack: Stack, model: nn.Module) -> str:
    return type(model.get_submodule(stack.blocks[0][-1])).__name__


def _reads_tokens(model: nn.Module) -> bool:
    """Whether the model has an embedding table."""
    return any(isinstance(module, nn.Embedding) for module in model.modules())
