"""When what becomes trainable: points in time, selectors, schedules, and the phases they give. Needs no torch.

The language, in full::

    schedule  = entry {"," entry} | name | name "(" argument {"," argument} ")"
    entry     = selector ["*" number] "@" time   opens, at that multiple of the learning rate
              | "-" selector "@" time            freezes again what the selector names
    selector  = "all" | [stack "."] group ["[" index "]"]      head, embeddings, block[3], decoder.block[-4:]
    index     = integer | [integer] ":" [integer]              as in Python; -1 is the top block
    time      = "0" | number ("step" | "ep" | "%")             % is of the whole run

Spaces are free. An entry takes effect at the first optimizer step that begins at or after its time. Entries act in
the order of their steps; at the same step in the order in which they are written, so the later one wins. A selector
without a stack means that group of every stack: ``block[-4:]`` is the last four blocks of each. ``base.block[-4:]``
is those of ``base.encoder`` and ``base.decoder`` where ``base`` has no blocks of its own; ``base.all`` is all of it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path

from ._arguments import read_arguments
from ._deciding import auto, auto_rates, build_named, freeze_converged, learn_rates, plateau
from ._named import NAMED
from ._phases import Phase, Schedule
from ._spec import Entry, Selector, spec_of
from ._time import Time
from .errors import ScheduleError

__all__ = [
    "RECOMMENDED",
    "Entry",
    "Phase",
    "Schedule",
    "Selector",
    "Time",
    "all_at_once",
    "auto",
    "auto_rates",
    "freeze_converged",
    "freeze_out",
    "gradual",
    "learn_rates",
    "linear_probe",
    "parse_schedule",
    "parse_selectors",
    "plateau",
    "rotate",
    "spec_of",
    "top",
]

_NAMED = re.compile(r"([A-Za-z_]\w*)\s*(?:\((.*)\))?", re.DOTALL)
_UNCLOSED = re.compile(r"[A-Za-z_]\w*\s*\([^()]*")
_UNBRACKETED = re.compile(r"([A-Za-z_]\w*)(?:[\s:]+|\s*,\s*(?=\w+\s*=))([^@()]+)")
_TIMED = re.compile(r"(?:\A|,)\s*([A-Za-z_]\w*)\s*(\([^()]*\))?\s*@")
RECOMMENDED = "top(0.4, encoder_until=40%)"  # by recipes/benchmark.py: see the guide


def parse_schedule(spec: str | Schedule) -> Schedule:
    """Read a schedule, or a ``trainer_state.json`` whose run it replays; a ``Schedule`` comes back as it is.

    Example:
        >>> parse_schedule("gradual(every=0.5ep)")
        Schedule(entries=(), name='gradual', arguments=(('every', Time(value=Fraction(1, 2), unit='ep')), ...

    Args:
        spec: ``selector@time`` entries or the name of a schedule with its arguments, as above, or a path.

    Raises:
        ScheduleError: With every fault of the text, what is allowed, and a near match.
    """
    if isinstance(spec, Schedule):
        return spec
    if not isinstance(spec, str):
        raise ScheduleError(f"a schedule is a string or a Schedule, not {spec!r} ({type(spec).__name__}).")
    if spec.strip().endswith(".json"):
        return _replay(Path(spec.strip()))
    named = _NAMED.fullmatch(spec.strip())
    if named:
        name, text = named.groups()
        return Schedule(name=name, arguments=read_arguments(name, text))
    if _UNCLOSED.fullmatch(spec.strip()):
        parse_schedule(f"{spec})")  # has faults of its own, which come first
        raise ScheduleError(f"{spec.strip()!r}: the bracket is not closed. Write {spec.strip()}).")
    _check_named(spec)
    return Schedule(_entries("schedule", spec, Entry.parse))


def _check_named(spec: str) -> None:
    """Raise where a named schedule is written as an entry, or its arguments without brackets."""
    bare = _UNBRACKETED.fullmatch(spec.strip())
    if bare and bare[1] in NAMED:
        read_arguments(*bare.groups())  # has faults of its own, which come first
        raise ScheduleError(f"{spec.strip()!r}: what {bare[1]} takes stands in brackets. Write {bare[1]}({bare[2]}).")
    for name, brackets in _TIMED.findall(spec):
        if name in NAMED:
            raise ScheduleError(
                f"{spec.strip()!r}: {name} stands for a whole schedule, without a time. Write {name}{brackets} alone."
            )


def _entries(kind: str, text: str, read: Callable[[str], Entry]) -> tuple[Entry, ...]:
    entries: list[Entry] = []
    faults: list[str] = []
    for position, part in enumerate(text.split(","), 1):
        try:
            entries.append(read(part))
        except ScheduleError as error:
            faults.append(f"entry {position}: {error}")
    if faults:
        raise ScheduleError(f"{kind} {text!r} cannot be read.\n  " + "\n  ".join(faults)) from None
    return tuple(entries)


def _replay(path: Path) -> Schedule:
    try:
        history = json.loads(path.read_text(encoding="utf-8"))["log_history"]
        return Schedule.from_log(history if isinstance(history, list) else ())
    except (OSError, ValueError, TypeError, KeyError) as error:
        told = f"{type(error).__name__}: {error}"
        raise ScheduleError(f"{str(path)!r} is no trainer_state.json that can be replayed ({told}).") from error


def parse_selectors(selectors: str) -> Schedule:
    """Read selectors without times, ``"head, block[-2:]"``, as the schedule that opens them for a whole run.

    Example:
        >>> parse_selectors("head, block[-1]").phases(layer_groups(bert))[0].trainable
        ('block[1]', 'head')

    Args:
        selectors: As in a schedule, without ``@time``.

    Raises:
        ScheduleError: A selector cannot be read.
    """
    if not isinstance(selectors, str) or "*" in selectors:
        raise ScheduleError(f"selectors are a string such as 'head, block[-2:]', not {selectors!r}.")
    return _Selection(_entries(_Selection._kind, selectors, _timeless))


class _Selection(Schedule):
    """Selectors without times: messages write them as they were given."""

    _kind = "selection"

    def _write(self, entry: Entry) -> str:
        return str(entry).partition("@")[0]


def _timeless(text: str) -> Entry:
    what, at, _ = (piece.strip() for piece in text.partition("@"))
    selector = Selector.parse(what.removeprefix("-"))
    if at:
        raise ScheduleError(f"{text.strip()!r} has a time, and selectors have none. Write {what}.")
    return Entry(selector, Time(Fraction(0)), freeze=what.startswith("-"))


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
    return build_named("gradual", {"every": every, "blocks": blocks, "embeddings": embeddings})


def top(share: float = 0.5, encoder_until: str | Time | None = None) -> Schedule:
    """Train the head and the upper part of the blocks from the first step; the rest stays frozen to the end.

    What lies below is computed once for each example where there is a cache. A head of norms alone stays frozen with
    an encoder whose last norm is among them (Whisper, T5): its gradient would go back through all of the decoder.

    Example:
        >>> str(top(0.4, encoder_until="40%"))
        'top(0.4, encoder_until=40%)'

    Args:
        share: Of the blocks, from the top, rounded up; of an encoder and a decoder of one depth 0.5 is the decoder.
        encoder_until: Time at which an encoder below a decoder is frozen again: until then that share of either
            trains, counted by itself. Left out, the two count as one. Without effect on other models.

    Raises:
        ScheduleError: A share outside (0, 1].
    """
    return build_named("top", {"share": share, "encoder_until": encoder_until})


def linear_probe(until: str | Time = "1ep") -> Schedule:
    """Train the head alone, then everything: LP-FT.

    Example:
        >>> str(linear_probe(until="20%"))
        'linear_probe(until=20%)'

    Args:
        until: Time at which everything opens. To train only the head for the whole run write ``head@0``.

    Reference: LP-FT, arXiv 2202.10054.
    """
    return build_named("linear_probe", {"until": until})


def all_at_once() -> Schedule:
    """Train everything from the first step: ordinary fine-tuning.

    Example:
        >>> str(all_at_once())
        'all_at_once'
    """
    return build_named("all_at_once", {})


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
        head: Whether the head trains all the time, and with it what lies between stacks (``connector``).

    Raises:
        ScheduleError: An argument of the wrong kind; later, a run of unknown length.

    Reference: LISA, arXiv 2403.17919; BAdam, arXiv 2404.02827; HiFT, arXiv 2401.15207.
    """
    given = {"blocks": blocks, "every": every, "seed": seed, "order": order, "embeddings": embeddings, "head": head}
    return build_named("rotate", given)


def freeze_out(first: float = 0.8, cubed: bool = True, scaled: bool = True) -> Schedule:
    """Train everything, then freeze block after block from the bottom at set shares of the run: FreezeOut.

    The rate of each falls along half a cosine and is 0 where it freezes, the head's at the end of the run. Take a
    constant learning rate beside it, or both fall.

    Example:
        >>> str(freeze_out(0.5, cubed=False))
        'freeze_out(0.5, cubed=false, scaled=true)'

    Args:
        first: Share of the run, before cubing, after which the lowest block freezes, and the embeddings with it; the
            others follow at equal distances, up to the head's 1.
        cubed: Whether each share is cubed: lower blocks freeze earlier, 0.8 is then 51.2 % of the run.
        scaled: Whether each rate begins divided by that share, so that all cover the same distance.

    Raises:
        ScheduleError: A share outside (0, 1]; later, a run of unknown length.

    Reference: FreezeOut, arXiv 1706.04983.
    """
    return build_named("freeze_out", {"first": first, "cubed": cubed, "scaled": scaled})
