"""The only file that knows Trainer: its events, mapped to the Unfreezer."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import fields
from typing import Any

from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ._history import past_transitions
from ._live import LiveView
from ._options import Options
from ._plan import plan_rows, plan_table, state_copies
from ._resumed import go_on, save_beside
from ._trainer import (
    calling_trainer,
    complete_schedule,
    extend_model_card,
    inform,
    probe_of,
    refuse,
    restart_patience,
    show_timeline,
    steps_per_epoch,
)
from ._training_arguments import UnfreezeArguments
from ._transition import as_record, on_record
from ._watch import watch
from .cache import FrozenPrefixCache, recommended
from .errors import UnfreezeError
from .regularization import reinitialize as draw_anew
from .schedule import Schedule, parse_schedule, parse_selectors
from .unfreezer import Unfreezer

__all__ = ["UnfreezeArguments", "UnfreezeCallback"]

# What the training loop calls after on_train_begin (v5: the first three; v4 has one long loop, which calls the others):
# part of the Trainer ("" for itself) and method. No event is fired when an exception ends training, so all are watched.
_WATCHED = (
    ("", "_run_epoch"),
    ("", "_evaluate"),
    ("", "_finalize_training"),
    ("", "get_batch_samples"),
    ("", "training_step"),
    ("", "_maybe_log_save_evaluate"),
    ("accelerator", "clip_grad_norm_"),
    ("optimizer", "step"),
    ("callback_handler", "call_event"),
)


class UnfreezeCallback(TrainerCallback):
    """Opens the Trainer's model group by group on a schedule.

    Example:
        >>> trainer = Trainer(model, args, train_dataset=data, callbacks=[UnfreezeCallback("gradual(every=1ep)")])
        >>> trainer.train()

    Args:
        schedule: A spec string (see ``hf_unfreeze.schedule``) or a ``Schedule``; left out,
            ``top(0.4, encoder_until=40%)``, and on a CPU the cache in memory, unless ``cache`` says otherwise.
        layer_decay: Factor on the learning rate from each level to the one below it, in (0, 1]; ``"0.35->1.0"``
            changes it evenly from the first step to the last.
        block_warmup: Time over which the rate of a newly opened group rises to its full value, e.g. ``"50step"``.
        frozen_eval: Whether frozen modules run in eval mode.
        pull: Strength of the pull of opened weights back to the pretrained ones (L2-SP); see ``Unfreezer``.
        dropout: Least dropout probability of opened modules.
        group_weight_decay: Weight decay of some groups: ``"head=0.1, block[0:4]=0"``.
        drop_state: Whether the optimizer forgets its state of what is frozen again.
        offload_state: Whether the optimizer's state of what is frozen lies in main memory.
        prefix_dtype: ``"bfloat16"`` or ``"float16"``: what the frozen blocks at the bottom compute in; not exact.
        reinitialize: Groups whose weights are drawn anew before the first step of every run: ``"block[-2:]"``.
        cache: ``"memory"``, ``"device"``, ``"disk"``, ``"disk:FOLDER"`` or a ``FrozenPrefixCache``: an example
            goes through the frozen blocks once in the run and not once in an epoch.

    An ``EarlyStoppingCallback`` on the same Trainer counts its patience anew where the trainable set changes.

    Raises:
        UnfreezeError: At once for a schedule or argument that cannot be read; when training begins for one that does
            not fit the model, the optimizer or the run.

    Reference: ULMFiT, arXiv 1801.06146.
    """

    def __init__(
        self,
        schedule: str | Schedule | None = None,
        *,
        layer_decay: float | str = 1.0,
        block_warmup: str | None = None,
        frozen_eval: bool = True,
        pull: float = 0.0,
        dropout: float = 0.0,
        group_weight_decay: str | None = None,
        drop_state: bool = False,
        offload_state: bool = False,
        prefix_dtype: str | None = None,
        reinitialize: str | None = None,
        cache: str | FrozenPrefixCache | None = None,
    ) -> None:
        schedule, cache = recommended(schedule, cache)
        self.schedule = parse_schedule(schedule)
        self.layer_decay = layer_decay
        self.block_warmup = block_warmup
        self.frozen_eval = frozen_eval
        self.pull = pull
        self.dropout = dropout
        self.group_weight_decay = group_weight_decay
        self.drop_state = drop_state
        self.offload_state = offload_state
        self.prefix_dtype = prefix_dtype
        self.reinitialize = reinitialize
        self._options()
        if reinitialize is not None:
            parse_selectors(reinitialize)
        self.cache = FrozenPrefixCache.parse(cache)
        self.unfreezer: Unfreezer | None = None
        self._live: LiveView | None = None
        self._steps_per_epoch: int | None = None
        self._told = False  # what is wrong with the checkpoints
        self._unwatch: list[Callable[[], None]] = []

    def _options(self) -> Options:
        """The options as the attributes are now: a search may change them between two runs."""
        return Options(**{option.name: getattr(self, option.name) for option in fields(Options)})

    @classmethod
    def from_arguments(cls, arguments: UnfreezeArguments) -> UnfreezeCallback:
        """Make the callback that the parsed arguments describe.

        Example:
            >>> UnfreezeCallback.from_arguments(UnfreezeArguments(schedule="gradual(every=1ep)", pull=0.01))

        Args:
            arguments: As ``HfArgumentParser`` returns them.
        """
        return cls(**vars(arguments))

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Freeze: now that the optimizer holds every parameter, and never before."""
        self._close()  # auto_find_batch_size begins again after an out-of-memory error without an end
        refuse(args)
        with ExitStack() as stack:
            stack.callback(self._close)  # whatever raises from here on leaves the model as it was
            self._begin(args, state, **kwargs)
            stack.pop_all()

    def _begin(self, args: TrainingArguments, state: TrainerState, **kwargs: Any) -> None:
        model, optimizer = kwargs["model"], kwargs["optimizer"]
        trainer = calling_trainer()
        self.cache = FrozenPrefixCache.parse(self.cache)  # as it is now
        self._steps_per_epoch = steps_per_epoch(args, kwargs.get("train_dataloader"))
        self.unfreezer = Unfreezer(
            model if trainer is None else trainer.model_wrapped,
            optimizer,
            complete_schedule(self.schedule, args, state, self._steps_per_epoch),
            total_steps=state.max_steps,
            steps_per_epoch=self._steps_per_epoch,
            cache=self.cache,
            probe=probe_of(trainer),
            **vars(self._options()),
        )
        if self.reinitialize and not state.global_step:
            self._draw_anew(model, args.seed)
        if self.cache is not None:
            inform(self.cache, trainer, state, kwargs.get("train_dataloader"), self._steps_per_epoch)
        if trainer is not None:
            self._attach(trainer)
            self._live = LiveView(trainer, self.unfreezer, self._steps_per_epoch, self.cache)
        if state.is_world_process_zero and not args.disable_tqdm:
            self._print_plan(model, state)
        go_on(self.unfreezer, model, state)
        self._advance(args, state)

    def _draw_anew(self, model: Any, seed: int) -> None:
        drawn = draw_anew(model, self.reinitialize or "", seed)
        may_open = self.unfreezer.decisions.may_open if self.unfreezer else ()
        if frozen := [name for name in drawn if name not in may_open]:
            warnings.warn(
                f"reinitialize={self.reinitialize!r} has drawn {', '.join(frozen)} anew, which '{self.schedule}' never "
                "opens: random weights that stay so. Open them too, or leave them out.",
                UserWarning,
                stacklevel=2,
            )

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Change phase where the schedule says so: between two optimizer steps, before the forward."""
        self._advance(args, state)
        if self._live is not None:
            self._live.update()

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Add the phase and the learning rate of each group to the usual training logs."""
        logs: dict[str, Any] = kwargs.get("logs") or {}
        if self.unfreezer is None or "loss" not in logs:
            return
        current = self.unfreezer.transition
        extra: dict[str, float] = {f"lr/{name}": rate for name, rate in self.unfreezer.learning_rates().items()}
        extra |= self.cache.record() if self.cache is not None else {}
        state.log_history[-1].update(extra)  # the Trainer has put a copy there before it calls us
        logs.update(extra)
        logs["unfreeze/phase"] = current.phase
        logs["unfreeze/trainable_params"] = current.trainable_params

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Let the evaluation decide, where the schedule leaves it to it; the next step begins the new phase."""
        if self.unfreezer is not None:
            self.unfreezer.observe(kwargs.get("metrics") or {}, state.global_step)

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Put beside the checkpoint what a resumed run needs and the checkpoint lacks: weights to return to."""
        if self.unfreezer is not None and state.is_world_process_zero:
            self._told |= save_beside(self.unfreezer, kwargs["model"], args, state, not self._told)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Restore every flag, hook and mode, and show what happened."""
        self._close()
        show_timeline()  # before the reporters close: this callback comes first

    def _advance(self, args: TrainingArguments, state: TrainerState) -> None:
        if self.unfreezer is None:
            return
        transition = self.unfreezer.step(state.global_step, state.epoch)
        when = {"epoch": state.epoch, "step": state.global_step}
        state.log_history += [record | when for record in self.unfreezer.take_records()]
        if transition is None:
            return
        record = as_record(transition, self.unfreezer.schedule)
        past = past_transitions(state.log_history)
        if past and on_record(record, past[-1]):
            return  # resumed inside a phase whose beginning is on record
        if not past and self.unfreezer.trains_everything:
            return  # nothing has changed, and a log without a record says just that
        state.log_history.append(record | when)
        if not past or past[-1]["unfreeze/trainable"] != transition.trainable:
            restart_patience()
        if state.is_world_process_zero and not args.disable_tqdm:
            from tqdm.auto import tqdm

            tqdm.write(
                f"step {transition.step}: phase {transition.phase} trains {transition.trainable} "
                f"({transition.trainable_params:,} parameters)" + (transition.reason and f": {transition.reason}")
            )

    def _print_plan(self, model: Any, state: TrainerState) -> None:
        from rich.console import Console

        if self.unfreezer is None:
            return
        copies = state_copies(self.unfreezer.optimizer)
        if copies is not None:
            copies += len(self.unfreezer.kept)  # the weights to return to
        groups, schedule = self.unfreezer.groups, self.unfreezer.schedule
        planned = schedule.phases(groups, state.max_steps, self._steps_per_epoch)
        reached = [phase for phase in planned if phase.start < state.max_steps]
        later = schedule.decided(groups)
        rows = plan_rows(model, groups, reached, self._steps_per_epoch, copies, later)
        Console().print(plan_table(rows, f"{schedule}, {state.max_steps} steps".replace("[", r"\[")))

    def _attach(self, trainer: Trainer) -> None:
        """Come before the reporters, so that what on_log adds reaches them; watch for the end of training."""
        callbacks = trainer.callback_handler.callbacks
        if sum(isinstance(callback, UnfreezeCallback) for callback in callbacks) > 1:
            raise UnfreezeError(
                "this Trainer has two UnfreezeCallbacks, which would undo each other. Keep one, and write both "
                "schedules as one: 'head@0, block[-4:]@1ep'."
            )
        if self not in callbacks:
            raise UnfreezeError(
                "an UnfreezeCallback was called by another callback. Give it to the Trainer: callbacks=[callback]."
            )
        callbacks.remove(self)
        callbacks.insert(0, self)
        for callback in callbacks[1:]:  # those that on_train_begin comes to next: the call that fires it is not watched
            self._unwatch.append(watch(callback, "on_train_begin", self._close))
        for part, name in _WATCHED:
            owner = getattr(trainer, part) if part else trainer
            if hasattr(owner, name):
                self._unwatch.append(watch(owner, name, self._close, over=lambda: self not in callbacks))
        extend_model_card(trainer, str(self.schedule))

    def _close(self) -> None:
        if self.unfreezer is not None:
            self.unfreezer.close()
            self.unfreezer = self._live = None
        while self._unwatch:
            self._unwatch.pop()()
