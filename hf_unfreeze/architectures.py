"""The registry: one row of data per architecture, keyed by ``config.model_type``. Needs nothing but Python."""

from __future__ import annotations

import functools
import importlib.metadata
from dataclasses import dataclass
from typing import Any

from .errors import StructureError

__all__ = [
    "BUILT_IN",
    "Architecture",
    "find_architecture",
    "list_architectures",
    "markdown_table",
    "register_architecture",
]


@dataclass(frozen=True)
class Architecture:
    """Where the blocks and the embeddings of one model type are; every other parameter is the head's.

    Paths are dotted and match anywhere between two dots of a parameter's name: ``encoder.layer`` finds
    ``bert.encoder.layer.3.output.dense.weight``. A ``*`` stands for one index of an enclosing list of stages.

    Example:
        >>> register_architecture(Architecture("my_model", {"": ("tower.layers",)}, ("tok_emb", "pos_emb")))

    Args:
        model_type: ``config.model_type``.
        stacks: Stack name → alternative paths of its list of blocks, one per version of the code; the order of the
            stacks is bottom → top. The name is empty where there is one stack.
        embeddings: Paths of embeddings, stems, position tables and relative-bias tables.
        parallel: Whether the stacks are towers side by side, which open together from the top.

    Raises:
        StructureError: The stacks are no dict, or paths are no tuple of strings.
    """

    model_type: str
    stacks: tuple[tuple[str, tuple[str, ...]], ...]
    embeddings: tuple[str, ...]
    parallel: bool = False

    def __init__(
        self,
        model_type: str,
        stacks: dict[str, tuple[str, ...]],
        embeddings: tuple[str, ...],
        parallel: bool = False,
    ) -> None:
        if not isinstance(stacks, dict):
            raise StructureError(
                f"{model_type!r}: stacks={stacks!r} is no dict of stack name and paths. "
                'Write {"": ("layers",)}, or {"encoder": ("encoder.layers",), "decoder": ("decoder.layers",)}.'
            )
        paths = tuple((name, _paths(f"{model_type!r}: stack {name!r}", given)) for name, given in stacks.items())
        object.__setattr__(self, "model_type", model_type)
        object.__setattr__(self, "stacks", paths)
        object.__setattr__(self, "embeddings", _paths(f"{model_type!r}: embeddings", embeddings))
        object.__setattr__(self, "parallel", parallel)


def _paths(what: str, given: Any) -> tuple[str, ...]:
    """Return paths as a tuple; a string is none, for it would be read letter by letter."""
    if isinstance(given, (tuple, list)) and all(isinstance(path, str) for path in given):
        return tuple(given)
    example = (given,) if isinstance(given, str) else ("layers",)
    raise StructureError(f"{what} is {given!r}, and no tuple of paths. Write {example!r}, with the comma.")


_Stacks = dict[str, tuple[str, ...]]
_Family = tuple[_Stacks, tuple[str, ...]]

_ONE: _Stacks = {"": ("encoder.layer",)}
_BERT: _Family = (_ONE, ("embeddings", "embeddings_project", "encoder.embedding_hidden_mapping_in"))
_DEBERTA: _Family = (_ONE, ("embeddings", "encoder.rel_embeddings", "encoder.LayerNorm", "encoder.conv"))
_GPT: _Family = ({"": ("h",)}, ("wte", "wpe", "word_embeddings", "word_embeddings_layernorm"))
_LLAMA: _Family = ({"": ("layers",)}, ("embed_tokens",))
_BART: _Family = (
    {"encoder": ("encoder.layers",), "decoder": ("decoder.layers",)},
    ("shared", "embed_tokens", "embed_positions", "layernorm_embedding", "encoder.conv1", "encoder.conv2"),
)
_T5: _Family = (
    {"encoder": ("encoder.block",), "decoder": ("decoder.block",)},
    ("shared", "embed_tokens", "relative_attention_bias"),
)
# transformers 5 took the encoder module out of these: encoder.layer became layers
_VIT: _Family = ({"": ("encoder.layer", "layers")}, ("embeddings", "relative_position_bias", "shared_position_bias"))
_WAV2VEC2: _Family = (
    {"": ("encoder.layers",)},
    ("feature_extractor", "feature_projection", "pos_conv_embed", "masked_spec_embed", "rel_attn_embed"),
)
_CLIP: _Family = (
    {
        "text": ("text_model.encoder.layers", "text_model.layers"),
        "vision": ("vision_model.encoder.layers", "vision_model.layers"),
    },
    ("embeddings", "pre_layrnorm", "pre_layernorm"),
)

_ROWS: tuple[tuple[str, _Family], ...] = (
    ("albert", ({"": ("encoder.albert_layer_groups",)}, ("embeddings", "encoder.embedding_hidden_mapping_in"))),
    ("bart blenderbot m2m_100 marian mbart pegasus whisper", _BART),
    ("audio-spectrogram-transformer beit deit dinov2 vit", _VIT),
    ("bert big_bird camembert electra ernie layoutlm longformer megatron-bert rembert roberta xlm-roberta", _BERT),
    ("bloom falcon gpt2 gpt_neo gptj", _GPT),
    ("clip siglip", _CLIP),
    (
        "cohere gemma gemma2 llama mistral mixtral olmo2 phi phi3 qwen2 qwen2_moe qwen3 smollm3 stablelm starcoder2",
        _LLAMA,
    ),
    ("convnext convnextv2", ({"": ("encoder.stages.*.layers",)}, ("embeddings",))),
    ("deberta deberta-v2", _DEBERTA),
    ("distilbert", ({"": ("transformer.layer",)}, ("embeddings",))),
    ("gpt_neox", ({"": ("layers",)}, ("embed_in",))),
    ("hubert wav2vec2 wavlm", _WAV2VEC2),
    ("modernbert", ({"": ("layers",)}, ("embeddings",))),
    ("mpnet", (_ONE, ("embeddings", "encoder.relative_attention_bias"))),
    ("mt5 t5", _T5),
    ("opt", ({"": ("decoder.layers",)}, ("embed_tokens", "embed_positions", "project_in"))),
    (
        "segformer",
        ({"": ("encoder.block.*", "stages.*.blocks")}, ("encoder.patch_embeddings.0", "stages.0.patch_embeddings")),
    ),
    ("swin", ({"": ("encoder.layers.*.blocks",)}, ("embeddings",))),
    ("xlnet", ({"": ("layer",)}, ("word_embedding", "mask_emb"))),
)

_PARALLEL = ("clip", "siglip")

_REGISTRY = {
    model_type: Architecture(model_type, *family, parallel=model_type in _PARALLEL)
    for model_types, family in _ROWS
    for model_type in model_types.split()
}


BUILT_IN = tuple(_REGISTRY[model_type] for model_type in sorted(_REGISTRY))


def register_architecture(architecture: Architecture) -> None:
    """Add a row for a model type of your own.

    Packages do it without being imported by an entry point in the group ``hf_unfreeze.architectures``: a function
    without arguments that calls this one.

    Example:
        >>> register_architecture(Architecture("my_model", {"": ("tower.layers",)}, ("tok_emb", "pos_emb")))
        >>> unfreezer = Unfreezer(my_model, optimizer, "gradual(every=100step)")

    Args:
        architecture: The row; its ``model_type`` is that of your model's config.

    Raises:
        StructureError: The model type has a row already.
    """
    if architecture.model_type in _REGISTRY:
        raise StructureError(
            f"{architecture.model_type!r} has a row already. Give your model a model_type of its own in its config."
        )
    _REGISTRY[architecture.model_type] = architecture


def list_architectures() -> tuple[Architecture, ...]:
    """Return every row, sorted by model type.

    Example:
        >>> [row.model_type for row in list_architectures()][:2]
        ['albert', 'audio-spectrogram-transformer']
    """
    _load_entry_points()
    return tuple(_REGISTRY[model_type] for model_type in sorted(_REGISTRY))


def find_architecture(model_type: str | None) -> Architecture | None:
    """Return the row of a model type, or None."""
    _load_entry_points()
    return _REGISTRY.get(model_type or "")


def markdown_table() -> str:
    """Write the rows built in as a page in Markdown: ``hf_unfreeze/ARCHITECTURES.md``.

    Example:
        >>> print(markdown_table().splitlines()[0])
        # Architectures with a row
    """
    lines = [
        "# Architectures with a row",
        "",
        "Written by `hf-unfreeze architectures --markdown > hf_unfreeze/ARCHITECTURES.md`. The structure of every",
        "other model is detected; `hf-unfreeze groups MODEL --explain` shows what was found and why. Alternatives are",
        "those of transformers 4 and 5; what is in neither column is the head.",
        "",
        "| model type | blocks, bottom → top | embeddings |",
        "|---|---|---|",
    ]
    for row in BUILT_IN:
        stacks = "; ".join(
            f"{stack + ': ' if stack else ''}{' or '.join(f'`{path}`' for path in paths)}"
            for stack, paths in row.stacks
        )
        note = " (side by side)" if row.parallel else ""
        lines.append(f"| {row.model_type} | {stacks}{note} | {', '.join(f'`{path}`' for path in row.embeddings)} |")
    return "\n".join(lines) + "\n"


@functools.cache
def _load_entry_points() -> None:
    for entry_point in importlib.metadata.entry_points(group="hf_unfreeze.architectures"):
        entry_point.load()()
