"""Train pretrained Hugging Face models from the top down, by a schedule you can read."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .architectures import Architecture, list_architectures, register_architecture
    from .cache import FrozenPrefixCache
    from .callback import UnfreezeArguments, UnfreezeCallback
    from .errors import UnfreezeError
    from .freezing import set_trainable, trainable_summary
    from .groups import LayerGroup, layer_groups
    from .optim import param_groups_layer_decay
    from .schedule import (
        Phase,
        Schedule,
        all_at_once,
        auto,
        auto_rates,
        freeze_converged,
        freeze_out,
        gradual,
        learn_rates,
        linear_probe,
        parse_schedule,
        plateau,
        rotate,
        top,
    )
    from .unfreezer import Unfreezer

__version__ = "0.1.0"

__all__ = [
    "Architecture",
    "FrozenPrefixCache",
    "LayerGroup",
    "Phase",
    "Schedule",
    "UnfreezeArguments",
    "UnfreezeCallback",
    "UnfreezeError",
    "Unfreezer",
    "all_at_once",
    "auto",
    "auto_rates",
    "freeze_converged",
    "freeze_out",
    "gradual",
    "layer_groups",
    "learn_rates",
    "linear_probe",
    "list_architectures",
    "param_groups_layer_decay",
    "parse_schedule",
    "plateau",
    "register_architecture",
    "rotate",
    "set_trainable",
    "top",
    "trainable_summary",
]

# Loaded on first use: `import hf_unfreeze` costs neither transformers nor torch.
_HOME = {
    "Architecture": "architectures",
    "FrozenPrefixCache": "cache",
    "LayerGroup": "groups",
    "Phase": "schedule",
    "Schedule": "schedule",
    "UnfreezeArguments": "callback",
    "UnfreezeCallback": "callback",
    "UnfreezeError": "errors",
    "Unfreezer": "unfreezer",
    "all_at_once": "schedule",
    "auto": "schedule",
    "auto_rates": "schedule",
    "freeze_converged": "schedule",
    "freeze_out": "schedule",
    "gradual": "schedule",
    "layer_groups": "groups",
    "learn_rates": "schedule",
    "linear_probe": "schedule",
    "list_architectures": "architectures",
    "param_groups_layer_decay": "optim",
    "parse_schedule": "schedule",
    "plateau": "schedule",
    "register_architecture": "architectures",
    "rotate": "schedule",
    "set_trainable": "freezing",
    "top": "schedule",
    "trainable_summary": "freezing",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_HOME[name]}", __name__), name)


def __dir__() -> list[str]:
    return [*globals(), *__all__]
