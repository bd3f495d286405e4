"""What training a block is worth: one function per criterion, more is better; its source beside it.

A criterion is a function of the ``Evidence`` on one block. Write one of your own and name it::

    register_criterion("mine", lambda evidence: float(sum(g.norm() for g in evidence.gradients)))
    UnfreezeCallback("auto(mine, every=1ep)")
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from ._arguments import check_arguments
from .errors import ScheduleError, near_match

__all__ = ["AGREEMENT", "Criterion", "Evidence", "find_criterion", "register_criterion"]


@dataclass(frozen=True)
class Evidence:
    """What was measured of one block, tensor by tensor in the same order; in evaluation mode, without dropout.

    Args:
        name: Name of the block.
        weights: Its parameters.
        gradients: Mean gradient over the training batches.
        squares: Mean of the squared gradient of each batch.
        steps: Direction of the first step that the optimizer would take, without its learning rate.
        validation: Mean gradient over validation batches; empty for criteria that ask for none.
        batches: Number of training batches.
        norm: Sum of the absolute mean gradient, over all weights; the mean over ranks.
        norm_before: The same when it was measured before; NaN for criteria that do not ask for it.
        output: What the block returns for one training batch, a row for each position of each example; None for
            criteria that do not ask for it.
        pretrained: The same of the model with which the run began.
    """

    name: str
    weights: Sequence[torch.Tensor]
    gradients: Sequence[torch.Tensor]
    squares: Sequence[torch.Tensor]
    steps: Sequence[torch.Tensor]
    validation: Sequence[torch.Tensor]
    batches: int
    norm: float = math.nan
    norm_before: float = math.nan
    output: torch.Tensor | None = None
    pretrained: torch.Tensor | None = None


@dataclass(frozen=True)
class Criterion:
    """A function of the evidence, and what it asks for besides the gradients of training batches."""

    function: Callable[[Evidence], float]
    validation: bool = False
    before: bool = False
    outputs: bool = False


def relative_gradient_norm(evidence: Evidence) -> float:
    """Norm of the gradient over the norm of the weights: Auto-RGN of Surgical fine-tuning, arXiv 2210.11466."""
    return _norm(evidence.gradients) / max(_norm(evidence.weights), 1e-12)


def gradient_snr(evidence: Evidence) -> float:
    """Squared mean of the gradient over its variance between batches: Auto-SNR, arXiv 2210.11466."""
    mean = _sum(g.square() for g in evidence.gradients)
    return mean / max(_sum(evidence.squares) - mean, 1e-30)


def fisher(evidence: Evidence) -> float:
    """Trace of the empirical Fisher information: the squared gradients, summed over the weights: arXiv 2301.05487."""
    return _sum(evidence.squares)


def spectrum_snr(evidence: Evidence) -> float:
    """Singular values above the Marchenko-Pastur edge over those below, by the largest: Spectrum, arXiv 2406.06623."""
    ratios = [_spectral(weight.float()) for weight in evidence.weights if weight.ndim == 2 and min(weight.shape) > 1]
    return sum(ratios) / len(ratios) if ratios else math.nan


def validation_gradient(evidence: Evidence) -> float:
    """Inner product of the validation gradient with the step that training would take: what that step would gain.

    One step of meta-learning, as in learning to reweight examples, arXiv 1803.09050.
    """
    return _sum(v * step for v, step in zip(evidence.validation, evidence.steps, strict=True))


def gradient_change(evidence: Evidence) -> float:
    """Change of the gradient's norm since the measurement before, relative to that: AutoFreeze, arXiv 2102.01386."""
    if not evidence.norm_before > 0:
        return math.nan
    return abs(evidence.norm_before - evidence.norm) / evidence.norm_before


def cka(evidence: Evidence) -> float:
    """1 - linear CKA of the output with that of the pretrained model, how far it has moved: arXiv 1905.00414."""
    if evidence.output is None or evidence.pretrained is None:
        return math.nan
    if torch.equal(evidence.output, evidence.pretrained):
        return 0.0
    now, then = (rows.double() - rows.double().mean(0) for rows in (evidence.output, evidence.pretrained))
    norms = float(torch.linalg.matrix_norm(now.T @ now) * torch.linalg.matrix_norm(then.T @ then))
    return 1 - float((then.T @ now).square().sum()) / norms if norms else math.nan


def _agreement(evidence: Evidence) -> float:
    """Cosine of the validation gradient and the step that training would take: what ``learn_rates`` follows.

    It is the gradient of the validation loss after that step by the group's rate, normalised and with the sign that
    lowers the loss: hypergradient descent, arXiv 1703.04782, on validation data and for each group.
    """
    norms = _norm(evidence.validation) * _norm(evidence.steps)
    return validation_gradient(evidence) / norms if norms else math.nan


AGREEMENT = Criterion(_agreement, validation=True)
_CRITERIA = {
    "relative_gradient_norm": Criterion(relative_gradient_norm),
    "gradient_snr": Criterion(gradient_snr),
    "fisher": Criterion(fisher),
    "spectrum_snr": Criterion(spectrum_snr),
    "validation_gradient": Criterion(validation_gradient, validation=True),
    "gradient_change": Criterion(gradient_change, before=True),
    "cka": Criterion(cka, outputs=True),
}
_BUILT_IN = dict(_CRITERIA)


def register_criterion(
    name: str,
    function: Callable[[Evidence], float],
    validation: bool = False,
    before: bool = False,
    outputs: bool = False,
) -> None:
    """Give a criterion of your own a name, for ``auto(name)``.

    Example:
        >>> register_criterion("gradient_norm", lambda evidence: float(sum(g.norm() for g in evidence.gradients)))

    Args:
        name: As in a schedule, a word without spaces and commas. One of your own is replaced, so that a cell of a
            notebook can run again; those built in stay.
        function: Of the evidence on one block; more is better.
        validation: Whether it asks for validation gradients.
        before: Whether it asks for the norm of the gradient at the measurement before; the first is at step 0.
        outputs: Whether it asks for the block's output, now and in the model with which the run began.

    Raises:
        ScheduleError: The name is no word, or that of another criterion which is built in; or the function is none.
    """
    check_arguments("auto", {"criterion": name})
    if not callable(function):
        raise ScheduleError(
            f"criterion {name!r}: {function!r} is no function. Write one that takes the evidence on a block and "
            "returns a number."
        )
    criterion = Criterion(function, validation, before, outputs)
    if _BUILT_IN.get(name, criterion) != criterion:
        raise ScheduleError(f"{name!r} is a criterion that is built in. Give yours another name, such as my_{name}.")
    _CRITERIA[name] = criterion


def find_criterion(name: str) -> Criterion:
    """Return a criterion by its name; raise ScheduleError with those there are."""
    if name not in _CRITERIA:
        raise ScheduleError(
            f"{name!r} is no criterion. There are {', '.join(_CRITERIA)}.{near_match(name, _CRITERIA)} "
            "Give one of your own a name with hf_unfreeze.criteria.register_criterion."
        )
    return _CRITERIA[name]


def _norm(tensors: Sequence[torch.Tensor]) -> float:
    return math.sqrt(_sum(tensor.float().square() for tensor in tensors))


def _sum(tensors: object) -> float:
    return math.fsum(float(tensor.float().sum()) for tensor in tensors)  # type: ignore[attr-defined]


def _spectral(weight: torch.Tensor) -> float:
    values = torch.linalg.svdvals(weight)
    low, high = (float(torch.quantile(values, share)) for share in (0.25, 0.75))
    aspect = min(weight.shape) / max(weight.shape)
    edge = (high - low) / 1.349 * (1 + math.sqrt(aspect))  # of what noise of this spread would reach
    signal, noise = float(values[values > edge].sum()), float(values[values <= edge].sum())
    return signal / max(noise, 1e-12) / max(float(values[0]), 1e-12)
