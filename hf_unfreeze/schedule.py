"""When what becomes trainable: points in time, selectors, schedules, and the phases they give. Needs no torch.

The language, in full::

    schedule  = entry {"," entry} | name | name "(" argument {"," argument} ")"
    entry     = ["-"] selector "@" time          "-" freezes again what the selector names
    selector  = "all" | [stack "."] group ["[" index "]"]      head, embeddings, block[3], decoder.block[-4:]
    index     = integer | [integer] ":" [integer]              as in Python; -1 is the top block
    time      = "0" | number ("step" | "ep" | "%")             % is of the whole run

Spaces are free. An entry takes effect at the first optimizer step that begins at or after its time. Entries act in
the order of their steps; at the same step in the order in which they are written, so the later one wins. A selector
without a stack means that group of every stack: ``block[-4:]`` is the last four blocks of each.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ._arguments import check_arguments, read_arguments, write_arguments
from ._named import NAMED, Change, Value, openings
from ._spec import Entry, Group, Selector, Time, spec_of
from .errors import ScheduleError

__all__ = [
    "Entry",
    "Phase",
    "Schedule",
    "Selector",
    "Time",
    "all_at_once",
    "gradual",
    "linear_probe",
    "parse_schedule",
    "parse_selectors",
    "plateau",
    "rotate",
    "spec_of",
]

_NAMED = re.compile(r"([A-Za-z_]\w*)\s*(?:\((.*)\))?", re.DOTALL)


@dataclass(frozen=True)
class Phase:
    """An interval of the run with a constant trainable set.

    Args:
        start: Optimizer step (``state.global_step``) from which it holds.
        trainable: Names of the trainable groups, bottom → top.
        reason: Why it began, in words and numbers, where the data decided.
        restores: Whether it begins by going back to the best weights.
    """

    start: int
    trainable: tuple[str, ...]
    reason: str = ""
    restores: bool = False


@dataclass(frozen=True)
class Schedule:
    """A readable, hashable plan of what becomes trainable when; ``str(schedule)`` parses back to an equal one.

    Example:
        >>> schedule = parse_schedule("head@0, block[-4:]@1ep, all@50%")
        >>> str(schedule)
        'head@0, block[-4:]@1ep, all@50%'

    Args:
        entries: The ``selector@time`` entries, in the order written; empty for a named schedule.
        name: Name of a named schedule (``gradual`` …), else empty.
        arguments: ``(name, value)`` of every argument of a named schedule.
    """

    entries: tuple[Entry, ...] = ()
    name: str = ""
    arguments: tuple[tuple[str, Value], ...] = ()

    def phases(
        self, groups: Sequence[Group], total_steps: int | None = None, steps_per_epoch: int | None = None
    ) -> tuple[Phase, ...]:
        """List every phase, also those that begin after the last step, in the order of their steps.

        Where the data decides, only the first is known; ``decided`` lists what may follow.

        Args:
            groups: ``layer_groups(model)``, bottom → top.
            total_steps: Optimizer updates of the whole run.
            steps_per_epoch: Optimizer updates in one epoch.

        Raises:
            ScheduleError: A selector matches nothing, or a phase would train nothing; all faults in one message.
        """
        length = total_steps, steps_per_epoch
        changes = NAMED[self.name].changes(groups, dict(self.arguments), length) if self.name else self._changes(groups)
        timed = sorted(((t.to_step(total_steps, steps_per_epoch), names, freeze) for t, names, freeze in changes),
                       key=lambda change: change[0])  # fmt: skip
        trainable: set[str] = set()
        at: dict[int, tuple[str, ...]] = {0: ()}
        for start, names, freeze in timed:
            trainable = trainable - names if freeze else trainable | names
            at[start] = tuple(group.name for group in groups if group.name in trainable and group.parameter_names)
        phases: list[Phase] = []
        for start, names_at in at.items():
            if not names_at:
                raise ScheduleError(
                    f"schedule {str(self)!r} trains nothing from step {start} on"
                    + (
                        f" ({', '.join(sorted(trainable))} has no parameter of its own in this model)"
                        if trainable and start == 0
                        else ""
                    )
                    + ". Open something at that time, for instance head@0 or block[-1]@0."
                )
            if not phases or names_at != phases[-1].trainable:
                phases.append(Phase(start, names_at))
        return tuple(phases)

    def decided(self, groups: Sequence[Group]) -> tuple[tuple[str, ...], ...]:
        """List the trainable sets, in order, whose time the data will decide; none of a timed schedule."""
        if not (self.name and NAMED[self.name].decided):
            return ()
        opened: set[str] = set()
        sets = []
        for names in openings(groups, dict(self.arguments)):
            opened |= names
            sets.append(tuple(group.name for group in groups if group.name in opened and group.parameter_names))
        return tuple(sets[1:])

    def _changes(self, groups: Sequence[Group]) -> list[Change]:
        changes: list[Change] = []
        faults: list[str] = []
        for entry in self.entries:
            try:
                changes.append((entry.time, frozenset(entry.selector.select(groups)), entry.freeze))
            except ScheduleError as error:
                faults.append(f"{entry}: {error}")
        if faults:
            raise ScheduleError(f"schedule {str(self)!r} does not fit the model.\n  " + "\n  ".join(faults))
        return changes

    def __str__(self) -> str:
        if not self.name:
            return ", ".join(map(str, self.entries))
        arguments = write_arguments(self.name, self.arguments)
        return f"{self.name}({arguments})" if arguments else self.name


def parse_schedule(spec: str | Schedule) -> Schedule:
    """Read a schedule; a ``Schedule`` comes back as it is.

    Example:
        >>> parse_schedule("gradual(every=0.5ep)")
        Schedule(entries=(), name='gradual', arguments=(('every', Time(value=Fraction(1, 2), unit='ep')), ...

    Raises:
        ScheduleError: With every fault of the text, what is allowed, and a near match.
    """
    if isinstance(spec, Schedule):
        return spec
    if not isinstance(spec, str):
        raise ScheduleError(f"a schedule is a string or a Schedule, not {spec!r} ({type(spec).__name__}).")
    named = _NAMED.fullmatch(spec.strip())
    if named:
        name, text = named.groups()
        return Schedule(name=name, arguments=read_arguments(name, text))
    entries: list[Entry] = []
    faults: list[str] = []
    for position, part in enumerate(spec.split(","), 1):
        try:
            entries.append(Entry.parse(part))
        except ScheduleError as error:
            faults.append(f"entry {position}: {error}")
    if faults:
        raise ScheduleError(f"schedule {spec!r} cannot be read.\n  " + "\n  ".join(faults)) from None
    return Schedule(tuple(entries))


def parse_selectors(selectors: str) -> Schedule:
    """Read selectors without times, ``"head, block[-2:]"``, as the schedule that opens them for a whole run.

    Raises:
        ScheduleError: A selector cannot be read.
    """
    if not isinstance(selectors, str):
        raise ScheduleError(f"selectors are a string such as 'head, block[-2:]', not {selectors!r}.")
    return parse_schedule(", ".join(f"{part}@0" for part in selectors.split(",")))


def _build_named(name: str, given: dict[str, Any]) -> Schedule:
    return Schedule(name=name, arguments=check_arguments(name, given))


def _time(value: str | Time) -> Time:
    return value if isinstance(value, Time) else Time.parse(value)


def gradual(every: str | Time = "1ep", blocks: int = 1, embeddings: bool = True) -> Schedule:
    """Open the head first, then block by block from the top: gradual unfreezing.

    Example:
        >>> str(gradual(every="500step", blocks=2))
        'gradual(every=500step, blocks=2, embeddings=true)'

    Args:
        every: Time between two openings.
        blocks: Blocks that open at a time; parallel towers open theirs together.
        embeddings: Whether the embeddings open at last, one interval after the lowest block.

    Raises:
        ScheduleError: An argument of the wrong kind.

    Reference: ULMFiT, arXiv 1801.06146.
    """
    return _build_named("gradual", {"every": _time(every), "blocks": blocks, "embeddings": embeddings})


def linear_probe(until: str | Time = "1ep") -> Schedule:
    """Train the head alone, then everything: LP-FT.

    Example:
        >>> str(linear_probe(until="20%"))
        'linear_probe(until=20%)'

    Args:
        until: Time at which everything opens. To train only the head for the whole run write ``head@0``.

    Reference: LP-FT, arXiv 2202.10054.
    """
    return _build_named("linear_probe", {"until": _time(until)})


def all_at_once() -> Schedule:
    """Train everything from the first step: ordinary fine-tuning.

    Example:
        >>> str(all_at_once())
        'all_at_once'
    """
    return _build_named("all_at_once", {})


def rotate(
    blocks: int = 2,
    every: str | Time = "20step",
    seed: int = 0,
    order: str = "random",
    embeddings: bool = True,
    head: bool = True,
) -> Schedule:
    """Train a few blocks at a time and change them regularly, beside embeddings and head: LISA, BAdam, HiFT.

    Example:
        >>> str(rotate(blocks=2, every="50step"))
        'rotate(blocks=2, every=50step, seed=0, order=random, embeddings=true, head=true)'

    Args:
        blocks: Blocks that train at a time; a round visits each block once, its last turn what is left.
        every: Length of a turn.
        seed: Of the shuffle of each round; the same on every process and after a resume.
        order: ``random``, ``ascending`` (from the bottom) or ``descending``.
        embeddings: Whether the embeddings train all the time.
        head: Whether the head trains all the time.

    Raises:
        ScheduleError: An argument of the wrong kind; later, a run of unknown length.

    Reference: LISA, arXiv 2403.17919; BAdam, arXiv 2404.02827; HiFT, arXiv 2401.15207.
    """
    given = {"blocks": blocks, "seed": seed, "order": order, "embeddings": embeddings, "head": head}
    return _build_named("rotate", {**given, "every": _time(every)})


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
    given = {"metric": metric, "patience": patience, "min_delta": float(min_delta), "mode": mode, "stop": stop,
             "back": back, "restore_best": restore_best, "blocks": blocks, "embeddings": embeddings}  # fmt: skip
    times = {"at_least": _time(at_least), "at_most": at_most if at_most is None else _time(at_most)}
    return _build_named("plateau", {**given, **times})
