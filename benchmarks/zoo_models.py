"""Tiny random models of every architecture that transformers has, without a recipe for each.

An architecture is found in transformers' own tables (model type → class), its config shrunk by a
dictionary of field names that stands for all configs, and its inputs made from the names of its
forward's arguments. `CONFIGS` and `INPUTS` hold what a few need besides. Models are seeded, in
evaluation mode, with random biases and norms, so that nothing vanishes by chance; no two sizes are
equal, so that none is mistaken for another.
"""

import functools
import importlib
import inspect
import re
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

VOCABULARY, HIDDEN, HEADS, LAYERS, INTERMEDIATE, POSITIONS = 99, 32, 4, 2, 48, 64
LABELS, FRAMES, MELS = 3, 4, 10
BATCH, LENGTH = 2, 7
ORDINARY = 4, VOCABULARY - 25

Inputs = dict[str, Any]

KINDS = {
    "vision-language": "MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES",
    "contrastive": "MODEL_FOR_ZERO_SHOT_IMAGE_CLASSIFICATION_MAPPING_NAMES",
    "speech-to-text": "MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING_NAMES",
    "encoder-decoder": "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES",
    "image": "MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES",
    "audio": "MODEL_FOR_AUDIO_CLASSIFICATION_MAPPING_NAMES",
    "speech": "MODEL_FOR_CTC_MAPPING_NAMES",
    "encoder": "MODEL_FOR_MASKED_LM_MAPPING_NAMES",
    "causal": "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES",
    "classifier": "MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES",
    "segmentation": "MODEL_FOR_SEMANTIC_SEGMENTATION_MAPPING_NAMES",
    "video": "MODEL_FOR_VIDEO_CLASSIFICATION_MAPPING_NAMES",
    "depth": "MODEL_FOR_DEPTH_ESTIMATION_MAPPING_NAMES",
    "detection": "MODEL_FOR_OBJECT_DETECTION_MAPPING_NAMES",
    "image-to-image": "MODEL_FOR_IMAGE_TO_IMAGE_MAPPING_NAMES",
}
"""Kind of model → transformers' table of model types; the first that has a type decides."""

SMALL: dict[str, Any] = {
    **dict.fromkeys(
        """hidden_size d_model n_embd embed_dim dim encoder_hidden_size decoder_hidden_size
        emb_dim lru_width output_dim projection_dim out_hidden_size embedding_dim
        text_hidden_size word_embed_proj_dim projector_hidden_size conv_dim_ hidden_dim_
        text_encoder_width vision_hidden_size fusion_hidden_size backbone_hidden_size
        head_hidden_size encoder_hidden_dim attention_hidden_size input_embedding_size
        output_embedding_size word_embed_size cross_hidden_size projection_hidden_size
        qformer_hidden_size d_latents vit_dim pred_hidden_size decoder_hidden_dim""".split(),
        HIDDEN,
    ),
    **dict.fromkeys(
        """intermediate_size encoder_ffn_dim decoder_ffn_dim ffn_dim mlp_dim d_ff ffn_hidden_size
        n_inner_ hidden_dim dim_ff dff moe_intermediate_size feed_forward_proj_size
        shared_expert_intermediate_size shared_intermediate_size d_inner
        moe_shared_expert_intermediate_size expert_ffn_hidden_size shared_experts_intermediate_size
        intermediate_size_mlp dense_intermediate_size encoder_linear_units decoder_linear_units
        speech_encoder_intermediate_size t2u_encoder_ffn_dim t2u_decoder_ffn_dim
        decoder_intermediate_size encoder_feedforward_dim dim_feedforward
        projection_intermediate_size projection_intermediate_dim feed_forward_size
        attention_ffn_size""".split(),
        INTERMEDIATE,
    ),
    **dict.fromkeys(
        """num_attention_heads num_heads n_head n_heads encoder_attention_heads attention_heads
        decoder_attention_heads num_self_attention_heads num_cross_attention_heads
        num_encoder_attention_heads num_decoder_attention_heads speech_encoder_attention_heads
        t2u_encoder_attention_heads t2u_decoder_attention_heads linear_num_value_heads
        decoder_num_attention_heads encoder_num_attention_heads pred_num_attention_heads
        decoder_self_attention_heads decoder_cross_attention_heads swa_num_attention_heads
        mit_num_attention_heads prompt_num_attention_heads index_n_heads conf_num_attention_heads
        cross_num_attention_heads resampler_n_heads linear_num_heads decoder_num_heads
        num_sliding_attention_heads num_swa_attention_heads""".split(),
        HEADS,
    ),
    **dict.fromkeys(
        """num_key_value_heads num_kv_heads encoder_num_key_value_heads linear_num_key_heads
        decoder_num_key_value_heads swa_num_key_value_heads num_query_groups
        cross_num_key_value_heads num_key_value_attention_heads
        num_swa_key_value_heads num_global_key_value_heads""".split(),
        HEADS // 2,
    ),
    **dict.fromkeys(
        """num_hidden_layers n_layer n_layers num_layers encoder_layers decoder_layers depth
        num_decoder_layers num_encoder_layers layers speech_encoder_layers t2u_encoder_layers
        t2u_decoder_layers decoder_num_hidden_layers encoder_num_hidden_layers
        pred_num_hidden_layers num_self_attends_per_block text_encoder_num_layers
        decoder_num_layers mit_num_hidden_layers prompt_layers conf_num_hidden_layers
        num_transformer_layers""".split(),
        LAYERS,
    ),
    **dict.fromkeys(
        """head_dim d_kv attention_head_size dim_head d_head qk_head_dim_ v_head_dim
        qk_nope_head_dim qk_rope_head_dim linear_key_head_dim linear_value_head_dim kv_channels
        swa_head_dim cross_head_dim index_head_dim_ attention_head_dim_ resampler_head_dim
        mamba_d_head mamba_head_dim kv_lora_rank q_lora_rank linear_head_dim rotary_dim
        swa_v_head_dim""".split(),
        HIDDEN // HEADS,
    ),
    "index_head_dim": 16,
    "global_head_dim": 16,
    "mamba_headdim": 16,
    **dict.fromkeys("vocab_size text_vocab_size src_vocab_size tgt_vocab_size".split(), VOCABULARY),
    "decoder_vocab_size": VOCABULARY,
    "vocab_size_per_layer_input": VOCABULARY,
    "hidden_size_per_layer_input": 8,
    **dict.fromkeys(
        """max_position_embeddings n_positions n_ctx max_length max_seq_len seq_len
        max_source_positions_ max_target_positions model_max_length seq_length
        text_encoder_context_length""".split(),
        POSITIONS,
    ),
    "max_source_positions": 16,
    **dict.fromkeys(
        """num_experts n_routed_experts num_local_experts moe_num_experts
        num_experts_per_layer""".split(),
        4,
    ),
    **dict.fromkeys("num_experts_per_tok num_experts_per_token moe_k moe_topk".split(), 2),
    **dict.fromkeys("n_group num_expert_group".split(), 1),
    "topk_group": 1,
    "n_shared_experts": 1,
    "first_k_dense_replace": 1,
    "image_size": 32,
    "patch_size": 8,
    "num_mel_bins": MELS,
    "num_frames": FRAMES,
    "window_size": 4,
    "sliding_window": 4,
    "mamba_d_state": 8,
    "state_size": 8,
    "ssm_state_size": 8,
    "mamba_n_heads": 8,
    "mamba_num_heads": 8,
    "mamba_chunk_size": 4,
    "chunk_size": 4,
    "time_step_rank": 4,
    "mamba_dt_rank": 4,
    "embedding_size": 16,
    "num_conv_pos_embeddings": 8,
    "num_conv_pos_embedding_groups": 2,
    "classifier_proj_size": 12,
    "xvector_output_dim": 12,
    "feature_size": MELS,
    "num_queries": 6,
    "num_query_tokens": 3,
    "num_landmarks": 4,
    "segment_means_seq_len": 16,
    "attention_window_size": 4,
    "local_attention": 4,
    "pooler_hidden_size": HIDDEN,
    "conv_dim": (16, 16),
    "conv_kernel": (4, 3),
    "conv_stride": (3, 2),
    "num_feat_extract_layers": 2,
    "laurel_rank": 4,
    "num_latents": 6,
    "num_labels": LABELS,
    "deepstack_visual_indexes": (0, 1),
    "num_position_embeddings": 16,
    "image_grid_pinpoints": ([32, 64],),
    "reassemble_hidden_size": HIDDEN,
    "vision_output_dim": HIDDEN,
    "decoder_in_channels": HIDDEN,
    "encoder_in_channels": (24, 32, 48),
    "stem_out_channels": 16,
    "num_patches": 16,
    "position_embedding_size": 16,
    "pos_emb_height": 8,
    "pos_emb_width": 8,
    "mm_tokens_per_image": 4,
    "fullatt_block_indexes": (1,),
    "vision_feature_layers": (-1, -2),
    "entity_vocab_size": VOCABULARY,
    "pronunciation_vocab_size": VOCABULARY,
    "shape_vocab_size": VOCABULARY,
    "num_filters": 4,
    "width_coefficient": 0.125,
    "depth_coefficient": 0.3,
}
"""Field of a config → small value, wherever a config has the field."""

WANTED = ("num_key_value_heads", "num_experts_per_tok", "n_routed_experts", "n_shared_experts")
"""Fields that are set even where the default is None."""

MROPE = {"mrope_section": [1, 1, 2], "partial_rotary_factor": 1.0}
"""Rotary embeddings of time, height and width, for the small head dimension."""

NESTED = ("depths", "num_blocks", "encoder_depths")
STAGES = (16, 24, 32, 48, 64)
WIDTHS = """hidden_sizes embed_dims encoder_hidden_sizes neck_hidden_sizes hidden_dims
post_process_channels""".split()

GEMMA3N: dict[str, Any] = {
    "intermediate_size": [48, 48],
    "activation_sparsity_pattern": [0.0, 0.0],
    "num_kv_shared_layers": 0,
    "layer_types": ["sliding_attention", "full_attention"],
}
HGNET: dict[str, Any] = {
    "stem_channels": [3, 8, 12],
    "stage_in_channels": [12, 16, 24, 32],
    "stage_mid_channels": [8, 8, 12, 16],
    "stage_out_channels": [16, 24, 32, 48],
    "stage_num_blocks": [1, 1, 1, 1],
    "stage_numb_of_layers": [2, 2, 2, 2],
}
CHAMELEON_VQ: dict[str, Any] = {
    "num_embeddings": 8,
    "embed_dim": 16,
    "latent_channels": 16,
    "base_channels": 32,
    "channel_multiplier": (1, 1, 1, 1),
    "resolution": 32,
}
TWO_KINDS: dict[str, Any] = {"layer_types": ["linear_attention", "full_attention"]}
RESNET: dict[str, Any] = {
    "use_timm_backbone": False,
    "backbone": None,
    "backbone_config": {
        "model_type": "resnet",
        "embedding_size": 16,
        "hidden_sizes": [16, 24, 32, 48],
        "depths": [1, 1, 1, 1],
        "layer_type": "basic",
        "out_features": ["stage2", "stage3", "stage4"],
    },
}
LCNET: dict[str, Any] = {
    "stem_channels": [3, 8, 16],
    "block_configs": [
        [[3, 16, 16, 1, True]],
        [[3, 16, 24, 2, False]],
        [[3, 24, 32, 2, False]],
        [[3, 32, 48, 2, False]],
    ],
    "out_features": ["stage1", "stage2", "stage3", "stage4"],
}
INTRACLASS: dict[str, Any] = {
    "neck_out_channels": 32,
    "scale_factor_list": [1, 2, 4, 8],
    "kernel_list": [3, 2, 2],
    "intraclass_block_config": {
        "reduce_channel": [1, 1, 0],
        "return_channel": [1, 1, 0],
        **{
            f"{name}_{ratio}ratio": [
                [tall * r + 1, wide * r + 1],
                [1, 1],
                [tall * r // 2, wide * r // 2],
            ]
            for ratio, r in (("long", 6), ("mid", 4), ("short", 2))
            for name, tall, wide in (
                ("vertical_long_to_small_conv", 1, 0),
                ("horizontal_small_to_long_conv", 0, 1),
                ("symmetric_conv_long", 1, 1),
            )
        },
    },
}
PARAKEET: dict[str, Any] = {"num_mel_bins": 16, "subsampling_conv_channels": 16}
SAM: dict[str, Any] = {"downsample_channels": [16, 32], "output_channels": 16}
COMPASS_ROPE: dict[str, Any] = {
    "full_attention": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]}
}

CONFIGS: dict[str, dict[str, Any]] = {}
"""Model type → fields that the dictionary above does not make fit. Nested for sub-configs."""

CONFIGS.update(
    {
        "opt": {"ffn_dim": 48},
        "gpt2": {"n_inner": 48},
        "recurrent_gemma": {"num_hidden_layers": 3, "attention_window_size": 4},
        "jamba": {
            "num_hidden_layers": 4,
            "attn_layer_period": 2,
            "attn_layer_offset": 1,
            "expert_layer_period": 2,
            "expert_layer_offset": 1,
            "use_mamba_kernels": False,
        },
        "mamba2": {"num_heads": 8, "head_dim": 8, "expand": 2, "n_groups": 2},
        "rwkv": {"attention_hidden_size": 32, "context_length": 64},
        "swin": {
            "image_size": 32,
            "patch_size": 4,
            "embed_dim": 16,
            "depths": (2, 2),
            "num_heads": (2, 4),
        },
        "swinv2": {
            "image_size": 32,
            "patch_size": 4,
            "embed_dim": 16,
            "depths": (2, 2),
            "num_heads": (2, 4),
        },
        "donut-swin": {
            "image_size": 32,
            "patch_size": 4,
            "embed_dim": 16,
            "depths": (2, 2),
            "num_heads": (2, 4),
        },
        "convnext": {"image_size": 64},
        "convnextv2": {"image_size": 64},
        "resnet": {"embedding_size": 16, "depths": (1, 2, 1, 1)},
        "segformer": {"image_size": 64, "decoder_hidden_size": 32},
        "deepseek_v3": {"n_group": 2, "num_key_value_heads": 4, "head_dim": 8},
        "distilbert": {"dim": 32, "hidden_dim": 48},
        "modernbert": {"cls_token_id": 1, "sep_token_id": 2, "reference_compile": False},
        "audio-spectrogram-transformer": {
            "max_length": 24,
            "frequency_stride": 4,
            "time_stride": 4,
        },
        "xlnet": {"d_head": 8},
        "blt": {
            "patch_size": 4,
            "encoder_hash_byte_group_vocab": 50,
            "encoder_config": {"num_key_value_heads": 4, "hidden_size_global": 32},
            "decoder_config": {"num_key_value_heads": 4, "hidden_size_global": 32},
            "global_config": {"num_key_value_heads": 4},
            "patcher_config": {"num_key_value_heads": 4},
        },
        "bailing_hybrid": {"num_hidden_layers": 4, "layer_group_size": 2},
        "bamba": {"num_hidden_layers": 3, "attn_layer_indices": [1], "mamba_n_groups": 1},
        "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
        "esm": {"vocab_size": 99, "pad_token_id": 1, "mask_token_id": 5},
        "esmc": {"num_key_value_heads": 4},
        "reformer": {"axial_pos_embds_dim": (16, 16), "axial_pos_shape": (8, 8)},
        "squeezebert": {"embedding_size": 32},
        "xmod": {"default_language": "en_XX"},
        "falcon_h1": {
            "mamba_d_ssm": 32,
            "mamba_n_heads": 4,
            "mamba_d_head": 8,
            "mamba_n_groups": 1,
        },
        "gemma3n_text": GEMMA3N,
        "hunyuan_v1_dense": {"head_dim": 8},
        "hunyuan_v1_moe": {"head_dim": 8},
        "dbrx": {"attn_config": {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 10000.0}},
        "efficientnet": {"hidden_dim": 160},
        "textnet": {"image_size": 32},
        "bit": {"num_groups": 8},
        "levit": {"image_size": 64, "patch_size": 16},
        "mobilevit": {
            "image_size": 64,
            "patch_size": 2,
            "hidden_sizes": (32, 40, 48),
            "neck_hidden_sizes": (8, 16, 24, 32, 40, 48, 64),
        },
        "mobilevitv2": {"image_size": 64, "patch_size": 2},
        "cvt": {"depth": (1, 2, 3), "embed_dim": (16, 32, 48), "num_heads": (1, 2, 4)},
        "nystromformer": {"num_landmarks": 64, "segment_means_seq_len": 64},
        "granite_speech5_ctc": {"encoder_config": {"context_size": 16, "num_key_value_heads": 4}},
        "albert": {"embedding_size": 16},
        "aria": {
            "projector_patch_to_query_dict": {16: 4},
            "max_value_projector_patch_to_query_dict": 4,
        },
        "blip-2": {"image_token_index": 88},
        "instructblip": {"image_token_index": 88},
        "instructblipvideo": {"video_token_index": 88},
        "chameleon": {
            "vocabulary_map": {"<image>": 89, **{f"IMGIMG{'ABCDEFGH'[i]}Z": i for i in range(8)}},
            "vq_config": CHAMELEON_VQ,
        },
        "cohere_compass": {"text_config": {"rope_parameters": COMPASS_ROPE}},
        "cohere_compass_text": {"rope_parameters": COMPASS_ROPE},
        "deepseek_ocr2": {
            "text_config": {"mlp_layer_types": ["dense", "sparse"]},
            "vision_config": {"sam_config": SAM},
        },
        "unlimited_ocr": {"vision_config": {"sam_config": SAM}},
        "diffusion_gemma": {
            "canvas_length": 8,
            "text_config": {"num_experts": 4, "top_k_experts": 2, "moe_intermediate_size": 48},
        },
        "exaone4_5": {"vision_config": {"window_size": 32}},
        "hyperclovax_vision_v2": {"vision_config": {"window_size": 32}},
        "qwen2_5_omni_thinker": {
            "vision_start_token_id": 83,
            "vision_end_token_id": 84,
            "vision_config": {"window_size": 32},
        },
        "qwen2_5_vl": {"vision_config": {"window_size": 32}},
        "qwen3_omni_moe_thinker": {"vision_start_token_id": 83, "vision_end_token_id": 84},
        "florence2": {
            "vision_config": {
                "patch_size": (7, 3, 3, 3),
                "embed_dim": (16, 24, 32, 48),
                "num_heads": (4, 4, 4, 4),
                "num_groups": (4, 4, 4, 4),
            }
        },
        "gemma3n": {"text_config": GEMMA3N},
        "gemma4_unified": {
            "vision_config": {"mm_embed_dim": 32, "mm_posemb_size": 16, "output_proj_dims": 32}
        },
        "hunyuan_vl": {"text_config": {"head_dim": 8}},
        "llama4": {
            "vision_config": {
                "intermediate_size": 128,
                "projector_input_dim": 32,
                "projector_output_dim": 32,
            }
        },
        "mistral4": {"head_dim": 16},
        "mllama": {
            "text_config": {"cross_attention_layers": [1]},
            "vision_config": {
                "intermediate_layers_indices": [0, 1],
                "vision_output_dim": 96,
                "num_global_layers": 1,
            },
        },
        "minicpm_ocr": {"text_config": TWO_KINDS},
        "minicpmv4_6": {"text_config": TWO_KINDS},
        "minicpmv4_7": {"text_config": TWO_KINDS},
        "molmo2": {"image_patch_id": 88, "adapter_config": {"vision_feature_layer": [1, 0]}},
        "muse_spark": {"out_hidden_size": 128, "audio_config": {"num_hidden_layers": 4}},
        "nemotron_h_omni": {
            "image_token_id": 88,
            "vision_config": {"video_temporal_patch_size": 2},
        },
        "step3p7": {"text_config": {"sliding_window": 4}},
        "align": {"projection_dim": 40, "vision_config": {"hidden_dim": 160}},
        "deepseek_vl_hybrid": {"high_res_vision_config": {"global_attn_indexes": [0, 1]}},
        "janus": {"vq_config": CHAMELEON_VQ},
        "canary": {"encoder_config": PARAKEET},
        "cohere_asr": {"encoder_config": PARAKEET},
        "parakeet_ctc": {"encoder_config": PARAKEET},
        "granite_speech": {"downsample_rate": 2, "encoder_config": {"hidden_dim": 32}},
        "granite_speech_plus": {"downsample_rate": 2, "encoder_config": {"hidden_dim": 32}},
        "voxtral": {"audio_token_id": 88, "audio_config": {"intermediate_size": 128}},
        "glmasr": {"audio_config": {"intermediate_size": 128}},
        "fun_asr_nano": {"adaptor_config": {"intermediate_size": 8}},
        "nemo_speechlm": {
            "audio_config": {"diarization_config": {"head_config": {"audio_hidden_size": 32}}}
        },
        "shieldgemma2": {"yes_token_index": 20, "no_token_index": 21},
        "neomme": {"head_dim": 16},
        "ministral": {"head_dim": 8},
        "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
        "zaya": {"num_experts_per_tok": 1},
        "layoutlmv3": {"coordinate_size": 4, "shape_size": 8},
        "lilt": {"hidden_size": 48},
        "dpt": {"num_hidden_layers": 4, "backbone_out_indices": [0, 1, 2, 3]},
        "lw_detr": {
            "projector_scale_factors": [1.0],
            "backbone_config": {"num_windows": 4, "window_block_indices": [0, 1, 3]},
        },
        "conditional_detr": RESNET,
        "dab-detr": RESNET,
        "deformable_detr": RESNET,
        "detr": RESNET,
        "table-transformer": RESNET,
        "dots3_note": {
            "vision_config": {
                "per_layer_config": {},
                "adapter_in_dim": 32,
                "adapter_out_dim": 32,
            },
            "audio_config": {
                "adapter_input_size": 32,
                "adapter_out_dim": 32,
                "downsample_hidden_size": 16,
            },
        },
        "swin2sr": {
            "image_size": 16,
            "patch_size": 1,
            "embed_dim": 16,
            "depths": (1, 1),
            "num_heads": (2, 2),
        },
        "hgnet_v2": HGNET,
        "vipllava": {"vision_feature_layer": (-1, -2)},
        "zamba": {
            "layers_block_type": ["linear_attention", "hybrid", "hybrid"],
            "num_hidden_layers": 3,
            "attention_hidden_size": 64,
            "attention_head_dim": 16,
        },
        "zamba2": {
            "layers_block_type": ["linear_attention", "hybrid"],
            "attention_hidden_size": 64,
            "attention_head_dim": 16,
            "mamba_headdim": 8,
        },
        "sapiens2": {
            "num_hidden_layers": 2,
            "num_key_value_heads_per_layer": [4, 2],
            "head_config": {"upsample_out_channels": [16, 12], "conv_out_channels": [12]},
        },
        "depth_pro": {
            "patch_size": 32,
            "intermediate_hook_ids": (1, 0),
            "intermediate_feature_dims": (16, 16),
            "scaled_images_feature_dims": (16, 24, 16),
        },
        "zoedepth": {"bottleneck_features": 32, "bin_embedding_dim": 16},
        "pp_ocrv5_server_det": {"backbone_config": HGNET, **INTRACLASS},
        "pp_ocrv6_medium_det": {"backbone_config": LCNET, **INTRACLASS},
        "pp_ocrv6_small_det": {
            "backbone_config": LCNET,
            "layer_list_out_channels": (16, 24, 32, 48),
        },
        "moonshine": {"encoder_num_key_value_heads": 4, "decoder_num_key_value_heads": 4},
        "moonshine_streaming": {
            "num_key_value_heads": 4,
            "encoder_config": {"num_key_value_heads": 4, "sliding_windows": [[16, 4], [16, 4]]},
        },
        "kyutai_speech_to_text": {
            "codec_config": {
                "upsample_groups": 32,
                "num_filters": 4,
                "codebook_size": 16,
                "codebook_dim": 16,
                "vector_quantization_hidden_dimension": 16,
            }
        },
        "pix2struct": {
            "text_config": {"hidden_size": 32},
            "vision_config": {"patch_embed_hidden_size": 48},
        },
        "paddleocr_vl": {
            "text_config": {
                "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, **MROPE},
            }
        },
        "kosmos-2.5": {"latent_query_num": 3, "vision_config": {"patch_embed_hidden_size": 48}},
        "kosmos-2": {"latent_query_num": 3},
        "muse_glimmer": {"out_hidden_size": 128},
        "granite4_vision": {
            "deepstack_layer_map": [[0, 0]],
            "spatial_target_layers": [0, 1, 0, 1],
            "downsample_rate": "1/2",
            "vision_config": {"hidden_size": 64},
        },
        "emu3": {
            "vocabulary_map": {
                "<image>": 89,
                "<|extra_200|>": 88,
                **{f"<|visual token {i:06d}|>": i for i in range(8)},
            },
            "vq_config": {
                "codebook_size": 8,
                "embed_dim": 4,
                "base_channels": 32,
                "channel_multiplier": (1, 1),
                "num_attention_heads": 1,
            },
        },
        "d_fine": {"backbone_config": HGNET},
        "deimv2": {"backbone_config": HGNET},
        "pp_doclayout_v2": {
            "backbone_config": HGNET,
            "class_thresholds": [0.5] * LABELS,
            "class_order": [0, 1, 2],
        },
        "pp_doclayout_v3": {"backbone_config": HGNET, "x4_feat_dim": 16},
        "pp_doclayout_v4": {"backbone_config": HGNET},
        "gpt_oss": {"head_dim": 8},
        "bloom": {"hidden_size": 32},
    }
)


@dataclass(frozen=True)
class Architecture:
    """A tiny model and its inputs."""

    name: str
    kind: str
    class_name: str
    build: Callable[[], nn.Module]
    given: Callable[[nn.Module, int, int], Inputs]
    """(model, batch, length) → inputs."""

    def model(self, dtype: torch.dtype = torch.float64) -> nn.Module:
        """A new instance, always the same."""
        torch.manual_seed(zlib.crc32(self.name.encode()))
        model = self.build()
        randomise(model)
        return model.to(dtype).eval()

    def inputs(
        self,
        model: nn.Module,
        batch: int = BATCH,
        length: int = LENGTH,
        dtype: torch.dtype = torch.float64,
    ) -> Inputs:
        """Inputs, always the same for the same sizes."""
        torch.manual_seed(100 * batch + length)
        given = self.given(model, batch, length)
        return {
            name: value.to(dtype) if _is_floating(value) else value for name, value in given.items()
        }


def architectures() -> dict[str, Architecture]:
    """Every architecture by name: transformers' model types, and plain modules of PyTorch."""
    found = {arch.name: arch for arch in _plain()}
    classes: set[str] = set()
    mapped = list(_mapped())
    named = {entry[2] for entry in mapped if _is_own(entry[1], entry[2])}
    for kind, model_type, class_name in mapped:
        own = _is_own(model_type, class_name)
        if class_name in classes or model_type in found or (class_name in named and not own):
            continue
        classes.add(class_name)
        found[model_type] = Architecture(
            model_type,
            kind,
            class_name,
            functools.partial(_build, model_type, class_name),
            functools.partial(_inputs, model_type, kind),
        )
    return found


def _is_own(model_type: str, class_name: str) -> bool:
    """Whether a class is named after a model type, rather than borrowed by it."""
    return class_name.lower().startswith(re.sub("[^a-z0-9]", "", model_type))


def _mapped() -> Iterator[tuple[str, str, str]]:
    """(kind, model type, class name) of transformers' tables."""
    auto = importlib.import_module("transformers.models.auto.modeling_auto")
    classifiers = auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES
    for kind, table in KINDS.items():
        for model_type, name in getattr(auto, table).items():
            if kind == "encoder":
                name = classifiers.get(model_type, name)
            yield kind, model_type, name if isinstance(name, str) else name[0]


def _class(name: str) -> Any:
    return getattr(importlib.import_module("transformers"), name)


def _build(model_type: str, class_name: str) -> nn.Module:
    cls = _class(class_name)
    config = small_config(cls.config_class, CONFIGS.get(model_type, {}))
    if class_name.endswith("SequenceClassification") and getattr(config, "pad_token_id", 0) is None:
        config.pad_token_id = 0
    config._experts_implementation = "eager"
    return cls(config)


def small_config(config_class: Any, overrides: Mapping[str, Any]) -> Any:
    """A config with every field that `SMALL` names made small, sub-configs too."""
    return config_class(**_small_fields(config_class, overrides))


def _small_fields(config_class: Any, overrides: Mapping[str, Any]) -> dict[str, Any]:
    try:
        default = config_class()
        values = {**_declared(config_class), **default.__dict__}
    except Exception:
        default, values = None, _declared(config_class)
    fields: dict[str, Any] = {}
    aliases = getattr(config_class, "attribute_map", {})
    for name, value in values.items():
        if name in aliases:
            continue
        if value == 0 or (value is None and name not in WANTED):
            continue
        if name in SMALL and not isinstance(value, str | bool | dict):
            listed = isinstance(value, list | tuple)
            small = SMALL[name]
            if listed and isinstance(small, tuple):
                fields[name] = type(value)(small)
            elif not listed and not isinstance(small, tuple):
                fields[name] = small
            elif listed:
                fields[name] = type(value)([small] * len(value))
        elif name in NESTED and isinstance(value, list | tuple):
            fields[name] = type(value)([1] * len(value))
        elif name in WIDTHS and isinstance(value, list | tuple):
            fields[name] = type(value)(STAGES[: len(value)])
        elif name.endswith(TOKENS) and isinstance(value, int) and value > 3:
            fields[name] = _special_token(name)
    if "mrope_section" in (getattr(config_class, "ignore_keys_at_rope_validation", None) or ()):
        fields["rope_parameters"] = {**(values.get("rope_parameters") or {}), **MROPE}
    if values.get("kv_lora_rank") and "num_key_value_heads" in fields:
        fields["num_key_value_heads"] = HEADS
    fields["num_labels"] = LABELS
    fields.update(overrides)
    if "tie_word_embeddings" in values:
        fields["tie_word_embeddings"] = bool(values["tie_word_embeddings"])
    for name in getattr(config_class, "sub_configs", {}):
        sub = getattr(default, name, None) if default is not None else None
        sub_class = type(sub) if sub is not None else config_class.sub_configs[name]
        whole = "model_type" in overrides.get(name, {})
        if whole or sub_class.__name__ == "AutoConfig" or isinstance(sub, dict):
            continue  # an override stands as it is
        inner = _small_fields(sub_class, {**_stages(sub), **overrides.get(name, {})})
        fields[name] = {**inner, "model_type": sub_class.model_type}
    return fields


def _stages(backbone: Any) -> dict[str, Any]:
    """The stages that a backbone returns; a transformer is made to have as many layers."""
    indices = getattr(backbone, "out_indices", None)
    if not indices or getattr(backbone, "stage_names", None) is None:
        return {}
    switches = {k: v for k, v in backbone.__dict__.items() if isinstance(v, bool)}
    if getattr(backbone, "num_hidden_layers", None) is None:
        return {"out_features": list(backbone.out_features)}
    count = len(indices)
    if count == 1:
        return switches
    return {
        **switches,
        "num_hidden_layers": count,
        "out_features": [f"stage{layer}" for layer in range(1, count + 1)],
    }


def _declared(config_class: Any) -> dict[str, Any]:
    """The fields that a config class declares, with their defaults."""
    declared: dict[str, Any] = {}
    for base in reversed(config_class.__mro__):
        for name in inspect.get_annotations(base):
            value = getattr(config_class, name, None)
            if not name.startswith("_") and not callable(value) and name not in ("sub_configs",):
                declared[name] = value
    for name in ("model_type", "base_config_key", "attribute_map", "keys_to_ignore_at_inference"):
        declared.pop(name, None)
    return declared


TOKENS = ("_token_id", "_token_index")
SPECIAL = {"pad": 0, "bos": 1, "eos": 2, "decoder_start": 1}


def _special_token(name: str) -> int:
    """A small id for a special token, unlike that of another name."""
    for prefix, token in SPECIAL.items():
        if name.startswith(prefix):
            return token
    return VOCABULARY - 1 - zlib.crc32(name.encode()) % 20


def randomise(model: nn.Module) -> None:
    """Draw the parameters anew: matrices at unit gain, noise on vectors."""
    done: set[int] = set()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if id(parameter) in done or not parameter.is_floating_point():
                continue
            done.add(id(parameter))
            if parameter.dim() < 2 or min(parameter.shape) == 0 or "A_log" in name:
                parameter.add_(0.1 * torch.randn_like(parameter))
            elif parameter.dim() == 2 and any(
                word in name for word in ("embed", "wte", "wpe", "shared", "word")
            ):
                parameter.normal_(0.0, 0.7)
            elif parameter.dim() == 3 and "expert" in name:
                parameter.normal_(0.0, HIDDEN**-0.5)
            else:
                parameter.normal_(0.0, parameter[0].numel() ** -0.5)
        for name, buffer in model.named_buffers():
            if "running_mean" in name:
                buffer.normal_(0.0, 0.3)
            elif "running_var" in name:
                buffer.uniform_(0.5, 2.0)


def _is_floating(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()


def token_ids(batch: int, length: int) -> Tensor:
    """Token ids that are no special tokens."""
    return torch.randint(*ORDINARY, (batch, length))


def other_ids(ids: Tensor, *, tokens: bool) -> Tensor:
    """Another id for each, of those that occur; special tokens stay."""
    ordinary = (ids >= ORDINARY[0]) & (ids < ORDINARY[1]) if tokens else torch.ones_like(ids) > 0
    if not bool(ordinary.any()):
        return ids
    low, high = ids[ordinary].min(), ids[ordinary].max()
    other = low + (ids - low + 1) % (high - low + 1) if high > low else (ids - 1).abs()
    return torch.where(ordinary, other, ids)


@dataclass(frozen=True)
class Context:
    """What the maker of an input may look at."""

    model: Any
    config: Any
    kind: str
    batch: int
    length: int

    @property
    def accepted(self) -> Mapping[str, inspect.Parameter]:
        """The arguments of the model's forward."""
        return inspect.signature(self.model.forward).parameters

    def field(self, *names: str, default: Any = None) -> Any:
        """The first field of that name in the config or its sub-configs."""
        configs = [self.config]
        for config in configs:
            for name in getattr(config, "sub_configs", {}) or {}:
                if (sub := getattr(config, name, None)) is not None:
                    configs.append(sub)
        for name in names:
            for config in configs:
                value = getattr(config, name, None)
                if value is not None:
                    return value
        return default

    def image(self) -> tuple[int, int, int]:
        size = self.field("image_size", default=64)
        size = size if isinstance(size, list | tuple) else (size, size)
        if isinstance(self.field("image_size"), dict):
            size = tuple(self.field("image_size").values())
        return (self.field("num_channels", "in_channels", default=3), int(size[-2]), int(size[-1]))


def _pixels(c: Context) -> Tensor:
    return _video(c) if c.kind == "video" else torch.randn(c.batch, *c.image())


def _video(c: Context) -> Tensor:
    frames = c.field("num_frames", "frames_per_clip", default=FRAMES)
    return torch.randn(c.batch, frames, *c.image())


def _features(c: Context) -> Tensor:
    """Spectrograms: (batch, mels, time) where a convolution over time follows, else transposed."""
    mels = c.field(
        "num_mel_bins", "input_feat_per_channel", "feature_projection_input_dim", default=MELS
    )
    positions = c.field("max_source_positions")
    if positions is not None and c.field("num_mel_bins") is not None:
        return torch.randn(c.batch, mels, 2 * positions)
    return torch.randn(c.batch, 4 * c.length, mels)


def _values(c: Context) -> Tensor:
    """Sounds: samples, or a spectrogram of fixed length."""
    if c.field("time_stride") is not None:
        return torch.randn(c.batch, c.field("max_length"), c.field("num_mel_bins"))
    return torch.randn(c.batch, 20 * c.length + 45)


MAKERS: dict[str, Callable[[Context], Any]] = {
    "input_ids": lambda c: token_ids(c.batch, c.length),
    "attention_mask": lambda c: torch.ones(c.batch, c.length, dtype=torch.int64),
    "decoder_input_ids": lambda c: token_ids(c.batch, c.length + 2),
    "pixel_values": _pixels,
    "pixel_values_videos": _video,
    "input_features": _features,
    "input_values": _values,
}


def _inputs(model_type: str, kind: str, model: Any, batch: int, length: int) -> Inputs:
    """Inputs made from the names of a model's arguments."""
    context = Context(model, model.config, kind, batch, length)
    if model_type in INPUTS:
        return INPUTS[model_type](context)
    accepted = context.accepted
    names = [model.main_input_name]
    if kind == "contrastive" and "spatial_shapes" in accepted:
        return {**_text(context), **images(context)}
    if kind == "contrastive":
        names = ["input_ids", "pixel_values", "pixel_values_videos", "attention_mask"]
    elif kind == "vision-language" and "pixel_values" in accepted and "input_ids" in accepted:
        return image_and_text(context)
    if names[0] == "input_ids":
        names.append("attention_mask")
        if "input_features" in accepted and _tower(model, "audio") is not None:
            return sound_and_text(context)
    if context.field("is_encoder_decoder") or kind in ("encoder-decoder", "speech-to-text"):
        names.append("decoder_input_ids")
    names += [n for n, p in accepted.items() if p.default is p.empty and n in MAKERS]
    return {n: MAKERS[n](context) for n in dict.fromkeys(names) if n in accepted and n in MAKERS}


def image_and_text(c: Context, image: Inputs | None = None, token: int | None = None) -> Inputs:
    """Text with as many image tokens as the model's own vision tower returns features."""
    return _merged(c, images(c) if image is None else image, "image", token)


def sound_and_text(c: Context, sound: Tensor | None = None) -> Inputs:
    """Text with as many audio tokens as the model's own audio tower returns features."""
    frames = 2 * c.field("max_source_positions", default=16)
    if sound is None:
        sound = torch.randn(c.batch, c.field("num_mel_bins", default=MELS), frames)
        mask = torch.ones(c.batch, frames, dtype=torch.int64)
    else:
        mask = torch.ones(sound.shape[:2], dtype=torch.int64)
    given = {"input_features": sound}
    if "input_features_mask" in c.accepted:
        given["input_features_mask"] = mask
    return _merged(c, given, "audio")


def _merged(c: Context, media: Inputs, kind: str, token: int | None = None) -> Inputs:
    """Text with as many tokens of a kind as the model's own tower returns features."""
    token = c.field(f"{kind}_token_id", f"{kind}_token_index") if token is None else token
    ids = token_ids(c.batch, c.length)
    features = _tower(c.model, kind)
    if token is not None and features is not None:
        accepted = inspect.signature(features).parameters
        dtype = next(c.model.parameters()).dtype
        given = {k: v.to(dtype) if _is_floating(v) else v for k, v in media.items()}
        with torch.no_grad():
            found = features(**{k: v for k, v in given.items() if {k, "kwargs"} & {*accepted}})
        count = _count(found, c.model.get_input_embeddings().weight.shape[-1]) // c.batch
        ids = torch.cat([ids[:, :2], torch.full((c.batch, count), token), ids[:, 2:]], 1)
    given = {"input_ids": ids, "attention_mask": torch.ones_like(ids), **media}
    for name in ("mm_token_type_ids", "token_type_ids"):
        if token is not None and name in c.accepted:
            given[name] = (ids == token).long()
    if "decoder_input_ids" in c.accepted and c.field("is_encoder_decoder"):
        given["decoder_input_ids"] = MAKERS["decoder_input_ids"](c)
    return given


def _tower(model: Any, kind: str) -> Callable[..., Any] | None:
    """A model's own function from pixels or sound to features, or its base model's."""
    for holder in (model, getattr(model, "model", None)):
        if (features := getattr(holder, f"get_{kind}_features", None)) is not None:
            return features
    return None


def images(c: Context) -> Inputs:
    """One image a row, and what describes it: as patches, as tiles or whole."""
    channels, height, width = c.image()
    if "image_grid_thw" in c.accepted:
        side = 2 * c.field("spatial_merge_size", "merge_size", default=2)
        frames = c.field("temporal_patch_size", "patch_temporal", default=1)
        size = channels * frames * c.field("patch_size") ** 2
        return {
            "pixel_values": torch.randn(c.batch * side * side, size),
            "image_grid_thw": torch.tensor([[1, side, side]]).repeat(c.batch, 1),
        }
    if "spatial_shapes" in c.accepted:
        side = int(c.field("num_patches") ** 0.5)
        return {
            "pixel_values": torch.randn(c.batch, side**2, channels * c.field("patch_size") ** 2),
            "pixel_attention_mask": torch.ones(c.batch, side**2, dtype=torch.int64),
            "spatial_shapes": torch.full((c.batch, 2), side),
        }
    pixels = torch.randn(c.batch, channels, height, width)
    if "qformer_input_ids" in c.accepted:
        return {"pixel_values": pixels, "qformer_input_ids": token_ids(c.batch, c.length)}
    if "pixel_attention_mask" in c.accepted:
        return {"pixel_values": pixels[:, None]}
    features = _tower(c.model, "image")
    if features is not None and "image_sizes" in inspect.signature(features).parameters:
        sizes = torch.tensor([[height, width]]).repeat(c.batch, 1)
        pinpoints = c.field("image_grid_pinpoints")
        if pinpoints is not None:
            tiles = 1 + (pinpoints[0][0] // height) * (pinpoints[0][1] // width)
            pixels = torch.randn(c.batch, tiles, channels, height, width)
        return {"pixel_values": pixels, "image_sizes": sizes}
    return {"pixel_values": pixels}


def _count(features: Any, width: int) -> int:
    """How many image tokens a vision tower's output stands for."""
    if getattr(features, "deepstack_features", None) and features.pooler_output is None:
        features = features.deepstack_features[0][1]
    elif hasattr(features, "pooler_output") and features.pooler_output is not None:
        features = features.pooler_output
    elif hasattr(features, "last_hidden_state"):
        features = features.last_hidden_state
    if isinstance(features, Tensor):
        return features.numel() // width
    return sum(_count(part, width) for part in features)


def _text(c: Context) -> Inputs:
    return {name: MAKERS[name](c) for name in ("input_ids", "attention_mask")}


def _patches(c: Context, *shape: int, tokens: int) -> Inputs:
    """Patches in a shape of their own, and the grid they come from."""
    side = int(tokens**0.5)
    grid = torch.tensor([[1, side, side]]).repeat(c.batch, 1)
    return {"pixel_values": torch.randn(c.batch * tokens, *shape), "image_grid_thw": grid}


def _positioned(c: Context, size: int, side: int) -> Inputs:
    """Patches with the position of each."""
    positions = torch.cartesian_prod(torch.arange(side), torch.arange(side))
    return {
        "pixel_values": torch.randn(c.batch, side**2, size),
        "image_position_ids": positions.repeat(c.batch, 1, 1),
    }


def _tiles(c: Context) -> Inputs:
    """Text that attends to an image of four tiles."""
    return {
        **_text(c),
        "pixel_values": torch.randn(c.batch, 1, 4, *c.image()),
        "aspect_ratio_ids": torch.full((c.batch, 1), 6),
        "aspect_ratio_mask": torch.ones(c.batch, 1, 4, dtype=torch.int64),
        "cross_attention_mask": torch.ones(c.batch, c.length, 1, 4, dtype=torch.int64),
    }


def _attended_image(c: Context) -> Inputs:
    """Text whose every token attends to one image."""
    mask = torch.ones(c.batch, c.length, 1, dtype=torch.int64)
    return {**_text(c), "pixel_values": _pixels(c)[:, None], "image_attention_mask": mask}


def _codes(c: Context) -> Inputs:
    """Tokens of several codebooks, a row each."""
    return {
        "input_ids": token_ids(c.batch * c.field("num_codebooks"), c.length),
        "attention_mask": torch.ones(c.batch, c.length, dtype=torch.int64),
    }


def _query_image(c: Context, image: Inputs | None = None) -> Inputs:
    """Text in which an image of three tokens stands, marked by a mask."""
    ids = token_ids(c.batch, c.length + 3)
    mask = torch.zeros_like(ids)
    mask[:, 1:4] = 1
    return {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "image_embeds_position_mask": mask,
        **({"pixel_values": _pixels(c)} if image is None else image),
    }


def _query_video(c: Context) -> Inputs:
    """Text and three tokens a frame, with the question that frames are asked."""
    ids = token_ids(c.batch, c.length)
    ids = torch.cat([torch.full((c.batch, 3 * FRAMES), 88), ids], 1)
    return {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "pixel_values": _video(c),
        "qformer_input_ids": token_ids(c.batch, c.length),
    }


def _document(c: Context) -> Inputs:
    """Words with their boxes on a page."""
    corners = torch.rand(c.batch, c.length, 2) * 0.5
    return {
        "input_ids": token_ids(c.batch, c.length),
        "attention_mask": torch.ones(c.batch, c.length, dtype=torch.int64),
        "bbox": torch.cat([corners, corners + 0.2], -1),
        "pixel_values": _pixels(c),
        "decoder_input_ids": MAKERS["decoder_input_ids"](c),
    }


def _row_column_patches(c: Context) -> Inputs:
    """Patches that start with their row and column."""
    places = torch.cartesian_prod(torch.arange(1, 5), torch.arange(1, 5)).double()
    pixels = torch.randn(c.batch, 16, c.field("patch_embed_hidden_size"), dtype=torch.float64)
    return {"flattened_patches": torch.cat([places.repeat(c.batch, 1, 1), pixels], -1)}


INPUTS: dict[str, Callable[[Context], Inputs]] = {
    "chameleon": lambda c: image_and_text(c, token=89),
    "dia": lambda c: {
        "input_ids": token_ids(c.batch, c.length),
        "decoder_input_ids": torch.randint(4, 70, (c.batch, c.length + 2, c.field("num_channels"))),
    },
    "fuyu": lambda c: image_and_text(c, {"pixel_values": torch.randn(c.batch, 16, 192)}),
    "fun_asr_nano": lambda c: sound_and_text(
        c, torch.randn(c.batch, 6, c.config.audio_config.input_size)
    ),
    "gemma4": lambda c: image_and_text(c, _positioned(c, 192, 6)),
    "gemma4_unified": lambda c: image_and_text(c, _positioned(c, 1728, 2)),
    "granite_docling": lambda c: image_and_text(
        c,
        {
            "pixel_values": _pixels(c)[:, None],
            "pixel_attention_mask": torch.ones(c.batch, 1, dtype=torch.bool),
        },
    ),
    "deepseek_vl_hybrid": lambda c: image_and_text(
        c, {"pixel_values": _pixels(c), "high_res_pixel_values": torch.randn(c.batch, 3, 32, 32)}
    ),
    "depth_pro": lambda c: {"pixel_values": torch.randn(c.batch, 3, 128, 128)},
    "emu3": lambda c: image_and_text(
        c,
        {
            "pixel_values": torch.randn(c.batch, 3, 8, 8),
            "image_sizes": torch.full((c.batch, 2), 8),
        },
        token=89,
    ),
    "granite_speech": lambda c: _merged(
        c, {"input_features": torch.randn(c.batch, 12, 160)}, "audio"
    ),
    "granite_speech_plus": lambda c: _merged(
        c, {"input_features": torch.randn(c.batch, 12, 160)}, "audio"
    ),
    "moss_transcribe_diarize": _text,
    "musicflamingo": _text,
    "qwen3_asr": _text,
    "nemo_speechlm": lambda c: sound_and_text(c, torch.randn(c.batch, 16, MELS)),
    "granite_speech5_ctc": lambda c: {"input_features": torch.randn(c.batch, 4 * c.length, 40)},
    "idefics": _attended_image,
    "instructblipvideo": _query_video,
    "kosmos-2": _query_image,
    "kosmos-2.5": lambda c: _query_image(c, _row_column_patches(c)),
    "molmo2": lambda c: image_and_text(
        c,
        {
            "pixel_values": torch.randn(c.batch, 16, 192),
            "image_token_pooling": torch.arange(16 * c.batch).view(-1, 4),
            "image_grids": torch.tensor([[2, 2, 0, 0]]).repeat(c.batch, 1),
            "image_num_crops": torch.ones(c.batch, dtype=torch.int64),
        },
        token=88,
    ),
    "evolla": lambda c: {
        **_text(c),
        "protein_input_ids": token_ids(c.batch, c.length + 1),
        "protein_attention_mask": torch.ones(c.batch, c.length + 1, dtype=torch.int64),
    },
    "diffusion_gemma": lambda c: {**_text(c), "decoder_input_ids": token_ids(c.batch, 8)},
    "pi0": lambda c: image_and_text(
        c,
        {
            "pixel_values": _pixels(c)[:, None],
            "pixel_attention_mask": torch.ones(c.batch, 1, dtype=torch.bool),
            "state": torch.randn(c.batch, 32),
            "noise": torch.randn(c.batch, 4, 32),
            "timestep": torch.rand(c.batch),
        },
    ),
    "kyutai_speech_to_text": lambda c: {
        "input_ids": torch.randint(4, 15, (c.batch, c.length, c.field("num_codebooks") + 1))
    },
    "nemotron_h_omni": lambda c: image_and_text(
        c,
        {
            "pixel_values": torch.randn(c.batch * 16, 192),
            "image_grid_hw": torch.full((c.batch, 2), 4),
        },
    ),
    "udop": _document,
    "voxtral_realtime": lambda c: {
        "input_ids": token_ids(c.batch, c.length),
        "input_features": torch.randn(c.batch, MELS, 8 * c.length),
    },
    "inkling2": lambda c: image_and_text(c, _patches(c, 16, 16, 3, tokens=4)),
    "kimi_k25": lambda c: image_and_text(c, _patches(c, 3, 8, 8, tokens=16)),
    "paddleocr_vl": lambda c: image_and_text(c, _patches(c, 3, 8, 8, tokens=16)),
    "mllama": _tiles,
    "moonshine": lambda c: {
        "input_values": torch.randn(c.batch, 300 * c.length),
        "decoder_input_ids": MAKERS["decoder_input_ids"](c),
    },
    "moonshine_streaming": lambda c: {
        "input_values": torch.randn(c.batch, 320 * c.length),
        "decoder_input_ids": MAKERS["decoder_input_ids"](c),
    },
    "musicgen": _codes,
    "musicgen_melody": _codes,
    "perceiver": lambda c: {"inputs": _pixels(c)},
    "pix2struct": lambda c: {
        **_row_column_patches(c),
        "decoder_input_ids": MAKERS["decoder_input_ids"](c),
    },
    "prophetnet": lambda c: {name: MAKERS[name](c) for name in ("input_ids", "decoder_input_ids")},
    "shieldgemma2": image_and_text,
    "speech-encoder-decoder": lambda c: {
        "input_values": _values(c),
        "decoder_input_ids": MAKERS["decoder_input_ids"](c),
    },
    "video_llama_3": lambda c: image_and_text(
        c, {**images(c), "image_merge_sizes": torch.full((c.batch,), 2)}
    ),
}
"""Model type → inputs that cannot be told from the names of its arguments."""


class _Recurrent(nn.Module):
    """A recurrent network with a head."""

    def __init__(self, recurrent: nn.Module) -> None:
        super().__init__()
        self.recurrent, self.head = recurrent, nn.Linear(HIDDEN, LABELS)

    def forward(self, values: Tensor) -> Tensor:
        return self.head(self.recurrent(values)[0][:, -1])


class _Tagger(nn.Module):
    """Token embeddings, a recurrent network and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, 16)
        self.recurrent = nn.LSTM(16, HIDDEN // 2, batch_first=True, bidirectional=True)
        self.head = nn.Linear(HIDDEN, LABELS)

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.head(self.recurrent(self.embedding(input_ids))[0].mean(1))


class _Transposed(nn.Module):
    """A module on transposed input."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, values: Tensor) -> Tensor:
        return self.module(values.transpose(1, 2)).transpose(1, 2)


class _Residual(nn.Module):
    """x + f(norm x)."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.norm, self.module = nn.LayerNorm(HIDDEN), module

    def forward(self, values: Tensor) -> Tensor:
        return values + self.module(self.norm(values))


def _mlp(width: int) -> nn.Module:
    return nn.Sequential(nn.Linear(width, 20), nn.GELU(), nn.Linear(20, width))


def _mixer() -> nn.Module:
    blocks = [m for _ in range(2) for m in (_Transposed(_mlp(LENGTH)), _mlp(HIDDEN))]
    return nn.Sequential(*(_Residual(block) for block in blocks), nn.Linear(HIDDEN, LABELS))


class _Seq2Seq(nn.Module):
    """nn.Transformer."""

    def __init__(self) -> None:
        super().__init__()
        self.transformer = nn.Transformer(HIDDEN, HEADS, 2, 2, INTERMEDIATE, batch_first=True)

    def forward(self, src: Tensor, tgt: Tensor) -> Tensor:
        return self.transformer(src, tgt)


def _conv_net() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.BatchNorm2d(8),
        nn.ReLU(inplace=True),
        nn.MaxPool2d(2),
        nn.utils.parametrizations.weight_norm(nn.Conv2d(8, 12, 3, groups=4)),
        nn.GroupNorm(3, 12),
        nn.Hardswish(),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.Linear(48, 10),
        nn.GLU(),
    )


def _unet() -> nn.Module:
    return nn.Sequential(
        nn.Conv1d(1, 6, 3, padding=1),
        nn.InstanceNorm1d(6, affine=True),
        nn.ELU(),
        nn.AvgPool1d(2),
        nn.Upsample(scale_factor=2),
        nn.Conv1d(6, 4, 3, padding=1),
        nn.PReLU(),
        nn.ConvTranspose1d(4, 1, 2, stride=2),
    )


def _encoder() -> nn.Module:
    layer = nn.TransformerEncoderLayer(HIDDEN, HEADS, INTERMEDIATE, batch_first=True)
    return nn.TransformerEncoder(layer, LAYERS, enable_nested_tensor=False)


def _plain() -> Iterator[Architecture]:
    """Modules of PyTorch itself."""

    def sequence(name: str) -> Callable[[Any, int, int], Inputs]:
        return lambda model, batch, length: {name: torch.randn(batch, length, HIDDEN)}

    yield Architecture("nn.TransformerEncoder", "plain", "nn", _encoder, sequence("src"))
    yield Architecture(
        "nn.Transformer",
        "plain",
        "nn",
        _Seq2Seq,
        lambda model, batch, length: {
            "src": torch.randn(batch, length, HIDDEN),
            "tgt": torch.randn(batch, length + 2, HIDDEN),
        },
    )
    for cls in (nn.LSTM, nn.GRU, nn.RNN):
        yield Architecture(
            f"nn.{cls.__name__}",
            "plain",
            "nn",
            lambda cls=cls: _Recurrent(cls(HIDDEN, HIDDEN, LAYERS, batch_first=True)),
            sequence("values"),
        )
    yield Architecture(
        "nn.LSTM-tagger",
        "plain",
        "nn",
        _Tagger,
        lambda model, batch, length: {"input_ids": token_ids(batch, length)},
    )
    yield Architecture(
        "mlp-mixer",
        "plain",
        "nn",
        _mixer,
        lambda model, batch, length: {"input": torch.randn(batch, LENGTH, HIDDEN)},
    )
    yield Architecture(
        "conv-net",
        "plain",
        "nn",
        _conv_net,
        lambda model, batch, length: {"input": torch.randn(batch, 3, 17, 19)},
    )
    yield Architecture(
        "conv-transpose",
        "plain",
        "nn",
        _unet,
        lambda model, batch, length: {"input": torch.randn(batch, 1, 4 * length)},
    )
