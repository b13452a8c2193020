"""The sizes and inputs of the small networks of `diffusers_models`.

An input that is a number stands for a whole number below it, one that is a shape for normal numbers, for each
sample; one that is a function of the number of samples gives what is neither.
"""

from __future__ import annotations

from typing import Any, TypeAlias

import torch

Row: TypeAlias = tuple[dict[str, Any], dict[str, Any]]  # configuration, inputs

_STEP = 1000  # an input that is a number: a whole number below it, for each sample
_LATENT, _TEXT = (4, 16, 16), (6, 32)  # one that is a shape: normal numbers, for each sample
_HEADS = {"num_attention_heads": 4, "attention_head_dim": 16, "num_layers": 2}
_AXES = (4, 6, 6)  # of rotary positions

_UNET = {"block_out_channels": (32, 64), "layers_per_block": 1, "norm_num_groups": 8}
_CROSS = {**_UNET, "cross_attention_dim": 32, "attention_head_dim": 8}
_CROSS_DOWN = ("DownBlock2D", "CrossAttnDownBlock2D")
_CROSS_UP = ("CrossAttnUpBlock2D", "UpBlock2D")
_ON_TEXT = {"sample": _LATENT, "timestep": _STEP, "encoder_hidden_states": _TEXT}
_CODER = {
    "down_block_types": ("DownEncoderBlock2D",) * 2,
    "up_block_types": ("UpDecoderBlock2D",) * 2,
    **_UNET,
}
_PICTURE = {"sample": (3, 32, 32)}
_SEQUENCES = {"hidden_states": (16, 16), "encoder_hidden_states": _TEXT, "timestep": _STEP}
_PLACES = {"img_ids": lambda samples: torch.rand(16, 3), "txt_ids": lambda samples: torch.zeros(6, 3)}
_MASK = {"encoder_attention_mask": lambda samples: torch.ones(samples, 6)}


TABLE: dict[str, Row] = {  # an input that is a function of the number of samples is neither number nor shape
    "UNet2DModel": (
        {
            **_UNET,
            "sample_size": 16,
            "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
            "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
        },
        {"sample": (3, 16, 16), "timestep": _STEP},
    ),
    "UNet2DConditionModel": (
        {**_CROSS, "sample_size": 16, "down_block_types": _CROSS_DOWN, "up_block_types": _CROSS_UP},
        _ON_TEXT,
    ),
    "UNet1DModel": (
        {"sample_size": 64, "block_out_channels": (16, 32, 64), "extra_in_channels": 32},
        {"sample": (2, 64), "timestep": _STEP},
    ),
    "UNet3DConditionModel": (
        {
            **_CROSS,
            "sample_size": 16,
            "down_block_types": ("CrossAttnDownBlock3D", "DownBlock3D"),
            "up_block_types": ("UpBlock3D", "CrossAttnUpBlock3D"),
        },
        {**_ON_TEXT, "sample": (4, 3, 16, 16)},
    ),
    "UNetMotionModel": (
        {
            **_UNET,
            "cross_attention_dim": 32,
            "num_attention_heads": 4,
            "motion_num_attention_heads": 4,
            "down_block_types": ("CrossAttnDownBlockMotion", "DownBlockMotion"),
            "up_block_types": ("UpBlockMotion", "CrossAttnUpBlockMotion"),
        },
        {
            "sample": (4, 3, 16, 16),
            "timestep": _STEP,
            "encoder_hidden_states": lambda samples: torch.randn(3 * samples, 6, 32),
        },
    ),
    "UNetSpatioTemporalConditionModel": (
        {
            "block_out_channels": (32, 64),
            "layers_per_block": 1,
            "cross_attention_dim": 32,
            "num_attention_heads": (2, 4),
            "addition_time_embed_dim": 8,
            "projection_class_embeddings_input_dim": 24,
            "down_block_types": ("CrossAttnDownBlockSpatioTemporal", "DownBlockSpatioTemporal"),
            "up_block_types": ("UpBlockSpatioTemporal", "CrossAttnUpBlockSpatioTemporal"),
        },
        {
            "sample": (2, 8, 16, 16),
            "timestep": _STEP,
            "encoder_hidden_states": (1, 32),
            "added_time_ids": (3,),
        },
    ),
    "Kandinsky3UNet": (
        {
            "time_embedding_dim": 64,
            "groups": 8,
            "attention_head_dim": 16,
            "layers_per_block": 2,
            "block_out_channels": (32, 64, 64, 64),
            "cross_attention_dim": 64,
            "encoder_hid_dim": 32,
        },
        {**_ON_TEXT, **_MASK},
    ),
    "StableCascadeUNet": (
        {
            "timestep_ratio_embedding_dim": 16,
            "conditioning_dim": 32,
            "block_out_channels": (32, 64),
            "num_attention_heads": (2, 4),
            "down_num_layers_per_block": (1, 1),
            "up_num_layers_per_block": (1, 1),
            "clip_text_pooled_in_channels": 32,
            "dropout": (0.0, 0.0),
        },
        {"sample": (16, 16, 16), "timestep_ratio": (), "clip_text_pooled": (1, 32)},
    ),
    "UVit2DModel": (
        {
            "hidden_size": 64,
            "cond_embed_dim": 32,
            "micro_cond_encode_dim": 8,
            "micro_cond_embed_dim": 40,
            "encoder_hidden_size": 32,
            "vocab_size": 100,
            "codebook_size": 90,
            "in_channels": 32,
            "block_out_channels": 32,
            "num_res_blocks": 1,
            "block_num_heads": 2,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "intermediate_size": 128,
            "sample_size": 8,
        },
        {
            "input_ids": lambda samples: torch.randint(0, 90, (samples, 8, 8)),
            "encoder_hidden_states": _TEXT,
            "pooled_text_emb": (32,),
            "micro_conds": (5,),
        },
    ),
    "ControlNetModel": (
        {
            **_CROSS,
            "down_block_types": _CROSS_DOWN,
            "conditioning_embedding_out_channels": (8, 16),
        },
        {**_ON_TEXT, "controlnet_cond": (3, 32, 32)},
    ),
    "T2IAdapter": ({"channels": [32, 64], "num_res_blocks": 1, "downscale_factor": 4}, {"x": (3, 32, 32)}),
    "AutoencoderKL": (_CODER, _PICTURE),
    "AsymmetricAutoencoderKL": (
        {
            "down_block_types": ("DownEncoderBlock2D",) * 2,
            "up_block_types": ("UpDecoderBlock2D",) * 2,
            "down_block_out_channels": (32, 64),
            "up_block_out_channels": (32, 64),
            "norm_num_groups": 8,
        },
        _PICTURE,
    ),
    "AutoencoderKLTemporalDecoder": (
        {"down_block_types": ("DownEncoderBlock2D",) * 2, "block_out_channels": (32, 64)},
        {**_PICTURE, "num_frames": lambda samples: samples},
    ),
    "AutoencoderTiny": (
        {
            "encoder_block_out_channels": (32, 32),
            "decoder_block_out_channels": (32, 32),
            "num_encoder_blocks": (1, 2),
            "num_decoder_blocks": (2, 1),
        },
        _PICTURE,
    ),
    "AutoencoderDC": (
        {
            "latent_channels": 8,
            "attention_head_dim": 16,
            "encoder_block_types": ("ResBlock", "EfficientViTBlock"),
            "decoder_block_types": ("ResBlock", "EfficientViTBlock"),
            "encoder_block_out_channels": (32, 64),
            "decoder_block_out_channels": (32, 64),
            "encoder_layers_per_block": (1, 1),
            "decoder_layers_per_block": (1, 1),
            "encoder_qkv_multiscales": ((), (5,)),
            "decoder_qkv_multiscales": ((), (5,)),
        },
        _PICTURE,
    ),
    "AutoencoderOobleck": (
        {
            "encoder_hidden_size": 16,
            "downsampling_ratios": [2, 4],
            "channel_multiples": [1, 2],
            "decoder_channels": 16,
            "decoder_input_channels": 8,
        },
        {"sample": (2, 64)},
    ),
    "VQModel": ({**_CODER, "num_vq_embeddings": 64}, _PICTURE),
    "DiTTransformer2DModel": (
        {**_HEADS, "sample_size": 16, "norm_num_groups": 8},
        {"hidden_states": _LATENT, "timestep": _STEP, "class_labels": 10},
    ),
    "PixArtTransformer2DModel": (
        {
            **_HEADS,
            "sample_size": 16,
            "norm_num_groups": 8,
            "cross_attention_dim": 64,
            "caption_channels": 32,
        },
        {
            "hidden_states": _LATENT,
            "encoder_hidden_states": _TEXT,
            "timestep": _STEP,
            "added_cond_kwargs": lambda samples: {"resolution": None, "aspect_ratio": None},
        },
    ),
    "SD3Transformer2DModel": (
        {
            **_HEADS,
            "sample_size": 16,
            "in_channels": 4,
            "out_channels": 4,
            "joint_attention_dim": 32,
            "caption_projection_dim": 64,
            "pooled_projection_dim": 32,
            "qk_norm": "rms_norm",
        },
        {
            "hidden_states": _LATENT,
            "encoder_hidden_states": _TEXT,
            "pooled_projections": (32,),
            "timestep": _STEP,
        },
    ),
    "FluxTransformer2DModel": (
        {
            **_HEADS,
            "in_channels": 16,
            "num_single_layers": 2,
            "joint_attention_dim": 32,
            "pooled_projection_dim": 32,
            "axes_dims_rope": _AXES,
        },
        {**_SEQUENCES, **_PLACES, "pooled_projections": (32,)},
    ),
    "ChromaTransformer2DModel": (
        {
            **_HEADS,
            "in_channels": 16,
            "num_single_layers": 2,
            "joint_attention_dim": 32,
            "axes_dims_rope": _AXES,
            "approximator_hidden_dim": 64,
            "approximator_num_channels": 16,
            "approximator_layers": 1,
        },
        {**_SEQUENCES, **_PLACES},
    ),
    "QwenImageTransformer2DModel": (
        {**_HEADS, "in_channels": 16, "out_channels": 4, "joint_attention_dim": 32, "axes_dims_rope": _AXES},
        {
            **_SEQUENCES,
            "encoder_hidden_states_mask": lambda samples: torch.ones(samples, 6),
            "img_shapes": lambda samples: [[(1, 4, 4)]] * samples,
        },
    ),
    "AuraFlowTransformer2DModel": (
        {
            "sample_size": 16,
            "num_mmdit_layers": 1,
            "num_single_dit_layers": 1,
            "num_attention_heads": 4,
            "attention_head_dim": 16,
            "joint_attention_dim": 32,
            "caption_projection_dim": 64,
            "pos_embed_max_size": 64,
        },
        {"hidden_states": _LATENT, "encoder_hidden_states": _TEXT, "timestep": _STEP},
    ),
    "SanaTransformer2DModel": (
        {
            **_HEADS,
            "in_channels": 4,
            "out_channels": 4,
            "num_cross_attention_heads": 4,
            "cross_attention_head_dim": 16,
            "cross_attention_dim": 64,
            "caption_channels": 32,
            "sample_size": 16,
        },
        {"hidden_states": _LATENT, "encoder_hidden_states": _TEXT, "timestep": _STEP},
    ),
    "Lumina2Transformer2DModel": (
        {
            "sample_size": 16,
            "in_channels": 4,
            "hidden_size": 48,
            "num_layers": 2,
            "num_refiner_layers": 1,
            "num_attention_heads": 3,
            "num_kv_heads": 1,
            "multiple_of": 16,
            "axes_dim_rope": (4, 6, 6),
            "axes_lens": (32, 32, 32),
            "cap_feat_dim": 32,
        },
        {
            "hidden_states": _LATENT,
            "encoder_hidden_states": _TEXT,
            "timestep": _STEP,
            "encoder_attention_mask": lambda samples: torch.ones(samples, 6, dtype=torch.bool),
        },
    ),
    "CogView3PlusTransformer2DModel": (
        {
            **_HEADS,
            "in_channels": 4,
            "out_channels": 4,
            "text_embed_dim": 32,
            "time_embed_dim": 32,
            "condition_dim": 8,
            "pos_embed_max_size": 16,
            "sample_size": 16,
        },
        {
            "hidden_states": _LATENT,
            "encoder_hidden_states": _TEXT,
            "timestep": _STEP,
            **dict.fromkeys(("original_size", "target_size", "crop_coords"), (2,)),
        },
    ),
    "PriorTransformer": (
        {**_HEADS, "embedding_dim": 32, "num_embeddings": 6},
        {
            "hidden_states": (32,),
            "timestep": _STEP,
            "proj_embedding": (32,),
            "encoder_hidden_states": _TEXT,
        },
    ),
    "StableAudioDiTModel": (
        {
            "sample_size": 16,
            "in_channels": 8,
            "out_channels": 8,
            "num_layers": 2,
            "attention_head_dim": 16,
            "num_attention_heads": 4,
            "num_key_value_attention_heads": 2,
            "cross_attention_dim": 32,
            "time_proj_dim": 16,
            "global_states_input_dim": 32,
            "cross_attention_input_dim": 32,
        },
        {
            "hidden_states": (8, 16),
            "timestep": _STEP,
            "encoder_hidden_states": _TEXT,
            "global_hidden_states": (1, 32),
        },
    ),
    "CogVideoXTransformer3DModel": (
        {
            **_HEADS,
            "in_channels": 4,
            "out_channels": 4,
            "time_embed_dim": 32,
            "text_embed_dim": 32,
            "sample_width": 16,
            "sample_height": 16,
            "sample_frames": 5,
            "max_text_seq_length": 6,
        },
        {"hidden_states": (2, 4, 16, 16), "encoder_hidden_states": _TEXT, "timestep": _STEP},
    ),
    "LatteTransformer3DModel": (
        {
            **_HEADS,
            "in_channels": 4,
            "out_channels": 8,
            "sample_size": 16,
            "patch_size": 2,
            "cross_attention_dim": 64,
            "caption_channels": 32,
            "video_length": 2,
            "norm_type": "ada_norm_single",
            "norm_elementwise_affine": False,
            "num_embeds_ada_norm": 1000,
        },
        {"hidden_states": (4, 2, 16, 16), "timestep": _STEP, "encoder_hidden_states": _TEXT},
    ),
    "LTXVideoTransformer3DModel": (
        {**_HEADS, "in_channels": 16, "out_channels": 16, "cross_attention_dim": 64, "caption_channels": 32},
        {
            **_SEQUENCES,
            **_MASK,
            "num_frames": lambda samples: 1,
            "height": lambda samples: 4,
            "width": lambda samples: 4,
        },
    ),
    "MochiTransformer3DModel": (
        {
            **_HEADS,
            "in_channels": 4,
            "pooled_projection_dim": 32,
            "text_embed_dim": 32,
            "time_embed_dim": 16,
            "max_sequence_length": 6,
        },
        {"hidden_states": (4, 2, 16, 16), "encoder_hidden_states": _TEXT, "timestep": _STEP, **_MASK},
    ),
    "WanTransformer3DModel": (
        {
            **_HEADS,
            "in_channels": 4,
            "out_channels": 4,
            "text_dim": 32,
            "freq_dim": 32,
            "ffn_dim": 128,
            "rope_max_seq_len": 32,
        },
        {"hidden_states": (4, 2, 16, 16), "timestep": _STEP, "encoder_hidden_states": _TEXT},
    ),
}
