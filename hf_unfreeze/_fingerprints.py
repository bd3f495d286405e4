"""What decides an activation besides the example: weights, code, precision, and what is switched on."""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from ._keys import fingerprint
from ._places import Place
from ._prefix import Prefix
from .errors import UnfreezeError

__all__ = ["Fingerprints"]


class Fingerprints:
    """Keeps a fingerprint of the stem and of each block, and takes it anew only where they have changed.

    Args:
        prefix: The stack.
        prefix_dtype: What the blocks compute in; None: as the model.
    """

    def __init__(self, prefix: Prefix, prefix_dtype: str | None) -> None:
        self._prefix, self._prefix_dtype = prefix, prefix_dtype
        self._parts, self._config = prefix.parts(), prefix.config()
        self._text = self._told()
        self._samples: list[Any] = [None] * len(self._parts)
        self._stamps: list[Any] = [None] * len(self._parts)
        self._digests = [b""] * len(self._parts)
        self._prints: dict[tuple[int, str], bytes] = {}
        modules: list[Any] = [module for block in prefix.blocks for module in block.modules()]
        self._adapters = [module for module in modules if hasattr(module, "disable_adapters")]

    def forget_trained(self) -> None:
        """Read the weights again of what trains now, once it is frozen: fused optimizers do not count their changes."""
        for index, part in enumerate(self._parts):
            if any(tensor.requires_grad for tensor in _tensors(part)):
                self._stamps[index] = None

    def look_again(self) -> None:
        """Read anew what may have changed without a trace: values written through ``.data``, what the config says."""
        self._parts, self._config, text = self._prefix.parts(), self._prefix.config(), self._told()
        samples = [[_sample(tensor) for tensor in _tensors(part)] for part in self._parts]
        for index, sample in enumerate(samples):
            if sample != self._samples[index]:
                self._stamps[index] = None
        if text != self._text:
            self._prints.clear()
        self._samples, self._text = samples, text

    def outdated(self) -> bool:
        """Whether the config says something else than when it was looked at."""
        return self._prefix.config() != self._config

    def _told(self) -> str:
        library = getattr(sys.modules.get("transformers"), "__version__", None)
        return f"{self._prefix.text()}\n{torch.__version__} {library} {self._prefix_dtype}"

    def of(self, boundary: int, salt: str) -> bytes:
        """Return 16 bytes of all that decides an activation but the example; weights are read only after a change.

        Raises:
            UnfreezeError: Something else than the schedule has opened what is passed over.
        """
        for index, part in enumerate(self._parts[: boundary + 1]):
            stamp = [(tensor._version, tensor.data_ptr(), tensor.requires_grad) for tensor in _tensors(part)]
            if stamp != self._stamps[index]:
                named = [(place.name, place.owner.get(place.key)) for place in part]
                if opened := [name for name, tensor in named if tensor is not None and tensor.requires_grad]:
                    raise UnfreezeError(
                        f"{opened[0]} of the frozen blocks was made trainable by something else than the schedule, and "
                        "the cache would pass it over. Leave requires_grad alone, and open it in the schedule."
                    )
                found = ((name, tensor) for name, tensor in named if tensor is not None)
                self._stamps[index], self._digests[index] = stamp, fingerprint(found)
                self._prints.clear()
        if (boundary, salt) not in self._prints:
            text = f"{self._text}\n{salt}\n".encode() + b"".join(self._digests[: boundary + 1])
            self._prints[boundary, salt] = hashlib.blake2b(text, digest_size=16).digest()
        return self._prints[boundary, salt]

    def ambient(self) -> str:
        """What decides the bits of an activation outside of the weights: device, autocast, precision, adapters."""
        kind = self._prefix.device.type
        autocast = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
        return f" {kind} {autocast} {_precision()}" + self._adapted()

    @property
    def coarse(self) -> bool:
        """Whether the blocks round to less than the type of their activations tells."""
        kind = self._prefix.device.type
        own = getattr(getattr(torch.backends, kind, None), "matmul", None)
        products = own or getattr(torch.backends.mkldnn, "matmul", None)
        rounded = getattr(products, "fp32_precision", "") in ("tf32", "bf16")  # asked of torch 2.9 or later
        return rounded or self._prefix_dtype is not None or torch.is_autocast_enabled(kind)

    def _adapted(self) -> str:
        """What PEFT computes with: a reference model is the same one with its adapters switched off."""
        states = [
            (m.disable_adapters, *m.active_adapters, *m.merged_adapters, str(getattr(m, "scaling", "")))
            for m in self._adapters
        ]
        return f" {list(dict.fromkeys(states))}" if states else ""


def _tensors(part: Sequence[Place]) -> list[torch.Tensor]:
    """What lies there now."""
    return [tensor for place in part if (tensor := place.owner.get(place.key)) is not None]


def _sample(tensor: torch.Tensor) -> list[Any]:
    """Eight values of a plain tensor."""
    values = tensor.detach().reshape(-1) if type(tensor) in (torch.Tensor, nn.Parameter) else torch.empty(0)
    return list(values[:: max(values.numel() // 8, 1)].tolist())


def _precision() -> str:
    """How float32 products are rounded. The old question fails once one of the settings of torch 2.9 was written."""
    backends: Any = torch.backends
    if not hasattr(backends, "fp32_precision"):
        return f"{torch.get_float32_matmul_precision()} {backends.cudnn.allow_tf32}"
    settings = (backends.cuda.matmul, backends.cudnn.conv, backends.mkldnn.matmul, backends.mkldnn.conv)
    return " ".join(setting.fp32_precision for setting in settings)
