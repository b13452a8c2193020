"""segmentation-models-pytorch: every architecture on a small encoder, and one on a few encoders more."""

from __future__ import annotations

from functools import partial

import segmentation_models_pytorch as smp
import torch
from torch import nn

from benchmarks.zoo.example import Case, Example

_SIDE = 64
_CLASSES = 3
_ENCODER = "resnet18"
_ARCHITECTURES = (
    "Unet",
    "UnetPlusPlus",
    "MAnet",
    "Linknet",
    "FPN",
    "PSPNet",
    "PAN",
    "DeepLabV3",
    "DeepLabV3Plus",
    "UPerNet",
    "Segformer",
)
_ENCODERS = (
    "timm-mobilenetv3_small_minimal_100",
    "mobilenet_v2",
    "efficientnet-b0",
    "mit_b0",
    "mobileone_s0",
    "densenet121",
)


def cases() -> dict[str, Case]:
    """A case for each architecture, and for a U-net on each of the other encoders."""
    return {
        **{name: partial(_example, name, _ENCODER) for name in _ARCHITECTURES},
        **{f"Unet-{encoder}": partial(_example, "Unet", encoder) for encoder in _ENCODERS},
        "DPT": _dpt,
    }


def _example(name: str, encoder: str) -> Example:
    model = getattr(smp, name)(encoder_name=encoder, encoder_weights=None, classes=_CLASSES)
    return _on_images(model, 2 * _SIDE if name == "PAN" else _SIDE)  # which pools its maps three times more


def _on_images(model: nn.Module, side: int) -> Example:
    return Example(
        model=model, inputs=torch.randn(1, 3, side, side), training_inputs=torch.randn(2, 3, side, side)
    )


def _dpt() -> Example:
    model = smp.DPT(
        encoder_name="tu-vit_tiny_patch16_224.augreg_in21k",
        encoder_weights=None,
        classes=_CLASSES,
        decoder_intermediate_channels=(32, 32, 64, 64),
        decoder_fusion_channels=32,
        dynamic_img_size=True,
    )
    return _on_images(model, _SIDE)
