"""Whether a model gives the same bits when its frozen prefix is passed over, and why it would not."""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import nn

from ._keys import Batch

__all__ = [
    "Attributes",
    "Buffers",
    "detached",
    "gradient_source",
    "has_loss",
    "same_outputs",
    "scales_by_length",
    "unfit",
]

AUGMENTS = ("mask_time_prob", "mask_feature_prob")


def unfit(model: nn.Module) -> str:
    """Return why no part of this model can be cached, as far as can be told without a forward."""
    if any(type(module).__name__ == "FullyShardedDataParallel" for module in model.modules()) or any(
        hasattr(parameter, "device_mesh") for parameter in model.parameters()
    ):
        return "FSDP gathers weights on all ranks together, and ranks would compute different examples"
    alone = not (torch.distributed.is_available() and torch.distributed.is_initialized())
    if torch.cuda.device_count() > 1 and alone:
        return "DataParallel copies the model for each batch. Launch one process for each GPU"
    config = getattr(model, "config", None)
    if getattr(config, "apply_spec_augment", False) and any(getattr(config, name, 0) for name in AUGMENTS):
        return "SpecAugment changes the inputs at random. Set config.apply_spec_augment = False"
    if scales_by_length(model, "dynamic"):
        return "dynamic rotary positions depend on the longest text so far"
    if any(getattr(module, "attention_type", "") == "block_sparse" for module in model.modules()):
        return "block-sparse attention (BigBird) becomes full attention for good where a text is short"
    return ""


def scales_by_length(model: nn.Module, kind: str) -> bool:
    """Whether a config in a model asks for this kind of rotary positions, which go by the length of the batch."""
    configs = {id(config): config for module in model.modules() if (config := getattr(module, "config", None))}
    names = ("rope_scaling", "rope_parameters")
    return any(kind in repr(getattr(config, name, None)) for config in configs.values() for name in names)


class Buffers:
    """The buffers of a model as they are now (running statistics, counters, queues), to be put back.

    Args:
        model: The model.
        passed_over: Modules whose buffers nobody reads while they are passed over.
    """

    def __init__(self, model: nn.Module, passed_over: Collection[nn.Module]) -> None:
        modules = list(model.modules())
        self._kept = [(m._buffers, n, b, b.clone()) for m in modules for n, b in m._buffers.items() if b is not None]
        self._read = [module._buffers for module in modules if module not in passed_over]

    def restore(self) -> None:
        """Put back what they were, and the tensors that held it."""
        with torch.no_grad():
            for owner, name, buffer, value in self._kept:
                owner[name] = buffer.copy_(value)

    def read(self) -> list[torch.Tensor]:
        """Return copies of what those have become that are read."""
        return [b.detach().clone() for owner in self._read for b in owner.values() if b is not None]


class Attributes:
    """What modules keep beside their parameters and buffers, as it is now."""

    def __init__(self, modules: Iterable[nn.Module]) -> None:
        self._kept = [(vars(module), {**vars(module)}) for module in modules]

    def restore(self) -> None:
        """Put back what they kept."""
        for now, before in self._kept:
            now.clear()
            now.update(before)

    @contextlib.contextmanager
    def unreadable(self) -> Iterator[None]:
        """Put NaN or None for a while where they have kept other tensors since, so that whoever reads them shows it."""
        new = [
            (now, name, value)
            for now, before in self._kept
            for name, value in now.items()
            if isinstance(value, torch.Tensor) and before.get(name) is not value
        ]
        for owner, name, value in new:
            owner[name] = torch.full_like(value, torch.nan) if value.is_floating_point() else None
        try:
            yield
        finally:
            for owner, name, value in new:
                owner[name] = value


def gradient_source(hidden: torch.Tensor, model: nn.Module) -> str:
    """Return why a gradient flows below the boundary, or an empty string."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    waiting, seen = [hidden.grad_fn], set()
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        name = names.get(id(getattr(node, "variable", None)))
        if name is not None:
            return f"{name} is trainable and runs below the frozen blocks"
        waiting += [following for following, _ in node.next_functions]
    return ""


def detached(output: Any) -> Any:
    """Return the tensors of an output without their graph, so that it can be freed."""
    if isinstance(output, torch.Tensor):
        return output.detach()
    if isinstance(output, Mapping):
        return {key: detached(value) for key, value in output.items()}
    if isinstance(output, (list, tuple)):
        return [detached(value) for value in output]
    return None


def has_loss(output: Any) -> bool:
    """Whether an output has a number of its own, so that what lies in its padding is nothing that trains."""
    values = output.values() if isinstance(output, Mapping) else output if isinstance(output, (list, tuple)) else ()
    return any(isinstance(value, torch.Tensor) and value.dim() == 0 for value in values)


def same_outputs(one: Any, other: Any, batch: Batch | None) -> bool:
    """Whether two outputs hold the same bits, but for what lies in the padding of a batch, where one is given."""
    if isinstance(one, torch.Tensor):
        if not isinstance(other, torch.Tensor) or one.shape != other.shape or one.dtype != other.dtype:
            return False
        equal = (one == other) | ((one != one) & (other != other))
        if batch is not None and batch.padded and one.shape[:2] == (batch.size, batch.tokens):
            places = torch.arange(batch.tokens, device=one.device)
            lengths = torch.tensor(batch.lengths, device=one.device)
            equal = equal[places < lengths[:, None]]
        return bool(equal.all())
    if isinstance(one, Mapping):
        return list(one) == list(other) and all(same_outputs(one[key], other[key], batch) for key in one)
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(same_outputs, one, other, [batch] * len(one)))
    return True  # None, numbers, and objects such as a key–value cache, of which training makes no use
