"""Shared by all tests: a tiny model, a tiny data set, and a Trainer over both. No network; no GPU but with
TEST_DEVICE=cuda, where every Trainer of ``make_trainer`` trains on one, and what only a GPU can do is tested too."""

from __future__ import annotations

import hashlib
import os
from functools import partial
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import torch
import transformers
from hypothesis import HealthCheck, settings
from transformers import BertConfig, BertForSequenceClassification, Trainer, TrainingArguments

transformers.utils.logging.set_verbosity_error()
torch.set_num_threads(1)
settings.register_profile("busy", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("busy")  # no test is a matter of time
DEVICE = os.environ.get("TEST_DEVICE", "cpu")
if DEVICE == "cuda":
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # products in one order, so that bits can be compared
    torch.use_deterministic_algorithms(True)

BLOCKS = 4
LAUNCHED = {"accelerated", "ddp", "fsdp", "trainer", "two", "undisturbed"}
EXAMPLES = 28  # 7 batches of 4 in an epoch; with accumulation 3 the last window is partial


def tiny_bert(seed: int = 0, **config) -> BertForSequenceClassification:
    """A BERT of four blocks with dropout, so that a wrong random state shows in the weights."""
    torch.manual_seed(seed)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2, "num_hidden_layers": BLOCKS}
    return BertForSequenceClassification(BertConfig(vocab_size=50, num_labels=3, **(sizes | config)))


def tiny_data(seed: int = 0) -> list[dict]:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(1, 50, (EXAMPLES, 8), generator=generator)
    return [{"input_ids": row, "attention_mask": torch.ones_like(row), "labels": int(row[0]) % 3} for row in ids]


def hashes(model: torch.nn.Module) -> dict[str, str]:
    return {n: hashlib.sha256(p.detach().cpu().numpy().tobytes()).hexdigest() for n, p in model.named_parameters()}


def pytest_configure(config):
    if DEVICE == "cuda":  # said by torch.compile of the loss
        config.addinivalue_line("filterwarnings", r"ignore:\s*Online softmax is disabled:UserWarning")


@pytest.hookimpl(tryfirst=True)  # before xdist reads the groups
def pytest_collection_modifyitems(items):
    """Mark what trains with a Trainer, so that the run at each save can leave it out; keep on one worker what shares
    processes that a fixture launches."""
    for item in items:
        if launched := LAUNCHED.intersection(item.fixturenames):
            item.add_marker(pytest.mark.xdist_group(min(launched)))
        if "make_trainer" in item.fixturenames:
            item.add_marker("trains")


def build_trainer(
    folder: Path, *callbacks, model=None, optimizers=(None, None), model_init=None, **arguments
) -> Trainer:
    """A Trainer over the tiny model; keyword arguments go to TrainingArguments."""
    defaults = {
        "output_dir": str(folder),
        "per_device_train_batch_size": 4,
        "num_train_epochs": 3,
        "learning_rate": 1e-2,
        "weight_decay": 0.1,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": DEVICE == "cpu",
        "seed": 3,
    }
    return Trainer(
        model=None if model_init else model or tiny_bert(),
        model_init=model_init,
        args=TrainingArguments(**(defaults | arguments)),
        train_dataset=tiny_data(),
        eval_dataset=tiny_data(1),
        optimizers=optimizers,
        callbacks=list(callbacks),
    )


@pytest.fixture
def make_trainer(tmp_path):
    """``build_trainer`` in a folder of the test."""
    return partial(build_trainer, tmp_path / "run")
