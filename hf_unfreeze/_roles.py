"""Words that tell what a part of a model is for: data for detection, one table per role. Needs no torch.

Each table is a tuple of regular expressions, matched against one component of a parameter's name (``re.search``).
A new family usually needs one more word here and no code.
"""

from __future__ import annotations

import re

__all__ = [
    "BLOCK_CLASS",
    "CLASS_MODALITIES",
    "CONNECTOR",
    "HEAD",
    "INPUT_PROJECTION",
    "MODALITIES",
    "NEVER_BLOCK",
    "NORM",
    "NORM_FIRST",
    "NORM_LAST",
    "NOT_STACKS",
    "NO_BLOCK_CLASS",
    "OWN_STEM",
    "PARALLEL",
    "PARTS",
    "QUIRKS",
    "RANKS",
    "SHARED_TABLE",
    "STAGE_INNER",
    "STEM",
    "TASK_HEAD",
    "matches",
]

# Classes whose lists are blocks, and lookalikes that are not.
BLOCK_CLASS = (
    r"(Block|Layer|Stage|Bottleneck|Cell|Group|EncoderLayer|Residual\w*|Module)(V?\d*|_\w+)?$",
    r"Block",
    r"Stage",
)
NO_BLOCK_CLASS = (
    r"Norm|Embed|Linear|Conv\d?d?(Norm)?Layer$|Conv\dd|Expert|MLP|Mlp|FFN|Feed|Downsampl|Upsampl|Head$|SelfAttention$|Dropout",
)
# Components under which a list is never a stack of blocks: stems and heads.
NOT_STACKS = (
    r"^(feature_extractor|conv_layers|conv_embed\w*|embeddings?|patch_embed\w*|stem|subsampl\w*|conv_stem)$",
    r"head|classifier|^neck$|^cls$|^score$|^pooler$|^projector$|merger|multi_modal_projector|upscale|upsampl|expert|^mlp$|^ffn$|_embed$|tdnn|adapter|^fc\w*$",
)
NEVER_BLOCK = (r"^(conv_layers|experts|adapters?|downsample\w*|lora_\w+)$",)
STAGE_INNER = (r"^(blocks?|layers?|resnets?|res_blocks|attentions|\d+)$",)

STEM = (
    r"embed(?!_out|.*(head|predict))|^w[tp]e$|^(cls|mask|register|dist\w*|class|pos|meta|storage|query|special)_?tok|_tokens?$",
    r"pos(ition)?(al)?_|^pos(_|$)|position|patch|^stem|_stem$|^conv1$|^(conv_in|shared|tok|word|token)\w*$",
    r"feature_(extractor|projection)|^relative_attention_bias$|rel_embeddings|rotary|subsampl|^frontend|^prompt_encoder$",
    r"^masked_spec_embed$|^mask_emb$|^(ln|norm)_pre$|^pre_?(ln|layer_?norm|norm|layrnorm)$|^input_proj|^project_in$",
    r"^per_layer|^ple$|^altup_proj|_(latent|speakers|delta)_proj$|^mel_|newline|separator",
)
HEAD = (
    r"^(\w*_)?(classifiers?|classification|class_head|lm_head|heads?|pooler|pooling\w*|scorer?|qa_outputs|cls|logits?\w*)$",
    r"head|classifier|predict(?!or)|^logit_|temperature|pooler|^ctc|^fc_norm$|^score|seq_relationship|^embed_out$|^attention_pool",
    r"^(start|end|answer|span)_|^tdnn$|^layer_weights$|^projector$|^decode_|^neck$|class_embed(?!ding)|bbox_embed|^bbox_pred",
    r"^embedding_proj|^upscale|^embed_out|unembed|mask_embedder|_a3_module$",
    r"^vocab|^generator|^proj_out$|^summary|^discriminator|^lm_|^qa_",
)
NORM = (r"norm|^ln|^layernorm|^post_?ln",)
NORM_LAST = (r"final|post|^norm$|_f$|^norm2|layernorm2$|^head_norm",)
NORM_FIRST = (r"^post_conv_layernorm$",)
# Class of the owner, component of the name, and where it runs in spite of name and place.
QUIRKS = (
    (r"BigBirdPegasusDecoder", r"^layernorm_embedding$", "head"),
    (r"^Lfm", r"^embedding_norm$", "head"),
    (r"StableLayerNorm|ConformerEncoder|Wav2Vec2BertEncoder", r"^layer_norm$", "head"),
    (r"SEWD|Deberta", r"^(LayerNorm|conv)$", "embeddings"),
    (r"CohereAsrDecoder", r"^proj$", "connector"),
    (r"PerceiverEncoder", r"^cross_attention$", "embeddings"),
    (r"Videomt", r"^layernorm$", "head"),
    (r"UVDoc", r"^resnet_head$", "embeddings"),
)
CONNECTOR = (
    r"projector|connector|multi_?modal|^mm_|resampl|merger|aligner|bridge|abstractor|(visual|vision|language|modality|mm)_proj|_to_mm_",
    r"^image_(newline|separator)|^view_separator|link_tower|^cross_modal_\w+_transform$|enc_to_dec_proj|^(language|text|vision|audio|image|visual|speech)_(model_)?(projection|proj|adapter)$|^embed_(vision|audio)$|^adapter$|qformer|^query_tokens$",
)

# Tables inside the first block that serve all blocks.
SHARED_TABLE = (r"relative_attention_bias|rel_attn_embed|relative_bias|rel_pos_bias",)

# What joins a vision tower to the encoder above it (DETR and its kin).
INPUT_PROJECTION = (r"^input_proj|^level_embed|^conv_s\d|^compress_vit|^query_position_embeddings_proj",)
# A model with these beside its "base model" is no task class.
OWN_STEM = (r"^embeddings$|^embed_tokens$|^word_embeddings$",)
TASK_HEAD = (r"lm_head|^ctc|classifier|^score$",)

# Which tower a component names, and which part of a tower.
MODALITIES = (
    ("qformer", r"q_?former"),
    ("cross", r"cross_(modal|encoder)|^x_layers|multimodal_(encoder|model)|mm_encoder|^fusion"),
    ("vision", r"vis|image|pixel|^vit|^backbone|r_layers|patch_encoder|sam_|convnext|siglip|eva|^conv_encoder"),
    ("video", r"video"),
    ("audio", r"audio|speech|wav|codec|sound|acoustic|mimi"),
    ("text", r"text|language|^lang|^llm?$|^lm$|^thinker"),
)
PARTS = (
    ("encoder", r"encoder"),
    ("decoder", r"decoder"),
    ("predictor", r"predictor"),
    ("resampler", r"resampl|perceiver"),
    ("mtp", r"mtp|nextn"),
)
# The same, by the class of the blocks, where the names of the path are silent.
CLASS_MODALITIES = (
    ("audio", r"Audio|Speech|Conformer|Wav|Whisper|Codec|Encodec|Mimi"),
    ("vision", r"Vision|Image|ViT|Swin|ResNet|Convn?ext|Dinov|Beit"),
)
# Height of a stack in the model; equal heights that are parallel share levels.
RANKS = {
    "vision": 10,
    "video": 10,
    "audio": 10,
    "resampler": 20,
    "qformer": 20,
    "connector": 30,
    "text": 40,
    "encoder": 50,
    "decoder": 60,
    "predictor": 70,
    "cross": 80,
    "mtp": 90,
}
PARALLEL = (r"logit_scale|^temperature$|^logit_bias$",)


def matches(table: tuple[str, ...], word: str) -> bool:
    """Whether a component of a name belongs to a table.

    Example:
        >>> matches(HEAD, "lm_head"), matches(STEM, "lm_head")
        (True, False)
    """
    return any(re.search(pattern, word) for pattern in table)
