"""Layer groups: a partition of a model's parameters, bottom → top."""

from __future__ import annotations

import re
import warnings
from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

from .architectures import Architecture, find_architecture
from .detection import block_lists, detect
from .errors import StructureError

__all__ = ["LayerGroup", "layer_groups"]


@dataclass(frozen=True)
class LayerGroup:
    """Parameters that open and close together.

    Args:
        name: ``embeddings``, ``block[3]``, ``decoder.block[3]``, ``head`` …
        stack: Stack of a block (``encoder``, ``vision`` …); empty where there is one, and for embeddings and head.
        parameter_names: As in ``model.named_parameters()``; empty for a head that is tied to the embeddings.
        level: Groups of one level open together; None where each opens alone.
    """

    name: str
    stack: str
    parameter_names: tuple[str, ...]
    level: int | None = None


def layer_groups(model: nn.Module) -> tuple[LayerGroup, ...]:
    """Return the layer groups of a model, bottom → top: every distinct parameter is in exactly one.

    Example:
        >>> [group.name for group in layer_groups(BertForSequenceClassification(BertConfig(num_hidden_layers=2)))]
        ['embeddings', 'block[0]', 'block[1]', 'head']

    Args:
        model: A model of transformers, or any module with a list of like blocks; wrapped by DDP, torch.compile or
            PEFT too. The meta device will do. A tied parameter is in the lowest of its groups. A model without any
            repeated structure gives one group, ``all_parameters``.

    Raises:
        StructureError: The model is no module, or has no parameters.
    """
    if not isinstance(model, nn.Module):
        raise StructureError(f"a model is a torch.nn.Module, not {type(model).__name__}. Pass the model itself.")
    aliases: dict[int, list[str]] = {}  # every name of each distinct parameter
    for name, parameter in model.named_parameters(remove_duplicate=False):
        aliases.setdefault(id(parameter), []).append(name)
    if not aliases:
        raise StructureError(f"{type(model).__name__} has no parameters, so there is nothing to unfreeze.")
    row = find_architecture(getattr(getattr(model, "config", None), "model_type", None))
    architecture = _matching(row, model) if row else None
    if architecture is None:
        architecture = detect(model)
    if architecture is None:
        return (LayerGroup("all_parameters", "", tuple(names[0] for names in aliases.values()), 0),)
    return _partition(model, architecture, list(aliases.values()))


def _matching(row: Architecture, model: nn.Module) -> Architecture | None:
    """Return the row with the stacks that this model has; None, with a warning, where it fits nothing."""
    present = {stack: paths for stack, paths in row.stacks if block_lists(model, paths)}
    if present:
        single = len(present) == 1
        return Architecture(
            row.model_type,
            {"" if single else stack: paths for stack, paths in present.items()},
            row.embeddings,
            row.parallel and not single,
        )
    patterns = ", ".join(path for _, paths in row.stacks for path in paths)
    warnings.warn(
        f"the row of {row.model_type!r} does not fit {type(model).__name__}: nothing matches {patterns}. "
        "The structure is detected instead; check it with hf-unfreeze groups.",
        UserWarning,
        stacklevel=4,
    )
    return None


def _partition(model: nn.Module, row: Architecture, aliases: Sequence[Sequence[str]]) -> tuple[LayerGroup, ...]:
    order = {"embeddings": 0}
    stack_of: dict[str, str] = {"embeddings": "", "head": ""}
    prefixes: list[tuple[str, str]] = []
    stacks: list[list[str]] = []
    for stack, paths in row.stacks:
        lists = block_lists(model, paths)
        names: list[str] = []
        for prefix in lists:
            name = f"{stack}.block[{len(names)}]" if stack else f"block[{len(names)}]"
            prefixes.append((prefix + ".", name))
            names.append(name)
            stack_of[name] = stack
        stacks.append(names)
    levels = _levels(stacks, row.parallel)
    for name in sorted(levels, key=lambda n: levels[n]):
        order[name] = len(order)
    order["head"] = len(order)
    levels |= {"embeddings": 0, "head": max(levels.values(), default=0) + 1}
    embeddings = (
        re.compile(rf"(?:^|\.)(?:{'|'.join(map(re.escape, row.embeddings))})(?:\.|$)") if row.embeddings else None
    )

    def home(name: str) -> str:
        block = next((group for prefix, group in prefixes if name.startswith(prefix)), None)
        if embeddings and embeddings.search(name) and not (block and _inner_embedding(name)):
            return "embeddings"
        return block or _stage_of(name, prefixes) or ("embeddings" if _stem_norm(model, name) else "head")

    members: dict[str, list[str]] = {name: [] for name in order}
    for same in aliases:
        lowest = min((home(name) for name in same), key=lambda group: order[group])
        members[lowest].append(same[0])
    return tuple(LayerGroup(name, stack_of[name], tuple(members[name]), levels[name]) for name in order)


def _stage_of(name: str, prefixes: Sequence[tuple[str, str]]) -> str | None:
    """Return the block whose input a stage's downsampling makes: the first of its own stage, or of the next one.

    ConvNeXt keeps it at the entry of a stage (``stages.1.downsampling_layer``), Swin at the exit
    (``layers.0.downsample``).
    """
    match = re.match(r"(.*\.(?:stages|layers)\.)(\d+)\.(downsampling_layer|downsample)\.", name)
    if not match:
        return None
    stage = int(match[2]) + (match[3] == "downsample")
    return next((group for prefix, group in prefixes if prefix.startswith(f"{match[1]}{stage}.")), None)


def _inner_embedding(name: str) -> bool:
    """Whether a block merely has a submodule with an embedding's name; relative-bias tables are embeddings for all."""
    return not re.search(r"relative_attention_bias|rel_attn_embed", name)


def _stem_norm(model: nn.Module, name: str) -> bool:
    """Wav2Vec2 and its kin: ``encoder.layer_norm`` runs before the blocks, unless do_stable_layer_norm."""
    config = getattr(model, "config", None)
    stable = getattr(config, "do_stable_layer_norm", None)
    return stable is False and re.search(r"(?:^|\.)encoder\.layer_norm\.", name) is not None


def _levels(stacks: Sequence[Sequence[str]], parallel: bool) -> dict[str, int]:
    """Give each block its level: stacks on top of each other, or side by side and level at the top."""
    if parallel:
        tallest = max(map(len, stacks), default=0)
        return {name: 1 + tallest - len(names) + i for names in stacks for i, name in enumerate(names)}
    return {name: 1 + i for i, name in enumerate(name for names in stacks for name in names)}
