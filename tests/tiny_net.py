"""Networks for the commands, by names such as ``tiny_net:TinyNet``, which trains in milliseconds."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from models import double


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


class FlatNet(TinyNet):
    """Maps that are flattened to a size which stands in the code."""

    def __init__(self, num_classes: int = 2) -> None:
        super().__init__(num_classes)
        self.fc = nn.Linear(16 * 4 * 4, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        maps = nn.functional.adaptive_avg_pool2d(self.features(images), 4)
        return self.fc(self.drop(maps.view(-1, 16 * 4 * 4)))


class TangledNet(nn.Module):
    """An operator without a rule, a width that is derived from a number of heads, and a comparison."""

    def __init__(self, classes: int = 2) -> None:
        super().__init__()
        self.heads = 2
        self.first, self.second = nn.Conv2d(3, 6, 1), nn.Conv2d(6, 8, 1)
        self.query, self.key, self.value = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)
        self.fc = nn.Linear(8, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.second(double(self.first(x))).flatten(2).transpose(1, 2)
        width = x.shape[-1]
        if width != 3:
            x = torch.tanh(x)
        shape = (self.heads, width // self.heads)
        query, key, value = (
            layer(x).unflatten(-1, shape).transpose(1, 2) for layer in (self.query, self.key, self.value)
        )
        x = x + ((query @ key.mT).softmax(-1) @ value).transpose(1, 2).flatten(2)
        return self.fc(x.mean(1))


class RowsNet(TinyNet):
    """Rows of the maps, read by products that reconstruction does not know: with a vector for each class."""

    def __init__(self, num_classes: int = 2) -> None:
        super().__init__(num_classes)
        self.rows, self.marks = nn.Linear(16, 10), nn.Linear(16, 12)
        self.of_rows = nn.Parameter(torch.randn(num_classes, 10) / 10)
        self.of_marks = nn.Parameter(torch.randn(num_classes, 12) / 10)

    def forward(self, images: Tensor) -> Tensor:
        maps = self.features(images).mean(3).transpose(1, 2)
        rows, marks = torch.relu(self.rows(maps)), torch.relu(self.marks(maps))
        read = torch.stack([rows @ vector for vector in self.of_rows.unbind()], -1)
        more = torch.stack([marks @ vector for vector in self.of_marks.unbind()], -1)
        scores: Tensor = (read + more).mean(1)
        return scores
