"""Models on several processes: wrappers taken off, refused or kept in step with the phases; ranks that must agree."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DataParallel, DistributedDataParallel

from ._agreement import agree, told
from ._reducer import active_ddp, can_rebuild, rebuild, reduced_tensors, refuse_options
from ._sharded import Sharded, is_sharded, reshard
from .errors import EnvironmentRefused, StructureError, UnfreezeError
from .freezing import Follower

__all__ = ["DEEPSPEED", "ReducerSync", "of_rank_0", "process_followers", "refuse_wrappers", "unwrap"]

DEEPSPEED = (
    "DeepSpeed keeps parameters, gradients and optimizer state in flat buffers that do not follow requires_grad. "
    "Train with DDP or FSDP2 (accelerate config), or without UnfreezeCallback."
)


def unwrap(model: nn.Module) -> nn.Module:
    """Return the model inside DDP, DataParallel and torch.compile; one under FSDP2 gets its sharded parameters back."""
    *_, inner = _layers(model)
    reshard(inner)
    return inner


def _layers(model: nn.Module) -> Iterator[nn.Module]:
    """Yield the model and what it wraps, from the outside in."""
    inner: Any = model
    while isinstance(inner, nn.Module):
        yield inner
        wraps = isinstance(inner, (DataParallel, DistributedDataParallel))
        inner = inner.module if wraps else getattr(inner, "_orig_mod", None)


def refuse_wrappers(model: Any) -> None:
    """Raise for DeepSpeed engines, FSDP1, weights that were offloaded, and what is no model.

    Raises:
        EnvironmentRefused: Says why, and what to use.
        StructureError: It is no module.
    """
    if not isinstance(model, nn.Module):
        raise StructureError(f"a model is a torch.nn.Module, not {type(model).__name__}. Give the model first.")
    for module in model.modules():
        kind = type(module)
        if kind.__module__.startswith("deepspeed"):
            raise EnvironmentRefused(DEEPSPEED)
        if kind.__name__ == "FullyShardedDataParallel":
            raise EnvironmentRefused(
                "FSDP1 flattens frozen and trainable parameters into one, and its wrappers hide the blocks. "
                "Use FSDP2: fsdp_version: 2 in the file for accelerate launch, or fsdp_config={'fsdp_version': 2}."
            )
    for name, parameter in model.named_parameters():
        if parameter.is_meta:
            raise EnvironmentRefused(
                f"{name} is on the meta device: device_map has offloaded it to the CPU or the disk, where it cannot "
                "train. Load the model without device_map, or with one that keeps every layer on an accelerator."
            )


def process_followers(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    opened: Iterable[nn.Parameter],
    said: Callable[[], Sequence[str]],
) -> list[Follower]:
    """Return what follows the phases where a model runs on several processes; an empty list where it does not.

    Args:
        model: The model, wrapped or not.
        optimizer: The torch optimizer.
        opened: Every parameter that some phase trains.
        said: What this rank is about to do, for the others to compare.
    """
    if not (dist.is_available() and dist.is_initialized()):
        return []
    root = unwrap(model)
    if is_sharded(root):
        return [Agreement(said), Sharded(root, optimizer)]
    wrapper = next((layer for layer in _layers(model) if isinstance(layer, DistributedDataParallel)), None)
    return [ReducerSync(root, wrapper, opened, said)]


def of_rank_0(metrics: Mapping[str, Any]) -> dict[str, Any]:
    """Return the metrics of rank 0, on every rank: what is decided from them must be decided alike.

    Raises:
        UnfreezeError: The metrics have no names.
    """
    if not isinstance(metrics, Mapping):
        raise UnfreezeError(f"metrics are a dict such as {{'eval_loss': 0.5}}, not {metrics!r}.")
    plain = {name: _plain(value) for name, value in metrics.items()}
    if not (dist.is_available() and dist.is_initialized()):
        return plain
    numbers = {name: value for name, value in plain.items() if isinstance(value, (int, float))}
    result: dict[str, Any] = json.loads(told(_world(), json.dumps(numbers)))
    return result


def _plain(value: Any) -> Any:
    """Return the one number of a tensor or of NumPy's scalars as Python's own; anything else as it is."""
    try:
        return value.item()
    except (AttributeError, RuntimeError, ValueError):  # the last two for more than one number
        return value


class Agreement:
    """Compares transitions on all ranks, where nothing else has to follow them."""

    def __init__(self, said: Callable[[], Sequence[str]]) -> None:
        self._said = said

    def update(self) -> None:
        """Raise on every rank if one says something else."""
        agree(_world(), self._said())

    def close(self) -> None:
        """Nothing is left behind."""


class ReducerSync:
    """Keeps DDP's reducer to the parameters that train, so that no other gradient is sent or waited for.

    Args:
        root: The model inside the wrapper.
        ddp: The wrapper; without one it is looked for in the first training forward.
        opened: Every parameter that some phase trains.
        said: What this rank is about to do, for the others to compare.

    Raises:
        EnvironmentRefused: The model was frozen before it was wrapped, or DDP is used in a way that cannot follow.
    """

    def __init__(
        self,
        root: nn.Module,
        ddp: DistributedDataParallel | None,
        opened: Iterable[nn.Parameter],
        said: Callable[[], Sequence[str]],
    ) -> None:
        self._root = root
        self._said = said
        self._expected = {id(p) for p in root.parameters() if p.requires_grad} | {id(p) for p in opened}
        self._rebuilds = False
        self._ddp: DistributedDataParallel | None = None
        self._search: Any = None
        if ddp is not None:
            self._take(ddp)
        else:
            self._search = root.register_forward_pre_hook(self._find)

    def update(self) -> None:
        """Compare with the other ranks, then give DDP a reducer over what trains now."""
        if self._ddp is None:
            return
        _refuse_absent(self._ddp)
        agree(self._ddp.process_group, self._said())
        if self._rebuilds:
            rebuild(self._ddp)

    def close(self) -> None:
        """Let DDP reduce everything that requires grad again."""
        if self._search is not None:
            self._search.remove()
        if self._ddp is not None and self._rebuilds and dist.is_initialized():
            rebuild(self._ddp)

    def _find(self, module: nn.Module, args: Any) -> None:
        """Take the wrapper whose forward this is, if there is one; by now the phase has begun."""
        if not (torch.is_grad_enabled() and module.training):
            return
        self._search.remove()
        ddp = active_ddp()
        if ddp is not None:
            self._take(ddp)
            self.update()
        elif dist.get_world_size() > 1 and not any(hasattr(p, "device_mesh") for p in module.parameters()):
            _warn_alone()

    def _take(self, ddp: DistributedDataParallel) -> None:
        refuse_options(ddp)
        names = {name for name, p in ddp.module.named_parameters() if id(p) in self._expected}
        needed, held = len(names - ddp.parameters_to_ignore), reduced_tensors(ddp)
        if held is not None and held < needed:
            raise EnvironmentRefused(
                f"DDP reduces {held} of the {needed} parameters that will train: the others were frozen when the model "
                "was wrapped, so that their gradients would differ between ranks. Wrap it before anything is frozen "
                "(before the first step()), and close() an Unfreezer before making another."
            )
        self._ddp = ddp
        self._rebuilds = can_rebuild()
        if not self._rebuilds:
            _fall_back(ddp)


def _warn_alone() -> None:
    """Tell that the ranks have nothing to do with each other: Accelerate joins processes on CPUs only if it is told."""
    warnings.warn(
        f"{dist.get_world_size()} processes, and no DDP or FSDP2 around the model: unless you reduce gradients, "
        "each trains alone and writes the same files. On CPUs write --use_cpu (Trainer), Accelerator(cpu=True), or "
        "ACCELERATE_USE_CPU=true before the command.",
        UserWarning,
        stacklevel=2,
    )


def _fall_back(ddp: DistributedDataParallel) -> None:
    """Settle for a reducer that knows all parameters and looks for those without a gradient, where DDP was made so."""
    release = f"torch {torch.__version__} has no reducer that hf_unfreeze can rebuild"
    if not ddp.find_unused_parameters or ddp.static_graph:
        raise EnvironmentRefused(
            f"{release}. Write ddp_find_unused_parameters=True (find_unused_parameters=True in DDP), without a static "
            "graph and with gradient_checkpointing_kwargs={'use_reentrant': False}; or use torch 2.6 to 2.13."
        )
    warnings.warn(
        f"{release}. Training is right, but the gradients of frozen parameters are sent too, as zeros.",
        UserWarning,
        stacklevel=2,
    )


def _refuse_absent(ddp: DistributedDataParallel) -> None:
    """Raise inside ``join`` if a rank has run out of data: what it does in our place would not change phase."""
    if not ddp._join_config.enable:
        return
    present = torch.ones(1, device=ddp.join_device)
    dist.all_reduce(present, group=ddp.process_group)  # a rank that has run out counts with a 0 just here
    if int(present.item()) < dist.get_world_size(ddp.process_group):
        raise EnvironmentRefused(
            "a phase begins after a rank has run out of data, and DDP.join cannot follow it there. Let the last phase "
            "begin before the shortest rank ends, or give every rank the same number of batches."
        )


def _world() -> dist.ProcessGroup:
    group = dist.group.WORLD
    if group is None:
        raise EnvironmentRefused("the process group is gone. Call init_process_group before the model is trained.")
    return group
