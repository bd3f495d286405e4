"""``Phase`` and ``Schedule``: which groups train from which step on. Needs no torch."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

from ._arguments import write_arguments
from ._named import NAMED, Value
from ._openings import Change
from ._spec import BLOCK, Entry, Group
from .errors import ScheduleError

__all__ = ["Phase", "Schedule", "is_transition"]


def is_transition(record: Any) -> bool:
    """Tell a transition from what anybody else wrote into ``log_history``."""
    return (
        isinstance(record, dict)
        and isinstance(record.get("unfreeze/phase"), int)
        and isinstance(record.get("unfreeze/trainable"), str)
        and isinstance(record.get("step"), int)
        and isinstance(record.get("unfreeze/rates", {}), dict)
    )


@dataclass(frozen=True)
class Phase:
    """An interval of the run with a constant trainable set.

    Example:
        >>> parse_schedule("head@0, all@40step").phases(layer_groups(bert))[0]
        Phase(start=0, trainable=('head',), reason='', restores=False, rates=())

    Args:
        start: Optimizer step (``state.global_step``) from which it holds.
        trainable: Names of the trainable groups, bottom → top.
        reason: Why it began, in words and numbers, where the data decided.
        restores: Whether it begins by going back to the best weights.
        rates: ``(name, factor)`` of each trainable group whose learning rate is multiplied, bottom → top.
    """

    start: int
    trainable: tuple[str, ...]
    reason: str = ""
    restores: bool = False
    rates: tuple[tuple[str, float], ...] = ()


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
    _kind = "schedule"  # what messages call it

    @classmethod
    def from_log(cls, log_history: Iterable[Any]) -> Schedule:
        """Return the timed schedule that replays what trained when in a run, and at what factor, whoever decided.

        It does not go back to earlier weights as ``plateau`` may, and has no cosines as ``freeze_out`` has. A run of
        ``all_at_once`` has the learning rates of its groups in the log, and no transition.

        Example:
            >>> str(Schedule.from_log(trainer.state.log_history))
            'head@0, -all@40step, block[5]@40step, head@40step'

        Args:
            log_history: ``trainer.state.log_history``, or that of a ``trainer_state.json``.

        Raises:
            ScheduleError: It holds neither, or is no list.
        """
        if not isinstance(log_history, Iterable):
            raise ScheduleError(
                f"{type(log_history).__name__} is no log_history. Write Schedule.from_log(trainer.state.log_history)."
            )
        log_history = list(log_history)
        entries: list[Entry] = []
        transitions = list(filter(is_transition, log_history))
        if transitions and transitions[0]["step"]:  # before it, a run of ``all_at_once`` or without the callback
            entries.append(Entry.parse("all@0"))
        for record in transitions:
            step, opened = record["step"], record["unfreeze/trainable"].split(",")
            entries += [Entry.parse(f"-all@{step}step")] if entries and opened != ["all"] else []
            entries += [Entry.parse(f"{selector}@{step}step") for selector in opened]
            rates = record.get("unfreeze/rates", {})
            entries += [Entry.parse(f"{name}*{rate!r}@{step}step") for name, rate in rates.items()]
        if not entries and any(str(key).startswith("lr/") for r in log_history if isinstance(r, dict) for key in r):
            entries = [Entry.parse("all@0")]
        if not entries:
            raise ScheduleError("this log_history has no transition. Take that of a run with UnfreezeCallback.")
        return cls(tuple(entries))

    def phases(
        self, groups: Sequence[Group], total_steps: int | None = None, steps_per_epoch: int | None = None
    ) -> tuple[Phase, ...]:
        """List every phase, also those that begin after the last step, in the order of their steps.

        Where the data decides, only the first is known; ``decided`` lists what may follow.

        Example:
            >>> [phase.start for phase in parse_schedule("head@0, all@50%").phases(layer_groups(bert), total_steps=80)]
            [0, 40]

        Args:
            groups: ``layer_groups(model)``, bottom → top.
            total_steps: Optimizer updates of the whole run.
            steps_per_epoch: Optimizer updates in one epoch.

        Raises:
            ScheduleError: A selector matches nothing, or a phase would train nothing; all faults in one message.
        """
        length = total_steps, steps_per_epoch
        if self.name:
            changes = [(change, 1.0) for change in NAMED[self.name].changes(groups, dict(self.arguments), length)]
        else:
            changes = self._changes(groups)
        timed = sorted(((time.to_step(*length), names, freeze, rate) for (time, names, freeze), rate in changes),
                       key=lambda change: change[0])  # fmt: skip
        rates: dict[str, float] = {}  # of what trains
        at: dict[int, dict[str, float]] = {0: {}}
        for start, names, freeze, rate in timed:
            kept = {name: before for name, before in rates.items() if name not in names}
            at[start] = rates = kept if freeze else kept | dict.fromkeys(names, rate)
        phases: list[Phase] = []
        for start, opened in at.items():
            names_at = tuple(group.name for group in groups if group.name in opened and group.parameter_names)
            rates_at = tuple((name, opened[name]) for name in names_at if opened[name] != 1)
            if not names_at:
                raise ScheduleError(
                    f"{self._kind} {str(self)!r} trains nothing from step {start} on"
                    + (f" ({', '.join(sorted(opened))} has no parameter of its own in this model)" if opened else "")
                    + f". Open something at that time, for instance {self._examples(groups)}."
                )
            if not phases or (names_at, rates_at) != (phases[-1].trainable, phases[-1].rates):
                phases.append(Phase(start, names_at, rates=rates_at))
        return tuple(phases)

    def decided(self, groups: Sequence[Group]) -> tuple[tuple[str, ...], ...]:
        """List the trainable sets, in order, whose time the data will decide; none of a timed schedule.

        Example:
            >>> parse_schedule("plateau(eval_loss)").decided(layer_groups(bert))[0]
            ('block[1]', 'head')

        Args:
            groups: ``layer_groups(model)``, bottom → top.
        """
        sets = NAMED[self.name].decided if self.name else None
        return tuple(
            tuple(group.name for group in groups if group.name in opened and group.parameter_names)
            for opened in (sets(groups, dict(self.arguments)) if sets else ())
        )

    def annealed(self, groups: Sequence[Group]) -> dict[str, tuple[float, Fraction]]:
        """Return of each group whose rate falls along a cosine its first factor, and the share of the run it takes."""
        cosines = NAMED[self.name].annealed if self.name else None
        return cosines(groups, dict(self.arguments)) if cosines else {}

    def _examples(self, groups: Sequence[Group]) -> str:
        own = [group.name for group in groups if group.parameter_names]
        blocks = [name for name in own if BLOCK.fullmatch(name)]
        tops = {name.partition("[")[0]: name for name in (g.name for g in groups) if BLOCK.fullmatch(name)}
        examples = ["head@0"] if any(name.rpartition(".")[2] == "head" for name in own) else []
        if blocks:  # with PEFT the top one may have none
            examples.append("block[-1]@0" if set(blocks) & set(tops.values()) else f"{blocks[-1]}@0")
        return " or ".join(self._write(Entry.parse(text)) for text in examples or ["all@0"])

    def _changes(self, groups: Sequence[Group]) -> list[tuple[Change, float]]:
        changes: list[tuple[Change, float]] = []
        faults: list[str] = []
        for entry in self.entries:
            try:
                change = entry.time, frozenset(entry.selector.select(groups)), entry.freeze
                changes.append((change, entry.rate))
            except ScheduleError as error:
                faults.append(f"{self._write(entry)}: {error}")
        if faults:
            raise ScheduleError(f"{self._kind} {str(self)!r} does not fit the model.\n  " + "\n  ".join(faults))
        return changes

    def _write(self, entry: Entry) -> str:
        return str(entry)

    def __str__(self) -> str:
        if not self.name:
            return ", ".join(map(self._write, self.entries))
        arguments = write_arguments(self.name, self.arguments)
        return f"{self.name}({arguments})" if arguments else self.name
