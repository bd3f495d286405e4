"""finetuning-scheduler on Lightning, the peer of the benchmark: the same model, batches, rates, and schedule."""

from __future__ import annotations

import logging
import math
import warnings
from pathlib import Path
from typing import Any

import torch
from finetuning_scheduler import FinetuningScheduler
from lightning.pytorch import LightningModule, seed_everything
from lightning.pytorch import Trainer as LightningTrainer
from lightning.pytorch.callbacks import Callback
from torch import nn
from transformers import Trainer, get_scheduler

from hf_unfreeze import layer_groups, parse_schedule


class Model(LightningModule):
    """A model of transformers with AdamW and the Trainer's own schedule of rates."""

    def __init__(self, trainer: Trainer, steps: int) -> None:
        super().__init__()
        self.model, self.args, self.steps = trainer.model, trainer.args, steps
        self.losses: list[float] = []

    def training_step(self, batch: dict[str, torch.Tensor], index: int) -> torch.Tensor:
        loss = self.model(**batch).loss
        self.losses.append(loss.item())
        return loss

    def configure_optimizers(self) -> dict[str, Any]:
        opened = [parameter for parameter in self.parameters() if parameter.requires_grad]
        optimizer = torch.optim.AdamW(opened, lr=self.args.learning_rate, weight_decay=self.args.weight_decay)
        rates = get_scheduler(
            self.args.lr_scheduler_type, optimizer, int(self.args.get_warmup_steps(self.steps)), self.steps
        )
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": rates, "interval": "step"}}


class Hours(Callback):
    """Hands Lightning's epochs to the clock of the other methods."""

    def __init__(self, clock: Any) -> None:
        self.clock = clock

    def on_train_epoch_start(self, *args: Any) -> None:
        self.clock.on_epoch_begin()

    def on_train_epoch_end(self, *args: Any) -> None:
        self.clock.on_epoch_end()


def phases_of(model: nn.Module, schedule: str, epochs: int, steps_per_epoch: int) -> dict[int, dict[str, Any]]:
    """Write a schedule that opens at whole epochs as finetuning-scheduler does: what each phase adds, and its end."""
    groups = layer_groups(model)
    phases = parse_schedule(schedule).phases(groups, epochs * steps_per_epoch, steps_per_epoch)
    names = {group.name: [f"model.{name}" for name in group.parameter_names] for group in groups}
    written, before = {}, set()
    for number, phase in enumerate(phases):
        added = [name for group in phase.trainable if group not in before for name in names[group]]
        ends = phases[number + 1].start // steps_per_epoch if number + 1 < len(phases) else epochs
        written[number] = {"params": added, "max_transition_epoch": ends}
        before = set(phase.trainable)
    return written


def fit(trainer: Trainer, schedule: str, clock: Any) -> tuple[float, torch.optim.Optimizer]:
    """Train the Trainer's model by Lightning and finetuning-scheduler; return the mean loss and the optimizer."""
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    epochs, folder = int(trainer.args.num_train_epochs), Path(trainer.args.output_dir)
    seed_everything(trainer.args.seed, verbose=False)
    loader = trainer.get_train_dataloader()
    steps = math.ceil(len(trainer.train_dataset) / trainer.args.train_batch_size)
    module = Model(trainer, epochs * steps)
    phases = phases_of(trainer.model, schedule, epochs, steps)
    # by itself it gives what opens later 1e-5, and leaves it out of the schedule of rates
    own = {"base_max_lr": trainer.args.learning_rate, "apply_lambdas_new_pgs": True}
    finetuning = FinetuningScheduler(
        ft_schedule=phases, epoch_transitions_only=True, restore_best=False, logging_level=logging.ERROR, **own
    )
    lightning = LightningTrainer(
        max_epochs=epochs,
        callbacks=[Hours(clock), finetuning],
        accelerator="auto",
        devices=1,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        gradient_clip_val=trainer.args.max_grad_norm,
        default_root_dir=folder,
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it advises workers for the loader, and more frequent logs
        lightning.fit(module, loader)
    return sum(module.losses) / len(module.losses), lightning.optimizers[0]
