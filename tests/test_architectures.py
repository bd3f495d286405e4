"""The registry as data, and names that may not change."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import model_zoo
import pytest

from hf_unfreeze import Architecture, layer_groups, list_architectures, register_architecture
from hf_unfreeze.architectures import find_architecture
from hf_unfreeze.errors import StructureError

SNAPSHOT = Path(__file__).parent / "data" / "group_names.json"
PROMISED = [
    "bert", "roberta", "xlm-roberta", "distilbert", "electra", "deberta", "deberta-v2", "albert", "mpnet",
    "camembert", "xlnet", "modernbert", "longformer", "big_bird", "gpt2", "gpt_neox", "llama", "mistral",
    "mixtral", "qwen2", "qwen3", "gemma2", "phi3", "opt", "bloom", "falcon", "t5", "bart", "mbart", "marian",
    "pegasus", "vit", "deit", "beit", "dinov2", "swin", "convnext", "segformer", "clip", "siglip", "whisper",
    "wav2vec2", "hubert", "wavlm",
]  # fmt: skip


def test_every_promised_row_is_there():
    rows = [row.model_type for row in list_architectures()]
    assert set(PROMISED) <= set(rows)
    assert rows == sorted(rows)


def test_rows_are_frozen_and_equal_by_value():
    row = find_architecture("bert")
    assert row == Architecture("bert", dict(row.stacks), row.embeddings)
    with pytest.raises(dataclasses.FrozenInstanceError):
        row.model_type = "other"


def test_a_second_row_is_refused():
    with pytest.raises(StructureError, match="'bert' has a row already"):
        register_architecture(Architecture("bert", {"": ("layers",)}, ()))


def names_now() -> dict[str, list[str]]:
    first = {pair.model_type: pair for pair in model_zoo.pairs() if pair.auto == "base"}
    return {name: [group.name for group in layer_groups(model_zoo.build(first[name]))] for name in PROMISED}


def test_group_names_are_stable():
    assert names_now() == json.loads(SNAPSHOT.read_text())
