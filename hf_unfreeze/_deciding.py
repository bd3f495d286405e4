"""The named schedules in which the data decides, as functions. Needs no torch."""

from __future__ import annotations

from typing import Any

from ._arguments import from_python
from ._phases import Schedule
from ._time import Time

__all__ = ["auto", "auto_rates", "build_named", "freeze_converged", "learn_rates", "plateau"]


def build_named(name: str, given: dict[str, Any]) -> Schedule:
    """Return a named schedule; raise ScheduleError for an argument of no use."""
    return Schedule(name=name, arguments=from_python(name, given))


def plateau(
    metric: str = "",
    patience: int = 2,
    min_delta: float = 0.0,
    mode: str = "auto",
    at_least: str | Time = "0",
    at_most: str | Time | None = None,
    stop: str = "none",
    back: bool = True,
    restore_best: bool = False,
    blocks: int = 1,
    embeddings: bool = True,
) -> Schedule:
    """Open what ``gradual`` opens next whenever a validation metric has stopped improving.

    Example:
        >>> str(plateau("eval_loss", patience=2, at_most="3ep"))
        'plateau(eval_loss, patience=2, at_most=3ep)'

    Args:
        metric: As the Trainer reports it; by default ``metric_for_best_model``.
        patience: Evaluations without improvement, one after the other, until the next opening.
        min_delta: What an improvement must exceed.
        mode: ``min`` or ``max``; ``auto`` follows ``greater_is_better``, else the name of the metric.
        at_least: Time that a phase lasts at least.
        at_most: Time after which the next group opens in any case.
        stop: ``no_gain`` ends unfreezing when the last opening brought no new best.
        back: Whether it then goes back to the best weights and their trainable set, or stays.
        restore_best: Whether each opening begins from the best weights so far.
        blocks: Blocks that open at a time.
        embeddings: Whether the embeddings open at last.

    Raises:
        ScheduleError: An argument of the wrong kind; later, no evaluation, or a metric that is not reported.

    Reference: FTS, finetuning-scheduler (github.com/speediedan/finetuning-scheduler).
    """
    given = {"metric": metric, "patience": patience, "min_delta": min_delta, "mode": mode, "at_least": at_least,
             "at_most": at_most, "stop": stop, "back": back, "restore_best": restore_best, "blocks": blocks,
             "embeddings": embeddings}  # fmt: skip
    return build_named("plateau", given)


def auto(
    criterion: str,
    blocks: int = 1,
    every: str | Time = "1ep",
    batches: int = 8,
    embeddings: bool = True,
    per: str = "block",
) -> Schedule:
    """Open the head first, then at regular times the blocks that a criterion finds most worth training.

    Before each opening the closed blocks are measured on a few batches; training is not disturbed.

    Example:
        >>> str(auto("validation_gradient", every="0.5ep"))
        'auto(validation_gradient, blocks=1, every=0.5ep, batches=8, embeddings=true)'

    Args:
        criterion: A name from ``hf_unfreeze.criteria``, or of a criterion of your own (``register_criterion``).
        blocks: Blocks that open at a time.
        every: Time between two openings.
        batches: Batches to measure on; fewer where an opening would cost more than 5 % of the steps to the next.
        embeddings: Whether the embeddings open at last.
        per: ``block``, or ``parameter``: what a block is worth divided by the number of its parameters.

    Raises:
        ScheduleError: An argument of the wrong kind, or no criterion; later, an unknown criterion.

    Reference: Surgical fine-tuning, arXiv 2210.11466.
    """
    given = {"criterion": criterion, "blocks": blocks, "every": every, "batches": batches, "embeddings": embeddings}
    return build_named("auto", {**given, "per": per})


def freeze_converged(
    criterion: str = "gradient_change", percentile: int = 50, every: str | Time = "10%", batches: int = 8
) -> Schedule:
    """Train everything, then freeze from the bottom up the blocks that have converged.

    Example:
        >>> str(freeze_converged(every="200step"))
        'freeze_converged(gradient_change, percentile=50, every=200step, batches=8)'

    Args:
        criterion: A name from ``hf_unfreeze.criteria``, or of a criterion of your own; what has converged is low.
        percentile: A block below this percentile of those that train freezes, if all below it are frozen.
        every: Time between two choices.
        batches: Batches to measure on; fewer where a choice would cost more than 5 % of the steps to the next.

    Raises:
        ScheduleError: An argument of the wrong kind; later, an unknown criterion.

    Reference: AutoFreeze, arXiv 2102.01386.
    """
    given = {"criterion": criterion, "percentile": percentile, "every": every, "batches": batches}
    return build_named("freeze_converged", given)


def auto_rates(criterion: str = "relative_gradient_norm", every: str | Time = "1ep", batches: int = 8) -> Schedule:
    """Train everything, each group at a rate in proportion to what a criterion finds it worth: Auto-RGN.

    Example:
        >>> str(auto_rates(every="200step"))
        'auto_rates(relative_gradient_norm, every=200step, batches=8)'

    Args:
        criterion: A name from ``hf_unfreeze.criteria``, or of a criterion of your own; the group of most worth gets the
            full rate, one of no worth is frozen until the next measurement.
        every: Time between two measurements; the first is at step 0.
        batches: Batches to measure on; fewer where it would cost more than 5 % of the steps to the next.

    Raises:
        ScheduleError: An argument of the wrong kind; later, an unknown criterion.

    Reference: Surgical fine-tuning, arXiv 2210.11466.
    """
    return build_named("auto_rates", {"criterion": criterion, "every": every, "batches": batches})


def learn_rates(speed: float = 0.5, start: float = 1.0, every: str | Time = "10%", batches: int = 8) -> Schedule:
    """Train everything and learn the rate of each group below the head from validation data, by hypergradients.

    A factor in [0, 1] rises where the next training step would lower the validation loss, and falls where it would
    raise it; at 0 the group is frozen. ``Schedule.from_log`` gives what was learnt as a schedule for other data.

    Example:
        >>> str(learn_rates(every="1ep"))
        'learn_rates(speed=0.5, start=1.0, every=1ep, batches=8)'

    Args:
        speed: Change of a factor at one measurement where step and validation gradient agree entirely.
        start: Factor of each group at step 0.
        every: Time between two measurements.
        batches: Batches of each kind to measure on; fewer where it would cost more than 5 % of the steps to the next.

    Raises:
        ScheduleError: An argument of the wrong kind; later, no validation data.

    Reference: hypergradient descent, arXiv 1703.04782.
    """
    return build_named("learn_rates", {"speed": speed, "start": start, "every": every, "batches": batches})
