"""The models of transformers, shrunken by rule: each class with the config of a toy.

A toy config is the class's default config with every size replaced by the one that `_SIZES` gives
to its name, so that a new class of transformers needs its name in a table and no more; what a rule
cannot know stands in `_OWN`.
"""

from __future__ import annotations

import importlib
import itertools
import json
from collections.abc import Iterator, Mapping
from typing import Any

from vlprune.zoo.entries import Entry

_IDS = {"pad": 0, "bos": 1, "eos": 3, "sep": 2, "decoder_start": 1, "mask": 2, "forced_eos": 3}
_VOCABULARY = 100

_TEXT = {
    "hidden_size": 48,
    "d_model": 48,
    "embed_dim": 48,
    "word_embed_proj_dim": 48,
    "intermediate_size": 72,
    "ffn_dim": 72,
    "d_ff": 72,
    "encoder_ffn_dim": 72,
    "decoder_ffn_dim": 72,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 24,
    "d_kv": 24,
}
_VISION = {
    "hidden_size": 64,
    "embed_dim": 64,
    "d_model": 64,
    "intermediate_size": 104,
    "mlp_dim": 104,
    "d_ff": 104,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "head_dim": 16,
    "d_kv": 16,
    "depth": 3,
    "out_hidden_size": 48,
}
_SIZES: dict[str, dict[str, Any]] = {
    "text": _TEXT,
    "vision": _VISION,
    "qformer": {
        "hidden_size": 32,
        "intermediate_size": 56,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "encoder_hidden_size": 64,
    },
    "audio": {
        "hidden_size": 32,
        "d_model": 32,
        "intermediate_size": 56,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "conf_num_attention_heads": 4,
        "conf_num_hidden_layers": 2,
        "input_feat_size": 16,
    },
    "adapter": {
        "hidden_size": 64,
        "intermediate_size": 56,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "head_dim": 16,
    },
}
_EVERYWHERE: dict[str, Any] = {
    "vocab_size": _VOCABULARY,
    "image_size": 32,
    "patch_size": 8,
    "max_position_embeddings": 64,
    "num_layers": 3,
    "num_heads": 4,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "num_decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "attention_heads": 4,
    "layers": 3,
    "projection_dim": 24,
    "project_dim": 24,
    "projection_size": 24,
    "num_query_tokens": 5,
    "moe_intermediate_size": 40,
    "shared_expert_intermediate_size": 32,
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "moe_num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_topk": 2,
    "moe_k": 2,
    "kv_lora_rank": 16,
    "q_lora_rank": 20,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 16,
    "v_head_dim": 20,
    "image_text_hidden_size": 24,
    "text_hidden_size": 48,
    "adapter_out_dim": 48,
    "linear_key_head_dim": 12,
    "linear_value_head_dim": 16,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "num_position_embeddings": 16,
    "num_patches": 16,
    "seq_len": 16,
    "max_num_patches": 16,
    "patch_embed_hidden_size": 48,
    "position_embedding_size": 16,
    "pos_emb_height": 8,
    "pos_emb_width": 8,
    "posemb_grid_size": 8,
    "output_channels": 32,
    "global_attn_indexes": [1],
    "projector_hidden_size": 56,
    "projection_hidden_size": 56,
    "projection_hidden_dim": 56,
    "projection_intermediate_size": 56,
    "alignment_intermediate_size": 56,
    "vision_hidden_size": 64,
    "merged_hidden_size": 48,
    "intermediate_size_mlp": 88,
    "dense_intermediate_size": 88,
    "shared_intermediate_size": 32,
    "share_expert_dim": 32,
    "shared_experts_intermediate_size": 32,
    "moe_shared_expert_intermediate_size": 32,
    "moe_hidden_size": 40,
    "hidden_size_per_layer_input": 16,
    "vocab_size_per_layer_input": _VOCABULARY,
    "laurel_rank": 8,
    "linear_head_dim": 12,
    "linear_num_heads": 4,
    "index_n_heads": 2,
    "index_head_dim": 16,
    "index_topk": 8,
    "ssm_state_size": 16,
    "mamba_num_heads": 4,
    "mamba_head_dim": 12,
    "n_groups": 2,
    "chunk_size": 8,
    "swa_num_attention_heads": 4,
    "swa_num_key_value_heads": 2,
    "swa_head_dim": 24,
    "d_rel": 8,
    "rel_extent": 64,
    "resampler_dim_head": 12,
    "resampler_heads": 4,
    "resampler_num_latents": 5,
    "aligner_num_add_layers": 2,
    "n_layers": 3,
    "projection_intermediate_dim": 56,
    "n_window": 16,
    "max_image_size": 64,
    "max_img_size": 64,
    "n_mel_bins": 16,
    "mel_vocab_size": 16,
    "num_mel_bins": 16,
    "index_kpool": 4,
    "feature_size": 16,
    "downsample_hidden_size": 16,
    "max_source_positions": 64,
    "encoder_ffn_dim": 56,
    "output_dim": 48,
    "max_state_dim": 10,
    "max_action_dim": 6,
    "resampler_n_latents": 5,
    "resampler_depth": 2,
    "resampler_n_heads": 4,
    "resampler_head_dim": 12,
    "l_layers": 2,
    "x_layers": 2,
    "r_layers": 2,
    "latent_query_num": 5,
    "num_qa_labels": 11,
    "visual_feat_dim": 40,
    "visual_embedding_dim": 40,
}

_PINPOINTS = {"image_grid_pinpoints": [[32, 64], [64, 32], [64, 64]]}
_WINDOWS = {"window_size": 32, "fullatt_block_indexes": [1]}
_SAM = {"image_size": 64, "downsample_channels": [40, 64]}
_MINICPM = {
    "image_token_id": 90,
    "video_token_id": 91,
    "insert_layer_id": 1,
    "vision_config": {"insert_layer_id": 1},
}
_SWIN = {
    "image_size": 32,
    "patch_size": 4,
    "embed_dim": 24,
    "depths": [2, 2],
    "num_heads": [2, 4],
    "window_size": 4,
}
_BACKBONE = _SWIN | {"depths": [1, 1, 2, 1], "num_heads": [2, 2, 4, 4], "window_size": 2}
_DETECTOR = {
    "backbone_config": _BACKBONE,
    "d_model": 32,
    "num_queries": 7,
    "max_text_len": 8,
    "encoder_ffn_dim": 56,
    "decoder_ffn_dim": 56,
}
_SEGMENTER = {
    "backbone_config": _BACKBONE,
    "hidden_dim": 32,
    "encoder_feedforward_dim": 56,
    "dim_feedforward": 72,
    "num_queries": 7,
    "encoder_layers": 2,
    "decoder_layers": 3,
    "num_attention_heads": 4,
}


def _rope(**values: Any) -> dict[str, Any]:
    return {"rope_type": "default", "rope_theta": 10000.0, **values}


def _mrope(*sections: int) -> dict[str, Any]:
    """Return the part of a config that shares rotary features between time, rows and columns."""
    return {"rope_parameters": _rope(mrope_section=list(sections))}


_QWEN3_VL = {
    "text_config": _mrope(4, 4, 4),
    "vision_config": {"deepstack_visual_indexes": [0, 1]},
}

# class -> what its config holds beside the rule
_OWN: dict[str, dict[str, Any]] = {
    "AlignModel": {
        "vision_config": {
            "width_coefficient": 1.0,
            "depth_coefficient": 1.0,
            "kernel_sizes": [3, 5],
            "in_channels": [32, 16],
            "out_channels": [16, 24],
            "strides": [1, 2],
            "num_block_repeats": [1, 1],
            "expand_ratios": [1, 4],
            "hidden_dim": 24,
        }
    },
    "SiglipModel": {"text_config": {"projection_size": 64}},
    "Siglip2Model": {"text_config": {"projection_size": 64}},
    "Tipsv2Model": {"text_config": {"hidden_size": 64}},
    "VideoPrismClipModel": {
        "text_config": {"hidden_size": 64},
        "vision_config": {"tubelet_size": [1, 8, 8], "num_frames": 2},
    },
    "BlipForQuestionAnswering": {
        "text_config": {"encoder_hidden_size": 48},
        "vision_config": {"hidden_size": 48},
    },
    "Blip2ForImageTextRetrieval": {"qformer_config": {"use_qformer_text_input": True}},
    "Apertus1p5ForConditionalGeneration": {
        "image_token_offset": 60,
        "audio_token_offset": 76,
        "vision_config": {"codebook_size": 16},
        "audio_config": {"codebook_dim": 32, "codebook_size": 16},
    },
    "Blip2Model": {"image_token_index": 90},
    "Blip2ForConditionalGeneration": {"image_token_index": 90},
    "InstructBlipForConditionalGeneration": {"image_token_index": 90},
    "Florence2ForConditionalGeneration": {
        "vision_config": {
            "depths": [1, 2],
            "patch_size": [7, 3],
            "patch_stride": [4, 2],
            "patch_padding": [3, 1],
            "patch_prenorm": [False, True],
            "embed_dim": [32, 64],
            "num_heads": [2, 4],
            "num_groups": [2, 4],
            "window_size": 4,
            "projection_dim": 48,
            "max_temporal_embeddings": 10,
        }
    },
    "Gemma3ForConditionalGeneration": {"mm_tokens_per_image": 4},
    "LlavaNextForConditionalGeneration": _PINPOINTS,
    "LlavaNextVideoForConditionalGeneration": _PINPOINTS,
    "LlavaOnevisionForConditionalGeneration": _PINPOINTS,
    "MllamaForConditionalGeneration": {
        "text_config": {"cross_attention_layers": [1]},
        "vision_config": {
            "num_global_layers": 2,
            "intermediate_layers_indices": [0, 1],
            "vision_output_dim": 192,
            "max_num_tiles": 2,
            "supported_aspect_ratios": [[1, 1], [1, 2], [2, 1]],
        },
    },
    "PaliGemmaForConditionalGeneration": {
        "projection_dim": 48,
        "hidden_size": 48,
        "vision_config": {"projection_dim": 48},
    },
    "Qwen2VLForConditionalGeneration": {
        "text_config": _mrope(2, 2, 2),
        "vision_config": {"hidden_size": 48, "embed_dim": 64},
    },
    "Qwen2_5_VLForConditionalGeneration": {
        "text_config": _mrope(2, 2, 2),
        "vision_config": _WINDOWS,
    },
    "Exaone4_5_ForConditionalGeneration": {"vision_config": _WINDOWS | {"num_key_value_heads": 2}},
    "HyperCLOVAXVisionV2ForConditionalGeneration": {"vision_config": _WINDOWS},
    "Qwen3VLForConditionalGeneration": _QWEN3_VL,
    "Qwen3VLMoeForConditionalGeneration": _QWEN3_VL,
    "Cosmos3OmniForConditionalGeneration": _QWEN3_VL,
    "Qwen3_5ForConditionalGeneration": {"text_config": _mrope(1, 1, 1)},
    "Qwen3_5MoeForConditionalGeneration": {"text_config": _mrope(1, 1, 1)},
    "Qwen4ExpForConditionalGeneration": {
        "text_config": _mrope(4, 4, 4)
        | {
            "indexer_n_heads": 2,
            "indexer_kv_heads": 1,
            "indexer_head_dim": 24,
            "indexer_budget": 8,
            "indexer_compress_ratio": 2,
            "hc_lowrank": 16,
            "ple_embed_dim": 24,
        }
    },
    "Qwen2_5OmniThinkerForConditionalGeneration": {
        "vision_start_token_id": 80,
        "text_config": _mrope(2, 2, 2),
        "vision_config": _WINDOWS,
    },
    "Qwen3OmniMoeThinkerForConditionalGeneration": {
        "vision_start_token_id": 80,
        "audio_config": {"n_window": 50},
        "text_config": _mrope(2, 2, 2),
        "vision_config": {"deepstack_visual_indexes": [0, 1]},
    },
    "Glm46VForConditionalGeneration": {"text_config": _mrope(2, 2, 2)},
    "Glm4vForConditionalGeneration": {"text_config": _mrope(2, 2, 2)},
    "GlmOcrForConditionalGeneration": {"text_config": _mrope(2, 2, 2)},
    "Glm4vMoeForConditionalGeneration": {"text_config": _mrope(1, 1, 1)},
    "Ernie4_5_VLMoeForConditionalGeneration": {"text_config": _mrope(2, 2, 2)},
    "Cosmos3EdgeForConditionalGeneration": {"text_config": _mrope(4, 4, 4)},
    "CohereCompassForConditionalGeneration": {
        "text_config": {
            "rope_parameters": {
                "sliding_attention": _rope(mrope_section=[4, 4, 4]),
                "full_attention": _rope(mrope_section=[4, 4, 4]),
            }
        },
        "vision_config": {"deepstack_visual_indexes": [0, 1]},
    },
    "HunYuanVLForConditionalGeneration": {"text_config": _mrope(4, 4, 4) | {"head_dim": 24}},
    "AriaForConditionalGeneration": {"projector_patch_to_query_dict": {"16": 4}},
    "ChameleonForConditionalGeneration": {
        "vocabulary_map": {"<image>": 90} | {f"IMGIMG{'ABCDEFGH'[i]}Z": 70 + i for i in range(8)},
        "vq_config": {
            "embed_dim": 16,
            "num_embeddings": 8,
            "latent_channels": 16,
            "resolution": 32,
            "base_channels": 32,
            "channel_multiplier": [1, 1, 2],
            "num_res_blocks": 1,
        },
    },
    "Emu3ForConditionalGeneration": {
        "vocabulary_map": {"<image>": 90, "<|extra_200|>": 91}
        | {f"<|visual token {i:06}|>": 70 + i for i in range(8)},
        "vq_config": {
            "codebook_size": 8,
            "base_channels": 32,
            "channel_multiplier": [1, 1, 2],
            "num_res_blocks": 1,
            "hidden_size": 64,
            "temporal_downsample_factor": 2,
        },
    },
    "DeepseekOcr2ForConditionalGeneration": {
        "text_config": {
            "num_experts_per_tok": 2,
            "mlp_layer_types": ["dense", "sparse", "sparse"],
        },
        "vision_config": {"sam_config": _SAM},
    },
    "UnlimitedOcrForConditionalGeneration": {"vision_config": {"sam_config": _SAM}},
    "DiffusionGemmaForBlockDiffusion": {
        "canvas_length": 6,
        "text_config": {"num_experts": 4, "top_k_experts": 2, "moe_intermediate_size": 40},
        "vision_config": {"pooling_kernel_size": 2},
    },
    "Dots3NoteForConditionalGeneration": {
        "vision_config": {
            "adapter_in_dim": 64,
            "mlp_layer_types": ["dense", "sparse", "sparse"],
            "per_layer_config": {},
        },
        "audio_config": {"adapter_input_size": 32},
        "text_config": {
            "swa_num_attention_heads": 4,
            "swa_num_key_value_heads": 4,
            "swa_q_lora_rank": 20,
            "swa_kv_lora_rank": 16,
            "swa_head_dim": 24,
            "swa_qk_nope_head_dim": 16,
            "swa_v_head_dim": 20,
        },
    },
    "FastVlmForConditionalGeneration": {
        "vision_config": {
            "architecture": "fastvit_mci3",
            "hidden_size": 128,
            "model_args": {
                "inference_mode": True,
                "layers": [1, 1, 1, 1, 1],
                "embed_dims": [16, 16, 32, 32, 64],
            },
        }
    },
    "PaddleOCRVLForConditionalGeneration": {"text_config": _mrope(4, 4, 4)},
    "PerceptionLMForConditionalGeneration": {
        "vision_config": {
            "architecture": "vit_pe_core_tiny_patch16_384",
            "model_args": {
                "embed_dim": 64,
                "depth": 3,
                "num_heads": 4,
                "img_size": [32, 32],
                "patch_size": 8,
            },
        }
    },
    "Gemma4ForConditionalGeneration": {"vision_config": {"pooling_kernel_size": 2}},
    "Gemma4UnifiedForConditionalGeneration": {
        "vision_config": {
            "pooling_kernel_size": 2,
            "mm_posemb_size": 16,
            "mm_embed_dim": 64,
            "output_proj_dims": 64,
        }
    },
    "Gemma3nForConditionalGeneration": {
        "image_token_id": 82,
        "audio_token_id": 90,
        "audio_soft_tokens_per_image": 4,
        "audio_config": {"vocab_offset": 88, "vocab_size": 12},
        "text_config": {
            "vocab_size_per_layer_input": 80,
            "intermediate_size": 72,
            "num_hidden_layers": 4,
            "num_kv_shared_layers": 2,
            "layer_types": ["sliding_attention", "full_attention"] * 2,
        },
        "vision_config": {
            "architecture": "test_efficientnet",
            "hidden_size": 256,
            "vocab_offset": 80,
            "vocab_size": 8,
        },
        "vision_soft_tokens_per_image": 1,
    },
    "Granite4VisionForConditionalGeneration": _PINPOINTS
    | {
        "downsample_rate": "1/2",
        "deepstack_layer_map": [[-2, 0]],
        "spatial_target_layers": [0, 1, 2, 1],
        "qformer_config": {"hidden_size": 64, "encoder_hidden_size": 64},
    },
    "GraniteDoclingForConditionalGeneration": {
        "vision_config": {"scale_factor": 2, "deepstack_visual_indexes": [0, 1, 2]}
    },
    "InstructBlipVideoForConditionalGeneration": {"video_token_index": 90},
    "HYV4VLForConditionalGeneration": {"text_config": _mrope(2, 1, 1)},
    "JanusForConditionalGeneration": {
        "vision_config": {"projection_dim": 48, "num_image_tokens": 16, "depth": 2},
        "vq_config": {
            "num_embeddings": 8,
            "latent_channels": 16,
            "base_channels": 32,
            "channel_multiplier": [1, 2],
            "num_res_blocks": 1,
            "num_patches": 4,
            "projection_dim": 24,
            "image_token_embed_dim": 48,
        },
    },
    "Kimi_K25ForConditionalGeneration": {
        "projection_hidden_size": 64,
        "text_config": {"n_group": 2, "topk_group": 1, "first_k_dense_replace": 1},
    },
    "Llama4ForConditionalGeneration": {
        "text_config": {"num_experts_per_tok": 2, "interleave_moe_layer_step": 2},
        "vision_config": {
            "intermediate_size": 256,
            "projector_input_dim": 40,
            "projector_output_dim": 40,
            "vision_output_dim": 40,
        },
    },
    "MiniCPMOcrForConditionalGeneration": _MINICPM,
    "MiniCPMV4_6ForConditionalGeneration": _MINICPM,
    "MiniCPMV4_7ForConditionalGeneration": _MINICPM,
    "Molmo2ForConditionalGeneration": {"adapter_config": {"vision_feature_layer": [2, 0]}},
    "MuseGlimmerForConditionalGeneration": {"out_hidden_size": 256},
    "MuseSparkForConditionalGeneration": {
        "out_hidden_size": 256,
        "audio_config": {
            "patch_sizes": [4, 2],
            "hidden_sizes": [16, 32],
            "depths": [1, 1],
            "out_hidden_size": 48,
        },
    },
    "NemotronH_Omni_Reasoning_V3": {
        "image_token_id": 90,
        "video_token_id": 91,
        "vision_config": {"video_temporal_patch_size": 2},
    },
    "PI0ForConditionalGeneration": {
        "vlm_config": {"projection_dim": 48, "hidden_size": 48},
        "dit_config": {"hidden_size": 32, "intermediate_size": 56},
    },
    "Pix2StructForConditionalGeneration": {
        "text_config": {"d_kv": 12},
        "vision_config": {"hidden_size": 48, "d_kv": 12},
    },
    "PPFormulaNetForConditionalGeneration": {
        "vision_config": {
            "post_conv_in_channels": 32,
            "post_conv_mid_channels": 40,
            "post_conv_out_channels": 56,
            "decoder_hidden_size": 48,
        }
    },
    "Step3p7ForConditionalGeneration": {
        "text_config": {"sliding_window": 8},
        "vision_config": {"mlp_ratio": 1.5},
    },
    "T5Gemma2ForConditionalGeneration": {"encoder": {"mm_tokens_per_image": 4}},
    "VipLlavaForConditionalGeneration": {"vision_feature_layer": [-2, -1]},
    "CLIPSegForImageSegmentation": {"extract_layers": [0, 1, 2], "reduce_dim": 32},
    "XCLIPModel": {
        "prompt_num_attention_heads": 4,
        "prompt_layers": 2,
        "vision_config": {
            "num_frames": 2,
            "mit_hidden_size": 24,
            "mit_intermediate_size": 40,
            "mit_num_attention_heads": 4,
        },
    },
    "GroupViTModel": {
        "vision_config": {
            "depths": [1, 1, 1],
            "num_group_tokens": [8, 4, 0],
            "num_output_groups": [8, 4, 4],
        }
    },
    "OwlViTForObjectDetection": {"projection_dim": 48},
    "Owlv2ForObjectDetection": {"projection_dim": 48},
    "BridgeTowerModel": {"vision_config": {"hidden_size": 128}},
    "BridgeTowerForImageAndTextRetrieval": {"vision_config": {"hidden_size": 128}},
    "BridgeTowerForContrastiveLearning": {
        "hidden_size": 128,
        "text_config": {"hidden_size": 128},
        "vision_config": {"hidden_size": 128},
        "contrastive_hidden_size": 24,
        "logit_scale_init_value": 2.7,
    },
    "SwinForImageClassification": _SWIN,
    "Swinv2ForImageClassification": _SWIN,
    "SegformerForSemanticSegmentation": {
        "num_encoder_blocks": 2,
        "depths": [2, 2],
        "sr_ratios": [2, 1],
        "hidden_sizes": [32, 64],
        "patch_sizes": [7, 3],
        "strides": [4, 2],
        "num_attention_heads": [2, 4],
        "mlp_ratios": [2, 3],
        "decoder_hidden_size": 40,
    },
    "GroundingDinoForObjectDetection": _DETECTOR,
    "MMGroundingDinoForObjectDetection": _DETECTOR,
    "MaskFormerForInstanceSegmentation": {
        "backbone_config": _BACKBONE,
        "decoder_config": {"num_queries": 7},
        "fpn_feature_size": 32,
        "mask_feature_size": 32,
    },
    "Mask2FormerForUniversalSegmentation": _SEGMENTER
    | {"feature_size": 32, "mask_feature_size": 32},
    "OneFormerForUniversalSegmentation": _SEGMENTER
    | {"conv_dim": 32, "mask_dim": 32, "task_seq_len": 9, "text_encoder_width": 32},
}

# the auto mappings whose every class has an entry
_MAPPINGS = (
    "ZERO_SHOT_IMAGE_CLASSIFICATION",
    "VISUAL_QUESTION_ANSWERING",
    "IMAGE_TEXT_TO_TEXT",
    "ZERO_SHOT_OBJECT_DETECTION",
)

# model type -> classes beside those of the mappings
_MORE = {
    "clip_vision_model": "CLIPVisionModelWithProjection",
    "clip_text_model": "CLIPTextModelWithProjection",
    "clipseg": "CLIPSegForImageSegmentation",
    "xclip": "XCLIPModel",
    "groupvit": "GroupViTModel",
    "owlvit": "OwlViTModel OwlViTForObjectDetection",
    "owlv2": "Owlv2Model Owlv2ForObjectDetection",
    "blip": "BlipForImageTextRetrieval",
    "blip-2": "Blip2Model",
    "blip_2_qformer": "Blip2QFormerModel",
    "vilt": "ViltForImageAndTextRetrieval",
    "lxmert": "LxmertModel LxmertForQuestionAnswering",
    "visual_bert": "VisualBertModel VisualBertForQuestionAnswering",
    "flava": "FlavaModel",
    "bridgetower": "BridgeTowerModel BridgeTowerForContrastiveLearning "
    "BridgeTowerForImageAndTextRetrieval",
    "vit": "ViTForImageClassification",
    "deit": "DeiTForImageClassification",
    "beit": "BeitForImageClassification",
    "dinov2": "Dinov2ForImageClassification",
    "dinov3_vit": "DINOv3ViTModel",
    "swin": "SwinForImageClassification",
    "swinv2": "Swinv2ForImageClassification",
    "segformer": "SegformerForSemanticSegmentation",
    "maskformer": "MaskFormerForInstanceSegmentation",
    "mask2former": "Mask2FormerForUniversalSegmentation",
    "oneformer": "OneFormerForUniversalSegmentation",
    "bert": "BertModel",
    "roberta": "RobertaModel",
}

# model types without scaled-dot-product attention
_EAGER = frozenset(
    {
        "align",
        "blip",
        "bridgetower",
        "flava",
        "git",
        "got_ocr2",
        "grounding-dino",
        "groupvit",
        "apertus1p5",
        "hy_v4_vl",
        "inkling2",
        "inkling2_loop",
        "lxmert",
        "mask2former",
        "maskformer",
        "mm-grounding-dino",
        "oneformer",
        "swinv2",
        "videoprism",
        "vilt",
        "visual_bert",
    }
)

# what a config derives from its sizes
_DERIVED = frozenset({"layer_types", "mlp_layer_types", "stage_names", "id2label", "label2id"})


def entries() -> Iterator[Entry]:
    """Yield one entry per class; nothing is built."""
    for name, model_type in _classes().items():
        yield _entry(name, model_type)


def _classes() -> dict[str, str]:
    """Return class name -> model type, in the order of the auto mappings."""
    auto = importlib.import_module("transformers.models.auto.modeling_auto")  # lazy: slow
    found: dict[str, str] = {}
    for mapping in _MAPPINGS:
        for model_type, name in getattr(auto, f"MODEL_FOR_{mapping}_MAPPING_NAMES").items():
            found.setdefault(name, model_type)
    for model_type, names in _MORE.items():
        found |= dict.fromkeys(names.split(), model_type)
    return {name: model_type for name, model_type in found.items() if name not in left_out()}


def left_out() -> dict[str, str]:
    """Return the classes of the auto mappings that have no entry, and why."""
    return {
        "OmDetTurboForObjectDetection": "keeps the text embeddings of earlier calls, so that what "
        "it answers depends on the calls before",
        "Apertus1p5ForConditionalGeneration": "the sound tokenizer inside keeps its full size, and "
        "a check takes more than ten minutes",
        "Llama4ForConditionalGeneration": "its own forward raises AttributeError in transformers "
        "5.24 ('MoeCausalLMOutputWithPast' object has no attribute 'image_outputs')",
    }


def _entry(name: str, model_type: str) -> Entry:
    auto = importlib.import_module("transformers.models.auto.configuration_auto")  # lazy: slow
    config = toy(auto.CONFIG_MAPPING[model_type](), _OWN.get(name, {}))
    attention = "eager" if model_type in _EAGER else "sdpa"
    return Entry(
        name=f"transformers/{name}",
        family="transformers",
        arguments={"class": name, "config": config, "attention": attention, "experts": "eager"},
        group=model_type,
    )


def toy(config: Any, own: Mapping[str, Any]) -> dict[str, Any]:
    """Return JSON arguments of a config of the same class with small sizes, updated by `own`."""
    shrunken = _merge(_shrink(config, "", itertools.count(_VOCABULARY - 1, -1)), own)
    result: dict[str, Any] = json.loads(json.dumps(shrunken))  # shares nothing with the tables
    return result


def _shrink(config: Any, role: str, ids: Iterator[int]) -> dict[str, Any]:
    """Return what differs from the defaults once every size is small.

    Args:
        config: of a model or a part of one.
        role: key of `_SIZES`, "" for the whole model.
        ids: special tokens not yet given away.
    """
    defaults = vars(type(config)())
    subs = {k: v for k, v in vars(config).items() if hasattr(v, "model_type")}
    role = role or ("text" if "vocab_size" in vars(config) or subs else "vision")
    result: dict[str, Any] = {}
    for key, value in vars(config).items():
        if key in subs:
            result[key] = {
                "model_type": value.model_type,
                **_shrink(value, _role(key, role), ids),
            }
            if key == "backbone_config" and hasattr(value, "out_features"):
                result[key]["out_features"] = list(value.out_features)
        elif _is_id(key, value):
            result[key] = next((i for k, i in _IDS.items() if key.startswith(k + "_")), None)
            if result[key] is None:
                result[key] = next(ids)
        elif value is not None and not key.startswith("_"):
            size = _SIZES[role].get(key, _EVERYWHERE.get(key))
            if size is not None:
                result[key] = _like(value, size)
            elif value != defaults.get(key) and key not in _DERIVED:
                result[key] = value
    if "vision_config" in getattr(config, "sub_configs", {}) and config.vision_config is None:
        result["vision_config"] = _shrink(config.sub_configs["vision_config"](), "vision", ids)
    if "global_attn_indexes" in result:
        result["window_size"] = 2
    if "kv_lora_rank" in result:
        result["num_key_value_heads"] = result["num_attention_heads"]
        if vars(config).get("head_dim") == config.qk_rope_head_dim:
            del result["head_dim"]
    if types := vars(config).get("layer_types"):
        result["layer_types"] = _few(types, result["num_hidden_layers"])
    if types := vars(config).get("mlp_layer_types"):
        result["mlp_layer_types"] = _few(types, result["num_hidden_layers"])
    return result


def _few(types: list[str], length: int) -> list[str]:
    """Return that many layer types, with each that occurs."""
    unique = list(dict.fromkeys(types))
    if "full_attention" in unique:
        unique = [*(t for t in unique if t != "full_attention"), "full_attention"]
    return [unique[0]] * (length - len(unique)) + unique


def _role(key: str, parent: str) -> str:
    for role, words in {
        "qformer": ("qformer",),
        "audio": ("audio",),
        "adapter": ("adapter",),
        "vision": ("vision", "image", "backbone", "sam", "vq"),
        "text": ("text", "decoder", "encoder", "vlm", "dit", "perceiver"),
    }.items():
        if any(word in key for word in words):
            return parent if key == "encoder_config" else role
    return parent


def _is_id(key: str, value: Any) -> bool:
    return isinstance(value, int) and key.endswith(("_token_id", "_token_index", "_patch_id"))


def _like(value: Any, size: Any) -> Any:
    if isinstance(value, (list, tuple)) and isinstance(size, int):
        return [size] * len(value)
    if isinstance(value, int) and isinstance(size, int):
        return min(value, size)
    return size


def _merge(base: dict[str, Any], other: Mapping[str, Any]) -> dict[str, Any]:
    """Return `base` with the values of `other`, mappings merged key by key."""
    for key, value in other.items():
        inner = base.get(key)
        if isinstance(value, Mapping) and isinstance(inner, dict) and "model_type" not in value:
            base[key] = _merge(inner, value)
        else:
            base[key] = value
    return base
