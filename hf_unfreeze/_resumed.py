"""Going on from a checkpoint of the Trainer: what was decided, the weights to return to, and what was not loaded."""

from __future__ import annotations

import json
import re
import warnings
from pathlib import Path

from safetensors import safe_open
from torch import nn
from transformers import PreTrainedModel, Trainer, TrainerState, TrainingArguments

from ._history import divergence, past_transitions
from ._trainer import calling_trainer, checkpoint_resumed, newest_checkpoint
from .errors import ScheduleError
from .schedule import parse_selectors
from .unfreezer import Unfreezer

__all__ = ["go_on", "not_loaded", "save_beside"]


def go_on(unfreezer: Unfreezer, model: nn.Module, state: TrainerState) -> None:
    """Take over from the log and the checkpoint what the run needs, and tell what differs.

    Args:
        unfreezer: The engine of the run that begins, or goes on.
        model: The model of the Trainer.
        state: Its log, and the step at which it goes on.

    Raises:
        UnfreezeError: The checkpoint lacks the weights to return to.
    """
    unfreezer.memory.replay(state.log_history, state.global_step)
    if not state.global_step:
        return
    if different := divergence(unfreezer, state.log_history, state.global_step):
        warnings.warn(different, UserWarning, stacklevel=3)
    checkpoint = checkpoint_resumed()
    for kept in unfreezer.kept:
        kept.load(checkpoint)
    if checkpoint is None or Path(getattr(model, "name_or_path", "") or ".").resolve() == checkpoint.resolve():
        return
    if lost := not_loaded(unfreezer, model, state, checkpoint):
        warnings.warn(
            f"transformers has not loaded {lost} of this {type(model).__name__}, as {checkpoint} has them under other "
            "names: they are as in the model that the Trainer was given, and not as they were trained. Resume with "
            f"{type(model).__name__}.from_pretrained({str(checkpoint)!r}) as the model.",
            UserWarning,
            stacklevel=3,
        )


def save_beside(
    unfreezer: Unfreezer, model: nn.Module, args: TrainingArguments, state: TrainerState, tells: bool
) -> bool:
    """Put the weights to return to into the checkpoint that was saved just now.

    Where ``tells``, a warning says what ``load_best_model_at_end`` would not bring back from it.

    Returns:
        Whether it was told.
    """
    for kept in unfreezer.kept:
        kept.save(newest_checkpoint(args, state.global_step))
    if not (tells and args.load_best_model_at_end):
        return False
    lost = not_loaded(unfreezer, model, state, newest_checkpoint(args, state.global_step))
    if lost:
        warnings.warn(
            f"load_best_model_at_end will leave {lost} of this {type(model).__name__} as they are at the end, as its "
            "checkpoints have them under other names. After training take "
            f"{type(model).__name__}.from_pretrained(trainer.state.best_model_checkpoint).",
            UserWarning,
            stacklevel=3,
        )
    return bool(lost)


def not_loaded(unfreezer: Unfreezer, model: nn.Module, state: TrainerState, checkpoint: Path) -> str:
    """Name what has trained and what a Trainer will not find in its own checkpoint; empty where it finds everything.

    ``save_pretrained`` gives some parameters the names of older versions of transformers, which ``from_pretrained``
    knows and the Trainer does not.
    """
    trainer = calling_trainer()
    if not isinstance(model, PreTrainedModel) or trainer is None or trainer.is_fsdp_enabled:
        return ""
    if type(trainer)._load_from_checkpoint is not Trainer._load_from_checkpoint:
        return ""
    written = _written(checkpoint)
    there = {id(p) for name, p in model.named_parameters(remove_duplicate=False) if name in written}  # or tied to it
    ignored = [re.compile(pattern) for pattern in model._keys_to_ignore_on_save or ()]
    trained = _trained(unfreezer, state)
    lost = [
        name
        for name, parameter in model.named_parameters()
        if id(parameter) not in there and name in trained and not any(pattern.search(name) for pattern in ignored)
    ]
    return (lost[0] + f" and {len(lost) - 1} more" * (len(lost) > 1)) if written and lost else ""


def _written(checkpoint: Path) -> set[str]:
    """Return the names in a checkpoint of a whole model; none in one of adapters, or in another format."""
    one, index = checkpoint / "model.safetensors", checkpoint / "model.safetensors.index.json"
    if one.is_file():
        with safe_open(one, framework="pt") as file:
            return set(file.keys())
    return set(json.loads(index.read_text(encoding="utf-8"))["weight_map"]) if index.is_file() else set()


def _trained(unfreezer: Unfreezer, state: TrainerState) -> set[str]:
    """Return the parameters that have been open so far; by a log without a transition all have."""
    selections = {r["unfreeze/trainable"] for r in past_transitions(state.log_history)} or {"all"}
    try:
        opened = {n for text in selections for n in parse_selectors(text).phases(unfreezer.groups)[0].trainable}
    except ScheduleError:  # a log of another model
        opened = {group.name for group in unfreezer.groups}
    return {name for group in unfreezer.groups if group.name in opened for name in group.parameter_names}
