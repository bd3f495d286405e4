"""Models that are not the default: other configs, adapters, quantised layers, wrappers, and other libraries."""

from __future__ import annotations

import copy
import re

import model_zoo
import pytest
import torch
import transformers
from conftest import tiny_bert
from no_torchvision import import_timm
from torch import nn

from hf_unfreeze import Unfreezer, layer_groups, set_trainable, trainable_summary
from hf_unfreeze.errors import ScheduleError
from hf_unfreeze.groups import explain_groups

NAMES = ["embeddings", "block[0]", "block[1]", "block[2]", "block[3]", "head"]


def homes(model: nn.Module) -> dict[str, str]:
    """The group of every distinct parameter; a partition or an error."""
    found = [(name, group.name) for group in layer_groups(model) for name in group.parameter_names]
    assert sorted(name for name, _ in found) == sorted(name for name, _ in model.named_parameters())
    return dict(found)


def names(model: nn.Module) -> list[str]:
    return [group.name for group in layer_groups(model)]


def build(model_type: str, auto: str, **config) -> nn.Module:
    pair = next(pair for pair in model_zoo.pairs() if pair.model_type == model_type and auto in pair.auto)
    return model_zoo.build(pair, 4, **config)


@pytest.mark.parametrize("model_type", ["wav2vec2", "hubert", "wavlm", "unispeech-sat", "data2vec-audio"])
def test_stable_layer_norm_moves_the_norm_of_the_encoder(model_type):
    norm = "encoder.layer_norm.bias"
    before, after = (homes(build(model_type, "base", do_stable_layer_norm=stable)) for stable in (False, True))
    assert before[norm] == "embeddings"
    assert after[norm] == ("embeddings" if model_type == "data2vec-audio" else "head")  # it has no such variant


def test_wav2vec2_adapter_is_head():
    found = homes(build("wav2vec2", "ctc", add_adapter=True))
    assert {group for name, group in found.items() if ".adapter." in name} == {"head"}


@pytest.mark.parametrize("model_type", ["deberta", "deberta-v2"])
def test_deberta_relative_attention(model_type):
    config = {"relative_attention": True, "norm_rel_ebd": "layer_norm", "position_buckets": 16, "conv_kernel_size": 3}
    model = build(model_type, "sequence_classification", **config)
    found = homes(model)
    assert found["deberta.encoder.rel_embeddings.weight"] == "embeddings"
    assert names(model) == NAMES


def test_the_table_that_all_blocks_of_a_beit_share_is_no_head():
    found = homes(build("beit", "image_classification", use_shared_relative_position_bias=True))
    shared = {group for name, group in found.items() if "relative_position_bias" in name and ".layer" not in name}
    assert shared == {"embeddings"}


def test_albert_with_several_groups():
    model = build("albert", "masked_lm", num_hidden_groups=3, inner_group_num=2)
    assert names(model) == ["embeddings", "block[0]", "block[1]", "block[2]", "head"]
    inner = "albert.encoder.albert_layer_groups.2.albert_layers.1.ffn.bias"
    assert homes(model)[inner] == "block[2]"


def test_resized_embeddings_and_head():
    model = transformers.BertForMaskedLM(tiny_bert().config)
    model.resize_token_embeddings(61, mean_resizing=False)
    found = homes(model)
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert found["bert.embeddings.word_embeddings.weight"] == "embeddings"
    assert found["cls.predictions.bias"] == "head"


@pytest.mark.parametrize(("tie", "home"), [(True, None), (False, "head")])
def test_tied_and_untied_heads(tie, home):
    model = build("llama", "causal_lm", tie_word_embeddings=tie)
    assert homes(model).get("lm_head.weight") == home
    assert names(model)[-1] == "head"


def test_an_adapter_added_in_place_lies_in_its_block():
    """What ``model.add_adapter`` of transformers does; 5.24 asks there for a PEFT that is not out yet."""
    from peft import LoraConfig, inject_adapter_in_model

    model = inject_adapter_in_model(LoraConfig(target_modules=["query"]), tiny_bert())
    found = homes(model)
    added = {name: group for name, group in found.items() if "lora_" in name}
    assert len(added) == 8
    assert all(group == f"block[{re.search(r'layer.([0-9])', name)[1]}]" for name, group in added.items())


class Packed(nn.Module):
    """What a quantised linear layer looks like: buffers, no parameter."""

    def __init__(self, linear: nn.Linear):
        super().__init__()
        self.register_buffer("packed", linear.weight.detach().to(torch.int8))

    def forward(self, x):
        return x @ self.packed.T.float()


def test_quantised_linear_layers():
    model = tiny_bert()
    for path, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and ".layer." in path:
            model.set_submodule(path, Packed(module))
    assert names(model) == NAMES
    assert homes(model)["bert.encoder.layer.2.output.LayerNorm.bias"] == "block[2]"


def test_a_block_without_any_parameter_keeps_its_number():
    layers = [nn.Sequential(nn.Linear(3, 3)) for _ in range(4)]
    layers[1] = nn.Sequential(Packed(nn.Linear(3, 3)))
    model = nn.Module()
    model.layers = nn.ModuleList(layers)
    model.head = nn.Linear(3, 1)
    assert names(model) == NAMES
    assert homes(model)["layers.3.0.bias"] == "block[3]"


def peft_model(kind: str):
    import peft

    task = {"task_type": "SEQ_CLS"}
    config = {
        "lora": lambda: peft.LoraConfig(target_modules=["query"], **task),
        "prompt": lambda: peft.PromptTuningConfig(num_virtual_tokens=2, **task),
        "prefix": lambda: peft.PrefixTuningConfig(num_virtual_tokens=2, **task),
        "saved": lambda: peft.LoraConfig(target_modules=["query"], modules_to_save=["pooler"], **task),
    }[kind]()
    return peft.get_peft_model(tiny_bert(), config)


@pytest.mark.parametrize("kind", ["lora", "prompt", "prefix", "saved"])
def test_peft_opens_only_what_was_trainable(kind):
    model = peft_model(kind)
    trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert names(model) == NAMES
    found = homes(model)
    assert {group for name, group in found.items() if "prompt_encoder" in name} <= {"embeddings"}
    assert {group for name, group in found.items() if "modules_to_save" in name} <= {"head"}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    engine = Unfreezer(model, optimizer, "all@0")
    engine.step(0, 0.0)
    assert {name for name, parameter in model.named_parameters() if parameter.requires_grad} == trainable
    engine.close()


def test_ddp_and_compiled_models():
    model = tiny_bert()
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        wrapped = nn.parallel.DistributedDataParallel(model)
        found = homes(wrapped)
    finally:
        torch.distributed.destroy_process_group()
    assert found == {f"module.{name}": group for name, group in homes(model).items()}
    compiled = homes(torch.compile(model))
    assert compiled == {f"_orig_mod.{name}": group for name, group in homes(model).items()}


def test_timm_models_are_split_by_their_own_matcher(monkeypatch):
    timm = import_timm(monkeypatch)
    model = timm.create_model("vit_tiny_patch16_224", depth=4, num_classes=3)
    found = homes(model)
    assert names(model) == NAMES
    assert [found[name] for name in ("pos_embed", "blocks.2.norm1.weight", "norm.weight", "head.bias")] == [
        "embeddings", "block[2]", "head", "head"
    ]  # fmt: skip
    assert "group_matcher of VisionTransformer" in explain_groups(model)["pos_embed"]
    staged = homes(timm.create_model("convnext_atto", depths=(1, 2, 1, 1), num_classes=3))
    assert staged["stages.1.downsample.1.weight"] == staged["stages.1.blocks.0.norm.weight"] == "block[1]"


class Matched(nn.Module):
    """A model with a matcher as timm's have, so that the reading of matchers is tested without timm."""

    def __init__(self):
        super().__init__()
        self.patch = nn.Linear(2, 3)
        self.stages = nn.ModuleList(
            nn.ModuleDict({"downsample": nn.Linear(3, 3), "blocks": nn.ModuleList([nn.Linear(3, 3), nn.Linear(3, 3)])})
            for _ in range(2)
        )
        self.norm = nn.LayerNorm(3)
        self.fc = nn.Linear(3, 2)

    def group_matcher(self, coarse: bool = False):
        blocks = [(r"^stages\.(\d+)\.downsample", (0,)), (r"^stages\.(\d+)\.blocks\.(\d+)", None), (r"^norm", (99999,))]
        return {"stem": r"^patch", "blocks": blocks}


def test_a_matcher_places_downsampling_and_norms():
    found = homes(Matched())
    assert names(Matched()) == NAMES
    assert found["patch.bias"] == "embeddings" and found["norm.bias"] == found["fc.bias"] == "head"
    assert found["stages.1.downsample.bias"] == found["stages.1.blocks.0.bias"] == "block[2]"


def test_sentence_transformers(tmp_path):
    import sentence_transformers
    from sentence_transformers.sentence_transformer import modules as models

    config = tiny_bert().config
    transformers.BertModel(config).save_pretrained(tmp_path)
    vocab = tmp_path / "vocab.txt"
    vocab.write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"abcdefgh"]))
    transformers.BertTokenizer(str(vocab)).save_pretrained(tmp_path)
    parts = [models.Transformer(str(tmp_path)), models.Pooling(16), models.Dense(16, 4)]
    model = sentence_transformers.SentenceTransformer(modules=parts, device="cpu")
    found = homes(model)
    assert names(model) == NAMES
    assert {group for name, group in found.items() if name.startswith("2.")} == {"head"}
    assert {group for name, group in found.items() if "embeddings" in name} == {"embeddings"}


class Nested(nn.Module):
    """Lists in lists, and no word that tells anything."""

    def __init__(self):
        super().__init__()
        self.a = nn.Linear(2, 3)
        self.b = nn.ModuleList(nn.ModuleList(nn.Sequential(nn.Linear(3, 3), nn.GELU()) for _ in range(2)) for _ in "12")
        self.c = nn.Linear(3, 1)


def test_plain_modules():
    tower = nn.Sequential(nn.Linear(2, 3), *(nn.Linear(3, 3) for _ in range(4)), nn.Linear(3, 1))
    assert names(tower) == NAMES and homes(tower)["5.bias"] == "head"
    found = homes(Nested())
    assert found["a.bias"] == "embeddings" and found["c.bias"] == "head"
    assert names(Nested()) == NAMES


def test_a_model_without_repetition_opens_as_a_whole_or_not_at_all():
    model = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 1))
    set_trainable(model, "all")
    assert trainable_summary(model).trainable == trainable_summary(model).total
    with pytest.raises(ScheduleError, match=r"head matches nothing.*Tried: its row.*register_architecture\("):
        set_trainable(model, "head")


def test_the_answer_does_not_depend_on_weights_or_mode():
    model = tiny_bert()
    other = copy.deepcopy(model).eval()
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.zero_()
    assert layer_groups(model) == layer_groups(other)


class Twins(nn.Module):
    """A second tower that is the first one again."""

    def __init__(self):
        super().__init__()
        self.text_model = nn.Module()
        self.text_model.layers = nn.ModuleList(nn.TransformerEncoderLayer(4, 1, 4) for _ in range(2))
        self.decoder = nn.Module()
        self.decoder.layers = self.text_model.layers
        self.head = nn.Linear(4, 1)


def test_a_tower_tied_to_a_lower_one_has_no_groups_of_its_own():
    assert names(Twins()) == ["embeddings", "block[0]", "block[1]", "head"]
