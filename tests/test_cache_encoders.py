"""Encoders that the cache takes or leaves for what is special about them."""

from __future__ import annotations

import random

import pytest
import torch
from conftest import EXAMPLES, tiny_bert
from test_cache import SGD, both, by_hand, pad, ragged_data
from test_cache_calls import EPOCH, SIZES, assert_alike, batches, evaluates
from torch import nn
from transformers import (
    BigBirdConfig,
    BigBirdForSequenceClassification,
    DebertaV2Config,
    DebertaV2ForSequenceClassification,
    EsmConfig,
    EsmForSequenceClassification,
    LlamaConfig,
    LlamaModel,
    MPNetConfig,
    MPNetForSequenceClassification,
    T5Config,
    T5ForConditionalGeneration,
    Wav2Vec2Config,
    Wav2Vec2ForSequenceClassification,
    XmodConfig,
    XmodForSequenceClassification,
)

from hf_unfreeze import FrozenPrefixCache, Unfreezer

pytestmark = pytest.mark.filterwarnings("ignore:schedule .* will not reach:UserWarning")


def deberta():
    more = {"relative_attention": True, "pos_att_type": ["c2p", "p2c"], "position_buckets": 8, "share_att_key": True}
    more |= {"max_relative_positions": 16, "norm_rel_ebd": "layer_norm", "vocab_size": 50, "num_labels": 3}
    return DebertaV2ForSequenceClassification(DebertaV2Config(**SIZES, **more)).double()


def mpnet():
    return MPNetForSequenceClassification(MPNetConfig(**SIZES, vocab_size=50, num_labels=3)).double()


def wav2vec2():
    more = {"conv_dim": (8, 8), "conv_stride": (5, 2), "conv_kernel": (10, 3), "num_feat_extract_layers": 2}
    more |= {"num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": 2, "apply_spec_augment": False}
    more |= {"layerdrop": 0.0, "num_labels": 3, "classifier_proj_size": 8}
    return Wav2Vec2ForSequenceClassification(Wav2Vec2Config(**SIZES, **more)).double()


@pytest.mark.parametrize("make", [deberta, mpnet])
def test_families_whose_blocks_read_a_table_beside_them(make):
    """Positions of DeBERTa and MPNet; the former asks its own encoder for hidden states, and reads the last."""
    cache = assert_alike(make, schedule="head@0, block[-1]@0")
    assert cache.active.off == "" and cache.stats.hits == 2 * 4 * EPOCH


def test_a_family_that_asks_its_encoder_for_hidden_states_and_drops_them():
    sounds = torch.randn(4 * EPOCH, 200, generator=torch.Generator().manual_seed(0)).double().split(4)
    data = [{"input_values": sound, "labels": batch["labels"]} for sound, batch in zip(sounds, batches(), strict=True)]
    cache = assert_alike(wav2vec2, data=data, schedule="head@0, block[-1]@0")
    assert cache.active.off == "" and cache.stats.hits == 2 * 4 * EPOCH


def test_an_encoder_is_passed_over_in_evaluation_too():
    """What the decoder returns of keys and values is no concern of the encoder's."""
    sizes = {"vocab_size": 50, "d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_heads": 2}

    def t5():
        config = T5Config(**sizes, dropout_rate=0.0, decoder_start_token_id=0, pad_token_id=0)
        return T5ForConditionalGeneration(config).double()

    data = [batch | {"labels": batch["input_ids"]} for batch in batches()]
    cache = assert_alike(t5, evaluates, data, schedule="head@0, decoder.block[-1]@0")
    assert cache.stats.hits == 3 * 2 * 4 * EPOCH - 4 * EPOCH - 4  # all but the first of each, and what is checked


class OverLlama(nn.Module):
    """Has no config of its own."""

    def __init__(self, **config) -> None:
        super().__init__()
        self.encoder = LlamaModel(LlamaConfig(**SIZES, vocab_size=50, num_key_value_heads=2, **config))
        self.head = nn.Linear(16, 3)
        self.double()

    def forward(self, input_ids, attention_mask=None, labels=None):
        logits = self.head(self.encoder(input_ids, attention_mask=attention_mask)[0][:, -1])
        return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}


def test_one_mask_for_all_examples():
    mask = torch.full((1, 1, 8, 8), -1e9).double().triu(1)
    cache = assert_alike(OverLlama, data=[batch | {"attention_mask": mask} for batch in batches()])
    assert cache.active.off == "" and cache.stats.hits == 2 * 4 * EPOCH


def big_bird():
    config = BigBirdConfig(**SIZES, vocab_size=50, num_labels=3, attention_type="block_sparse", block_size=2)
    return BigBirdForSequenceClassification(config).double()


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: OverLlama(rope_scaling={"rope_type": "dynamic", "factor": 2.0}, max_position_embeddings=6),
         "dynamic rotary positions"),
        (big_bird, "block-sparse attention"),
    ],
)  # fmt: skip
def test_what_goes_by_the_lengths_it_has_met(make, reason):
    model = make()
    with pytest.warns(UserWarning, match=reason):
        Unfreezer(model, torch.optim.SGD(model.parameters(), lr=0.1), "head@0", cache="memory").close()


def xmod():
    config = XmodConfig(**SIZES, vocab_size=50, num_labels=3, languages=["a", "b"], default_language="a")
    return XmodForSequenceClassification(config).double()


def speaks_another_language(model, batch, step):
    model.set_default_language("ab"[step >= EPOCH + 2])
    return model(**batch).loss


def lora():
    import peft

    model = tiny_bert(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    config = peft.LoraConfig(task_type="SEQ_CLS", target_modules=["query"], init_lora_weights=False)
    return peft.get_peft_model(model, config).double()


def scales_its_adapters(model, batch, step):
    for module in model.modules():
        if isinstance(getattr(module, "scaling", None), dict):
            module.scaling["default"] = 1.0 + 9 * (step >= EPOCH + 2)
    return model(**batch).loss


def rounds_for_a_while(model, batch, step):
    """In two ways, on the same examples."""
    with torch.autocast("cpu", torch.bfloat16, enabled=step % 3 == 2):
        return model(**batch)["loss"]


class Linear(nn.Module):
    """Blocks whose activations are of the type that autocast computes in."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.head = nn.Embedding(50, 16), nn.Linear(16, 3)
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 16)) for _ in range(3))

    def forward(self, input_ids, attention_mask=None, labels=None):
        hidden = self.tokens(input_ids)
        for layer in self.layers:
            hidden = layer(hidden)
        logits = self.head(hidden.mean(dim=1).to(self.head.weight.dtype))
        return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}


@pytest.mark.parametrize(
    ("make", "loss", "within"),
    [(xmod, speaks_another_language, 1e-10), (lora, scales_its_adapters, 1e-10), (Linear, rounds_for_a_while, 1e-6)],
)
def test_what_is_set_in_mid_run(make, loss, within):
    cache = assert_alike(make, loss, within=within)
    assert cache.active.off == "" and cache.stats.hits


def test_a_switch_that_is_named_like_a_rate_is_part_of_the_key(tmp_path):
    """``token_dropout`` of ESM scales its embeddings, in eval mode too."""

    def misses(token_dropout):
        sizes = SIZES | {"vocab_size": 50, "num_labels": 3, "pad_token_id": 1, "mask_token_id": 4}
        torch.manual_seed(0)
        model = EsmForSequenceClassification(EsmConfig(**sizes, token_dropout=token_dropout))
        cache = FrozenPrefixCache("disk", folder=tmp_path)
        unfreezer = by_hand(model, cache)
        for _ in range(2):
            model(**batches()[0])
        unfreezer.close()
        return cache.stats.misses

    assert (misses(True), misses(True), misses(False)) == (4, 0, 4)


class Augments:
    """Draws from a generator of its own, which it keeps in a list."""

    def __init__(self) -> None:
        self.sources = [random.Random(0)]

    def __call__(self, rows):
        batch = pad(rows)
        batch["labels"] = batch["labels"] * 0 + self.sources[0].randrange(3)
        return batch


def test_a_generator_that_a_collator_keeps_in_a_list(make_trainer):
    """To fetch an example once more would move it on."""

    def trained(cache):
        collator = Augments()
        options = {"data": ragged_data(), "collator": collator, "cache": cache, "per_device_train_batch_size": 4}
        both(make_trainer, "head@0", model=lambda: tiny_bert().double(), **options, **SGD)
        return collator.sources[0].random()

    expected = Augments().sources[0]
    for _ in range(2 * 3 * EXAMPLES // 4):
        expected.randrange(3)
    assert trained(FrozenPrefixCache()) == expected.random()
