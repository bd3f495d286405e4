"""Shrunken models of every (model type, Auto class) pair of the installed transformers, on the meta device."""

from __future__ import annotations

import copy
import re
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import FunctionType
from typing import Any

import torch
import transformers
from torch import nn
from transformers.models.auto import modeling_auto
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

COUNT = re.compile(
    r"(^|_)(num|n|encoder|decoder|text|vision|audio|layer|predictor|pred|cross|crossattention|l|r|x|temporal|fusion)_"
    r"?(\w+_)?(layers?|blocks?|depth)$|^(depth|layers|n_layer|n_layers)$"
)
NOT_COUNT = re.compile(
    r"feat|conv|adapter|kv_shared|tdnn|num_hidden_groups|inner_group|dense_layers|upsampl|_every|stride|interval|"
    r"sandwich|skip|moe_layer|first_k|residual|mlp|postnet|prenet|predictor_layers|classifier|fc_|pool|cross_attention_"
    r"|start|freeze|unfreeze|index|out_|feature_layer|select|interact|mtp|swa|mixer|kernel|nextn|out$|final"
)
LISTS = re.compile(r"^(depths|layers_block_type|layer_types|num_layers|encoder_depths|decoder_depths|depth)$")


@dataclass(frozen=True)
class Pair:
    """One entry of transformers' Auto mappings: ``Pair("bert", "AutoModel", "BertModel")``."""

    model_type: str
    auto: str
    class_name: str

    def __str__(self) -> str:
        return f"{self.model_type}-{self.auto}-{self.class_name}"


def pairs() -> list[Pair]:
    """Every pair of the installed transformers, in a stable order."""
    found = set()
    for name in sorted(vars(modeling_auto)):
        if not re.fullmatch(r"MODEL_\w*MAPPING_NAMES", name):
            continue
        auto = name.removeprefix("MODEL_").removesuffix("MAPPING_NAMES").strip("_").lower() or "base"
        for model_type, classes in getattr(modeling_auto, name).items():
            for class_name in (classes,) if isinstance(classes, str) else classes:
                if class_name:
                    found.add((model_type, auto, class_name))
    return [Pair(*item) for item in sorted(found)]


def shrunken(config_class: type, layers: int) -> Any:
    """A config with every stack cut to ``layers`` blocks; hidden sizes stay, they cost nothing on the meta device."""
    default = config_class()
    plain, nested = _changes(default, layers), _sub_configs(default, layers)
    scalars = {k: v for k, v in plain.items() if not isinstance(v, list)}
    as_dicts = {k: v.to_dict() for k, v in nested.items()}  # transformers 4 takes dicts only, here and there
    for changes in ({**plain, **nested}, {**plain, **as_dicts}, {**scalars, **nested}, {**scalars, **as_dicts}):
        try:
            return config_class(**copy.deepcopy(changes))
        except Exception:  # noqa: BLE001 - any complaint of any config class means: try the next form
            continue
    return default


def _sub_configs(config: Any, layers: int) -> dict[str, Any]:
    kinds = transformers.PretrainedConfig
    return {k: shrunken(type(v), layers) for k, v in vars(config).items() if isinstance(v, kinds)}


def _changes(config: Any, layers: int) -> dict[str, Any]:
    changes: dict[str, Any] = {}
    values = {k: v for k, v in vars(config).items() if not k.startswith("_")}
    counts = {
        k: v
        for k, v in values.items()
        if isinstance(v, int) and not isinstance(v, bool) and v > 1 and COUNT.search(k) and not NOT_COUNT.search(k)
    }
    for name in counts:
        changes[name] = layers
    old = max(counts.values(), default=0)
    for name, value in values.items():
        if not isinstance(value, (list, tuple)) or not value:
            continue
        if LISTS.search(name) and all(isinstance(v, int) for v in value):
            changes[name] = [min(v, max(2, layers // 2)) for v in value]
        elif len(value) == old and old > 4:
            kept = list(value)[:layers]
            if all(isinstance(v, str) for v in value):  # every kind of layer stays in the list
                for i, kind in enumerate(sorted(set(value))[:layers]):
                    kept[i] = kind if kind not in kept else kept[i]
            changes[name] = kept + [value[-1]] * (layers - len(kept))
    if "attention_types" in values:  # GPT-Neo counts its layers here too
        changes["attention_types"] = [[["global"], layers]]
    for name in ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"):
        if isinstance(values.get(name), int) and values[name] > 4:
            changes[name] = 4
            for top in ("num_experts_per_tok", "moe_k", "n_group", "topk_group"):
                if isinstance(values.get(top), int):
                    changes[top] = 1 if "group" in top else min(2, values[top])
    return changes


# What default configs leave out, by attribute; set only where the value is missing.
MISSING = {
    "head_dim": 64,
    "num_key_value_heads": 2,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "prediction_length": 8,
    "context_length": 8,
    "vocab_size": 64,
    "pad_token_id": 0,
    "vocabulary_map": {"<image>": 1},
    "rope_theta": 1e4,
    "n_shared_experts": 1,
    "moe_intermediate_size": 64,
    "shared_expert_intermediate_size": 64,
    "dropout_rate": 0.0,
    "mlp_layer_types": ["dense", "sparse"] * 6,
    "downsample_rate": "1/2",
    "deepstack_layer_map": [[0, 0], [1, 1]],
    "spatial_merge_size": 2,
}
OCR = {"intraclass_block_config": defaultdict(lambda: [3, 1, 1]), "kernel_list": [3, 2, 2]}  # sizes of convolutions
# Values of single model types; a function is called for one.
VALUES: dict[str, dict[str, Any]] = {
    "beit": {"out_indices": [0, 1, 2, 3]},
    "reformer": {"is_decoder": True},
    "perceiver": {"num_cross_attention_heads": 1},
    "t5gemma": {"is_encoder_decoder": False},
    "hiera": {"decoder_hidden_size": 64, "decoder_depth": 3, "decoder_num_heads": 8},
    "diffusion_gemma_text": {"num_experts": 4, "top_k_experts": 2},
    "qwen4_exp_text": {"indexer_n_heads": 2, "indexer_kv_heads": 1, "indexer_head_dim": 8, "indexer_budget": 8,
                       "indexer_compress_ratio": 2},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 6},
    "sapiens2": {"head_config": lambda: CONFIG_MAPPING["sapiens2"].sub_configs["head_config"](
        use_pixel_shuffle=True, upsample_out_channels=[64, 32], upsample_kernel_sizes=[3, 3], conv_out_channels=[32],
        conv_kernel_sizes=[1], scale_conv_out_channels=[32], scale_conv_kernel_sizes=[1], scale_final_input_size=32,
        scale_final_hidden_sizes=[16, 8])},
    "pp_ocrv5_server_det": OCR,
    "pp_ocrv6_medium_det": OCR,
    "cohere_compass_text": {"rope_parameters": {k: {"rope_type": "default", "rope_theta": 1e4} for k in
                                                ("full_attention", "sliding_attention")}},
}  # fmt: skip


# What stands in for the towers of timm where it cannot be used: it wants torchvision.
STAND_INS: dict[str, Callable[[], Any]] = {
    "timm_backbone": lambda: transformers.ResNetConfig(out_features=["stage2", "stage3", "stage4"]),
    "timm_wrapper": lambda: transformers.ViTConfig(num_hidden_layers=3, model_args={"embed_dim": 768}),
}
TIMM = transformers.utils.is_timm_available() and transformers.utils.is_torchvision_available()


def _complete(config: Any) -> Any:
    """Fill in what a config leaves to the checkpoint, in its parts too."""
    for name, value in MISSING.items():
        try:
            missing = getattr(config, name, None) is None
        except Exception:  # noqa: BLE001 - the value varies by layer, and the config says so by an error of its own
            continue
        if missing:
            setattr(config, name, value)
    for name, value in VALUES.get(config.model_type, {}).items():
        setattr(config, name, value() if isinstance(value, FunctionType) else value)
    for name, value in list(vars(config).items()):
        if isinstance(value, transformers.PretrainedConfig):
            stand_in = STAND_INS.get(value.model_type) if not TIMM else None
            setattr(config, name, _complete(stand_in() if stand_in else value))
        elif name in ("hidden_sizes", "depths", "embed_dims", "fusion_hidden_sizes") and isinstance(value, tuple):
            setattr(config, name, list(value))
    return config


def configs(pair: Pair, layers: int) -> Iterator[Any]:
    """Configs to try: that of the pair as it is; completed; that of the class; the default, where sizes must agree."""
    own = getattr(getattr(transformers, pair.class_name), "config_class", None) or CONFIG_MAPPING[pair.model_type]
    yield shrunken(CONFIG_MAPPING[pair.model_type], layers)
    yield _complete(shrunken(CONFIG_MAPPING[pair.model_type], layers))
    if own is not CONFIG_MAPPING[pair.model_type]:
        yield _complete(shrunken(own, layers))
    yield _complete(CONFIG_MAPPING[pair.model_type]())


def build(pair: Pair, layers: int = 3, **overrides: Any) -> nn.Module:
    """The model of a pair on the meta device, without weights."""
    errors = []
    for config in configs(pair, layers):
        for key, value in overrides.items():
            setattr(config, key, value)
        try:
            return build_class(getattr(transformers, pair.class_name), config)
        except Exception as error:  # noqa: BLE001 - each of 1,600 classes has complaints of its own
            errors.append(error)
    raise errors[-1] from errors[0]


def build_class(model_class: type, config: Any) -> nn.Module:
    """Build quietly; pytest turns warnings into errors."""
    with warnings.catch_warnings(), torch.device("meta"):
        warnings.simplefilter("ignore")
        return model_class(config).eval()


def try_build(pair: Pair, layers: int) -> nn.Module | None:
    """The model, or None where this machine cannot build it: a missing package, or a config that needs values."""
    try:
        return build(pair, layers)
    except Exception:  # noqa: BLE001 - each of 1,600 classes has complaints of its own
        return None
