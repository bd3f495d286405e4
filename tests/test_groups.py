"""Layer groups of real architectures at 12 layers: names in order, a partition, and chosen parameters by hand."""

from __future__ import annotations

import pytest
import torch
import transformers
from torch import nn
from transformers import AutoConfig

from hf_unfreeze import Architecture, LayerGroup, layer_groups, list_architectures, register_architecture
from hf_unfreeze.errors import StructureError

DEPTH = 12
LAYER_KEYS = ("num_hidden_layers", "num_layers", "num_decoder_layers", "n_layer", "n_layers", "encoder_layers",
              "decoder_layers", "encoder_ffn", "n_head_layers")  # fmt: skip

# model type, Auto class, stacks bottom → top, and the group of some parameters
TABLE = [
    ("bert", "SequenceClassification", "", {"bert.pooler.dense.bias": "head", "classifier.bias": "head",
        "bert.embeddings.LayerNorm.bias": "embeddings", "bert.encoder.layer.10.output.dense.bias": "block[10]"}),
    ("bert", "MaskedLM", "", {"bert.embeddings.word_embeddings.weight": "embeddings",
        "cls.predictions.transform.dense.bias": "head"}),
    ("bert", "TokenClassification", "", {"classifier.weight": "head"}),
    ("roberta", "SequenceClassification", "", {"classifier.dense.bias": "head"}),
    ("roberta", "CausalLM", "", {"lm_head.dense.bias": "head"}),
    ("xlm-roberta", "TokenClassification", "", {"classifier.bias": "head"}),
    ("camembert", "SequenceClassification", "", {"classifier.dense.bias": "head"}),
    ("electra", "SequenceClassification", "", {"electra.embeddings_project.bias": "embeddings"}),
    ("distilbert", "SequenceClassification", "", {"pre_classifier.bias": "head",
        "distilbert.transformer.layer.11.ffn.lin1.bias": "block[11]"}),
    ("distilbert", "QuestionAnswering", "", {"qa_outputs.bias": "head"}),
    ("deberta", "SequenceClassification", "", {"pooler.dense.bias": "head"}),
    ("deberta-v2", "SequenceClassification", "", {"pooler.dense.bias": "head"}),
    ("mpnet", "SequenceClassification", "", {"mpnet.encoder.relative_attention_bias.weight": "embeddings"}),
    ("longformer", "SequenceClassification", "", {"classifier.dense.bias": "head"}),
    ("big_bird", "SequenceClassification", "", {"classifier.dense.bias": "head"}),
    ("ernie", "SequenceClassification", "", {"ernie.pooler.dense.bias": "head"}),
    ("megatron-bert", "SequenceClassification", "", {"bert.encoder.ln.bias": "head"}),
    ("rembert", "SequenceClassification", "", {"rembert.encoder.embedding_hidden_mapping_in.bias": "embeddings"}),
    ("layoutlm", "TokenClassification", "", {"layoutlm.embeddings.x_position_embeddings.weight": "embeddings"}),
    ("xlnet", "SequenceClassification", "", {"transformer.word_embedding.weight": "embeddings",
        "sequence_summary.summary.bias": "head"}),
    ("modernbert", "SequenceClassification", "", {"model.final_norm.weight": "head", "head.dense.weight": "head"}),
    ("gpt2", "CausalLM", "", {"transformer.wte.weight": "embeddings", "transformer.ln_f.bias": "head",
        "transformer.h.10.attn.c_attn.bias": "block[10]"}),
    ("gpt2", "SequenceClassification", "", {"score.weight": "head"}),
    ("gpt_neo", "CausalLM", "", {"transformer.ln_f.bias": "head"}),
    ("gptj", "CausalLM", "", {"lm_head.bias": "head"}),
    ("gpt_neox", "CausalLM", "", {"gpt_neox.embed_in.weight": "embeddings"}),
    ("llama", "CausalLM", "", {"model.embed_tokens.weight": "embeddings", "model.norm.weight": "head",
        "lm_head.weight": "head", "model.layers.10.mlp.up_proj.weight": "block[10]"}),
    ("mistral", "CausalLM", "", {"lm_head.weight": "head"}),
    ("mixtral", "CausalLM", "", {"model.layers.11.input_layernorm.weight": "block[11]"}),
    ("qwen2", "CausalLM", "", {"model.norm.weight": "head"}),
    ("qwen3", "SequenceClassification", "", {"score.weight": "head"}),
    ("gemma", "CausalLM", "", {"model.embed_tokens.weight": "embeddings"}),
    ("gemma2", "CausalLM", "", {"model.norm.weight": "head"}),
    ("phi", "CausalLM", "", {"model.final_layernorm.bias": "head"}),
    ("phi3", "CausalLM", "", {"model.norm.weight": "head"}),
    ("olmo2", "CausalLM", "", {"model.norm.weight": "head"}),
    ("stablelm", "CausalLM", "", {"model.norm.bias": "head"}),
    ("starcoder2", "CausalLM", "", {"model.norm.bias": "head"}),
    ("cohere", "CausalLM", "", {"model.norm.weight": "head"}),
    ("opt", "CausalLM", "", {"model.decoder.embed_positions.weight": "embeddings"}),
    ("bloom", "CausalLM", "", {"transformer.word_embeddings_layernorm.bias": "embeddings"}),
    ("falcon", "CausalLM", "", {"transformer.ln_f.bias": "head"}),
    ("t5", "Seq2SeqLM", "encoder decoder", {"shared.weight": "embeddings", "decoder.final_layer_norm.weight": "head",
        "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight": "embeddings",
        "decoder.block.10.layer.0.layer_norm.weight": "decoder.block[10]"}),
    ("mt5", "Seq2SeqLM", "encoder decoder", {"decoder.final_layer_norm.weight": "head"}),
    ("bart", "Seq2SeqLM", "encoder decoder", {"model.encoder.layernorm_embedding.bias": "embeddings"}),
    ("mbart", "Seq2SeqLM", "encoder decoder", {"model.decoder.layer_norm.bias": "head"}),
    ("marian", "Seq2SeqLM", "encoder decoder", {"model.shared.weight": "embeddings"}),
    ("pegasus", "Seq2SeqLM", "encoder decoder", {"model.decoder.layers.10.fc1.bias": "decoder.block[10]"}),
    ("m2m_100", "Seq2SeqLM", "encoder decoder", {"model.shared.weight": "embeddings"}),
    ("whisper", "SpeechSeq2Seq", "encoder decoder", {"model.encoder.conv2.bias": "embeddings",
        "model.decoder.embed_tokens.weight": "embeddings", "model.decoder.layer_norm.bias": "head"}),
    ("whisper", "AudioClassification", "", {"projector.bias": "head", "encoder.conv1.bias": "embeddings"}),
    ("vit", "ImageClassification", "", {"vit.layernorm.bias": "head", "vit.embeddings.cls_token": "embeddings"}),
    ("beit", "ImageClassification", "", {"classifier.bias": "head"}),
    ("dinov2", "ImageClassification", "", {"dinov2.layernorm.bias": "head"}),
    ("audio-spectrogram-transformer", "AudioClassification", "", {"classifier.dense.bias": "head"}),
    ("clip", "ZeroShotImageClassification", "parallel", {"logit_scale": "head",
        "visual_projection.weight": "head", "vision_model.pre_layrnorm.bias": "embeddings"}),
    ("siglip", "ZeroShotImageClassification", "parallel", {"logit_bias": "head"}),
    ("wav2vec2", "CTC", "", {"lm_head.bias": "head", "wav2vec2.encoder.layer_norm.bias": "embeddings",
        "wav2vec2.feature_projection.projection.bias": "embeddings"}),
    ("hubert", "AudioClassification", "", {"projector.bias": "head"}),
    ("wavlm", "AudioClassification", "",
        {"wavlm.encoder.layers.0.attention.rel_attn_embed.weight": "embeddings"}),
]  # fmt: skip


def build(model_type: str, task: str, depth: int = DEPTH, **changes) -> nn.Module:
    """Build a model on the meta device from its default config at the given depth."""
    config = AutoConfig.for_model(model_type, **changes)
    for part in (
        config,
        *(getattr(config, name) for name in ("text_config", "vision_config") if hasattr(config, name)),
    ):
        for key in LAYER_KEYS:
            if isinstance(getattr(part, key, None), int):
                setattr(part, key, depth)
    for key, value in {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 0}.items():
        setattr(config, key, value)
    if model_type == "gpt_neo":
        config.attention_types = [[["global"], depth]]
        config.attention_layers = ["global"] * depth
    if getattr(config, "layer_types", None):
        config.layer_types = config.layer_types[:1] * depth
    if model_type == "mixtral":
        config.num_local_experts = 2
    config.is_decoder = task == "CausalLM" or getattr(config, "is_decoder", False)
    with torch.device("meta"):
        return getattr(transformers, f"AutoModelFor{task}").from_config(config)


def names(stacks: str) -> list[str]:
    if stacks == "parallel":
        blocks = [f"{stack}.block[{i}]" for i in range(DEPTH) for stack in ("text", "vision")]
    elif stacks:
        blocks = [f"{stack}.block[{i}]" for stack in stacks.split() for i in range(DEPTH)]
    else:
        blocks = [f"block[{i}]" for i in range(DEPTH)]
    return ["embeddings", *blocks, "head"]


def partition(model: nn.Module) -> dict[str, str]:
    """Check that the groups are a partition of the distinct parameters; return the group of every name."""
    groups = layer_groups(model)
    owned = [name for group in groups for name in group.parameter_names]
    assert sorted(owned) == sorted(name for name, _ in model.named_parameters())
    return {name: group.name for group in groups for name in group.parameter_names}


@pytest.mark.parametrize(
    ("model_type", "task", "stacks", "places"), TABLE, ids=lambda v: v if isinstance(v, str) else ""
)
def test_groups_by_hand(model_type, task, stacks, places):
    model = build(model_type, task)
    groups = layer_groups(model)
    assert [group.name for group in groups] == names(stacks)
    found = partition(model)
    assert {name: found[name] for name in places} == places
    assert all(group.parameter_names for group in groups[1:-1])
    levels = [group.level for group in groups]
    assert levels == sorted(levels) and levels[0] == 0


def test_the_table_covers_the_registry():
    staged_or_shared = {"albert", "swin", "convnext", "convnextv2", "segformer"}  # below, block by block
    bare = {"deit", "blenderbot", "qwen2_moe", "smollm3"}  # same family, same row as one in the table
    rows = {row.model_type for row in list_architectures()}
    assert rows - staged_or_shared - bare == {row[0] for row in TABLE}
    assert len(rows) >= 43


def test_albert_shares_one_block():
    model = build("albert", "SequenceClassification")
    assert [group.name for group in layer_groups(model)] == ["embeddings", "block[0]", "head"]
    assert partition(model)["albert.encoder.embedding_hidden_mapping_in.bias"] == "embeddings"


@pytest.mark.parametrize("model_type", ["swin", "convnext"])
def test_staged_models_number_their_blocks_through(model_type):
    with torch.device("meta"):
        model = transformers.AutoModelForImageClassification.from_config(AutoConfig.for_model(model_type))
    found = partition(model)
    depths = {"swin": [2, 2, 6, 2], "convnext": [3, 3, 9, 3]}[model_type]
    assert [g.name for g in layer_groups(model)] == ["embeddings", *(f"block[{i}]" for i in range(sum(depths))), "head"]
    second = f"block[{depths[0]}]"  # the first block of the second stage, which the downsampling serves
    assert {
        group for name, group in found.items() if "downsampl" in name and ("layers.0" in name or "stages.1" in name)
    } == {second}


def test_wav2vec2_with_stable_layer_norm_ends_in_it():
    model = build("wav2vec2", "CTC", do_stable_layer_norm=True)
    assert partition(model)["wav2vec2.encoder.layer_norm.bias"] == "head"


def test_tied_and_untied_heads():
    config = transformers.GPT2Config(n_layer=2, n_embd=8, n_head=2, vocab_size=20, bos_token_id=0, eos_token_id=0)
    model = transformers.GPT2LMHeadModel(config)
    assert model.lm_head.weight is model.transformer.wte.weight
    assert partition(model)["transformer.wte.weight"] == "embeddings"
    config.tie_word_embeddings = False
    assert partition(transformers.GPT2LMHeadModel(config))["lm_head.weight"] == "head"


def test_wrapped_models_keep_their_names():
    inner = build("bert", "SequenceClassification", 2)
    compiled = torch.compile(inner)
    assert [group.name for group in layer_groups(compiled)] == ["embeddings", "block[0]", "block[1]", "head"]
    assert all(name.startswith("_orig_mod.") for group in layer_groups(compiled) for name in group.parameter_names)


def test_peft():
    from peft import LoraConfig, get_peft_model

    config = transformers.BertConfig(hidden_size=16, intermediate_size=32, num_attention_heads=2, num_hidden_layers=2)
    lora = LoraConfig(task_type="SEQ_CLS", target_modules=["query"])
    model = get_peft_model(transformers.BertForSequenceClassification(config), lora)
    found = partition(model)
    assert {group for name, group in found.items() if "lora_" in name} == {"block[0]", "block[1]"}
    assert {group for name, group in found.items() if "modules_to_save" in name} == {"head"}


class Tower(nn.Module):
    """A model of nobody's: a stem, a list of like blocks, a head."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Linear(4, 8)
        self.blocks = nn.ModuleList(nn.Linear(8, 8) for _ in range(3))
        self.out = nn.Linear(8, 2)


def test_a_plain_module_is_detected():
    assert [(g.name, g.parameter_names) for g in layer_groups(Tower())] == [
        ("embeddings", ("stem.weight", "stem.bias")),
        *((f"block[{i}]", (f"blocks.{i}.weight", f"blocks.{i}.bias")) for i in range(3)),
        ("head", ("out.weight", "out.bias")),
    ]


def test_a_model_without_structure_is_one_group():
    model = nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 1))
    assert [group.name for group in layer_groups(model)] == ["all_parameters"]


def test_what_is_no_model_is_refused():
    with pytest.raises(StructureError, match=r"not str"):
        layer_groups("bert-base-uncased")
    with pytest.raises(StructureError, match="has no parameters"):
        layer_groups(nn.ReLU())


def test_a_row_that_does_not_fit_falls_back_with_one_warning():
    model = Tower()
    model.config = transformers.BertConfig()
    with pytest.warns(
        UserWarning, match=r"the row of 'bert' does not fit Tower: nothing matches encoder\.layer"
    ) as caught:
        groups = layer_groups(model)
    assert len(caught) == 1 and len(groups) == 5


def test_a_row_of_ones_own():
    register_architecture(Architecture("tower-of-the-tests", {"": ("blocks",)}, ("stem",)))
    with pytest.raises(StructureError, match="has a row already"):
        register_architecture(Architecture("tower-of-the-tests", {"": ("blocks",)}, ("stem",)))


def test_a_group_is_plain_data():
    group = LayerGroup("block[0]", "", ("a", "b"))
    assert hash(group) == hash(LayerGroup("block[0]", "", ("a", "b")))
