"""A learning rate per layer group, inside the optimizer step; the optimizer's own groups are never touched."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from ._parts import GroupParts
from .errors import EnvironmentRefused, OptimizerError, UnfreezeError
from .groups import LayerGroup, layer_groups
from .schedule import Selector

__all__ = [
    "DropState",
    "GroupRates",
    "OffloadState",
    "decay_multipliers",
    "group_weight_decay",
    "param_groups_layer_decay",
    "raw_optimizer",
    "unsuitable",
]

_REFUSED = {
    "ScheduleFree": "keeps one averaging state for a whole param group",
    "Prodigy": "estimates one step size for a whole param group",
    "DAdapt": "estimates one step size for a whole param group",
    "LayerWiseDummy": "updates each layer inside the backward pass, so there is no step to act in",
    "Lomo": "updates parameters inside the backward pass, so there is no step to act in",
    "FusedAdam": "counts the steps of a whole param group at once",
    "FusedLAMB": "counts the steps of a whole param group at once",
    "GrokAdamW": "clips each param group as one, and decays by the position of a parameter among those with a gradient",
    "LBFGS": "keeps one direction for all parameters, and goes on moving those that are frozen",
    "DeepSpeed": "is DeepSpeed's, whose flat buffers do not follow requires_grad",
}


def raw_optimizer(optimizer: Any) -> torch.optim.Optimizer:
    """Return the torch optimizer inside wrappers such as Accelerate's."""
    while not type(optimizer).__module__.startswith("torch.optim") and isinstance(
        inner := getattr(optimizer, "optimizer", None), torch.optim.Optimizer
    ):
        optimizer = inner
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise OptimizerError(
            f"{type(optimizer).__name__} is no torch.optim.Optimizer. Pass the one that trains the model."
        )
    return optimizer


def unsuitable(optimizer: torch.optim.Optimizer) -> str:
    """Return why an optimizer cannot follow parameters that open and close, or an empty string."""
    names = [cls.__name__.lower() for cls in type(optimizer).__mro__]
    return next((why for part, why in _REFUSED.items() if any(part.lower() in name for name in names)), "")


def decay_multipliers(groups: Sequence[LayerGroup], layer_decay: float) -> dict[str, float]:
    """Return ``layer_decay ** d`` per group, d levels below the head: 1 for the head, least for the embeddings.

    Example:
        >>> decay_multipliers(layer_groups(bert), 0.5)
        {'embeddings': 0.125, 'block[0]': 0.25, 'block[1]': 0.5, 'head': 1.0}

    Args:
        groups: ``layer_groups(model)``, bottom → top.
        layer_decay: Factor from each level to the one below it.

    Raises:
        UnfreezeError: ``layer_decay`` is not in (0, 1].

    Reference: ULMFiT, arXiv 1801.06146 (discriminative rates); BEiT, arXiv 2106.08254 (this form).
    """
    if isinstance(layer_decay, bool) or not isinstance(layer_decay, (int, float)) or not 0 < layer_decay <= 1:
        raise UnfreezeError(f"layer_decay={layer_decay!r} lies outside (0, 1]. Write 1.0 for none, or 0.65 to 0.95.")
    levels = {g.name: i if g.level is None else g.level for i, g in enumerate(groups)}
    ranks = {level: rank for rank, level in enumerate(sorted(set(levels.values()), reverse=True))}
    return {name: layer_decay ** ranks[level] for name, level in levels.items()}


class GroupRates:
    """Gives each layer group its multiple of the learning rate for the length of ``optimizer.step()``.

    A step pre-hook swaps in one param group per (param group, layer group), a post-hook puts the optimizer's own back
    with what the step has written into the parts, as a count of steps; schedulers, checkpoints and the layout of the
    state never see the difference.

    Args:
        optimizer: A torch optimizer whose state is kept per parameter.
        group_of: Layer group name of each parameter, by ``id``.
        multipliers: Returns the multiplier of each layer group for the step about to be taken.
        weight_decay: Weight decay of some layer groups, instead of their param group's; a param group without weight
            decay (biases and norms) stays without.

    Raises:
        OptimizerError: Weight decay is asked for, and no param group has any; in a step, the optimizer writes to its
            param groups what belongs to them as a whole.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        group_of: dict[int, str],
        multipliers: Callable[[], dict[str, float]],
        weight_decay: Mapping[str, float] | None = None,
    ) -> None:
        if any((weight_decay or {}).values()) and not any(g.get("weight_decay") for g in optimizer.param_groups):
            raise OptimizerError(
                "group_weight_decay changes the weight decay of parameters that have one, and in this optimizer none "
                "has. Set weight_decay=0.01 in TrainingArguments; to have none elsewhere write 'all=0, head=0.1'."
            )
        self._optimizer = optimizer
        self._group_of = group_of
        self._multipliers = multipliers
        self._decay = weight_decay or {}
        self._own: list[dict[str, Any]] | None = None
        self._parts: list[GroupParts] = []
        self._rates: list[Any] = []
        self._used: dict[str, float] = {}
        self._hooks = [
            optimizer.register_step_pre_hook(self._before),
            optimizer.register_step_post_hook(self._after),
        ]

    def _before(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        self._restore()  # a step that raised never reached its post-hook
        self._parts = []
        self._used = self._multipliers()
        self._rates = [group.get("lr") for group in optimizer.param_groups]
        if not self._decay and all(multiplier == 1.0 for multiplier in self._used.values()):
            return
        if type(optimizer).__name__ == "ZeroRedundancyOptimizer":
            raise OptimizerError(
                "ZeroRedundancyOptimizer copies its param groups one by one to an optimizer inside, so there can be no "
                "more of them in a step. Leave layer_decay and what else gives groups rates out, or shard with FSDP2."
            )
        self._parts = [GroupParts(group, self._split(group)) for group in optimizer.param_groups]
        self._own = list(optimizer.param_groups)
        optimizer.param_groups[:] = [part for parts in self._parts for part in parts.parts]  # Lookahead shares the list

    def _split(self, group: dict[str, Any]) -> list[dict[str, Any]]:
        if group.get("lr") is None:
            raise OptimizerError(
                "layer_decay, block_warmup and freeze_out need a learning rate, and this optimizer derives its own "
                "(Adafactor with relative_step). Write relative_step=False with lr=…, or leave both out."
            )
        parts: dict[str, list[nn.Parameter]] = {}  # by name, not by rate: bitsandbytes goes by positions that stay
        for parameter in group["params"]:
            parts.setdefault(self._group_of.get(id(parameter), ""), []).append(parameter)
        return [{"params": parts[name], **self._settings(group, name)} for name in parts]

    def _settings(self, group: dict[str, Any], name: str) -> dict[str, float]:
        settings = {"lr": group["lr"] * self._used.get(name, 1.0)}
        if group.get("weight_decay"):
            settings["weight_decay"] = self._decay.get(name, group["weight_decay"])
        return settings

    def _after(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        self._restore()
        for parts in self._parts:
            parts.write_back(type(optimizer).__name__)
        self._parts = []

    def _restore(self) -> None:
        if self._own is not None:
            self._optimizer.param_groups[:] = self._own
            self._own = None

    def update(self) -> None:
        """Nothing to do at a change of flags: the multipliers are asked for at each step."""

    def rates(self) -> dict[str, float]:
        """Return the learning rate that each layer group got in the last step; 0.0 for a frozen one."""
        rates: dict[str, float] = {}
        for group, rate in zip(self._optimizer.param_groups, self._rates, strict=False):
            for parameter in group["params"]:
                name = self._group_of.get(id(parameter))
                if name is not None and rate is not None and (parameter.requires_grad or name not in rates):
                    rates[name] = float(rate) * self._used.get(name, 1.0) if parameter.requires_grad else 0.0
        return rates

    def of_parameters(self) -> dict[int, float]:
        """Return the learning rate that each parameter got in the last step, by ``id``."""
        return {
            id(parameter): float(rate) * self._used.get(self._group_of.get(id(parameter), ""), 1.0)
            for group, rate in zip(self._optimizer.param_groups, self._rates, strict=False)
            if rate is not None
            for parameter in group["params"]
        }

    def close(self) -> None:
        """Take the hooks away."""
        self._restore()
        for hook in self._hooks:
            hook.remove()


class DropState:
    """Forgets the optimizer's state of parameters that were open and are frozen again; opened later they start anew."""

    def __init__(self, optimizer: torch.optim.Optimizer, parameters: Iterable[nn.Parameter]) -> None:
        if isinstance(optimizer, torch.optim.Adagrad):
            raise OptimizerError("Adagrad allocates all its state at once and cannot drop any. Write drop_state=False.")
        self._optimizer = optimizer
        self._parameters = list(parameters)

    def update(self) -> None:
        """Forget what is frozen now."""
        for parameter in self._parameters:
            if not parameter.requires_grad:
                self._optimizer.state.pop(parameter, None)

    def close(self) -> None:
        """Nothing to restore: what was dropped belonged to frozen weights."""


class OffloadState:
    """Keeps the optimizer's state of frozen parameters in main memory; it is back on its device before they train."""

    def __init__(self, optimizer: torch.optim.Optimizer, parameters: Iterable[nn.Parameter]) -> None:
        self._optimizer = optimizer
        self._parameters = list(parameters)
        if any(hasattr(parameter, "device_mesh") for parameter in self._parameters):
            raise EnvironmentRefused(
                "offload_state is not available for sharded parameters (FSDP2). Write offload_state=False."
            )
        self._devices: dict[tuple[nn.Parameter, str], torch.device] = {}  # of what is away

    def update(self) -> None:
        """Move what is frozen now to main memory, and what has opened back."""
        for parameter in sorted(self._parameters, key=lambda p: p.requires_grad):  # first room, then what needs it
            for name, value in self._optimizer.state.get(parameter, {}).items():
                if not isinstance(value, torch.Tensor):
                    continue
                if parameter.requires_grad:
                    device = self._devices.pop((parameter, name), value.device)
                    self._optimizer.state[parameter][name] = value.to(device)
                elif value.device.type != "cpu":
                    self._devices[parameter, name] = value.device
                    self._optimizer.state[parameter][name] = value.cpu()

    def close(self) -> None:
        """Bring everything back."""
        for (parameter, name), device in self._devices.items():
            self._optimizer.state[parameter][name] = self._optimizer.state[parameter][name].to(device)
        self._devices.clear()


def group_weight_decay(spec: str | None, groups: Sequence[LayerGroup]) -> dict[str, float]:
    """Read ``"head=0.1, block[0:4]=0"``: weight decay by layer group, later entries over earlier ones.

    Raises:
        ScheduleError: A selector cannot be read, or matches nothing.
        UnfreezeError: An entry without a number that is 0 or more.
    """
    decays: dict[str, float] = {}
    for entry in str(spec).split(",") if spec not in (None, "") else ():
        selector, _, text = entry.partition("=")
        try:
            value = float(text)
        except ValueError:
            value = -1.0
        if not 0 <= value < float("inf"):
            raise UnfreezeError(
                f"group_weight_decay={spec!r}: {entry.strip()!r} is no selector=number. Write 'head=0.1, block[0:4]=0'."
            )
        chosen = Selector.parse(selector)
        decays.update(dict.fromkeys(chosen.select(groups) if groups else (), value))
    return decays


def param_groups_layer_decay(
    model: nn.Module, lr: float, weight_decay: float = 0.0, layer_decay: float = 0.75
) -> list[dict[str, Any]]:
    """Return param groups for an optimizer of your own: decayed rates per layer, no weight decay on vectors.

    Example:
        >>> groups = param_groups_layer_decay(model, lr=1e-3, weight_decay=0.01, layer_decay=0.8)
        >>> optimizer = torch.optim.AdamW(groups)

    Args:
        model: Any model whose layer groups can be told.
        lr: Learning rate of the head.
        weight_decay: For matrices; biases and norms (tensors of one dimension or none) get 0.
        layer_decay: Factor from each level to the one below it, in (0, 1].

    Reference: BEiT, arXiv 2106.08254.
    """
    for name, value in (("lr", lr), ("weight_decay", weight_decay)):
        if isinstance(value, bool) or not isinstance(value, (int, float, torch.Tensor)) or not value >= 0:
            raise UnfreezeError(f"{name}={value!r} is no number from 0 up. Write for instance {name}=1e-3.")
    groups = layer_groups(model)
    parameters = dict(model.named_parameters())
    multipliers = decay_multipliers(groups, layer_decay)
    result: list[dict[str, Any]] = []
    for group in groups:
        for decay, matrices in ((weight_decay, True), (0.0, False)):
            members = [parameters[n] for n in group.parameter_names if (parameters[n].ndim > 1) is matrices]
            if members:
                rate = lr * multipliers[group.name]
                result.append({"params": members, "lr": rate, "weight_decay": decay, "name": group.name})
    return result
