"""DDP's reducer, built anew in place over exactly the parameters that train; the only file that uses DDP's privates."""

from __future__ import annotations

from typing import Any

import torch
from torch.nn.parallel import DistributedDataParallel

from .errors import EnvironmentRefused

__all__ = ["active_ddp", "can_rebuild", "rebuild", "reduced_tensors", "refuse_options"]

_dist: Any = torch.distributed  # a build of torch without it still imports this file
_PRIVATE = ("_build_params_for_reducer", "_build_debug_param_to_name_mapping", "_ddp_init_helper")
_HOOK_STATE = ("error_dict", "p_memory_dict", "q_memory_dict")  # of PowerSGD, keyed by the number of the bucket
_BUILTIN = "BuiltinCommHookType."
# Options of DDP that keep their own list of parameters, made when the model was wrapped.
_REFUSED = {
    "mixed_precision": "mixed_precision, which casts by hooks of its own. Write mixed_precision in Accelerate's config",
    "_delay_all_reduce_params": "delay_all_reduce_named_params, which gives frozen parameters zeros. Leave it out",
}


def refuse_options(ddp: DistributedDataParallel) -> None:
    """Raise for options of DDP under which freezing goes wrong.

    Raises:
        EnvironmentRefused: Says which, and what to write instead.
    """
    for attribute, reason in _REFUSED.items():
        if getattr(ddp, attribute, None):
            raise EnvironmentRefused(f"the model is wrapped in DDP with {reason}.")


def active_ddp() -> DistributedDataParallel | None:
    """Return the wrapper whose forward is running."""
    return getattr(DistributedDataParallel, "_active_ddp_module", None)


def can_rebuild() -> bool:
    """Tell whether this release of torch has what a rebuild takes."""
    return all(hasattr(DistributedDataParallel, name) for name in _PRIVATE)


def reduced_tensors(ddp: DistributedDataParallel) -> int | None:
    """Return how many parameters the reducer holds, or None where it cannot be told."""
    data = _logging_data(ddp)
    return int(data["num_parameter_tensors"]) if "num_parameter_tensors" in data else None


def rebuild(ddp: DistributedDataParallel) -> None:
    """Give DDP a new reducer over the parameters that require grad now; hooks and options are kept.

    It is what unpickling a DDP object does, with any process group. No rank waits for another here.
    """
    private: Any = ddp
    builtin = str(_logging_data(ddp).get("comm_hook", "")).removeprefix(_BUILTIN)
    parameters, sparse = private._build_params_for_reducer()
    names = private._build_debug_param_to_name_mapping(parameters)
    private.reducer = private.logger = None  # the old buckets go before the new ones come
    private._ddp_init_helper(parameters, sparse, names, private.static_graph)
    if private.static_graph:
        private.reducer._set_static_graph()
        private.logger._set_static_graph()
        private._static_graph_delay_allreduce_enqueued = False  # else the first gradients are not reduced at all
    for hook, state in private._comm_hooks:
        _start_hook_state(state)
        private.logger._set_comm_hook_name(hook.__qualname__)
        _dist._register_comm_hook(private.reducer, state, hook)
    members = _dist.BuiltinCommHookType.__members__
    if not private._comm_hooks and builtin in members:
        private.logger._set_comm_hook_name(_BUILTIN + builtin)
        _dist._register_builtin_comm_hook(private.reducer, members[builtin])


def _start_hook_state(state: Any) -> None:
    """Let PowerSGD begin again: what it kept is per bucket, and these are others now, and once more after a step."""
    if not hasattr(state, "start_powerSGD_iter"):
        return
    for name in _HOOK_STATE:
        getattr(state, name).clear()
    state.start_powerSGD_iter = max(state.start_powerSGD_iter, state.iter + 2)


def _logging_data(ddp: DistributedDataParallel) -> dict[str, Any]:
    read = getattr(ddp, "_get_ddp_logging_data", None)
    return dict(read()) if read is not None else {}
