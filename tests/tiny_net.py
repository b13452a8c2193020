"""A network that trains in milliseconds, by the name ``tiny_net:TinyNet``."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class TinyNet(nn.Module):
    """Two convolutions with batch norm, dropout, one linear layer."""

    def __init__(self, num_classes: int = 2) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(3, 12, 3, padding=1),
            nn.BatchNorm2d(12),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(12, 16, 3, padding=1),
            nn.BatchNorm2d(16),
            nn.ReLU(),
        )
        self.drop = nn.Dropout(0.1)
        self.fc = nn.Linear(16, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        scores: Tensor = self.fc(self.drop(self.features(images).mean((2, 3))))
        return scores


class SharedWeights(TinyNet):
    """Two names for one weight."""

    def __init__(self, num_classes: int = 2) -> None:
        super().__init__(num_classes)
        self.again = self.fc

    def forward(self, images: Tensor) -> Tensor:
        return super().forward(images) + self.again(torch.ones(1, 16))
