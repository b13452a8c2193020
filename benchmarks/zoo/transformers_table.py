"""The sizes of the small networks of `transformers_models`: model class -> arguments of its configuration.

``shape`` is that of the input, where it is not the default. ``outputs`` names the outputs that are asked for,
where the model also gives a hidden state: one that is an output must keep its width.
"""

from __future__ import annotations

from typing import Any, TypeAlias

Sizes: TypeAlias = dict[str, Any]

_BOXES = ("logits", "pred_boxes")
_MASKS = ("class_queries_logits", "masks_queries_logits")
_EMBEDDINGS = ("logits_per_image", "logits_per_text", "text_embeds", "image_embeds")

_TEXT: Sizes = {
    "vocab_size": 100,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 128,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_IMAGE: Sizes = {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 128,
    "image_size": 32,
    "patch_size": 8,
}
_GROUPED: Sizes = {**_TEXT, "num_key_value_heads": 2}
_PYRAMID: Sizes = {"depths": [1, 1, 1, 1], "hidden_sizes": [16, 32, 48, 64]}
_GPT: Sizes = {"vocab_size": 100, "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 64}
_HALVES: Sizes = {
    "vocab_size": 100,
    "d_model": 64,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 128,
    "decoder_ffn_dim": 128,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 1,
    "outputs": ("logits",),
}
_T5: Sizes = {
    "vocab_size": 100,
    "d_model": 64,
    "d_kv": 16,
    "d_ff": 128,
    "num_layers": 2,
    "num_heads": 4,
    "pad_token_id": 0,
    "decoder_start_token_id": 0,
    "outputs": ("logits",),
}
_SWIN: Sizes = {
    "image_size": 32,
    "patch_size": 2,
    "embed_dim": 16,
    "depths": [2, 2],
    "num_heads": [2, 4],
    "window_size": 4,
}
_SPEECH: Sizes = {
    "vocab_size": 32,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 128,
    "conv_dim": [32, 32, 32],
    "conv_stride": [5, 2, 2],
    "conv_kernel": [10, 3, 3],
    "num_conv_pos_embeddings": 16,
    "num_conv_pos_embedding_groups": 4,
    "layerdrop": 0.0,
    "mask_time_prob": 0.0,
    "shape": (2000,),
}
_RESNET: Sizes = {
    "model_type": "resnet",
    "embedding_size": 16,
    "hidden_sizes": [16, 32, 48, 64],
    "depths": [1, 1, 1, 1],
    "out_features": ["stage4"],
}
_DETR: Sizes = {
    "use_timm_backbone": False,
    "use_pretrained_backbone": False,
    "backbone": None,
    "backbone_config": _RESNET,
    "num_queries": 8,
    "d_model": 64,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 128,
    "decoder_ffn_dim": 128,
    "shape": (3, 64, 64),
    "outputs": _BOXES,
}
_SWIN_BACKBONE: Sizes = {
    "model_type": "swin",
    "image_size": 64,
    "embed_dim": 16,
    "depths": [1, 1, 1, 1],
    "num_heads": [2, 2, 4, 4],
    "window_size": 4,
    "out_features": ["stage1", "stage2", "stage3", "stage4"],
}

ENCODERS: dict[str, Sizes] = {
    "BertForSequenceClassification": _TEXT,
    "BertForMaskedLM": _TEXT,
    "RobertaForSequenceClassification": _TEXT,
    "XLMRobertaForSequenceClassification": _TEXT,
    "CamembertForSequenceClassification": _TEXT,
    "DistilBertForSequenceClassification": {
        "vocab_size": 100, "dim": 64, "n_layers": 2, "n_heads": 4, "hidden_dim": 128,
        "max_position_embeddings": 64,
    },
    "AlbertForSequenceClassification": {**_TEXT, "embedding_size": 32},
    "ElectraForSequenceClassification": {**_TEXT, "embedding_size": 32},
    "DebertaForSequenceClassification": {
        **_TEXT, "relative_attention": True, "pos_att_type": ["p2c", "c2p"], "position_biased_input": False,
        "pooler_hidden_size": 64,
    },
    "DebertaV2ForSequenceClassification": {
        **_TEXT, "relative_attention": True, "pos_att_type": ["p2c", "c2p"], "position_biased_input": False,
        "pooler_hidden_size": 64,
    },
    "MPNetForSequenceClassification": _TEXT,
    "MobileBertForSequenceClassification": {
        **_TEXT, "embedding_size": 32, "intra_bottleneck_size": 32, "true_hidden_size": 32,
    },
    "SqueezeBertForSequenceClassification": {**_TEXT, "embedding_size": 64},
    "ConvBertForSequenceClassification": {**_TEXT, "embedding_size": 64, "conv_kernel_size": 3},
    "RoFormerForSequenceClassification": {**_TEXT, "embedding_size": 64},
    "FNetForSequenceClassification": _TEXT,
    "MegatronBertForSequenceClassification": _TEXT,
    "ModernBertForSequenceClassification": {**_TEXT, "cls_token_id": 1, "sep_token_id": 2},
    "FunnelForSequenceClassification": {
        "vocab_size": 100, "block_sizes": [1, 1], "num_decoder_layers": 1, "d_model": 64, "n_head": 4,
        "d_head": 16, "d_inner": 128,
    },
    "XLNetForSequenceClassification": {
        "vocab_size": 100, "d_model": 64, "n_layer": 2, "n_head": 4, "d_inner": 128, "use_mems_eval": False,
    },
}  # fmt: skip

DECODERS: dict[str, Sizes] = {
    "GPT2LMHeadModel": _GPT,
    "GPTNeoForCausalLM": {
        "vocab_size": 100, "hidden_size": 64, "num_layers": 2, "num_heads": 4, "intermediate_size": 128,
        "attention_types": [[["global", "local"], 1]], "max_position_embeddings": 64, "window_size": 8,
    },
    "GPTNeoXForCausalLM": _TEXT,
    "GPTJForCausalLM": {**_GPT, "rotary_dim": 8},
    "CodeGenForCausalLM": {**_GPT, "rotary_dim": 8},
    "GPTBigCodeForCausalLM": _GPT,
    "OPTForCausalLM": {**_TEXT, "ffn_dim": 128, "word_embed_proj_dim": 64},
    "BloomForCausalLM": {"vocab_size": 100, "hidden_size": 64, "n_layer": 2, "n_head": 4},
    "MptForCausalLM": {"vocab_size": 100, "d_model": 64, "n_layers": 2, "n_heads": 4, "max_seq_len": 64},
    "LlamaForCausalLM": _GROUPED,
    "LlamaForSequenceClassification": _GROUPED,
    "MistralForCausalLM": _GROUPED,
    "Qwen2ForCausalLM": _GROUPED,
    "Qwen3ForCausalLM": {**_GROUPED, "head_dim": 16},
    "GemmaForCausalLM": {**_GROUPED, "head_dim": 16},
    "Gemma2ForCausalLM": {**_GROUPED, "head_dim": 16, "query_pre_attn_scalar": 16},
    "PhiForCausalLM": _GROUPED,
    "Phi3ForCausalLM": _GROUPED,
    "FalconForCausalLM": {**_TEXT, "new_decoder_architecture": False, "multi_query": True},
    "StableLmForCausalLM": _GROUPED,
    "MixtralForCausalLM": {**_GROUPED, "num_local_experts": 4},
    "OlmoForCausalLM": _GROUPED,
    "Olmo2ForCausalLM": _GROUPED,
    "Starcoder2ForCausalLM": _GROUPED,
    "CohereForCausalLM": _GROUPED,
    "GraniteForCausalLM": _GROUPED,
    "PersimmonForCausalLM": _TEXT,
    "BioGptForCausalLM": {**_TEXT, "layerdrop": 0.0},
    "CTRLLMHeadModel": {**_GPT, "dff": 128},
    "OpenAIGPTLMHeadModel": _GPT,
    "XGLMForCausalLM": {
        "vocab_size": 100, "d_model": 64, "num_layers": 2, "attention_heads": 4, "ffn_dim": 128,
        "max_position_embeddings": 64, "layerdrop": 0.0,
    },
    "MambaForCausalLM": {"vocab_size": 100, "hidden_size": 64, "num_hidden_layers": 2, "state_size": 8},
}  # fmt: skip

ENCODER_DECODERS: dict[str, Sizes] = {
    "T5ForConditionalGeneration": _T5,
    "MT5ForConditionalGeneration": {**_T5, "feed_forward_proj": "gated-gelu"},
    "BartForConditionalGeneration": _HALVES,
    "MBartForConditionalGeneration": _HALVES,
    "PegasusForConditionalGeneration": _HALVES,
    "MarianMTModel": _HALVES,
    "BlenderbotForConditionalGeneration": _HALVES,
    "M2M100ForConditionalGeneration": {**_HALVES, "encoder_layerdrop": 0.0, "decoder_layerdrop": 0.0},
}

VISION: dict[str, Sizes] = {
    "ViTForImageClassification": _IMAGE,
    "DeiTForImageClassification": _IMAGE,
    "DeiTForImageClassificationWithTeacher": _IMAGE,
    "BeitForImageClassification": {**_IMAGE, "use_relative_position_bias": True},
    "Dinov2ForImageClassification": _IMAGE,
    "ViTMAEForPreTraining": {
        **_IMAGE, "decoder_hidden_size": 32, "decoder_num_hidden_layers": 1, "decoder_num_attention_heads": 4,
        "decoder_intermediate_size": 64,
    },
    "YolosForObjectDetection": {
        **_IMAGE, "image_size": [32, 32], "num_detection_tokens": 8, "outputs": _BOXES,
    },
    "SwinForImageClassification": _SWIN,
    "Swinv2ForImageClassification": _SWIN,
    "ConvNextForImageClassification": {**_PYRAMID, "shape": (3, 64, 64)},
    "ConvNextV2ForImageClassification": {**_PYRAMID, "shape": (3, 64, 64)},
    "SegformerForSemanticSegmentation": {
        **_PYRAMID, "num_attention_heads": [1, 2, 3, 4], "decoder_hidden_size": 32, "shape": (3, 64, 64),
    },
    "DetrForObjectDetection": _DETR,
    "ConditionalDetrForObjectDetection": _DETR,
    "Mask2FormerForUniversalSegmentation": {
        "backbone_config": _SWIN_BACKBONE, "hidden_dim": 32, "feature_size": 32, "mask_feature_size": 32,
        "encoder_layers": 1, "decoder_layers": 2, "num_attention_heads": 4, "encoder_feedforward_dim": 64,
        "dim_feedforward": 64, "num_queries": 8, "use_timm_backbone": False, "backbone": None,
        "shape": (3, 64, 64), "outputs": _MASKS,
    },
    "MaskFormerForInstanceSegmentation": {
        "backbone_config": _SWIN_BACKBONE, "fpn_feature_size": 32, "mask_feature_size": 32,
        "decoder_config": {**_DETR, "model_type": "detr"}, "shape": (3, 64, 64), "outputs": _MASKS,
    },
    "DPTForDepthEstimation": {
        **_IMAGE, "num_hidden_layers": 4, "backbone_out_indices": [0, 1, 2, 3],
        "neck_hidden_sizes": [16, 16, 32, 32], "fusion_hidden_size": 16, "is_hybrid": False,
    },
    "UperNetForSemanticSegmentation": {
        "backbone_config": _SWIN_BACKBONE, "hidden_size": 32, "auxiliary_in_channels": 64,
        "auxiliary_channels": 32, "use_timm_backbone": False, "backbone": None, "shape": (3, 64, 64),
    },
    "ResNetForImageClassification": {**_PYRAMID, "embedding_size": 16, "shape": (3, 64, 64)},
    "RegNetForImageClassification": {
        **_PYRAMID, "embedding_size": 16, "groups_width": 16, "shape": (3, 64, 64),
    },
    "MobileViTForImageClassification": {
        "image_size": 64, "hidden_sizes": [32, 48, 64], "neck_hidden_sizes": [8, 16, 24, 32, 48, 48, 160],
        "shape": (3, 64, 64),
    },
    "MobileViTV2ForImageClassification": {"image_size": 64, "width_multiplier": 0.5, "shape": (3, 64, 64)},
    "MobileNetV1ForImageClassification": {"depth_multiplier": 0.25, "image_size": 64, "shape": (3, 64, 64)},
    "MobileNetV2ForImageClassification": {"depth_multiplier": 0.5, "image_size": 64, "shape": (3, 64, 64)},
    "PvtForImageClassification": {
        **_PYRAMID, "image_size": 64, "num_attention_heads": [1, 2, 4, 4], "shape": (3, 64, 64),
    },
    "PvtV2ForImageClassification": {
        **_PYRAMID, "image_size": 64, "num_attention_heads": [1, 2, 4, 4], "shape": (3, 64, 64),
    },
    "PoolFormerForImageClassification": {**_PYRAMID, "shape": (3, 64, 64)},
    "FocalNetForImageClassification": {
        "image_size": 64, "embed_dim": 16, "depths": [1, 1, 1], "hidden_sizes": [16, 32, 64],
        "focal_levels": [1, 1, 1], "focal_windows": [3, 3, 3], "shape": (3, 64, 64),
    },
    "LevitForImageClassification": {
        "image_size": 64, "hidden_sizes": [32, 48, 64], "num_attention_heads": [2, 3, 4], "depths": [1, 1, 1],
        "key_dim": [8, 8, 8], "shape": (3, 64, 64),
    },
    "CvtForImageClassification": {
        "embed_dim": [16, 32, 64], "num_heads": [1, 2, 4], "depth": [1, 2, 3], "shape": (3, 64, 64),
    },
    "EfficientNetForImageClassification": {
        "image_size": 64, "width_coefficient": 0.5, "depth_coefficient": 0.5, "hidden_dim": 640,
        "shape": (3, 64, 64),
    },
    "HieraForImageClassification": {
        "image_size": [64, 64], "embed_dim": 16, "depths": [1, 1, 1, 1], "num_heads": [1, 2, 4, 8],
        "shape": (3, 64, 64),
    },
    "TimesformerForVideoClassification": {**_IMAGE, "num_frames": 2, "shape": (2, 3, 32, 32)},
    "VideoMAEForVideoClassification": {**_IMAGE, "num_frames": 4, "shape": (4, 3, 32, 32)},
}  # fmt: skip

AUDIO: dict[str, Sizes] = {
    "WhisperForConditionalGeneration": {
        **_HALVES, "num_mel_bins": 16, "max_source_positions": 32, "max_target_positions": 32,
        "shape": (16, 64),
    },
    "Wav2Vec2ForCTC": _SPEECH,
    "Wav2Vec2ForSequenceClassification": _SPEECH,
    "HubertForCTC": _SPEECH,
    "WavLMForCTC": _SPEECH,
    "Data2VecAudioForCTC": {**_SPEECH, "conv_pos_kernel_size": 5, "num_conv_pos_embeddings": 2},
    "ASTForAudioClassification": {
        **{name: value for name, value in _IMAGE.items() if name != "image_size"}, "num_mel_bins": 16,
        "max_length": 32, "frequency_stride": 8, "time_stride": 8, "shape": (32, 16),
    },
}  # fmt: skip

PAIRS: dict[str, Sizes] = {
    "CLIPModel": {
        "text_config": _TEXT,
        "vision_config": _IMAGE,
        "projection_dim": 32,
        "outputs": _EMBEDDINGS,
    },
    "SiglipModel": {"text_config": _TEXT, "vision_config": _IMAGE, "outputs": _EMBEDDINGS},
    "ViltForQuestionAnswering": {**_IMAGE, "vocab_size": 100, "max_position_embeddings": 64},
}
