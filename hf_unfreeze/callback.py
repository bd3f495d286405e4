"""The only file that knows Trainer: its events, mapped to the Unfreezer."""

from __future__ import annotations

import functools
import sys
import warnings
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

import transformers
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ._history import as_record, divergence, past_transitions
from ._plan import model_card_section, plan_rows, plan_table, state_copies
from ._watch import watch
from .distributed import DEEPSPEED
from .errors import EnvironmentRefused, UnfreezeError
from .optim import decay_multipliers
from .schedule import Schedule, parse_schedule
from .unfreezer import Unfreezer, parse_warmup

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


@dataclass
class UnfreezeArguments:
    """Arguments of UnfreezeCallback for ``HfArgumentParser``, beside ``TrainingArguments``.

    Example:
        >>> parser = HfArgumentParser((UnfreezeArguments, TrainingArguments))
        >>> unfreeze_args, training_args = parser.parse_args_into_dataclasses()
        >>> Trainer(..., args=training_args, callbacks=[UnfreezeCallback.from_arguments(unfreeze_args)])
    """

    schedule: str = field(
        default="gradual", metadata={"help": "What trains when: 'head@0, block[-4:]@1ep, all@50%' or a named schedule."}
    )
    layer_decay: float = field(
        default=1.0, metadata={"help": "Factor on the learning rate from each level to the one below it, in (0, 1]."}
    )
    block_warmup: str | None = field(
        default=None, metadata={"help": "Time over which a newly opened group warms up: 50step, 0.1ep or 2%."}
    )
    frozen_eval: bool = field(
        default=True, metadata={"help": "Run frozen modules in eval mode (no dropout, BatchNorm statistics at rest)."}
    )


class UnfreezeCallback(TrainerCallback):
    """Opens the Trainer's model group by group on a schedule.

    Example:
        >>> trainer = Trainer(model, args, train_dataset=data, callbacks=[UnfreezeCallback("gradual(every=1ep)")])
        >>> trainer.train()

    Args:
        schedule: A spec string (see ``hf_unfreeze.schedule``) or a ``Schedule``.
        layer_decay: Factor on the learning rate from each level to the one below it, in (0, 1].
        block_warmup: Time over which the rate of a newly opened group rises to its full value, e.g. ``"50step"``.
        frozen_eval: Whether frozen modules run in eval mode.

    Raises:
        UnfreezeError: At once for a schedule or argument that cannot be read; when training begins for one that does
            not fit the model, the optimizer or the run.

    Reference: ULMFiT, arXiv 1801.06146.
    """

    def __init__(
        self,
        schedule: str | Schedule = "gradual",
        *,
        layer_decay: float = 1.0,
        block_warmup: str | None = None,
        frozen_eval: bool = True,
    ) -> None:
        self.schedule = parse_schedule(schedule)
        decay_multipliers((), layer_decay)  # these two check the value
        parse_warmup(block_warmup)
        self.layer_decay = layer_decay
        self.block_warmup = block_warmup
        self.frozen_eval = frozen_eval
        self.unfreezer: Unfreezer | None = None
        self._steps_per_epoch: int | None = None
        self._unwatch: list[Callable[[], None]] = []

    @classmethod
    def from_arguments(cls, arguments: UnfreezeArguments) -> UnfreezeCallback:
        """Make the callback that the parsed arguments describe."""
        return cls(**vars(arguments))

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Freeze: now that the optimizer holds every parameter, and never before."""
        self._close()  # auto_find_batch_size begins again after an out-of-memory error without an end
        _refuse(args)
        with ExitStack() as stack:
            stack.callback(self._close)  # whatever raises from here on leaves the model as it was
            self._begin(args, state, **kwargs)
            stack.pop_all()

    def _begin(self, args: TrainingArguments, state: TrainerState, **kwargs: Any) -> None:
        model, optimizer = kwargs["model"], kwargs["optimizer"]
        self._steps_per_epoch = _steps_per_epoch(args, kwargs.get("train_dataloader"))
        self.unfreezer = Unfreezer(
            model,
            optimizer,
            self.schedule,
            total_steps=state.max_steps,
            steps_per_epoch=self._steps_per_epoch,
            layer_decay=self.layer_decay,
            block_warmup=self.block_warmup,
            frozen_eval=self.frozen_eval,
        )
        trainer = _calling_trainer()
        if trainer is not None:
            self._attach(trainer)
        if state.is_world_process_zero and not args.disable_tqdm:
            self._print_plan(model, state)
        if state.global_step and (different := divergence(self.unfreezer, state.log_history, state.global_step)):
            warnings.warn(different, UserWarning, stacklevel=2)
        self._advance(args, state)

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Change phase where the schedule says so: between two optimizer steps, before the forward."""
        self._advance(args, state)

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Add the phase and the learning rate of each group to the usual training logs."""
        logs: dict[str, Any] = kwargs.get("logs") or {}
        if self.unfreezer is None or "loss" not in logs:
            return
        current = self.unfreezer.transition
        extra: dict[str, float] = {f"lr/{name}": rate for name, rate in self.unfreezer.learning_rates().items()}
        state.log_history[-1].update(extra)  # the Trainer has put a copy there before it calls us
        logs.update(extra)
        logs["unfreeze/phase"] = current.phase
        logs["unfreeze/trainable_params"] = current.trainable_params

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Restore every flag, hook and mode."""
        self._close()

    def _advance(self, args: TrainingArguments, state: TrainerState) -> None:
        if self.unfreezer is None:
            return
        transition = self.unfreezer.step(state.global_step, state.epoch)
        if transition is None:
            return
        record = as_record(transition)
        past = past_transitions(state.log_history)
        if past and all(past[-1].get(key) == value for key, value in record.items()):
            return  # resumed inside a phase whose beginning is on record
        state.log_history.append({**record, "epoch": state.epoch, "step": state.global_step})
        if state.is_world_process_zero and not args.disable_tqdm:
            from tqdm.auto import tqdm

            tqdm.write(
                f"step {transition.step}: phase {transition.phase} trains {transition.trainable} "
                f"({transition.trainable_params:,} parameters)"
            )

    def _print_plan(self, model: Any, state: TrainerState) -> None:
        from rich.console import Console

        if self.unfreezer is None:
            return
        reached = [phase for phase in self.unfreezer.phases if phase.start < state.max_steps]
        copies = state_copies(self.unfreezer.optimizer)
        rows = plan_rows(model, self.unfreezer.groups, reached, self._steps_per_epoch, copies)
        Console().print(plan_table(rows, f"{self.schedule}, {state.max_steps} steps".replace("[", r"\[")))

    def _attach(self, trainer: Trainer) -> None:
        """Come before the reporters, so that what on_log adds reaches them; watch for the end of training."""
        callbacks = trainer.callback_handler.callbacks
        if sum(isinstance(callback, UnfreezeCallback) for callback in callbacks) > 1:
            raise UnfreezeError(
                "this Trainer has two UnfreezeCallbacks, which would undo each other. Keep one, and write both "
                "schedules as one: 'head@0, block[-4:]@1ep'."
            )
        callbacks.remove(self)
        callbacks.insert(0, self)
        for part, name in _WATCHED:
            owner = getattr(trainer, part) if part else trainer
            if hasattr(owner, name):
                self._unwatch.append(watch(owner, name, self._close))
        _extend_model_card(trainer, str(self.schedule))

    def _close(self) -> None:
        if self.unfreezer is not None:
            self.unfreezer.close()
            self.unfreezer = None
        while self._unwatch:
            self._unwatch.pop()()


def _refuse(args: TrainingArguments) -> None:
    """Raise for what would train wrongly without a word."""
    if getattr(args, "deepspeed", None):
        raise EnvironmentRefused(DEEPSPEED)
    if int(transformers.__version__.partition(".")[0]) >= 5 or not args.gradient_checkpointing:
        return
    options = args.gradient_checkpointing_kwargs
    if not isinstance(options, dict) or options.get("use_reentrant", True):
        raise EnvironmentRefused(
            "re-entrant gradient checkpointing in transformers 4 gives no gradient to blocks above a frozen one. "
            "Write gradient_checkpointing_kwargs={'use_reentrant': False}."
        )


def _steps_per_epoch(args: TrainingArguments, dataloader: Any) -> int | None:
    """Return optimizer updates in one epoch as the Trainer counts them: a last partial window is a step too."""
    try:
        batches = len(dataloader)
    except TypeError:  # an iterable dataset has no length
        return None
    return max(-(-batches // args.gradient_accumulation_steps), 1)


def _calling_trainer() -> Trainer | None:
    """Return the Trainer that fired the event: callbacks are never handed it, but it is a few frames up the stack."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        owner = frame.f_locals.get("self")
        if isinstance(owner, Trainer):
            return owner
        frame = frame.f_back
    return None


def _extend_model_card(trainer: Trainer, schedule: str) -> None:
    """Let ``trainer.create_model_card`` write the unfreezing section too, however often it is called."""
    original = getattr(trainer.create_model_card, "__wrapped__", trainer.create_model_card)

    @functools.wraps(original)
    def create_model_card(*args: Any, **kwargs: Any) -> None:
        original(*args, **kwargs)
        if trainer.is_world_process_zero():
            card = Path(trainer.args.output_dir or ".") / "README.md"
            section = model_card_section(schedule, trainer.state.log_history)
            card.write_text(f"{card.read_text(encoding='utf-8').rstrip()}\n\n{section}", encoding="utf-8")

    vars(trainer)["create_model_card"] = create_model_card
