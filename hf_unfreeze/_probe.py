"""Measures gradients and outputs of blocks on a few batches, and leaves no trace of it in the run."""

from __future__ import annotations

import contextlib
import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from ._kept import Pretrained
from ._outputs import group_modules, outputs_of
from ._shadow import random_state, seed_random_state, set_random_state
from .criteria import AGREEMENT, Evidence, find_criterion
from .errors import EnvironmentRefused, ScheduleError
from .freezing import flags_lent
from .schedule import Schedule

__all__ = ["Probe", "Prober"]

SHARE = 0.05  # of the batches that are trained on between two choices: what a choice may cost
_LEAST = 2  # batches: one alone has no variance
_ADAPTIVE = ("adam", "lion", "adafactor", "rmsprop", "adagrad", "lamb")


@dataclass(frozen=True)
class Probe:
    """Where the batches come from that a schedule such as ``auto`` measures on.

    Example:
        >>> probe = Probe(lambda model, batch: model(**batch).loss, train=lambda count: batches[:count])
        >>> unfreezer = Unfreezer(model, optimizer, "auto(fisher, every=10%)", total_steps=400, probe=probe)

    Args:
        loss: Loss of a model on a batch.
        train: Returns so many training batches, always the same ones; on several ranks each its share.
        validation: The same of validation data, or None where there is none.
        per_step: Batches that one optimizer update trains on.
    """

    loss: Callable[[nn.Module, Any], torch.Tensor]
    train: Callable[[int], Iterable[Any]]
    validation: Callable[[int], Iterable[Any]] | None = None
    per_step: int = 1


class Prober:
    """Scores blocks by the criterion of a schedule, alike on every rank; what it needs again later goes on record.

    Args:
        model: The model without wrappers.
        members: Parameters of each group, by their names.
        optimizer: The raw torch optimizer; its kind tells the step it would take.
        schedule: A schedule that measures.
        probe: Where the batches come from.
        interval: Optimizer updates between two choices.

    Raises:
        ScheduleError: An unknown criterion, no probe, or no validation data where the criterion asks for them.
        EnvironmentRefused: Sharded or quantised parameters.
    """

    def __init__(
        self,
        model: nn.Module,
        members: Mapping[str, Mapping[str, nn.Parameter]],
        optimizer: torch.optim.Optimizer,
        schedule: Schedule,
        probe: Probe | None,
        interval: int,
    ) -> None:
        given: dict[str, Any] = dict(schedule.arguments)
        self._schedule = str(schedule)
        self.name: str = given.get("criterion", "validation_agreement")
        self.criterion = find_criterion(self.name) if "criterion" in given else AGREEMENT
        if probe is None:
            raise ScheduleError(
                f"{schedule} needs batches to measure on. Train with a data set that has a length; in your own loop "
                "pass probe=Probe(loss, batches), from hf_unfreeze.unfreezer."
            )
        if self.criterion.validation and probe.validation is None:
            raise ScheduleError(f"{schedule} needs validation data. Pass eval_dataset to the Trainer.")
        for parameter in (p for parameters in members.values() for p in parameters.values()):
            if hasattr(parameter, "device_mesh") or not parameter.is_floating_point():
                raise EnvironmentRefused(
                    f"{schedule.name} cannot measure sharded (FSDP2) or quantised weights. Write gradual."
                )
        self._model, self._members, self._probe = model, members, probe
        self._adaptive = any(word in type(optimizer).__name__.lower() for word in _ADAPTIVE)
        self._by_size = given.get("per") == "parameter"
        passes = 1 + self.criterion.validation
        trained = interval * probe.per_step
        self.batches = min(given["batches"], max(_LEAST, int(SHARE * trained / passes)))
        self.cost = self.batches * passes / max(trained, 1)
        self.norms: dict[str, float] = {}  # of the gradient of each group, when it was measured last
        self.records: list[dict[str, Any]] = []  # for the log
        self.pretrained: Pretrained | None = None
        if self.criterion.outputs:
            everything = {name: p for parameters in members.values() for name, p in parameters.items()}
            self.pretrained = Pretrained(everything, model.named_buffers())
        if self.cost > SHARE:
            warnings.warn(
                f"{schedule} measures on {self.batches * passes} batches at each choice and trains on {trained} until "
                f"the next: it costs {self.cost:.0%}, more than {SHARE:.0%}. Write a longer every.",
                UserWarning,
                stacklevel=2,
            )

    def begin(self, names: Sequence[str]) -> None:
        """Measure the norms that the first choice is compared with, where the criterion asks for them."""
        if names and self.criterion.before and not self.norms:
            self(names)

    def replay(self, record: Mapping[str, Any]) -> None:
        """Take from a record of the log what the next choice is compared with."""
        self.norms = dict(record.get("unfreeze/gradient_norms") or self.norms)

    def __call__(self, names: Sequence[str]) -> dict[str, float]:
        """Return what each of the named groups is worth."""
        tensors = [p for name in names for p in self._members[name].values()]
        device = tensors[0].device
        with _untouched(self._model), flags_lent(tensors):
            gradients, squares, batches = self._measure(self._probe.train, tensors)
            validation = self._measure(self._probe.validation, tensors)[0] if self.criterion.validation else []
            now, then = self._outputs(names)
            parts, first = [], 0
            for name in names:
                parts.append(slice(first, first := first + len(self._members[name])))
            norms = _mean_over_ranks([sum(float(g.abs().sum()) for g in gradients[part]) for part in parts], device)
            worth = []
            for name, mine, norm in zip(names, parts, norms, strict=True):
                weights, mean = [weight.detach() for weight in tensors[mine]], gradients[mine]
                steps = [g / (g.abs() + 1e-8) for g in mean] if self._adaptive else mean
                evidence = Evidence(
                    name, weights, mean, squares[mine], steps, validation[mine], batches,
                    norm, self.norms.get(name, math.nan), now.get(name), then.get(name),
                )  # fmt: skip
                with torch.no_grad():
                    value = self._number(self.criterion.function(evidence), name)
                worth.append(value / sum(weight.numel() for weight in weights) if self._by_size else value)
        agreed = dict(zip(names, _mean_over_ranks(worth, device), strict=True))
        self.norms = dict(zip(names, norms, strict=True))
        known = {name: value for name, value in agreed.items() if math.isfinite(value)}  # JSON has no NaN
        record = {"unfreeze/criterion": self.name, "unfreeze/worth": known, "unfreeze/batches": batches}
        record["unfreeze/schedule"] = self._schedule
        self.records.append(record | ({"unfreeze/gradient_norms": self.norms} if self.criterion.before else {}))
        return agreed

    def _outputs(self, names: Sequence[str]) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
        """Return what each group returns for one batch, now and in the model with which the run began."""
        if self.pretrained is None:
            return {}, {}
        modules = group_modules(self._model, {name: list(self._members[name]) for name in names})
        batch = next(iter(self._probe.train(1)))  # there is one: gradients have been measured
        now = outputs_of(modules, lambda: self._probe.loss(self._model, batch))
        with self.pretrained.lent():
            return now, outputs_of(modules, lambda: self._probe.loss(self._model, batch))

    def _number(self, value: Any, name: str) -> float:
        try:
            return float(value)
        except (TypeError, ValueError):
            raise ScheduleError(f"criterion {self.name!r} returned {value!r} for {name}. Return one number.") from None

    def _measure(
        self, batches: Any, tensors: Sequence[nn.Parameter]
    ) -> tuple[list[torch.Tensor], list[torch.Tensor], int]:
        """Return the mean over batches of the gradient and of its square, and how many batches there were."""
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
            raise ScheduleError("found no batch to measure on: the data set has fewer examples than ranks.")
        return [mean / count for mean in means], [square / count for square in squares], count


@contextlib.contextmanager
def _untouched(model: nn.Module) -> Iterator[None]:
    """Lend the model in evaluation mode without gradient checkpointing; modes and random states are as before after.

    In between generators begin anew: a collator that masks at random gives each measurement the same batches.
    """
    modes = [(module, module.training) for module in model.modules()]
    recomputed = [m for m in model.modules() if vars(m).get("gradient_checkpointing")]
    states = [(random_state(device), device) for device in {p.device for p in model.parameters()}]
    try:
        for _, device in states:
            seed_random_state(device)
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
