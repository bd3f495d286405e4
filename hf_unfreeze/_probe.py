"""Measures the gradients of closed blocks on a few batches, and leaves no trace of it in the run."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from ._shadow import random_state, set_random_state
from .criteria import Evidence, find_criterion
from .errors import EnvironmentRefused, ScheduleError
from .freezing import flags_lent
from .schedule import Schedule

__all__ = ["Probe", "Prober"]

_ADAPTIVE = ("adam", "lion", "adafactor", "rmsprop", "adagrad", "lamb")


@dataclass(frozen=True)
class Probe:
    """Where the batches come from that ``auto`` measures on.

    Args:
        loss: Loss of a model on a batch.
        train: Returns so many training batches, always the same ones; on several ranks each its share.
        validation: The same of validation data, or None where there is none.
    """

    loss: Callable[[nn.Module, Any], torch.Tensor]
    train: Callable[[int], Iterable[Any]]
    validation: Callable[[int], Iterable[Any]] | None = None


class Prober:
    """Scores closed blocks by the criterion of an ``auto`` schedule, alike on every rank.

    Args:
        model: The model without wrappers.
        members: Parameters of each group.
        optimizer: The raw torch optimizer; its kind tells the step it would take.
        schedule: The ``auto`` schedule.
        probe: Where the batches come from.
        interval: Optimizer updates between two openings.

    Raises:
        ScheduleError: An unknown criterion, no probe, or no validation data where the criterion asks for them.
        EnvironmentRefused: Sharded or quantised parameters.
    """

    def __init__(
        self,
        model: nn.Module,
        members: Mapping[str, Sequence[nn.Parameter]],
        optimizer: torch.optim.Optimizer,
        schedule: Schedule,
        probe: Probe | None,
        interval: int,
    ) -> None:
        given: dict[str, Any] = dict(schedule.arguments)
        self._criterion = find_criterion(given["criterion"])
        if probe is None:
            raise ScheduleError(f"{schedule} needs batches to measure on. Train with a data set that has a length.")
        if self._criterion.validation and probe.validation is None:
            raise ScheduleError(f"{schedule} needs validation data. Pass eval_dataset to the Trainer.")
        for parameter in (p for parameters in members.values() for p in parameters):
            if hasattr(parameter, "device_mesh") or not parameter.is_floating_point():
                raise EnvironmentRefused("auto cannot measure sharded (FSDP2) or quantised weights. Write gradual.")
        self._model, self._members, self._probe = model, members, probe
        self._adaptive = any(word in type(optimizer).__name__.lower() for word in _ADAPTIVE)
        self.batches = min(given["batches"], max(2, interval // 20))  # an opening costs at most 5 % of the steps to it

    def __call__(self, names: Sequence[str]) -> dict[str, float]:
        """Return what each of the named groups is worth."""
        tensors = [p for name in names for p in self._members[name]]
        with _untouched(self._model), flags_lent(tensors):
            gradients, squares = self._measure(self._probe.train, tensors)
            validation = self._measure(self._probe.validation, tensors)[0] if self._criterion.validation else []
            worth, first = [], 0
            for name in names:
                mine = slice(first, first := first + len(self._members[name]))
                with torch.no_grad():
                    worth.append(self._worth(name, tensors[mine], gradients[mine], squares[mine], validation[mine]))
        return dict(zip(names, _mean_over_ranks(worth, tensors[0].device), strict=True))

    def _worth(self, name: str, weights: Any, gradients: Any, squares: Any, validation: Any) -> float:
        steps = [g / (g.abs() + 1e-8) for g in gradients] if self._adaptive else gradients
        detached = [weight.detach() for weight in weights]
        evidence = Evidence(name, detached, gradients, squares, steps, validation, self.batches)
        return float(self._criterion.function(evidence))

    def _measure(self, batches: Any, tensors: Sequence[nn.Parameter]) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """Return the mean over batches of the gradient and of its square."""
        means = [torch.zeros_like(p, requires_grad=False) for p in tensors]
        squares = [torch.zeros_like(p, requires_grad=False) for p in tensors]
        count = 0
        for batch in batches(self.batches):
            found = torch.autograd.grad(self._probe.loss(self._model, batch), tensors, allow_unused=True)
            count += 1
            for mean, square, gradient in zip(means, squares, found, strict=True):
                if gradient is not None:
                    mean += gradient
                    square += gradient.square()
        if not count:
            raise ScheduleError("auto found no batch to measure on: the data set has fewer examples than ranks.")
        return [mean / count for mean in means], [square / count for square in squares]


@contextlib.contextmanager
def _untouched(model: nn.Module) -> Iterator[None]:
    """Lend the model in evaluation mode without gradient checkpointing; modes and random states are as before after."""
    modes = [(module, module.training) for module in model.modules()]
    recomputed = [m for m in model.modules() if vars(m).get("gradient_checkpointing")]
    states = [(random_state(device), device) for device in {p.device for p in model.parameters()}]
    try:
        for module, _ in modes:
            module.training = False
        for module in recomputed:
            vars(module)["gradient_checkpointing"] = False
        with torch.enable_grad():
            yield
    finally:
        for module, mode in modes:
            module.training = mode
        for module in recomputed:
            vars(module)["gradient_checkpointing"] = True
        for state, device in states:
            set_random_state(state, device)


def _mean_over_ranks(values: Sequence[float], device: torch.device) -> list[float]:
    """Average over the ranks, so that all choose alike although each measured on data of its own."""
    if not (dist.is_available() and dist.is_initialized()):
        return list(values)
    total = torch.tensor(values, dtype=torch.float32 if device.type == "mps" else torch.float64, device=device)
    dist.all_reduce(total)
    return [float(value) for value in total / dist.get_world_size()]
