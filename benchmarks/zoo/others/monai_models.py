"""monai: segmentation, classification, registration, generation; most in two dimensions, a few in three."""

from __future__ import annotations

from functools import partial
from typing import Any, TypeAlias

import torch
from monai.networks import nets
from monai.networks.nets.resnet import ResNetBlock
from monai.networks.nets.senet import SEResNetBottleneck
from torch import Tensor, nn

from benchmarks.zoo.example import Case, Example

Row: TypeAlias = tuple[str, dict[str, Any], tuple[int, ...]]  # class, sizes, shape of a sample

_SMALL, _IMAGE, _VOLUME = (1, 32, 32), (1, 64, 64), (1, 32, 32, 32)
_PLANE: dict[str, Any] = {"spatial_dims": 2, "in_channels": 1, "out_channels": 2}
_SPACE: dict[str, Any] = {**_PLANE, "spatial_dims": 3}
_STEPS: dict[str, Any] = {"channels": (16, 32, 64), "strides": (2, 2)}
_EVEN: dict[str, Any] = {"channels": (16, 32), "strides": (2, 2)}
_TOKENS: dict[str, Any] = {"hidden_size": 64, "mlp_dim": 128, "num_heads": 4}
_VIT: dict[str, Any] = {
    **_TOKENS,
    "in_channels": 1,
    "spatial_dims": 2,
    "img_size": 32,
    "patch_size": 8,
    "num_layers": 2,
}
_DIFFUSION: dict[str, Any] = {
    "channels": (16, 32),
    "num_res_blocks": 1,
    "attention_levels": (False, True),
    "norm_num_groups": 8,
}
_CRITIC: dict[str, Any] = {"in_shape": _SMALL, **_EVEN}

TABLE: dict[str, Row] = {
    "AttentionUnet": ("AttentionUnet", {**_PLANE, **_STEPS}, _IMAGE),
    "AutoEncoder": ("AutoEncoder", {**_PLANE, **_EVEN, "num_res_units": 1}, _IMAGE),
    "AutoencoderKL": ("AutoencoderKL", {**_PLANE, **_DIFFUSION}, _SMALL),
    "BasicUNet": ("BasicUNet", {**_PLANE, "features": (16, 16, 32, 32, 64, 16)}, _IMAGE),
    "BasicUNet3d": ("BasicUNet", {**_SPACE, "features": (8, 8, 16, 16, 32, 8)}, _VOLUME),
    "BasicUNetPlusPlus": ("BasicUNetPlusPlus", {**_PLANE, "features": (16, 16, 32, 32, 64, 16)}, _IMAGE),
    "Classifier": ("Classifier", {**_CRITIC, "classes": 10}, _SMALL),
    "Critic": ("Critic", _CRITIC, _SMALL),
    "DenseNet": (
        "DenseNet",
        {**_PLANE, "init_features": 16, "growth_rate": 8, "block_config": (2, 2)},
        _IMAGE,
    ),
    "Discriminator": ("Discriminator", _CRITIC, _SMALL),
    "DynUNet": (
        "DynUNet",
        {
            **_PLANE,
            "kernel_size": [3, 3, 3],
            "strides": [1, 2, 2],
            "upsample_kernel_size": [2, 2],
            "filters": [16, 32, 64],
            "res_block": True,
        },
        _IMAGE,
    ),
    "EfficientNetBN": (
        "EfficientNetBN",
        {"model_name": "efficientnet-b0", "pretrained": False, "in_channels": 1, "num_classes": 10},
        _IMAGE,
    ),
    "FlexibleUNet": (
        "FlexibleUNet",
        {
            "in_channels": 1,
            "out_channels": 2,
            "backbone": "resnet10",
            "decoder_channels": (64, 48, 32, 24, 16),
        },
        _IMAGE,
    ),
    "FullyConnectedNet": (
        "FullyConnectedNet",
        {"in_channels": 16, "out_channels": 4, "hidden_channels": [32, 32]},
        (16,),
    ),
    "Generator": (
        "Generator",
        {"latent_shape": (16,), "start_shape": (32, 8, 8), "channels": (16, 8), "strides": (2, 2)},
        (16,),
    ),
    "GlobalNet": (
        "GlobalNet",
        {"image_size": (64, 64), "spatial_dims": 2, "in_channels": 2, "num_channel_initial": 8, "depth": 3},
        (2, 64, 64),
    ),
    "HighResNet": ("HighResNet", _PLANE, _SMALL),
    "LocalNet": (
        "LocalNet",
        {
            "spatial_dims": 2,
            "in_channels": 2,
            "num_channel_initial": 8,
            "extract_levels": (0, 1, 2),
            "out_channels": 2,
        },
        (2, 64, 64),
    ),
    "MaskedAutoEncoderViT": (
        "MaskedAutoEncoderViT",
        {
            **_VIT,
            "decoder_hidden_size": 48,
            "decoder_mlp_dim": 96,
            "decoder_num_layers": 1,
            "decoder_num_heads": 4,
        },
        _SMALL,
    ),
    "MedNeXt": (
        "MedNeXt",
        {
            **_PLANE,
            "init_filters": 8,
            "kernel_size": 3,
            **{f"blocks_{place}": (1, 1) for place in ("down", "up")},
            "blocks_bottleneck": 1,
        },
        _IMAGE,
    ),
    "PatchDiscriminator": (
        "PatchDiscriminator",
        {"spatial_dims": 2, "channels": 16, "in_channels": 1, "num_layers_d": 2},
        _IMAGE,
    ),
    "Quicknat": ("Quicknat", {"num_classes": 4, "num_filters": 16}, _IMAGE),
    "RegUNet": (
        "RegUNet",
        {"spatial_dims": 2, "in_channels": 2, "num_channel_initial": 8, "depth": 3, "out_channels": 2},
        (2, 64, 64),
    ),
    "Regressor": ("Regressor", {**_CRITIC, "out_shape": (4,)}, _SMALL),
    "ResNet": (
        "ResNet",
        {
            "block": ResNetBlock,
            "layers": [1, 1, 1, 1],
            "block_inplanes": [16, 32, 48, 64],
            "n_input_channels": 1,
            "num_classes": 10,
        },
        _VOLUME,
    ),
    "SegResNet": ("SegResNet", {**_PLANE, "init_filters": 16}, _IMAGE),
    "SegResNet3d": (
        "SegResNet",
        {**_SPACE, "init_filters": 8, "blocks_down": (1, 1, 1), "blocks_up": (1, 1)},
        _VOLUME,
    ),
    "SegResNetDS": ("SegResNetDS", {**_PLANE, "init_filters": 16, "blocks_down": (1, 1, 1)}, _IMAGE),
    "SegResNetVAE": (
        "SegResNetVAE",
        {**_PLANE, "init_filters": 8, "input_image_size": (64, 64), "vae_nz": 32},
        _IMAGE,
    ),
    "SENet": (
        "SENet",
        {
            "spatial_dims": 2,
            "in_channels": 1,
            "block": SEResNetBottleneck,
            "layers": (1, 1, 1, 1),
            "groups": 1,
            "reduction": 16,
            "inplanes": 64,
            "num_classes": 10,
            "dropout_prob": None,
            "input_3x3": False,
        },
        _IMAGE,
    ),
    "SwinUNETR": (
        "SwinUNETR",
        {**_PLANE, "depths": (1, 1, 1, 1), "num_heads": (2, 2, 4, 4), "window_size": 4, "feature_size": 12},
        _IMAGE,
    ),
    "SwinUNETR_v2": (
        "SwinUNETR",
        {
            **_PLANE,
            "depths": (1, 1, 1, 1),
            "num_heads": (2, 2, 4, 4),
            "window_size": 4,
            "feature_size": 12,
            "use_v2": True,
        },
        _IMAGE,
    ),
    "UNet": ("UNet", {**_PLANE, **_STEPS}, _IMAGE),
    "UNet3d_residual": ("UNet", {**_SPACE, **_STEPS, "num_res_units": 2}, _VOLUME),
    "UNETR": ("UNETR", {**_PLANE, **_TOKENS, "img_size": 32, "feature_size": 8}, _SMALL),
    "VarAutoEncoder": (
        "VarAutoEncoder",
        {"spatial_dims": 2, "in_shape": _SMALL, "out_channels": 1, "latent_size": 8, **_EVEN},
        _SMALL,
    ),
    "ViT": ("ViT", {**_VIT, "classification": True}, _SMALL),
    "ViTAutoEnc": ("ViTAutoEnc", {**_VIT, "patch_size": 16, "deconv_chns": 16}, _SMALL),
    "VNet": ("VNet", {**_PLANE, "out_channels": 2}, _IMAGE),
    "VoxelMorphUNet": (
        "VoxelMorphUNet",
        {
            "spatial_dims": 2,
            "in_channels": 2,
            "unet_out_channels": 16,
            "channels": (16, 32, 32, 32),
            "final_conv_channels": (16,),
        },
        (2, 64, 64),
    ),
    "VQVAE": (
        "VQVAE",
        {
            **_PLANE,
            "channels": (16, 32),
            "num_res_layers": 1,
            "num_res_channels": (16, 32),
            "downsample_parameters": ((2, 4, 1, 1),) * 2,
            "upsample_parameters": ((2, 4, 1, 1, 0),) * 2,
            "num_embeddings": 16,
            "embedding_dim": 8,
        },
        _SMALL,
    ),
}
_CHOSEN = {
    "ViT": 0,
    "ViTAutoEnc": 0,
    "PatchDiscriminator": -1,
}  # class -> place of the output that is asked for


def cases() -> dict[str, Case]:
    """A case for each row, and for what takes more than an image."""
    return {name: partial(_example, *row) for name, row in TABLE.items()} | {
        "DecoderOnlyTransformer": _of_words,
        "DiffusionModelUNet": _noisy,
    }


class Selected(nn.Module):
    """A model that gives one of its outputs, where the others are maps from within, which so may be cut."""

    def __init__(self, model: nn.Module, place: int) -> None:
        super().__init__()
        self.model = model
        self.place = place

    def forward(self, image: Tensor) -> Tensor:
        """The chosen output."""
        return self.model(image)[self.place]


def _example(name: str, sizes: dict[str, Any], shape: tuple[int, ...]) -> Example:
    model = getattr(nets, name)(**sizes)
    if name in _CHOSEN:
        model = Selected(model, _CHOSEN[name])
    return Example(
        model=model,
        inputs=torch.randn(1, *shape),
        training_inputs=torch.randn(2, *shape),
    )


def _of_words() -> Example:
    model = nets.DecoderOnlyTransformer(
        num_tokens=100, max_seq_len=16, attn_layers_dim=64, attn_layers_depth=2, attn_layers_heads=4
    )
    return Example(
        model=model,
        inputs=torch.randint(0, 100, (1, 12)),
        training_inputs=torch.randint(0, 100, (2, 12)),
    )


def _noisy() -> Example:
    model = nets.DiffusionModelUNet(**_PLANE, **_DIFFUSION, with_conditioning=True, cross_attention_dim=24)

    def inputs(samples: int) -> dict[str, Tensor]:
        return {
            "x": torch.randn(samples, *_SMALL),
            "timesteps": torch.randint(0, 1000, (samples,)),
            "context": torch.randn(samples, 6, 24),
        }

    return Example(model=model, inputs=inputs(1), training_inputs=inputs(2))
