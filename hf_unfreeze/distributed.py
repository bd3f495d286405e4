"""Wrappers around a model: taking them off, and refusing those under which freezing would go wrong."""

from __future__ import annotations

from typing import Any

from torch import nn

from .errors import EnvironmentRefused

__all__ = ["DEEPSPEED", "refuse_wrappers", "unwrap"]

DEEPSPEED = (
    "DeepSpeed keeps parameters, gradients and optimizer state in flat buffers that do not follow requires_grad. "
    "Train with DDP or FSDP2 (accelerate config), or without UnfreezeCallback."
)


def unwrap(model: nn.Module) -> nn.Module:
    """Return the model inside DDP, DataParallel and torch.compile."""
    while True:
        inner = getattr(model, "_orig_mod", None)
        if inner is None and type(model).__name__ in ("DistributedDataParallel", "DataParallel"):
            inner = model.module
        if not isinstance(inner, nn.Module):
            return model
        model = inner


def refuse_wrappers(model: Any) -> None:
    """Raise for DeepSpeed engines and for FSDP1 without ``use_orig_params``.

    Raises:
        EnvironmentRefused: Says why, and what to use.
    """
    for module in model.modules():
        kind = type(module)
        if kind.__module__.startswith("deepspeed"):
            raise EnvironmentRefused(DEEPSPEED)
        if kind.__name__ == "FullyShardedDataParallel" and not getattr(module, "_use_orig_params", False):
            raise EnvironmentRefused(
                "FSDP1 without use_orig_params=True flattens frozen and trainable parameters into one. "
                "Write fsdp_config={'use_orig_params': True}, or use FSDP2 (fsdp_version: 2)."
            )
