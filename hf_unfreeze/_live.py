"""Where a run is, on the progress display of its Trainer: the bar of a terminal, or the table of a notebook."""

from __future__ import annotations

import functools
import html
from collections.abc import Sequence
from typing import Any

from transformers import Trainer

from .cache import FrozenPrefixCache
from .distributed import unwrap
from .schedule import spec_of
from .unfreezer import Unfreezer

__all__ = ["LiveView"]

_CELL = "display:inline-block;width:7px;height:12px;margin-right:1px;background:"
_COLOURS = {True: "#2a788e", False: "#d9d9d9"}


class LiveView:
    """Adds phase, open groups, next transition, share and cache hits to the display; does nothing where there is none.

    A display is a terminal's bar on a real terminal, or a notebook's table, of the main process; with ``disable_tqdm``
    the Trainer has neither.

    Args:
        trainer: The Trainer that is running.
        unfreezer: What opens its model.
        steps_per_epoch: Optimizer updates in one epoch.
        cache: The cache of the run, if it has one.
    """

    def __init__(
        self, trainer: Trainer, unfreezer: Unfreezer, steps_per_epoch: int | None, cache: FrozenPrefixCache | None
    ) -> None:
        self._trainer, self._unfreezer, self._cache = trainer, unfreezer, cache
        self._planned = unfreezer.schedule.phases(unfreezer.groups, trainer.state.max_steps, steps_per_epoch)
        self._total = sum(parameter.numel() for parameter in unwrap(trainer.model_wrapped).parameters())

    def update(self) -> None:
        """Show the present phase; call it before a step, when the display has begun."""
        if not self._trainer.is_world_process_zero():
            return
        for callback in self._trainer.callback_handler.callbacks:
            bar, table = (getattr(callback, name, None) for name in ("training_bar", "training_tracker"))
            if bar is not None and not bar.disable and bar.fp.isatty():
                bar.set_postfix_str(f"{''.join('▯▮'[opened] for opened in self._open())} {self._told()}", refresh=False)
            if table is not None:
                self._show_in(table)

    def _show_in(self, table: Any) -> None:
        table.prefix = f"<div>{_cells(self._open())} {html.escape(self._told())}</div>"
        if "write_line" not in vars(table):
            table.write_line = functools.partial(self._write_line, table.write_line)

    def _write_line(self, original: Any, values: dict[str, Any]) -> None:
        """Write a line of the Trainer's table, two columns longer."""
        columns = {"Phase": self._unfreezer.transition.phase, "Open": _cells(self._open())}
        original(values | columns)

    def _open(self) -> list[bool]:
        """Tell of each group, bottom → top, whether it trains."""
        unfreezer = self._unfreezer
        trainable = set(unfreezer.phases[unfreezer.transition.phase].trainable)
        return [group.name in trainable for group in unfreezer.groups]

    def _told(self) -> str:
        """Say the phase in words: ``phase 1: block[2:4], head (12%), next block[0:4], head at 20``."""
        now = self._unfreezer.transition
        share = now.trainable_params / self._total
        return f"phase {now.phase}: {now.trainable} ({share:.1%}){self._next()}{self._hits()}"

    def _next(self) -> str:
        """Say what opens next, or when, as far as it is known."""
        unfreezer, number = self._unfreezer, self._unfreezer.transition.phase + 1
        if "; no gain:" in unfreezer.transition.reason:
            return ""
        for phases, opens in ((unfreezer.phases, True), (self._planned, False)):
            if number < len(phases) and phases[number].start < self._trainer.state.max_steps:
                what = f"{spec_of(phases[number].trainable, unfreezer.groups)} " if opens else ""
                return f", next {what}at {phases[number].start}"
        return ", next when the data says" if number <= len(unfreezer.schedule.decided(unfreezer.groups)) else ""

    def _hits(self) -> str:
        if self._cache is None or not (asked := self._cache.stats.hits + self._cache.stats.misses):
            return ""
        return f", cache {self._cache.stats.hits / asked:.0%}"


def _cells(opened: Sequence[bool]) -> str:
    """Draw the groups side by side, bottom → top."""
    return "".join(f'<span style="{_CELL}{_COLOURS[is_open]}"></span>' for is_open in opened)
