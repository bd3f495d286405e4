"""What a run has to save beside model and optimizer: nothing, unless data decides or weights are kept to return to."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from ._decisions import Decisions, Timed
from ._kept import Kept
from ._transition import Transition, as_record, on_record
from .errors import UnfreezeError
from .schedule import Schedule

__all__ = ["Memory"]


class Memory:
    """Keeps what decided on the phases of a run, as the Trainer's ``log_history`` does, and gives it to the next run.

    Args:
        schedule: The schedule of the run.
        decisions: What decides on its phases.
        kept: The copies of weights that a resumed run needs.
    """

    def __init__(self, schedule: Schedule, decisions: Decisions, kept: Sequence[Kept]) -> None:
        self._schedule, self._decisions, self._kept = schedule, decisions, kept
        self._decides = not isinstance(decisions, Timed)
        self._records: list[dict[str, Any]] = []
        self._for_log: list[dict[str, Any]] = []
        self.loaded = 0  # step of the state that was loaded
        self._complete = not (self._decides or kept)  # whether it holds all that was decided before this step

    def note(self, records: Iterable[Mapping[str, Any]], step: int) -> None:
        """Remember what was measured or evaluated."""
        self._records += [{**record, "step": step} for record in records if self._decides]

    def note_transition(self, transition: Transition) -> None:
        """Remember that a phase began, and not again where a run resumed inside it."""
        record = as_record(transition, self._schedule)
        past = next((r for r in reversed(self._records) if "unfreeze/phase" in r), None)
        if past is None or not on_record(record, past):
            self.note([record], transition.step)

    def note_measured(self, step: int) -> None:
        """Remember what was measured for a choice, and lay it by for a log."""
        measure = self._decisions.measure
        if measure is not None and measure.records:
            self.note(measure.records, step)
            self._for_log += measure.records
            measure.records = []

    def take_records(self) -> list[dict[str, Any]]:
        """Return what was laid by since the last call."""
        records, self._for_log = self._for_log, []
        return records

    def begin(self, step: int) -> None:
        """Refuse to go on in the middle of a run of which nothing is known.

        Raises:
            UnfreezeError: Nothing was loaded, and what was decided before this step is lost.
        """
        if step and not self._complete:
            lost = "what it decided" if self._decides else "the weights to return to"
            raise UnfreezeError(
                f"{self._schedule} begins at step {step}, and {lost} before that step is not known. Write "
                "accelerator.register_for_checkpointing(unfreezer) before load_state (without Accelerate: save "
                "unfreezer.state_dict(), and load_state_dict() before the first step()), or count from 0."
            )
        self._complete = True

    def replay(self, records: Iterable[Any], step: int) -> None:
        """Decide again what a run decided whose log this is, up to a step."""
        self._decisions.replay(records, step)
        self._complete = True

    def state(self, done: int) -> dict[str, Any]:
        """Return what a run needs that goes on after so many steps."""
        weights = {kept.file: dict(kept.weights) for kept in self._kept}
        return {"schedule": str(self._schedule), "step": done, "records": list(self._records), "weights": weights}

    def load(self, state: Mapping[str, Any], begun: bool) -> None:
        """Take over what another run has saved.

        Raises:
            UnfreezeError: It is no such state, this run has begun already, or the other kept no weights.
        """
        if not isinstance(state, Mapping) or not {"schedule", "step", "records", "weights"} <= set(state):
            raise UnfreezeError(f"{type(state).__name__} is no state of an Unfreezer. Pass what state_dict() returned.")
        if begun and (self._decides or self._kept):
            raise UnfreezeError(
                "load_state_dict() comes before the first step(): what has been decided since cannot be undone. "
                "close() this Unfreezer and make a new one."
            )
        if state["schedule"] != str(self._schedule):
            warnings.warn(
                f"the state was saved by another schedule, '{state['schedule']}'. From here on this one holds: "
                f"'{self._schedule}'.",
                UserWarning,
                stacklevel=3,
            )
        for kept in self._kept if state["step"] else ():
            kept.take_over(state["weights"].get(kept.file), f"the state of step {state['step']}")
        self.loaded = state["step"]
        self._records = [dict(record) for record in state["records"]] if self._decides else []
        self.replay(self._records, state["step"])
