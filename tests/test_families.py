"""Loose parameters and stacks of families that names alone would misplace; each row read off the modeling source."""

from __future__ import annotations

import model_zoo
import pytest
import transformers

from hf_unfreeze import layer_groups

# model type, part of the Auto class, group of some parameters
TABLE = [
    ("xlm", "base", {"attentions.1.q_lin.weight": "block[1]", "layer_norm2.2.bias": "block[2]",
        "ffns.0.lin1.weight": "block[0]"}),
    ("layoutlmv3", "base", {"norm.weight": "embeddings"}),
    ("bros", "base", {"bbox_embeddings.bbox_projection.weight": "embeddings"}),
    ("bigbird_pegasus", "base", {"decoder.layernorm_embedding.bias": "head"}),
    ("clap", "base", {"audio_model.audio_encoder.batch_norm.weight": "embeddings",
        "audio_projection.linear1.weight": "head"}),
    ("canine", "base", {"initial_char_encoder.layer.0.output.dense.bias": "encoder.initial.block[0]",
        "chars_to_molecules.conv.bias": "encoder.initial.connector",
        "projection.conv.bias": "encoder.connector", "pooler.dense.bias": "head"}),
    ("kosmos-2", "base", {"image_to_text_projection.latent_query": "embeddings",
        "image_to_text_projection.dense.weight": "connector"}),
    ("groupvit", "base", {"vision_model.encoder.stages.0.group_token": "embeddings",
        "vision_model.encoder.stages.1.group_token": "vision.block[2]",
        "vision_model.encoder.stages.0.downsample.norm_tokens.bias": "vision.block[2]",
        "visual_projection.0.weight": "head"}),
    ("blip_2_qformer", "base", {"layernorm.bias": "embeddings"}),
    ("videomae", "for_pretraining", {"encoder_to_decoder.weight": "connector", "decoder.norm.bias": "head",
        "decoder.decoder_layers.0.output.dense.bias": "decoder.block[0]"}),
    ("bridgetower", "base", {"cross_modal_text_layers.1.output.dense.bias": "cross.block[1]",
        "cross_modal_image_layers.1.output.dense.bias": "cross.block[1]",
        "cross_modal_text_link_tower.0.LayerNorm.bias": "cross.block[1]",
        "cross_modal_text_layernorm.weight": "connector"}),
    ("lightglue", "base", {"transformer_layers.0.self_attention.q_proj.weight": "main.block[0]",
        "token_confidence.0.token.weight": "main.block[0]"}),
    ("lfm2", "base", {"embedding_norm.weight": "head"}),
    ("eomt", "universal", {"layernorm.bias": "head", "query.weight": "embeddings"}),
    ("videomt", "universal", {"query_updater.weight": "embeddings"}),
    ("unlimited_ocr", "base", {"vision_tower.vision_encoder.pre_layrnorm.weight": "vision.connector"}),
    ("sam", "mask_generation", {"prompt_encoder.mask_embed.conv1.bias": "embeddings"}),
    ("superglue", "keypoint", {"gnn.layers.0.attention.output.dense.bias": "main.block[0]",
        "keypoint_encoder.encoder.0.linear.weight": "connector", "bin_score": "head"}),
    ("encodec", "base", {"encoder.layers.0.conv.bias": "encoder.block[0]",
        "decoder.layers.0.conv.bias": "decoder.block[0]"}),
    ("qwen3_asr_encoder", "base", {"conv2d1.bias": "embeddings", "ln_post.bias": "head"}),
    ("bark", "base", {"semantic.layers.0.mlp.in_proj.weight": "semantic.block[0]",
        "fine_acoustics.layers.0.mlp.in_proj.weight": "fine.block[0]"}),
    ("swiftformer", "base", {"encoder.network.1.proj.bias": "block[2]"}),
    ("granite_speech", "base", {"projector.qformer.encoder.layer.0.attention.output.dense.bias": "qformer.block[0]",
        "projector.query": "embeddings"}),
    ("sam_hq", "mask_generation", {"mask_decoder.encoder_conv1.bias": "connector"}),
    ("vjepa2", "base", {"predictor.layer.0.norm1.bias": "predictor.block[0]", "encoder.layernorm.bias": "head"}),
    ("pe_audio_video", "base", {"audio_model.audio_encoder.layers.1.mlp.up_proj.weight": "audio.block[1]",
        "video_model.video_encoder.layers.2.mlp.up_proj.weight": "video.block[2]",
        "audio_model.audio_encoder.norm.weight": "text.connector", "text_model.final_norm.weight": "text.connector",
        "audio_video_encoder.layers.0.mlp.up_proj.weight": "cross.block[0]",
        "audio_model.text_audio_head.proj.weight": "head", "video_model.video_head.proj.weight": "head",
        "audio_model.text_audio_logit_scale": "head", "video_model.text_video_logit_bias": "head"}),
    ("sam3_video", "base", {"tracker_neck.fpn_layers.0.proj1.weight": "vision.connector",
        "detector_model.detr_decoder.box_rpb_embed_x.layer1.bias": "encoder.detr_encoder.connector",
        "detector_model.detr_decoder.presence_head.layer1.bias": "head",
        "detector_model.mask_decoder.instance_projection.bias": "head"}),
    ("glm_image_vqmodel", "base", {"quant_conv.bias": "all_parameters"}),
    ("evolla", "base", {
        "protein_encoder.sequence_compressor_resampler.layers.1.0.norm_media.bias": "resampler.block[1]",
        "protein_encoder.sequence_compressor_resampler.layers.1.1.fc1.weight": "resampler.block[1]",
        "protein_encoder.sequence_compressor_resampler.latents": "embeddings"}),
    ("granite4_vision", "base", {
        "layerwise_projectors.1.qformer.encoder.layer.0.attention.output.dense.bias": "connector",
        "vision_tower.encoder.layers.0.mlp.fc1.bias": "vision.block[0]"}),
    ("omdet-turbo", "object_detection", {"decoder.task_project.bias": "encoder.connector",
        "decoder.query_position_head.layers.0.weight": "encoder.connector"}),
    ("xcodec", "base", {"fc.bias": "acoustic.connector", "fc2.bias": "acoustic.connector"}),
    ("musicgen", "text_to_waveform", {"enc_to_dec_proj.bias": "connector",
        "audio_encoder.encoder.layers.0.conv.bias": "codec.encoder.block[0]", "decoder.lm_heads.1.weight": "head",
        "decoder.model.decoder.embed_tokens.0.weight": "embeddings", "text_encoder.shared.weight": "embeddings"}),
    ("gemma4_unified_assistant", "causal_lm", {"pre_projection.weight": "embeddings",
        "post_projection.weight": "head"}),
    ("resnet", "base", {"encoder.stages.0.layers.0.shortcut.convolution.weight": "block[0]",
        "encoder.stages.0.layers.0.layer.2.convolution.weight": "block[0]",
        "encoder.stages.1.layers.0.layer.0.convolution.weight": "block[2]"}),
    ("convnext", "base", {"encoder.stages.1.downsampling_layer.0.weight": "block[2]",
        "encoder.stages.1.downsampling_layer.1.weight": "block[2]"}),
    ("textnet", "base", {"encoder.stages.1.stage.0.main_conv.weight": "block[3]"}),
    ("dab-detr", "base", {"backbone.conv_encoder.model.encoder.stages.3.layers.2.layer.0.convolution.weight":
        "vision.block[15]", "encoder.query_scale.layers.0.weight": "vision.connector",
        "decoder.query_scale.layers.0.weight": "encoder.connector",
        "decoder.ref_anchor_head.layers.0.weight": "encoder.connector",
        "query_refpoint_embeddings.weight": "embeddings"}),
    ("mm-grounding-dino", "base", {"decoder.reference_points_head.layers.0.weight": "encoder.connector"}),
    ("diffusion_gemma", "base", {"decoder.self_conditioning.gate_proj.weight": "embeddings",
        "decoder.self_conditioning.pre_norm.weight": "embeddings"}),
    ("emu3", "base", {"vqmodel.encoder.down_block.down.3.attn.1.q_proj.weight": "codec.block[10]",
        "vqmodel.encoder.down_block.down.3.attn_norms.2.weight": "codec.block[11]"}),
    ("vibevoice_acoustic_tokenizer", "base", {"encoder.stem.conv.conv.weight": "embeddings",
        "encoder.stem.stage.1.ffn.linear1.weight": "encoder.block[1]",
        "encoder.conv_layers.0.conv.conv.weight": "encoder.block[2]", "encoder.head.conv.weight": "connector",
        "decoder.head.conv.weight": "head"}),
    ("wavtokenizer", "base", {"encoder_model.encoder.layers.0.conv.bias": "encoder.block[0]",
        "backbone.convnext.1.gamma": "decoder.block[1]"}),
    ("slanet", "table", {"backbone.post_csp_pan.downsamples.0.pointwise_convolution.convolution.weight":
        "neck.block[3]"}),
    ("glpn", "depth", {"decoder.stages.0.convolution.weight": "head"}),
    ("vitmatte", "matting", {"decoder.fusion_blocks.0.conv.conv.weight": "head"}),
    ("glm_image", "base", {"vqmodel.quant_conv.weight": "connector"}),
    ("oneformer", "base", {"task_encoder.task_mlp.layers.0.0.weight": "vision.decoder.connector"}),
    ("xclip", "base", {"prompts_generator.alpha": "head", "prompts_visual_layernorm.weight": "text.connector"}),
    ("vits", "base", {"flow.flows.3.conv_pre.bias": "flow.block[0]", "flow.flows.0.conv_pre.bias": "flow.block[3]"}),
    ("emu3", "base", {"vqmodel.decoder.up_block.up.3.attn_norms.0.norm_layer.bias": "codec.decoder3.block[0]",
        "vqmodel.decoder.up_block.up.3.upsample.conv.bias": "codec.decoder3.block[4]",
        "vqmodel.decoder.up_block.up.0.block.3.conv1.bias": "codec.decoder3.block[15]"}),
    ("flava", "for_pretraining", {"image_codebook.blocks.group_1.group.block_2.res_path.path.conv_1.bias":
        "codec.block[1]", "image_codebook.blocks.group_4.group.block_2.res_path.path.conv_1.bias": "codec.block[7]"}),
    ("xcodec2", "base", {"acoustic_decoder.prior_net.0.conv1.bias": "decoder.block[0]",
        "acoustic_decoder.layers.0.input_layernorm.weight": "decoder.block[2]",
        "acoustic_decoder.post_net.1.conv1.bias": "decoder.block[6]"}),
    ("inkling_mm_model", "base", {"audio_tower.norm.weight": "embeddings"}),
    ("hiera", "for_pretraining", {"hiera.encoder.stages.0.layers.0.layernorm_before.bias": "encoder.block[0]",
        "encoder_norm.bias": "connector", "multiscale_fusion.multi_scale_fusion_heads.0.weight": "connector",
        "decoder.decoder_norm.bias": "head"}),
    ("blip", "visual_question", {"vision_model.post_layernorm.weight": "connector"}),
    ("mask2former", "base", {"pixel_level_module.encoder.swin.layernorm.weight": "vision.encoder.connector"}),
    ("depth_pro", "base", {"encoder.patch_encoder.model.layernorm.weight": "head"}),
    ("maskformer", "base", {"pixel_level_module.decoder.fpn.stem.0.weight": "vision.encoder.connector"}),
    ("blt", "base", {"local_decoder.patch_embedding_projection.weight": "global.connector"}),
    ("bark", "waveform", {"semantic.layernorm_final.weight": "head"}),
    ("vit_mae", "for_pretraining", {"decoder.decoder_embed.weight": "connector", "decoder.mask_token": "embeddings"}),
    ("efficientloftr", "matching", {"refinement_layer.out_conv.weight": "connector"}),
    ("omdet-turbo", "object_detection", {"encoder.channel_projection_layers.0.0.weight": "vision.connector"}),
    ("speecht5", "spectrogram", {"speecht5.encoder.wrapped_encoder.layers.1.layer_norm.bias": "encoder.block[1]",
        "speecht5.decoder.prenet.layers.0.weight": "embeddings", "speech_decoder_postnet.feat_out.bias": "head"}),
    ("qwen3_omni_moe", "waveform", {"code2wav.decoder.1.block.2.conv1.conv.weight": "head",
        "thinker.model.audio_tower.ln_post.weight": "audio.connector"}),
    ("ovis2", "base", {"visual_embeddings_table.weight": "connector"}),
    ("fun_asr_nano", "base", {"multi_modal_projector.layers.1.self_attn.q_proj.weight": "adaptor.block[1]",
        "multi_modal_projector.linear_1.weight": "connector"}),
    ("sam3", "base", {"geometry_encoder.final_proj.weight": "embeddings"}),
    ("seamless_m4t", "base", {"vocoder.dur_predictor.conv1.weight": "t2u.decoder.connector",
        "vocoder.hifi_gan.conv_pre.weight": "t2u.decoder.connector"}),
    ("levit", "for_image", {"encoder.stages.0.layers.3.module.linear_up.linear.weight": "block[1]",
        "encoder.stages.0.layers.4.queries.linear.weight": "block[2]",  # leads to the second stage
        "encoder.stages.0.layers.5.module.linear_up.linear.weight": "block[2]",
        "encoder.stages.2.layers.2.module.projection.linear.weight": "block[5]"}),
    ("perceiver", "masked", {"perceiver.decoder.output_position_encodings.position_embeddings": "head",
        "perceiver.encoder.cross_attention.mlp.dense1.bias": "embeddings"}),
    ("blip-2", "base", {"query_tokens": "embeddings", "qformer.layernorm.weight": "embeddings",
        "vision_model.post_layernorm.weight": "vision.connector", "language_projection.weight": "qformer.connector"}),
    ("idefics2", "base", {"connector.modality_projection.up_proj.weight": "vision.connector",
        "connector.perceiver_resampler.norm.weight": "resampler.connector"}),
    ("deepseek_ocr2", "base", {"vision_tower.sam_encoder.neck.conv1.weight": "vision.connector",
        "multi_modal_projector.weight": "vision.vision_encoder.connector"}),
    ("rt_detr", "base", {"encoder_input_proj.0.0.weight": "vision.connector",
        "encoder.lateral_convs.0.conv.weight": "encoder.connector", "enc_output.0.weight": "encoder.connector",
        "decoder_input_proj.0.0.weight": "encoder.connector"}),
    ("pp_doclayout_v2", "object_detection", {"model.enc_score_head.weight": "head"}),
    ("deformable_detr", "base", {"reference_points.weight": "encoder.connector"}),
    ("mllama", "base", {"vision_model.layernorm_post.weight": "vision.connector",
        "multi_modal_projector.weight": "vision.global_transformer.connector"}),
    ("t5gemma2", "base", {"encoder.multi_modal_projector.mm_soft_emb_norm.weight": "connector"}),
    ("flava", "base", {"image_to_mm_projection.weight": "connector", "text_model.pooler.dense.weight": "head"}),
    ("videoprism_vision_model", "base", {"layernorm1.weight": "connector", "layernorm2.weight": "head"}),
    ("chameleon", "base", {"vqmodel.encoder.mid.attn_1.norm.weight": "codec.mid.block[0]"}),
    ("segformer", "base", {"stages.0.layer_norm.weight": "block[1]",
        "stages.1.patch_embeddings.proj.weight": "block[2]",
        "stages.2.layer_norm.weight": "head"}),
    ("pvt_v2", "base", {"encoder.layers.0.layer_norm.weight": "block[1]",
        "encoder.layers.2.layer_norm.weight": "head"}),
    ("swin2sr", "base", {"encoder.stages.0.conv.weight": "block[5]", "encoder.stages.5.conv.weight": "block[35]"}),
    ("dinov3_convnext", "base", {"model.stages.0.downsample_layers.0.weight": "embeddings",
        "model.stages.1.downsample_layers.0.weight": "block[2]"}),
    ("florence2", "base", {"vision_tower.convs.0.conv.weight": "embeddings",
        "vision_tower.convs.1.conv.weight": "vision.block[1]"}),
    ("muse_spark_audio", "base", {"layers.0.patch_embedder.proj.weight": "embeddings",
        "layers.1.patch_embedder.proj.weight": "block[2]"}),
    ("sam2_video", "base", {"mask_downsample.weight": "embeddings", "memory_attention.layer_norm.bias":
        "memory.connector", "memory_encoder.feature_projection.weight": "vision.connector",
        "mask_decoder.conv_s0.weight": "vision.connector"}),
    ("sam3", "base", {"text_encoder.text_model.final_layer_norm.weight": "vision.connector",
        "geometry_encoder.output_layer_norm.weight": "encoder.connector",
        "detr_decoder.reference_points.weight": "embeddings"}),
    ("dac", "base", {"decoder.conv1.bias": "connector"}),
    ("qwen2_5_omni", "multimodal", {"talker.thinker_to_talker_proj.weight": "text.connector",
        "token2wav.code2wav_bigvgan_model.ups.1.0.weight": "vocoder.block[3]",
        "token2wav.code2wav_dit_model.norm_out.linear.weight": "code2wav.connector"}),
    ("pe_video_encoder", "base", {"embedder.vision_model.classifier.weight": "connector"}),
    ("nemotron3_diarization", "audio_frame", {"silence_embeds": "embeddings"}),
    ("granite_speech", "base", {"encoder.out_mid.weight": "audio.block[0]"}),  # after half of the layers
    ("csm", "text_to", {"codec_model.quantizer.semantic_residual_vector_quantizer.input_proj.weight":
        "codec.encoder.connector", "depth_decoder.model.inputs_embeds_projector.weight": "text.connector"}),
    ("d_fine", "base", {"decoder.lqe_layers.0.reg_conf.layers.0.weight": "head"}),
    ("seamless_m4t", "speech_seq", {"speech_encoder.encoder.layer_norm.weight": "connector"}),
    ("videoprism", "base", {"text_model.layernorm.weight": "head"}),
    ("blt", "base", {"patcher.lm_head.weight": "patcher.connector",
        "local_encoder.patch_embedding_projection.weight": "encoder.block[0]"}),
    ("aria", "base", {"multi_modal_projector.query": "embeddings"}),
    ("pe_audio_video", "base", {"audio_video_encoder.embedder.data_proj.weight": "text.connector"}),
    ("pe_audio_video_encoder", "base", {"embedder.concat_modality_proj.weight": "audio.connector"}),
    ("encoder-decoder", "causal", {"encoder.pooler.dense.weight": "head"}),
]  # fmt: skip

# model type, and Auto class where it is not the base → stacks bottom → top, as the forward runs them
ORDER = {
    "canine": ["encoder.initial", "encoder", "encoder.final"],
    "blt": ["patcher", "encoder", "global", "decoder"],
    "bark": ["codec.encoder", "codec.decoder", "semantic", "coarse", "fine"],
    "hrm_text": ["low", "high"],
    "blip-2": ["vision", "qformer", "text"],
    "t5gemma2": ["vision", "text", "decoder"],
    "phi4_multimodal": ["audio", "vision", "text"],
    "grounding-dino": ["text", "vision", "encoder", "decoder"],
    "pi0": ["vision", "text", "expert"],
    "xcodec": ["semantic", "acoustic", "semantic_encoder", "decoder", "semantic_decoder"],
    "neucodec": ["semantic", "acoustic", "decoder"],
    "evolla": ["protein", "resampler", "text"],
    "musicgen text_to_waveform": ["codec.encoder", "codec.decoder", "text", "decoder"],
    "musicgen_melody text_to_waveform": ["codec.encoder", "codec.decoder", "text", "decoder"],
    "pe_audio_video": ["vision.frame", "audio", "text", "video", "cross"],
    "pe_audio_video_encoder": ["vision.frame", "audio", "video", "cross"],
    "pe_video_encoder": ["vision.frame", "video"],
    "sam3_video": [
        "text",
        "vision",
        "encoder",
        "encoder.detr_encoder",
        "decoder",
        "tracker.memory_encoder",
        "tracker.memory_fuser",
        "tracker.memory",
        "tracker.decoder",
    ],
    "vits": ["text", "flow", "decoder"],
    "qwen2_5_omni multimodal": ["audio", "vision", "text", "talker", "code2wav", "vocoder"],
    "qwen3_omni_moe multimodal": ["audio", "vision", "text", "talker", "talker.predictor", "code2wav"],
    "kyutai_speech_to_text speech": ["codec.encoder", "codec.decoder", "text"],
    "fun_asr_nano": ["audio", "adaptor", "text"],
    "janus": ["codec", "codec.mid", "codec.decoder", "codec.decoder2", "vision", "text"],
    "oneformer": ["vision.encoder", "vision.decoder", "decoder", "decoder.part"],
}


def model_of(model_type: str, auto: str):
    pair = next(pair for pair in model_zoo.pairs() if pair.model_type == model_type and auto in pair.auto)
    return model_zoo.build(pair)


if not transformers.__version__.startswith("5."):
    pytest.skip("these names are those of transformers 5", allow_module_level=True)


@pytest.mark.parametrize(("model_type", "auto", "places"), TABLE, ids=lambda v: v if isinstance(v, str) else "")
def test_loose_parameters(model_type, auto, places):
    home = {name: group.name for group in layer_groups(model_of(model_type, auto)) for name in group.parameter_names}
    assert {name: home[name] for name in places} == places


@pytest.mark.parametrize(
    ("name", "parameter"),
    [
        ("CLIPSegForImageSegmentation", "decoder.transposed_convolution.weight"),
        ("BlipForImageTextRetrieval", "vision_proj.weight"),
        ("Blip2VisionModelWithProjection", "vision_projection.weight"),
    ],
)
def test_heads_of_classes_outside_the_auto_mappings(name, parameter):
    model_class = getattr(transformers, name)
    model = model_zoo.build_class(model_class, model_zoo.shrunken(model_class.config_class, 3))
    assert parameter in layer_groups(model)[-1].parameter_names


@pytest.mark.parametrize(("model_type", "auto"), [("canine", "base"), ("cohere_asr", "base"), ("videomae", "training")])
def test_what_leads_from_an_encoder_to_a_decoder_stands_between_them(model_type, auto):
    names = (group.name.partition("block[")[0] for group in layer_groups(model_of(model_type, auto)))
    stacks = list(dict.fromkeys(names))
    assert "connector" in stacks[2] and len(stacks) > 3, stacks


@pytest.mark.parametrize("pair", ORDER)
def test_stacks_in_the_order_of_execution(pair):
    model_type, _, auto = pair.partition(" ")
    tops = {g.stack: g.level for g in layer_groups(model_of(model_type, auto or "base")) if "block[" in g.name}
    assert list(dict.fromkeys(sorted(tops, key=lambda stack: (tops[stack], stack)))) == ORDER[pair]


def test_what_runs_between_two_blocks_serves_the_upper_one():
    pair = next(pair for pair in model_zoo.pairs() if pair.model_type == "minicpmv4_7_vision")
    for layers, group in ((3, "head"), (9, "block[7]")):  # after the seventh block, where there is one
        home = {name: g.name for g in layer_groups(model_zoo.build(pair, layers)) for name in g.parameter_names}
        assert home["vit_merger.self_attn.k_proj.weight"] == group


def test_a_tower_tied_as_a_whole_takes_no_level():
    levels = [group.level for group in layer_groups(model_of("diffusion_gemma", "base"))]
    assert sorted(set(levels)) == list(range(max(levels) + 1))
