"""The runs of the Trainer that are made on two ranks and, with twice the batch, on one."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))

import transformers
from conftest import tiny_bert, tiny_data
from packaging import version
from transformers import Trainer, TrainingArguments

from hf_unfreeze import UnfreezeCallback

# transformers 4 loads optimizer.pt to the device cpu:0, which torch does not know, with any callback and without
RESUMES = version.parse(transformers.__version__).major > 4
SCHEDULE = "head@0, block[-1]@3step, block[-2:]@1ep, all@60%, -block[0]@15step"
RUNS: dict[str, dict[str, Any]] = {
    "plain": {},
    "checkpointed": {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": False}},
    "accumulated": {"gradient_accumulation_steps": 2, "num_train_epochs": 5},
}

CACHES = {"in_memory": "memory", "on_disk": "disk:{}/cache", "on_disk_again": "disk:{}/cache"}


def two_rank_options(options: dict[str, Any]) -> dict[str, Any]:
    """Half the batch, and a loss that is averaged as one process averages it."""
    return {"per_device_train_batch_size": 2, "average_tokens_across_devices": False, **options}


def make(output_dir: Path, *callbacks, cache: str | None = None, **options) -> Trainer:
    """A Trainer over the tiny BERT in fp64, without dropout, which ranks draw differently."""
    defaults = {
        "output_dir": str(output_dir), "per_device_train_batch_size": 4, "num_train_epochs": 3, "learning_rate": 1e-2,
        "weight_decay": 0.1, "logging_steps": 1, "save_strategy": "no", "report_to": "none", "disable_tqdm": True,
        "use_cpu": True, "seed": 3, "dataloader_pin_memory": False,
    }  # fmt: skip
    return Trainer(
        model=tiny_bert(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0).double(),
        args=TrainingArguments(**(defaults | options)),
        train_dataset=tiny_data(),
        callbacks=[UnfreezeCallback(SCHEDULE, layer_decay=0.8, block_warmup="2step", cache=cache), *callbacks],
    )
