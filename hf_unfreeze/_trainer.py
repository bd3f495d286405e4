"""What the callback has to know of a Trainer that no event tells it."""

from __future__ import annotations

import copy
import functools
import importlib.util
import math
import os
import random
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from types import FrameType, FunctionType, MethodType
from typing import Any, cast

import numpy as np
import torch
from accelerate.data_loader import DataLoaderShard
from torch import nn
from transformers import (
    EarlyStoppingCallback,
    PreTrainedTokenizerBase,
    Seq2SeqTrainer,
    Trainer,
    TrainerState,
    TrainingArguments,
)
from transformers.integrations.integration_utils import TensorBoardCallback

from ._ahead import Ahead, holds_all
from ._coming import Coming
from ._plan import model_card_section
from ._plateau import with_metric
from ._probe import Probe
from ._timeline import group_names, timeline
from .cache import FrozenPrefixCache
from .distributed import DEEPSPEED
from .errors import EnvironmentRefused, ScheduleError, near_match
from .schedule import Schedule, parse_schedule

_TIMINGS = ("_runtime", "_per_second", "_time")  # what an evaluation reports besides metrics

__all__ = [
    "calling_trainer",
    "checkpoint_resumed",
    "complete_schedule",
    "extend_model_card",
    "inform",
    "newest_checkpoint",
    "probe_of",
    "refuse",
    "restart_patience",
    "show_timeline",
    "steps_per_epoch",
]


def refuse(args: TrainingArguments) -> None:
    """Raise for what would train wrongly without a word."""
    if getattr(args, "deepspeed", None):
        raise EnvironmentRefused(DEEPSPEED)


def complete_schedule(
    schedule: str | Schedule, args: TrainingArguments, state: TrainerState, per_epoch: int | None
) -> Schedule:
    """Fill in what the arguments say of the best model, where a schedule leaves it open; check what it will be told."""
    evaluates = _strategy(args) != "no"
    complete = with_metric(parse_schedule(schedule), args.metric_for_best_model, args.greater_is_better, evaluates)
    if complete.name == "plateau":
        _check_metric(str(dict(complete.arguments)["metric"]), calling_trainer())
        if not _evaluates_before_the_end(args, state, per_epoch):
            warnings.warn(
                f"{complete} will see no evaluation before the last of {state.max_steps} steps, so none can open "
                "anything. Set eval_steps or eval_delay lower, or train for longer.",
                UserWarning,
                stacklevel=2,
            )
    return complete


def _strategy(args: TrainingArguments) -> str:
    return str(getattr(args.eval_strategy, "value", args.eval_strategy))


def _check_metric(metric: str, trainer: Trainer | None) -> None:
    """Refuse what this Trainer cannot report: a stock one names metrics by data set, and computes only the loss."""
    if trainer is None or type(trainer) not in (Trainer, Seq2SeqTrainer) or not metric or metric.endswith(_TIMINGS):
        return
    data = trainer.eval_dataset
    prefixes = [f"eval_{name}_" for name in data] if isinstance(data, dict) and data else ["eval_"]
    losses = [f"{prefix}loss" for prefix in prefixes]
    why = ""
    if not metric.startswith(tuple(prefixes)):
        why = f"eval_dataset is a dict, and its metrics begin with {', '.join(prefixes)}. "
    elif trainer.compute_metrics is None and metric not in losses:
        why = f"this Trainer has no compute_metrics, and reports {', '.join(losses)}. Pass compute_metrics, or "
    if why:
        cure = f"{'w' if why.endswith('or ') else 'W'}rite plateau({losses[0]})."
        raise ScheduleError(f"{metric!r} will not be in the evaluation: {why}{cure}{near_match(metric, losses)}")


def _evaluates_before_the_end(args: TrainingArguments, state: TrainerState, per_epoch: int | None) -> bool:
    """Whether there will be an evaluation that steps follow, as far as that can be known."""
    by_steps = _strategy(args) == "steps"
    every = int(state.eval_steps) if by_steps else per_epoch
    if not every:
        return True
    delay = args.eval_delay if by_steps else args.eval_delay * every
    return max(1, math.ceil(delay / every)) * every < state.max_steps


def probe_of(trainer: Trainer | None) -> Probe | None:
    """Return batches of the Trainer's data sets, and its loss; its own loaders and random states are left alone."""
    if trainer is None:
        return None
    pristine = _copied(trainer.data_collator)  # one with a generator of its own would be moved on
    size, part, parts = trainer.args.per_device_train_batch_size, trainer.args.process_index, trainer.args.world_size

    def loss(model: nn.Module, batch: Any) -> torch.Tensor:
        with trainer.compute_loss_context_manager():
            return cast("torch.Tensor", trainer.compute_loss(model, trainer._prepare_inputs(batch)))

    def batches(data: Any, count: int) -> Iterator[Any]:
        generator = torch.Generator().manual_seed(trainer.args.seed)
        drawn = torch.randperm(len(data), generator=generator)[part::parts][: count * size].tolist()
        collate = trainer._get_collator_with_removed_columns(_copied(pristine), "probe")
        return iter([collate([data[i] for i in drawn[n : n + size]]) for n in range(0, len(drawn), size)])

    held_out = trainer.eval_dataset
    held_out = next(iter(held_out.values()), None) if isinstance(held_out, dict) else held_out
    if not hasattr(trainer.train_dataset, "__len__"):
        return None
    validation = functools.partial(batches, held_out) if hasattr(held_out, "__len__") else None
    per_step = trainer.args.gradient_accumulation_steps
    return Probe(loss, functools.partial(batches, trainer.train_dataset), validation, per_step)


def _copied(thing: Any, called: bool = False, depth: int = 4) -> Any:
    """Copy a collator with the random generators in it and in what it calls; a model or a tokenizer it holds stays."""
    if isinstance(thing, torch.Generator):
        return torch.Generator(thing.device).set_state(thing.get_state())
    if isinstance(thing, (random.Random, np.random.Generator, np.random.RandomState)):
        return copy.deepcopy(thing)
    if isinstance(thing, MethodType):
        return MethodType(thing.__func__, _copied(thing.__self__, True, depth))
    if isinstance(thing, functools.partial):
        named = {name: _copied(value, depth=depth - 1) for name, value in thing.keywords.items()}
        return functools.partial(_copied(thing.func, True, depth), *map(_copied, thing.args), **named)
    shared = isinstance(thing, (nn.Module, Trainer, PreTrainedTokenizerBase, type, FunctionType))
    if shared or not depth or not (called or callable(thing)) or not hasattr(thing, "__dict__"):
        return thing
    twin = copy.copy(thing)
    vars(twin).update({name: _copied(value, depth=depth - 1) for name, value in vars(thing).items()})
    return twin


def steps_per_epoch(args: TrainingArguments, dataloader: Any) -> int | None:
    """Return optimizer updates in one epoch as the Trainer counts them: a last partial window is a step too."""
    try:
        batches = len(dataloader)
    except TypeError:  # an iterable dataset has no length
        return None
    return max(-(-batches // args.gradient_accumulation_steps), 1)


def inform(
    cache: FrozenPrefixCache, trainer: Trainer | None, state: TrainerState, dataloader: Any, per_epoch: int | None
) -> None:
    """Tell a cache what it cannot see in a forward: what will come by, and what reads the output."""
    if trainer is None:
        return
    cache.active.only_loss_counts = _loss_is_the_models(trainer)
    if not _is_as_usual(trainer, "_prepare_inputs"):
        return  # it does more than to move a batch: some write text there
    cache.active.ahead = _read_ahead(trainer, state, dataloader, per_epoch)
    base = getattr(dataloader, "base_dataloader", None)
    if cache.fetches and base is not None and isinstance(dataloader, DataLoaderShard):
        at_once = trainer.args.gradient_accumulation_steps
        cache.active.coming = Coming(base, trainer._prepare_inputs, at_once)


def _read_ahead(trainer: Trainer, state: TrainerState, dataloader: Any, per_epoch: int | None) -> Ahead | None:
    """Return what the cache may compute before it comes by: all of the data, where this process will see it all."""
    if per_epoch is None:
        return None
    args, until = trainer.args, state.global_step + per_epoch
    fits = state.train_batch_size or args.train_batch_size  # less than asked for under auto_find_batch_size
    if args.world_size > 1 or until > state.max_steps or not holds_all(dataloader, fits):
        return None
    at_a_time = fits if args.auto_find_batch_size else max(fits, args.eval_batch_size)
    return Ahead(dataloader, trainer._prepare_inputs, at_a_time, until, show_progress=not args.disable_tqdm)


def _loss_is_the_models(trainer: Trainer) -> bool:
    """Whether in training nothing reads what the model returns but the loss among it."""
    if trainer.compute_loss_func is not None or trainer.label_smoother is not None:
        return False
    return _is_as_usual(trainer, "compute_loss")


def _is_as_usual(trainer: Trainer, method: str) -> bool:
    """Whether neither a class of one's own nor this object has changed a method of the Trainer."""
    return getattr(getattr(trainer, method), "__func__", None) is getattr(Trainer, method)


def _frames() -> Iterator[tuple[Trainer, dict[str, Any]]]:
    """Yield the Trainers up the stack, each with the local variables of its method that is running."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        owner = frame.f_locals.get("self")
        if isinstance(owner, Trainer):
            yield owner, frame.f_locals
        frame = frame.f_back


def calling_trainer() -> Trainer | None:
    """Return the Trainer that fired the event: callbacks are never handed it, but it is a few frames up the stack."""
    return next((trainer for trainer, _ in _frames()), None)


def checkpoint_resumed() -> Path | None:
    """Return the checkpoint from which the running Trainer resumed: its training loop has it as an argument."""
    found = (variables.get("resume_from_checkpoint") for _, variables in _frames())
    return next((Path(path) for path in found if isinstance(path, (str, os.PathLike))), None)


def newest_checkpoint(args: TrainingArguments, step: int) -> Path:
    """Return the folder that was saved just now; a hyperparameter search has one level more."""
    root = Path(args.output_dir or ".")
    folders = [*root.glob(f"checkpoint-{step}"), *root.glob(f"*/checkpoint-{step}")]
    return max(folders, key=lambda folder: folder.stat().st_mtime)


def restart_patience() -> None:
    """Let early stopping wait for the phase it is in: a new phase has not had its chance yet."""
    trainer = calling_trainer()
    for callback in trainer.callback_handler.callbacks if trainer else ():
        if isinstance(callback, EarlyStoppingCallback):
            callback.early_stopping_patience_counter = 0


def show_timeline() -> None:
    """Give TensorBoard the timeline of the run that ends, where it is a reporter and matplotlib is installed."""
    trainer = calling_trainer()
    if trainer is None or not group_names(trainer.state.log_history) or not importlib.util.find_spec("matplotlib"):
        return
    for callback in trainer.callback_handler.callbacks:
        if isinstance(callback, TensorBoardCallback) and callback.tb_writer:
            callback.tb_writer.add_figure("unfreeze/timeline", timeline(trainer), trainer.state.global_step)


def extend_model_card(trainer: Trainer, schedule: str) -> None:
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
