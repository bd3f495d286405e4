"""Layer groups: a partition of a model's parameters, bottom → top.

The order from the top down is the reverse of the tuple: head, decoder, encoder; or cross stack, text, connector,
vision and audio. Parallel towers (CLIP, SigLIP, CLAP) are zipped from the top: their last blocks share a level.
"""

from __future__ import annotations

import warnings
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from ._matcher import match_groups
from ._rows import match_row
from .architectures import Architecture, find_architecture
from .detection import Layout, Place, detect
from .errors import StructureError

__all__ = ["LayerGroup", "explain_groups", "layer_groups", "leave_out"]


WRAPPERS = ("torch.nn.parallel", "torch._dynamo", "peft.")


@dataclass(frozen=True)
class LayerGroup:
    """A set of parameters that is frozen and opened as one.

    Example:
        >>> layer_groups(bert)[1].parameter_names[0]
        'encoder.layer.0.attention.self.query.weight'

    Args:
        name: ``embeddings``, ``block[3]``, ``decoder.block[0]``, ``connector``, ``head``; where something lies between
            stacks at several heights, ``vision.connector``, named by the stack right below.
        stack: What stands before ``.block``; empty when the model has one stack, and for embeddings and head.
        parameter_names: As in ``model.named_parameters()`` of the model that was given.
        level: Height, 0 for the embeddings; groups of one level open together.
    """

    name: str
    stack: str
    parameter_names: tuple[str, ...]
    level: int | None = None


def layer_groups(model: nn.Module, inputs: Mapping[str, Any] | None = None) -> tuple[LayerGroup, ...]:
    """Split the parameters of a model into layer groups, bottom → top.

    Every distinct parameter is in exactly one group, a tied one in the lowest of its groups. ``embeddings`` and
    ``head`` are always there, empty if the model has none. A model in which nothing repeats gives one group,
    ``all_parameters``.

    Example:
        >>> [group.name for group in layer_groups(bert)]
        ['embeddings', 'block[0]', 'block[1]', 'head']

    Args:
        model: Any module; one wrapped by DDP, torch.compile or PEFT as well. The meta device is enough.
        inputs: Keyword arguments of one forward, which places the parameters whose name tells nothing.

    Raises:
        StructureError: ``model`` is no module, or has no parameter.
    """
    return _assemble(model, _layout(model, inputs))[0]


def leave_out(groups: Sequence[LayerGroup], names: Collection[str]) -> tuple[LayerGroup, ...]:
    """Return the groups without some parameters; a group may be left with none."""
    return tuple(replace(g, parameter_names=tuple(n for n in g.parameter_names if n not in names)) for g in groups)


def explain_groups(model: nn.Module, inputs: Mapping[str, Any] | None = None) -> dict[str, str]:
    """Return for each parameter why it is in its group: a row, a block list, stem, final norm, head, a tie.

    Example:
        >>> explain_groups(bert)["pooler.dense.weight"]
        'row bert: head'

    Args:
        model: As for ``layer_groups``.
        inputs: As for ``layer_groups``.

    Raises:
        StructureError: ``model`` is no module, or has no parameter.
    """
    return _assemble(model, _layout(model, inputs))[1]


def _layout(model: nn.Module, inputs: Mapping[str, Any] | None) -> Layout | None:
    if not isinstance(model, nn.Module):
        raise StructureError(
            f"a model is a torch.nn.Module, not {type(model).__name__}. "
            "Write layer_groups(model), with the model itself and not its name, config or state_dict."
        )
    if next(model.parameters(), None) is None:
        raise StructureError(
            f"{type(model).__name__} has no parameters, so there is nothing to unfreeze. "
            "Build the model first, for instance AutoModel.from_config(config), and pass it to layer_groups."
        )
    prefix, inner = _unwrapped(model)
    layout = _inner_layout(inner, inputs)
    if layout is None or not prefix:
        return layout
    places = {prefix + name: place for name, place in layout.places.items()}
    for name, _ in model.named_parameters(remove_duplicate=False):
        places.setdefault(name, Place("embeddings", None, "prompt of the wrapper"))
    return Layout(places, layout.tiers)


def _inner_layout(model: nn.Module, inputs: Mapping[str, Any] | None) -> Layout | None:
    row = find_architecture(getattr(getattr(model, "config", None), "model_type", None))
    if row is not None:
        layout, failed = match_row(model, row)
        if layout is not None:
            return layout
        _warn_row(model, row, failed)
    return match_groups(model) or detect(model, inputs)


def _unwrapped(model: nn.Module) -> tuple[str, nn.Module]:
    """The model inside DDP, torch.compile and PEFT, and what they put before its parameters' names."""
    prefix = ""
    while type(model).__module__.startswith(WRAPPERS):
        names = ("module", "_orig_mod", "base_model", "model")
        children = dict(model.named_children())
        name = next((name for name in names if name in children), "")
        if not name:
            break
        prefix, model = f"{prefix}{name}.", children[name]
    return prefix, model


def _warn_row(model: nn.Module, row: Architecture, failed: str) -> None:
    warnings.warn(
        f"the row of {row.model_type!r} does not fit {type(model).__name__}: {failed}. "
        "The structure is detected instead; check it with hf-unfreeze groups.",
        UserWarning,
        stacklevel=5,
    )


def _assemble(model: nn.Module, layout: Layout | None) -> tuple[tuple[LayerGroup, ...], dict[str, str]]:
    canonical: dict[int, str] = {}
    aliases: dict[str, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        aliases.setdefault(canonical.setdefault(id(parameter), name), []).append(name)
    if layout is None:
        reason = "nothing repeats"
        return (LayerGroup("all_parameters", "", tuple(aliases), 0),), dict.fromkeys(aliases, reason)
    height = _heights(layout)
    members: dict[tuple[str, int | None], list[str]] = {key: [] for key in height}
    reasons: dict[str, str] = {}
    for name, others in aliases.items():
        lowest = min(others, key=lambda other: height[_key(layout.places[other])])
        place = layout.places[lowest]
        members[_key(place)].append(name)
        homes = {_key(layout.places[other]) for other in others}
        tied = next((other for other in others if other != lowest), lowest)
        reasons[name] = f"{place.reason}; tie with {tied}" if len(homes) > 1 else place.reason
    used = {stack for (stack, _), names in members.items() if names}
    # a tower that is tied to a lower one as a whole has no groups, and takes no levels
    kept = [key for key in sorted(height, key=lambda k: height[k]) if key[1] is None or key[0] in used]
    levels = {value: i for i, value in enumerate(dict.fromkeys(height[key][:1] for key in kept))}
    groups = []
    for key in kept:
        stack, index = key
        name = stack if index is None else f"{stack}.block[{index}]" if stack else f"block[{index}]"
        own = "" if stack in ("embeddings", "head") and index is None else stack.removesuffix(".connector")
        groups.append(LayerGroup(name, own, tuple(members[key]), levels[height[key][:1]]))
    return tuple(groups), reasons


def _key(place: Place) -> tuple[str, int | None]:
    return place.stack, place.index


def _heights(layout: Layout) -> dict[tuple[str, int | None], tuple[int, int]]:
    """Height of each group: ``(level, order within the level)``; parallel stacks are aligned at their tops."""
    sizes: dict[str, int] = {}
    for place in layout.places.values():
        if place.index is not None:
            sizes[place.stack] = max(sizes.get(place.stack, 0), place.index + 1)
    height: dict[tuple[str, int | None], tuple[int, int]] = {("embeddings", None): (0, 0)}
    level = 1
    for tier in layout.tiers:
        tallest = max(sizes.get(name, 1) for name in tier)
        for order, name in enumerate(tier):
            if name not in sizes:
                height[name, None] = (level + tallest - 1, order)
                continue
            for index in range(sizes[name]):
                height[name, index] = (level + tallest - sizes[name] + index, order)
        level += tallest
    height["head", None] = (level, 0)
    return height
