"""The demo's network: in the style of VGG, and deliberately far too large for what it has to learn."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

_STAGES = ((64, 64), (128, 128), (256, 256))
_HIDDEN = 256


class VGGDigits(nn.Module):
    """Three stages of two 3 x 3 convolutions with batch norm, then two fully connected layers.

    Args:
        num_classes: Scores that it gives.
        channels: Channels of the images.
        stages: The width of each convolution, by stage; each stage ends with a 2 x 2 max pooling.
        hidden: Neurons of the first fully connected layer.

    Example:
        >>> VGGDigits(10)(torch.zeros(2, 1, 16, 16)).shape
        torch.Size([2, 10])
    """

    def __init__(
        self,
        num_classes: int,
        *,
        channels: int = 1,
        stages: Sequence[Sequence[int]] = _STAGES,
        hidden: int = _HIDDEN,
    ) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for stage in stages:
            for width in stage:
                layers += [nn.Conv2d(channels, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU()]
                channels = width
            layers.append(nn.MaxPool2d(2))
        self.features = nn.Sequential(*layers)
        self.pool = nn.AdaptiveAvgPool2d(2)
        self.classifier = nn.Sequential(
            nn.Linear(channels * 4, hidden), nn.ReLU(), nn.Dropout(0.2), nn.Linear(hidden, num_classes)
        )

    def forward(self, images: Tensor) -> Tensor:
        """Scores ``(N, num_classes)`` of images ``(N, C, H, W)`` of 8 x 8 pixels or more."""
        maps = self.pool(self.features(images))  # (N, C, 2, 2)
        scores: Tensor = self.classifier(torch.flatten(maps, 1))
        return scores
