"""Words that tell what a part of a model is for: data for detection, one table per role. Needs no torch.

Each table is a tuple of regular expressions, matched against one component of a parameter's name (``re.search``).
A new family usually needs one more word here and no code.
"""

from __future__ import annotations

import functools
import re

__all__ = [
    "APART",
    "AUDIO_CLASS",
    "BESIDE",
    "BETWEEN_STAGES",
    "BLOCK_CLASS",
    "CLASS_MODALITIES",
    "CONNECTOR",
    "FIRST_STAGE",
    "FIRST_STEM",
    "HEAD",
    "INPUT_PROJECTION",
    "MIDWAY",
    "MIXES_TOKENS",
    "MODALITIES",
    "NEVER_BLOCK",
    "NEVER_CLASS",
    "NORM",
    "NORM_FIRST",
    "NORM_LAST",
    "NOT_STACKS",
    "NO_BLOCK_CLASS",
    "OUTER_STEM",
    "OWN_STEM",
    "PARALLEL",
    "PARTS",
    "PROPOSALS",
    "QUERIES",
    "RANKS",
    "REVERSED",
    "SECOND_HALF",
    "SEQUENTIAL",
    "SHARED_TABLE",
    "STACK_NAMES",
    "STAGE_END",
    "STAGE_INNER",
    "STEM",
    "TASK_HEAD",
    "TOWER",
    "TOWERS_INSIDE",
    "TOWER_CLASS",
    "matches",
]

# Classes whose lists are blocks, and lookalikes that are not.
BLOCK_CLASS = (
    r"(Block|Layer|Stage|Bottleneck|Cell|Group|EncoderLayer|Residual\w*|Module|Propagation)(V?\d*|_\w+)?$",
    r"Block|Stage|ConvEncoder$|^MobileAttention$",
)
NO_BLOCK_CLASS = (
    r"Norm|Embed|Linear|(?<!Rep)Conv\d?d?(Norm)?Layer$|Conv\dd|Expert|MLP|Mlp|FFN|Feed|Downsampl|Upsampl|Head$|SelfAttention$|Dropout",
)
# Feature extractors, small predictors and parts of blocks: no blocks, although some are checkpointed or never split.
NEVER_CLASS = (
    r"(LayerNorm|GroupNorm)ConvLayer$|PredictorLayer$|Data2VecAudio\w*ConvLayer$",
    r"ResNetConvLayer$|GLPNDecoderStage$|VitMatteFusionBlock$",
)
# Components under which a list is never a stack of blocks: stems and heads.
NOT_STACKS = (
    r"^(feature_(extractor|encoder)|conv_embed\w*|embeddings?|embedder|patch_embed\w*|stem|subsampl\w*|conv_stem)$",
    r"^(fpn|pan)_blocks$|^fusion_stage$|^tracker_neck$|^task_encoder$|^segmentation|^duration_predictor$",
    r"head|classifier|^neck$|^cls$|^score$|^pooler$|^projector$|_projectors$|merger|multi_modal_projector|upscale|upsampl|expert|^channel_projection|^lqe_layers$|^mlp$|^ffn$|(?<!image)(?<!audio)_embed$|tdnn|adapter|^fc\w*$",
)
# What is a tower in spite of lying there: the Q-Former in a projector, the image model in a video embedder.
TOWERS_INSIDE = (r"^(qformer|vision_model|audio_encoder|video_encoder)$",)
# A stage of blocks inside a stem: the lowest of the stages beside it.
FIRST_STAGE = (r"^stage$",)
NEVER_BLOCK = (r"^(experts|adapters?|downsample\w*|downsampl\w*|lora_\w+)$",)
# Towers of convolutions of many kinds, in which nothing repeats: one block.
TOWER_CLASS = (r"^Encodec(En|De)coder$|^WavTokenizerEncoder$",)
# The part of a block that makes a list of parts a block.
MIXES_TOKENS = (r"Attention$",)
# What stands alone in the second half of a block, where a list holds attention and feed-forward in turn.
SECOND_HALF = (r"MLPLayer$",)
# Members of a list of stages that lead from one stage to the next.
BETWEEN_STAGES = (r"Embeddings?$|Downsampl|Subsample$|PatchMerging",)
STAGE_INNER = (r"^(blocks?|layers?|stage|group|resnets?|(res|conv)_blocks|attentions|\d+)$",)

STEM = (
    r"embed(?!_out|.*(head|predict))|^w[tp]e$|^(cls|mask|register|dist\w*|class|pos|meta|storage|query|special)_?tok|_tokens?$",
    r"pos(ition)?(al)?_|^pos(_|$)|position|patch|^stem|_stem$|^conv1$|^(conv_in|shared|tok|word|token)\w*$",
    r"feature_(extractor|projection)|^relative_attention_bias$|rel_embeddings|rotary|subsampl|^frontend|^prompt_encoder$",
    r"^masked_spec_embed$|^(downsample_layers|convs)$|^mask_emb$|^(ln|norm)_pre$|^pre_?(ln|layer_?norm|norm|layrnorm)$|^input_proj|^project_in$",
    r"^per_layer|^ple$|^altup_proj|_(latent|speakers|delta|prompt)_proj$|^mel_|newline|separator|^query(_feat)?$|^latents|^visual_prompter$|^self_conditioning$|^prenet$|^no_object_pointer$",
)
HEAD = (
    r"^(\w*_)?(classifiers?|classification|class_head|lm_head|heads?|pooler|pooling\w*|scorer?|qa_outputs|cls|logits?\w*)$",
    r"head|classifier|predict(?!or)|^logit_|temperature|pooler|^ctc|^fc_norm$|^score|seq_relationship|^embed_out$|^attention_pool",
    r"^(start|end|answer|span)_|^tdnn$|^layer_weights$|^projector$|^decode_|^neck$|(?<!denoising_)class_embed(?!ding)|bbox_embed(?!ding)|^bbox_pred",
    r"^embedding_proj|^upscale|^embed_out|unembed|mask_embed(?!ding)|_a3_module$|merger|^final_input$|^segmentation|^transposed_convolution",
    r"^lqe_layers$|^vocab|^generator|^proj_out$|^summary|^discriminator|^lm_|^qa_",
)
NORM = (r"norm|^ln|^layernorm|^post_?ln",)
NORM_LAST = (r"final|post|^norm$|_f$|^norm2|layernorm2$|^head_norm",)
NORM_FIRST = (r"^post_conv_layernorm$",)
CONNECTOR = (
    r"projector|connector|multi_?modal|^mm_|resampl|merger|aligner|bridge|abstractor|(visual|vision|language|modality|mm)_proj|_to_mm_|_feature_extensor$|^latent_(scaling|bias)_factor$",
    r"^image_(newline|separator)|^view_separator|link_tower|^cross_modal_\w+_(transform|layernorm)$|enc_to_dec_proj|^embed_(vision|audio)$|^adapter$",
    r"^(image_to_)?(language|text|vision|audio|image|visual|speech)_(model_)?(projection|proj|adapter)$|qformer",
    r"^high_res_vision_|^(semantic_adapter|fc_encoder|latent_proj|encoder_to_decoder|keypoint_encoder)$|quantize|quant_conv",
    r"^(dur(ation)?|pitch|energy)_(predictor|embed)$|^decoder_embed(dings)?$|^visual_embeddings_table$",
)

# Tables inside the first block that serve all blocks.
SHARED_TABLE = (r"relative_attention_bias|rel_attn_embed|relative_bias|rel_pos_bias",)

# What joins a vision tower to the encoder above it, or an encoder to the decoder (DETR and its kin).
INPUT_PROJECTION = (
    r"^((en|de)coder_)?input_proj|^level_embed|^compress_vit|^encoder_(conv|norm)",
    r"^query_position_embeddings_proj|^box_rpb_embed|^query_scale$|^ref_anchor_head$",
    r"^ref_point_head$|^query_pos(ition)?_head$|^query_input_projection$|^reference_points_head$|^task_(encoder|project)$|^channel_projection",
)
PROPOSALS = (
    r"^enc_output|^decoder_input_proj|^reference_points$|^encoder_vision_features$|^(lateral|downsample)_convs$|^(fpn|pan)_blocks$",
)
# Learned queries of a projector.
QUERIES = (r"^(latent_)?query$",)
# What a task class puts before its base model, and not on it.
OUTER_STEM = (r"^embed_|_embeds$|^pre_projection$",)
# A model with these beside its "base model" is no task class.
OWN_STEM = (r"^embeddings$|^embed_tokens$|^word_embeddings$",)
# A tower that has no blocks of its own, under a language model.
TOWER = (r"audio|vision|visual|speech",)
TASK_HEAD = (
    r"lm_head|^codec_head$|^ctc|classifier|^score$|class_embed|bbox_embed|logit_(scale|bias)|^(text_)?(audio|video)_head$|^(box|presence)_head$|^enc_(score|bbox)_head$",
)

# Which tower a component names, and which part of a tower.
MODALITIES = (
    ("qformer", r"q_?former"),
    ("cross", r"cross_(modal|encoder)|^x_layers|multimodal_(encoder|model)|mm_encoder|^fusion"),
    ("vision", r"vis|image|pixel|^vit|^backbone|^r_layers|patch_encoder|sam_|convnext|siglip|eva|^conv_encoder"),
    ("video", r"video"),
    ("audio", r"audio|speech|wav|codec|sound|acoustic|mimi"),
    ("text", r"text|language|^lang|^llm?$|^lm$"),
)
PARTS = (
    ("encoder", r"encoder"),
    ("decoder", r"decoder"),
    ("predictor", r"predictor"),
    ("resampler", r"resampl|perceiver"),
    ("mtp", r"mtp|nextn"),
)
# Stacks whose path must be read as a whole: a name, or a modality to which the part is added.
STACK_NAMES = (
    ("encoder.initial", r"initial_char_encoder"),
    ("encoder.final", r"final_char_encoder"),
    ("patcher", r"^(model\.)?patcher\."),
    ("global", r"^(model\.)?global_transformer"),
    ("semantic", r"^semantic\.|semantic_(encoder|model|tokenizer_encoder)"),
    ("semantic_encoder", r"encoder_semantic"),
    ("coarse", r"^coarse_acoustics"),
    ("fine", r"^fine_acoustics"),
    ("semantic_decoder", r"decoder_semantic"),
    ("decoder", r"^backbone\.convnext$"),
    ("codec.encoder", r"^audio_encoder\.encoder$"),
    ("codec.decoder", r"^audio_encoder\.decoder$"),
    ("codec", r"codec_model|vqmodel|vq_model|vqvae|image_codebook"),
    ("tracker.memory_encoder", r"^tracker_model\.memory_encoder\.mask"),
    ("tracker.memory_fuser", r"^tracker_model\.memory_encoder\.memory_fuser"),
    ("tracker.memory", r"^tracker_model\.memory_attention"),
    ("tracker.decoder", r"^tracker_model\.mask_decoder"),
    ("cross", r"^(\w+\.)?audio_video_encoder"),
    ("vision.frame", r"embedder\.vision_model"),
    ("resampler", r"compressor_resampler"),
    ("audio", r"asr_encoder"),
    ("diarization", r"diarization_model"),
    ("timestamp", r"word_timestamp_encoder"),
    ("expert", r"(^|\.)dit\."),
    ("adaptor", r"^(model\.)?multi_modal_projector\.layers"),
    ("high_res", r"high_res_vision"),
    ("protein", r"protein_encoder\.model"),
    ("text", r"backbone_model\.layers"),
    ("low", r"L_module"),
    ("high", r"H_module"),
    ("flow", r"^flow\."),
    ("code2wav", r"code2wav_dit|^code2wav\.pre_transformer"),
    ("vocoder", r"vocoder|bigvgan|hifi_gan"),
    ("t2u", r"t2u_model"),
    ("talker", r"^talker"),
    ("refinement", r"^refinement_layer"),
    ("memory", r"memory_attention"),
    ("memory_encoder", r"memory_encoder|spatial_perceiver"),
    ("reading_order", r"reading_order"),
    ("neck", r"post_csp_pan"),
    ("mask", r"^blocks$"),
    ("spatial", r"spatial_layers"),
    ("temporal", r"temporal_layers"),
    ("auxiliary", r"auxiliary_layers"),
    ("vision", r"keypoint_detector|sam_encoder"),
    ("speech_decoder", r"^speech_decoder_model"),
    ("acoustic", r"^acoustic_encoder"),
    ("decoder", r"^acoustic_decoder"),
)
AUDIO_CLASS = r"Audio|Speech|Conformer|Wav|Whisper|Codec|Encodec|Mimi"
# The same, by the class of the blocks, where the names of the path are silent.
CLASS_MODALITIES = (
    ("text", r"TextDecoderLayer$"),
    ("cross", r"AudioVideo"),
    ("video", r"Video"),
    ("audio", AUDIO_CLASS),
    ("vision", r"Vision|Image|ViT|Swin|ResNet|Convn?ext|Dinov|Beit"),
)
# Height of a stack in the model; equal heights that are parallel share levels.
RANKS = {
    "codec": 5,
    "patcher": 5,
    "speech_decoder": 5,
    "vision.frame": 5,
    "vision": 10,
    "video": 10,
    "audio": 10,
    "high_res": 10,
    "protein": 10,
    "diarization": 10,
    "semantic": 10,
    "semantic_encoder": 15,
    "acoustic": 15,
    "low": 10,
    "high": 20,
    "neck": 20,
    "coarse": 20,
    "fine": 30,
    "memory_encoder": 25,
    "memory_fuser": 27,
    "spatial_perceiver": 28,
    "memory": 30,
    "spatial": 10,
    "temporal": 15,
    "auxiliary": 18,
    "resampler": 20,
    "qformer": 20,
    "connector": 29,
    "adaptor": 35,
    "text": 40,
    "encoder.initial": 48,
    "encoder": 50,
    "encoder.final": 52,
    "global": 55,
    "flow": 55,
    "decoder": 60,
    "semantic_decoder": 60,
    "expert": 60,
    "talker": 65,
    "tracker": 65,
    "predictor": 70,
    "refinement": 70,
    "mask": 70,
    "reading_order": 70,
    "t2u": 75,
    "cross": 80,
    "mtp": 90,
    "code2wav": 92,
    "timestamp": 90,
    "vocoder": 95,
}
# What runs between two blocks of the tower beside it, and the value of the config that tells after which.
MIDWAY = (("vit_merger", "insert_layer_id"),)
# What leads into the first stage of a model, and is its stem: registered in that stage, or in a list beside the stages.
FIRST_STEM = (r"embed|^(downsample_layers|convs|group_token)$",)
# What closes a stage that it is registered in, where everything else after the blocks leads to the next stage.
STAGE_END = (r"norm|^(conv|patch_embed)$",)
# What runs with a block of the list beside it: the owner's class, its name, and after which share of the blocks.
BESIDE = (
    (r"^GraniteSpeech\w*CTCEncoder$", r"^out(_mid)?$", 0.5),
    (r"LocalEncoder$", r"^patch_embedding_projection$", 1.0),
)
# Lists that a forward runs from the last to the first: the class that holds them.
REVERSED = (r"^VitsResidualCouplingBlock$|^Emu3VQVAEUpBlock$",)
# Lists before or after the one beside them, and not woven into it.
SEQUENTIAL = (r"^(prior|post)_net$",)
# Lists side by side that are stacks of their own and not one.
APART = (r"^(spatial|temporal)_layers$|^[rx]_layers",)
PARALLEL = (r"logit_scale|^temperature$|^logit_bias$",)


@functools.lru_cache(maxsize=1 << 16)
def matches(table: tuple[str, ...], word: str) -> bool:
    """Whether a component of a name belongs to a table.

    Example:
        >>> matches(HEAD, "lm_head"), matches(STEM, "lm_head")
        (True, False)
    """
    return any(re.search(pattern, word) for pattern in table)
