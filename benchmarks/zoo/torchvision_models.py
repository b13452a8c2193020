"""Every network of torchvision but the quantised: classification, segmentation, detection, video, flow."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torchvision
from torch import Tensor, nn

from benchmarks.zoo.example import Case, Example

_DETECTORS = ("fasterrcnn", "fcos", "keypointrcnn", "maskrcnn", "retinanet", "ssd")
_VIDEO = {  # frames, pixels
    "r3d_18": (8, 112),
    "mc3_18": (8, 112),
    "r2plus1d_18": (8, 112),
    "s3d": (14, 224),
    "mvit_v1_b": (16, 224),
    "mvit_v2_s": (16, 224),
    "swin3d_t": (8, 112),
    "swin3d_s": (8, 112),
    "swin3d_b": (8, 112),
}
_PIXELS = {"inception_v3": 299}


def cases() -> dict[str, Case]:
    """A case for each name."""
    names = (name for name in torchvision.models.list_models() if not name.startswith("quantized"))
    return {name: partial(_example, name) for name in names}


def _example(name: str) -> Example:
    if name.startswith(_DETECTORS):
        return _detector(name)
    if name.startswith("raft"):
        return _pair(_model(name), (2, 3, 128, 128))
    if name in _VIDEO:
        frames, pixels = _VIDEO[name]
        return _single(_model(name), (3, frames, pixels, pixels))
    if name.startswith(("deeplabv3", "fcn", "lraspp")):
        return _single(_model(name, weights_backbone=None), (3, 128, 128))
    options = {"init_weights": False} if name in ("googlenet", "inception_v3") else {}
    pixels = _PIXELS.get(name, 224)
    return _single(_model(name, **options), (3, pixels, pixels))


def _model(name: str, **options: Any) -> nn.Module:
    model: nn.Module = torchvision.models.get_model(name, weights=None, **options)
    return model


def _single(model: nn.Module, shape: tuple[int, ...]) -> Example:
    return Example(model=model, inputs=torch.randn(1, *shape), training_inputs=torch.randn(2, *shape))


def _pair(model: nn.Module, shape: tuple[int, ...]) -> Example:
    return Example(model=model, inputs=(torch.rand(1, *shape[1:]), torch.rand(1, *shape[1:])))


def _detector(name: str) -> Example:
    """A detector takes a list of images; for training it takes targets too, and gives losses."""
    model = _model(name, weights_backbone=None)
    pixels = 320 if "320" in name else 300
    for attribute in ("min_size", "max_size"):  # of the transform in front, which would enlarge to 800
        value = (pixels,) if attribute == "min_size" else pixels
        if not name.startswith("ssd"):
            setattr(model.transform, attribute, value)
    images = [torch.rand(3, pixels, pixels) for _ in range(2)]
    targets = [_target(name, pixels) for _ in images]
    return Example(model=model, inputs=(images[:1],), training_inputs=(images, targets), varying=True)


def _target(name: str, pixels: int) -> dict[str, Tensor]:
    boxes = torch.tensor([[10.0, 20.0, 120.0, 160.0], [40.0, 30.0, 200.0, 220.0]])
    target = {"boxes": boxes, "labels": torch.ones(2, dtype=torch.int64)}
    if name.startswith("maskrcnn"):
        target["masks"] = (torch.rand(2, pixels, pixels) > 0.5).to(torch.uint8)
    if name.startswith("keypointrcnn"):
        places = torch.rand(2, 17, 2) * 80 + 40
        target["keypoints"] = torch.cat([places, torch.ones(2, 17, 1)], 2)
    return target
