"""Checkpoints in which save_pretrained has given parameters other names, which a Trainer does not load: told."""

from __future__ import annotations

import warnings

import pytest
import torch
import transformers
from conftest import hashes, tiny_bert
from peft import LoraConfig, get_peft_model
from transformers import (
    BertConfig,
    BertForMaskedLM,
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedModel,
    T5Config,
    T5ForConditionalGeneration,
    ViTConfig,
    ViTForImageClassification,
    Wav2Vec2Config,
    Wav2Vec2ForSequenceClassification,
)

from hf_unfreeze import UnfreezeCallback

SMALL = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2, "num_hidden_layers": 2}
RENAMED = int(transformers.__version__.split(".")[0]) > 4
SCHEDULE = "head@0, all@2step"


def vit(seed=0):
    torch.manual_seed(seed)
    return ViTForImageClassification(ViTConfig(**SMALL, image_size=16, patch_size=8, num_labels=3))


def images():
    generator = torch.Generator().manual_seed(0)
    return [{"pixel_values": torch.randn(3, 16, 16, generator=generator), "labels": i % 3} for i in range(16)]


def texts(labels):
    rows = torch.randint(1, 50, (16, 8), generator=torch.Generator().manual_seed(0))
    return [{"input_ids": row, "labels": row if labels else i % 3} for i, row in enumerate(rows)]


def train(make_trainer, model, data, spec=SCHEDULE, resume=None, **arguments):
    arguments = {"max_steps": 6, "save_strategy": "steps", "save_steps": 4, "learning_rate": 1e-3, **arguments}
    trainer = make_trainer(UnfreezeCallback(spec), model=model, **arguments)
    trainer.train_dataset = trainer.eval_dataset = data
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        trainer.train(resume_from_checkpoint=resume)
    return trainer, [str(warning.message) for warning in told if "other names" in str(warning.message)]


def test_parameters_that_a_trainer_does_not_load_back_are_told_with_what_to_do(make_trainer, tmp_path):
    whole, told = train(make_trainer, vit(), images())
    assert not told
    checkpoint, again = str(tmp_path / "run" / "checkpoint-4"), {"output_dir": str(tmp_path / "again")}
    resumed, told = train(make_trainer, vit(), images(), resume=checkpoint, **again)
    assert len(told) == RENAMED
    assert (hashes(resumed.model) == hashes(whole.model)) != RENAMED, "no longer so: leave the warning out"
    if RENAMED:
        assert "has not loaded vit.layers.0.attention.q_proj.weight and " in told[0]
        assert f"ViTForImageClassification.from_pretrained({checkpoint!r})" in told[0]
    loaded = ViTForImageClassification.from_pretrained(checkpoint)
    resumed, told = train(make_trainer, loaded, images(), resume=checkpoint, **again)
    assert not told and hashes(resumed.model) == hashes(whole.model)


def test_what_has_never_opened_needs_no_loading(make_trainer, tmp_path):
    whole, _ = train(make_trainer, vit(), images(), "head@0")
    arguments = {"resume": str(tmp_path / "run" / "checkpoint-4"), "output_dir": str(tmp_path / "again")}
    resumed, told = train(make_trainer, vit(), images(), "head@0", **arguments)
    assert not told and hashes(resumed.model) == hashes(whole.model)


@pytest.mark.parametrize("spec", ["head@0", "head@0, block[-1]@3step"])
def test_the_best_model_that_will_not_be_whole_is_told_once(make_trainer, spec):
    best = {"eval_strategy": "steps", "eval_steps": 2, "save_steps": 2, "load_best_model_at_end": True}
    _, told = train(make_trainer, vit(), images(), spec, **best)
    assert len(told) == (RENAMED and "block" in spec)
    assert not told or "load_best_model_at_end will leave vit.layers.1.attention.q_proj.weight and 15 more" in told[0]


def lora():
    return get_peft_model(tiny_bert(), LoraConfig(task_type="SEQ_CLS", target_modules=["query", "value"], r=2))


def wav2vec2():
    sizes = {"conv_dim": (8,), "conv_stride": (5,), "conv_kernel": (10,), "num_feat_extract_layers": 1,
             "num_conv_pos_embeddings": 16, "num_conv_pos_embedding_groups": 2}  # fmt: skip
    return Wav2Vec2ForSequenceClassification(Wav2Vec2Config(**SMALL, **sizes, num_labels=3, apply_spec_augment=False))


WHOLE = {
    "GPT-2": (lambda: GPT2LMHeadModel(GPT2Config(n_embd=16, n_layer=2, n_head=2, vocab_size=50)), texts(True)),
    "T5": (
        lambda: T5ForConditionalGeneration(T5Config(d_model=16, d_kv=8, d_ff=16, num_layers=2, num_heads=2,
                                                    vocab_size=50, decoder_start_token_id=0)),
        texts(True),
    ),
    "BERT": (lambda: BertForMaskedLM(BertConfig(**SMALL, vocab_size=50)), texts(True)),
    "LoRA": (lora, texts(False)),
    "Wav2Vec2": (wav2vec2, [{"input_values": torch.ones(200), "labels": i % 3} for i in range(16)]),
}  # fmt: skip


@pytest.mark.parametrize("kind", WHOLE)
@pytest.mark.parametrize("shards", [False, True])
def test_tied_weights_adapters_and_shards_raise_no_alarm(make_trainer, tmp_path, kind, shards, monkeypatch):
    make, data = WHOLE[kind]
    if shards:
        original = PreTrainedModel.save_pretrained
        monkeypatch.setattr(
            PreTrainedModel, "save_pretrained", lambda *a, **k: original(*a, **{**k, "max_shard_size": "5KB"})
        )
    torch.manual_seed(0)
    whole, _ = train(make_trainer, make(), data, "all_at_once" if kind == "LoRA" else SCHEDULE)
    folder = tmp_path / "run" / "checkpoint-4"
    assert not shards or kind == "LoRA" or (folder / "model.safetensors.index.json").exists()
    torch.manual_seed(0)
    arguments = {"resume": str(folder), "output_dir": str(tmp_path / "again")}
    again, told = train(make_trainer, make(), data, "all_at_once" if kind == "LoRA" else SCHEDULE, **arguments)
    assert not told and hashes(again.model) == hashes(whole.model)
