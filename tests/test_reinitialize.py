"""Weights drawn anew are those of a fresh model, whatever rule its family draws them by."""

from __future__ import annotations

import pytest
import torch
import transformers
from conftest import hashes
from torch import nn

from hf_unfreeze import layer_groups
from hf_unfreeze.errors import StructureError
from hf_unfreeze.regularization import reinitialize

SMALL = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "num_hidden_layers": 2}
TEXT, IMAGE = SMALL | {"vocab_size": 99}, SMALL | {"image_size": 32, "patch_size": 8}
TWO = {"d_model": 64, "encoder_layers": 2, "decoder_layers": 2, "encoder_ffn_dim": 128, "decoder_ffn_dim": 128,
       "encoder_attention_heads": 4, "decoder_attention_heads": 4, "vocab_size": 99}  # fmt: skip
SOUND = {"conv_dim": (32, 32), "conv_stride": (5, 2), "conv_kernel": (10, 3), "num_feat_extract_layers": 2,
         "num_conv_pos_embeddings": 16, "num_conv_pos_embedding_groups": 4}  # fmt: skip
MEL = {"num_mel_bins": 8, "max_source_positions": 20, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
TOKENS = {"bos_token_id": 1, "eos_token_id": 2, "sep_token_id": 2}
FAMILIES = {
    "T5ForConditionalGeneration": {"d_model": 64, "d_kv": 32, "d_ff": 128, "num_layers": 2, "num_heads": 4,
                                   "vocab_size": 99},
    "CLIPModel": {"text_config": TEXT, "vision_config": IMAGE, "projection_dim": 32},
    "SiglipModel": {"text_config": TEXT, "vision_config": IMAGE},
    "BlipForConditionalGeneration": {"text_config": TEXT | TOKENS | {"encoder_hidden_size": 64},
                                     "vision_config": IMAGE},
    "GPT2LMHeadModel": {"n_embd": 64, "n_layer": 6, "n_head": 4, "vocab_size": 99} | TOKENS,
    "MambaForCausalLM": {"hidden_size": 64, "num_hidden_layers": 2, "vocab_size": 99},
    "WhisperForConditionalGeneration": TWO | MEL | {"decoder_start_token_id": 1, "begin_suppress_tokens": None},
    "BertForMaskedLM": TEXT,
    "Wav2Vec2ForCTC": SMALL | SOUND,
    "MixtralForCausalLM": TEXT | {"num_key_value_heads": 2, "num_local_experts": 4},
    "Dinov2ForImageClassification": IMAGE | {"mlp_ratio": 2},
    "SwinForImageClassification": {"embed_dim": 32, "depths": [2, 2], "num_heads": [2, 4], "image_size": 32,
                                   "patch_size": 4, "window_size": 4},
}  # fmt: skip


def built(family, seed=0):
    torch.manual_seed(seed)
    kind = getattr(transformers, family)
    return kind(kind.config_class(**FAMILIES[family]))


class Stack(nn.Module):
    """Torch's own layers: the attention has a ``_reset_parameters`` and a projection of its own."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(50, 64)
        layer = nn.TransformerEncoderLayer(64, 4, 128, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(64, 99)

    def forward(self, ids):
        return self.head(self.encoder(self.embed(ids)))


def stack(seed=0):
    torch.manual_seed(seed)
    return Stack()


def everything(model):
    return ", ".join(group.name for group in layer_groups(model) if group.parameter_names)


def fill(model, value=7.0):
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(value)
            parameter._is_hf_initialized = True  # as transformers 5 marks what it has loaded


def check_as_fresh(model, fresh, other, names):
    """Equal where two fresh models agree, of the same spread where they do not."""
    drawn, first, second = (dict(m.named_parameters()) for m in (model, fresh, other))
    for name in names:
        value, expected = drawn[name].detach(), first[name].detach()
        if torch.equal(expected, second[name].detach()):
            assert torch.equal(value, expected), name
        else:
            same = pytest.approx(float(expected.std()), rel=0.4 if expected.numel() < 200 else 0.15)
            assert float(value.std()) == same, name
            assert abs(float(value.mean() - expected.mean())) < 0.6 * float(expected.std()), name
            assert torch.equal(value == 0, expected == 0), name  # the row of the padding


@pytest.mark.parametrize("family", FAMILIES)
def test_everything_drawn_anew_is_a_fresh_model(family):
    model = built(family)
    fill(model)
    state = torch.random.get_rng_state()
    reinitialize(model, everything(model), seed=3)
    assert torch.equal(state, torch.random.get_rng_state())
    check_as_fresh(model, built(family), built(family, 1), dict(model.named_parameters()))


@pytest.mark.parametrize("family", ["T5ForConditionalGeneration", "CLIPModel", "MambaForCausalLM"])
@pytest.mark.parametrize("selectors", ["block[-1]", "head"])
def test_one_group_drawn_anew_leaves_the_others(family, selectors):
    """CLIP draws the head in the rule of the whole model, which says something about the rest too."""
    model = built(family)
    fill(model)
    chosen = reinitialize(model, selectors)
    names = [name for group in layer_groups(model) if group.name in chosen for name in group.parameter_names]
    check_as_fresh(model, built(family), built(family, 1), names)
    assert all(bool((p == 7).all()) for name, p in model.named_parameters() if name not in names)


def test_layers_of_torch_are_drawn_as_torch_draws_them():
    """The layers of a TransformerEncoder are copies, which in a fresh one begin with the same weights."""
    model = stack()
    fill(model)
    reinitialize(model, everything(model))
    check_as_fresh(model, stack(), stack(1), dict(model.named_parameters()))


def test_a_model_in_a_wrapper_keeps_its_rule():
    class Wrapper(nn.Module):
        def __init__(self):
            super().__init__()
            self.module = built("T5ForConditionalGeneration")

    model = Wrapper()
    fill(model)
    reinitialize(model, everything(model))
    check_as_fresh(model.module, built("T5ForConditionalGeneration"), built("T5ForConditionalGeneration", 1),
                   dict(model.module.named_parameters()))  # fmt: skip


class Scaled(Stack):
    def __init__(self):
        super().__init__()
        self.head = nn.ParameterDict({"scale": nn.Parameter(torch.ones(64)), "weight": nn.Parameter(torch.ones(3, 64))})

    def forward(self, ids):
        return (self.encoder(self.embed(ids)) * self.head["scale"]) @ self.head["weight"].T


def test_what_nothing_draws_is_told_and_all_stays():
    model = Scaled()
    start = hashes(model)
    with pytest.raises(StructureError, match=r"cannot draw head\.scale, head\.weight: quantised, or neither"):
        reinitialize(model, "head, block[-1]")
    assert hashes(model) == start
    reinitialize(model, "block[-1]")
    assert hashes(model) != start


def test_a_constant_of_a_model_that_cannot_be_built_again_is_told_and_all_stays():
    model = built("CLIPModel")
    start = hashes(model)
    model.config.text_config = None
    with pytest.raises(StructureError, match=r"takes logit_scale from a second CLIPModel, .* Leave their groups out"):
        reinitialize(model, "head")
    assert hashes(model) == start
