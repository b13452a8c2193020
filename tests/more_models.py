"""Toy networks whose trap lies in how parameters are held, sizes are stated, or outputs are packed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm

from toy import PIXELS, Head, Toy, conv, units


class SixConvGroups(Toy):
    """Six groups of a convolution, so that the first and the last can go: what stays is no prefix."""

    GROUPS = (
        units(
            "stem",
            6,
            "stem.weight:0*2 grouped.weight:0*3",
            "head.fc.weight:1*3",
            "stem.bias:0*2 grouped.bias:0*3",
            kind="conv_group",
        ),
        units("stem#2", 2, "stem.weight:0*6", "grouped.weight:1", "stem.bias:0*6"),
        units("grouped", 3, "grouped.weight:0*6", "head.fc.weight:1*6", "grouped.bias:0*6"),
    )
    MACS = PIXELS * (12 * 3 * 9 + 18 * 2 * 9) + 18 * 4

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.grouped, self.head = conv(3, 12), conv(12, 18, groups=6), Head(18)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.relu(self.grouped(F.relu(self.stem(x)))))


class ListOfParameters(Toy):
    """Matrices in a list that no module owns."""

    PIXELS = (6,)
    GROUPS = (
        units("matrices.0", 8, "matrices.0:0", "matrices.1:1", kind="neuron"),
        units("matrices.1", 5, "matrices.1:0", "matrices.2:1", kind="neuron"),
    )
    MACS = 6 * 8 + 8 * 5 + 5 * 4

    def __init__(self) -> None:
        super().__init__()
        shapes = ((8, 6), (5, 8), (4, 5))
        self.matrices = nn.ParameterList([nn.Parameter(torch.randn(shape)) for shape in shapes])

    def forward(self, x: Tensor) -> Tensor:
        first, second, last = self.matrices
        return F.linear(F.relu(F.linear(F.relu(F.linear(x, first)), second)), last)


class WeightNorm(Toy):
    """Weights are a length times a direction of each filter, and a direction depends on all inputs."""

    PIXELS = (6,)
    GROUPS = (
        units(
            "first.parametrizations.weight.original1",
            8,
            "first.parametrizations.weight.original1:0",
            "second.parametrizations.weight.original1:1",
            "first.parametrizations.weight.original0:0 first.bias:0",
            kind="neuron",
            mixed=True,
        ),
        units(
            "second.parametrizations.weight.original1",
            5,
            "second.parametrizations.weight.original1:0",
            "last.weight:1",
            "second.parametrizations.weight.original0:0 second.bias:0",
            kind="neuron",
        ),
    )
    MACS = 6 * 8 + 8 * 5 + 5 * 4

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = weight_norm(nn.Linear(6, 8)), weight_norm(nn.Linear(8, 5))
        self.last = nn.Linear(5, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(F.relu(self.second(F.relu(self.first(x)))))


class TableAsAttribute(Toy):
    """A table of positions that is neither parameter nor buffer; it must shrink too."""

    PIXELS = (7, 5)
    GROUPS = (units("embed", 8, "embed.weight:0", "read.weight:1", "embed.bias:0 table:2", kind="neuron"),)
    MACS = 7 * (5 * 8 + 8 * 4)

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.read = nn.Linear(5, 8), nn.Linear(8, 4)
        self.table = torch.arange(56.0).reshape(1, 7, 8).sin()

    def forward(self, x: Tensor) -> Tensor:
        return self.read(F.relu(self.embed(x) + self.table.detach().to(x, copy=True)))


class BatchNormOfVectors(Toy):
    """A batch norm between linear layers."""

    PIXELS = (6,)
    GROUPS = (
        units("first", 9, "first.weight:0", "second.weight:1", "first.bias:0 norm:norm", kind="neuron"),
    )
    MACS = 6 * 9 + 9 * 4

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.second = nn.Linear(6, 9), nn.BatchNorm1d(9), nn.Linear(9, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(F.relu(self.norm(self.first(x))))


class AssertsItsSizes(Toy):
    """A module that refuses inputs of another width than the one that it was made for."""

    GROUPS = (
        units("stem", 8, "stem.weight:0", "mlp.up.weight:1", "stem.bias:0"),
        units("mlp.up", 10, "mlp.up.weight:0", "mlp.down.weight:1", "mlp.up.bias:0", kind="neuron"),
    )
    MACS = PIXELS * (8 * 3 * 9 + 8 * 10 + 10 * 4)

    class Mlp(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.dim, self.up, self.down = 8, nn.Linear(8, 10), nn.Linear(10, 4)

        def forward(self, x: Tensor) -> Tensor:
            width = x.shape[-1]
            assert width == self.dim, f"{width} channels came in, not {self.dim}"
            return self.down(F.gelu(self.up(x)))

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.mlp = conv(3, 8), self.Mlp()

    def forward(self, x: Tensor) -> Tensor:
        return self.mlp(F.relu(self.stem(x)).permute(0, 2, 3, 1)).mean((1, 2))


class ListOfMaps(Toy):
    """The outputs are a list of maps at two scales; the stream between them is free."""

    GROUPS = (
        units("fine", 8, "fine.weight:0", "out.0.weight:1 coarse.weight:1", "fine.bias:0"),
        units("coarse", 6, "coarse.weight:0", "out.1.weight:1", "coarse.bias:0"),
    )
    LOCKED: ClassVar = {"out.0.weight:0": "output", "out.1.weight:0": "output"}
    MACS = PIXELS * (8 * 3 * 9 + 8 * 4) + 16 * (6 * 8 * 9 + 6 * 4)

    def __init__(self) -> None:
        super().__init__()
        self.fine, self.coarse = conv(3, 8), nn.Conv2d(8, 6, 3, stride=2, padding=1)
        self.out = nn.ModuleList([conv(8, 4, 1), conv(6, 4, 1)])

    def forward(self, x: Tensor) -> list[Tensor]:
        fine = F.relu(self.fine(x))
        coarse = F.relu(self.coarse(fine))
        return [layer(each) for layer, each in zip(self.out, (fine, coarse), strict=True)]


@dataclass
class Answer:
    """An output that torch's own tree functions take for a leaf."""

    logits: Tensor
    features: Tensor


class DataclassOutput(Toy):
    """The features leave the model inside a dataclass, so only what is before them can be cut."""

    GROUPS = (units("stem", 8, "stem.weight:0", "body.weight:1", "stem.bias:0"),)
    LOCKED: ClassVar = {"body.weight:0": "output", "head.fc.weight:1": "output"}
    MACS = PIXELS * (8 * 3 * 9 + 6 * 8 * 9) + 6 * 4

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.body, self.head = conv(3, 8), conv(8, 6), Head(6)

    def forward(self, x: Tensor) -> Answer:
        features = self.body(F.relu(self.stem(x)))
        return Answer(logits=self.head(F.relu(features)), features=features)


class LossesInTraining(Toy):
    """In training a detector gives a dictionary of losses, one of a branch that evaluation never runs."""

    GROUPS = (
        units("stem", 8, "stem.weight:0", "body.weight:1 guide.fc.weight:1", "stem.bias:0"),
        units("body", 6, "body.weight:0", "head.fc.weight:1", "body.bias:0"),
    )
    MACS = PIXELS * (8 * 3 * 9 + 6 * 8 * 9) + 6 * 4

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.body, self.head, self.guide = conv(3, 8), conv(8, 6), Head(6), Head(8)

    def forward(self, x: Tensor) -> Tensor | dict[str, Tensor]:
        features = F.relu(self.stem(x))
        classes = self.head(F.relu(self.body(features)))
        if not self.training:
            return classes
        return {"classes": classes.square().mean(), "guide": self.guide(features).square().mean()}


class IdleLayerBesideBatchNorm(Toy):
    """What no pass uses is looked for in training too, where a batch norm counts its batches in place."""

    GROUPS = (units("conv", 8, "conv.weight:0", "head.fc.weight:1", "conv.bias:0 norm:norm"),)
    LOCKED: ClassVar = {"idle.weight:0": "does not use it"}
    MACS = PIXELS * 8 * 3 * 9 + 8 * 4

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.idle, self.head = conv(3, 8), nn.BatchNorm2d(8), nn.Linear(3, 3), Head(8)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.relu(self.norm(self.conv(x))))
