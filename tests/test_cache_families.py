"""The frozen-prefix cache in families of models: weights as without it, each example once through a frozen block."""

from __future__ import annotations

import pytest
import torch
from test_cache import DOWN, SGD, both, pad, ragged_data
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    AutoModelForSpeechSeq2Seq,
    AutoModelForTokenClassification,
)

from hf_unfreeze.schedule import RECOMMENDED

pytestmark = pytest.mark.filterwarnings("ignore:schedule .* will not reach:UserWarning")

SIZES = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2, "num_hidden_layers": 3}
PICTURE = {"image_size": 8, "patch_size": 4, "num_labels": 3}
SPEECH = {"d_model": 16, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 2, "num_mel_bins": 8,
          "decoder_attention_heads": 2, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32, "vocab_size": 50,
          "max_source_positions": 20, "max_target_positions": 20, "pad_token_id": 0, "bos_token_id": 1,
          "eos_token_id": 2, "decoder_start_token_id": 1}  # fmt: skip
TEXT = {"vocab_size": 50, "num_labels": 3, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
FAMILIES = {
    "roberta": (AutoModelForTokenClassification, SIZES | TEXT | {"num_labels": 50}, DOWN),
    "distilbert": (AutoModelForSequenceClassification,
                   TEXT | {"dim": 16, "hidden_dim": 32, "n_heads": 2, "n_layers": 3}, DOWN),
    "gpt2": (AutoModelForSequenceClassification,
             TEXT | {"n_embd": 16, "n_head": 2, "n_layer": 3}, DOWN),
    "llama": (AutoModelForCausalLM, SIZES | TEXT | {"num_key_value_heads": 1, "tie_word_embeddings": True}, DOWN),
    "vit": (AutoModelForImageClassification, SIZES | PICTURE, DOWN),
    "whisper": (AutoModelForSpeechSeq2Seq, SPEECH,
                "decoder.block[-1]@0, head@0, encoder.block[-1]@1ep, -encoder.block[-1]@2ep"),
    "t5": (AutoModelForSeq2SeqLM, TEXT | {"d_model": 16, "d_ff": 32, "num_layers": 2, "num_heads": 2, "d_kv": 8,
                                          "dropout_rate": 0.0, "decoder_start_token_id": 0},
           "decoder.block[-1]@0, head@0, decoder.block[-2:]@1ep"),
}  # fmt: skip


def family_data(name: str) -> list[dict]:
    generator = torch.Generator().manual_seed(1)
    if name == "vit":
        return [
            {"pixel_values": torch.randn(3, 8, 8, generator=generator).double(), "labels": i % 3} for i in range(12)
        ]
    if name == "whisper":
        sound = [torch.randn(8, 40, generator=generator).double() for _ in range(12)]
        return [{"input_features": x, "labels": torch.arange(3, 7 + i % 3)} for i, x in enumerate(sound)]
    return ragged_data()[:12]


def family_batch(name: str):
    def collate(rows: list[dict]) -> dict:
        if name == "vit":
            pictures = torch.stack([row["pixel_values"] for row in rows])
            return {"pixel_values": pictures, "labels": torch.tensor([row["labels"] for row in rows])}
        if name == "whisper":
            labels = [nn.functional.pad(row["labels"], (0, 6 - len(row["labels"])), value=-100) for row in rows]
            return {
                "input_features": torch.stack([row["input_features"] for row in rows]),
                "labels": torch.stack(labels),
            }
        batch = pad(rows)
        if name in ("roberta", "llama", "t5"):
            batch["labels"] = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
        return batch

    return collate


def both_families(make_trainer, name: str, schedule: str):
    """Train without a cache and with it, and compare all weights; return the cache."""
    auto, config, _ = FAMILIES[name]

    def model():
        torch.manual_seed(0)
        return auto.from_config(AutoConfig.for_model(name, **config)).double()

    data = {"data": family_data(name), "collator": family_batch(name)}
    plain, cached, cache = both(make_trainer, schedule, model=model, **data, **SGD)
    bound = 1e-7 if name == "t5" else 1e-10  # T5 rounds to fp32 in its norms and in attention, whatever its dtype
    for (name_of, one), other in zip(plain.model.named_parameters(), cached.model.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=bound, msg=name_of)
    assert cache.active.off == ""
    return cache


@pytest.mark.parametrize("name", FAMILIES)
def test_families(make_trainer, name):
    cache = both_families(make_trainer, name, FAMILIES[name][2])
    again = 12 if name == "whisper" else 0  # the encoder block that trained in epoch 1 has new weights
    checked = {"whisper": 4, "t5": 0}.get(name, 8)  # a batch runs in full where a boundary has moved
    assert (cache.stats.hits, cache.stats.misses) == (24 - again - checked, 12 + again)


def test_an_encoder_that_trains_for_a_part_of_the_run(make_trainer):
    cache = both_families(make_trainer, "whisper", RECOMMENDED)
    assert (cache.stats.hits, cache.stats.misses) == (12, 24)  # each of 12 below what trains, and again once it rests
