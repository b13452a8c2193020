"""pytorchcv: the smallest network of each of its families, but those of more than 16 million parameters."""

from __future__ import annotations

from functools import partial

import torch
from pytorchcv.model_provider import get_model

from benchmarks.zoo.example import Case, Example

_CIFAR, _IMAGENET = (32, 32), (224, 224)
_SIDES = {  # side of the pictures -> networks
    _CIFAR: (
        "densenet40_k12_bc_cifar10",
        "diapreresnet20_cifar10",
        "diaresnet20_cifar10",
        "msdnet22_cifar10",
        "nin_cifar10",
        "preresnet20_cifar10",
        "resdropresnet20_cifar10",
        "resnet20_cifar10",
        "rir_cifar10",
        "ror3_56_cifar10",
        "sepreresnet20_cifar10",
        "seresnet20_cifar10",
        "shakedropresnet20_cifar10",
        "shakeshakeresnet20_2x16d_cifar10",
        "xdensenet40_2_k24_bc_cifar10",
    ),
    (64, 128): (  # of streets, cut into classes
        "cgnet_cityscapes",
        "ctxnet_cityscapes",
        "dabnet_cityscapes",
        "edanet_cityscapes",
        "enet_cityscapes",
        "erfnet_cityscapes",
        "esnet_cityscapes",
        "espcnet_cityscapes",
        "fastscnn_cityscapes",
        "fpenet_cityscapes",
        "lednet_cityscapes",
        "linknet_cityscapes",
    ),
    (64, 64): ("bisenet_resnet18_celebamaskhq", "centernet_resnet18_voc"),
    (128, 256): ("sinet_cityscapes",),
    _IMAGENET: (
        "bam_resnet18",
        "bninception",
        "cbam_resnet18",
        "channelnet",
        "condensenet74_c8_g8",
        "darknet_tiny",
        "darts",
        "densenet121",
        "diapreresnet10",
        "diaresnet10",
        "dicenet_wd5",
        "diracnet18v2",
        "dla46xc",
        "dpn68",
        "efficientnet_b0",
        "efficientnet_edge_small_b",
        "espnetv2_wd2",
        "fbnet_cb",
        "fdmobilenet_wd4",
        "ghostnet",
        "hardnet39ds",
        "hrnet_w18_small_v1",
        "ibn_densenet121",
        "igcv3_wd4",
        "menet108_8x1_g3",
        "mixnet_s",
        "mnasnet_small",
        "mobilenet_wd4",
        "mobilenetb_wd4",
        "mobilenetv2b_wd4",
        "mobilenetv3_small_w7d20",
        "octresnet10_ad2",
        "peleenet",
        "preresnet18_wd4",
        "proxylessnas_mobile",
        "regnetx002",
        "resnestabc14",
        "resnet18_wd4",
        "sepreresnet10",
        "seresnet10",
        "sharesnet18",
        "shufflenet_g1_wd4",
        "shufflenetv2_wd2",
        "shufflenetv2b_wd2",
        "sparsenet121",
        "spnasnet",
        "sqnxt23_w1",
        "squeezenet_v1_1",
        "vovnet27s",
    ),
}


def cases() -> dict[str, Case]:
    """A case for each network."""
    return {name: partial(_example, name, size) for size, names in _SIDES.items() for name in names}


def _example(name: str, size: tuple[int, int]) -> Example:
    model = get_model(name, pretrained=False, in_size=size)
    return Example(model=model, inputs=torch.randn(1, 3, *size), training_inputs=torch.randn(2, 3, *size))
