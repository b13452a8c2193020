"""Toy networks of designs that are seldom seen, with the answer written by hand.

Unless a toy says otherwise a sample has five positions of six features.
"""

from __future__ import annotations

from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from toy import Head, Toy, conv, units

PLACES = 5


class AttentionAsFunction(Toy):
    """Torch's attention called as a function: it derives the length of a head, and a scale from it."""

    PIXELS = (PLACES, 6)
    GROUPS = (
        units(
            "embed",
            12,
            "embed.weight:0 proj.weight:0",
            "query.weight:1 key.weight:1 value.weight:1 read.weight:1",
            "embed.bias:0 proj.bias:0",
            kind="neuron",
        ),
        units(
            "query",
            3,
            "query.weight:0*4 key.weight:0*4 value.weight:0*4",
            "proj.weight:1*4",
            "query.bias:0*4 key.bias:0*4 value.bias:0*4",
            kind="head",
            mixed=True,  # it gives the mean over the heads' weights too
        ),
    )
    TIED = (frozenset({"embed", "query"}),)
    MACS = PLACES * (6 * 12 + 4 * 12 * 12 + 12 * 4) + 2 * PLACES * PLACES * 12

    def __init__(self) -> None:
        super().__init__()
        self.width, self.heads = 12, 3
        self.embed, self.proj, self.read = nn.Linear(6, 12), nn.Linear(12, 12), nn.Linear(12, 4)
        self.query, self.key, self.value = nn.Linear(12, 12), nn.Linear(12, 12), nn.Linear(12, 12)

    def forward(self, x: Tensor) -> Tensor:
        stream = self.embed(x).transpose(0, 1)
        mixed, _ = F.multi_head_attention_forward(
            stream,
            stream,
            stream,
            self.width,
            self.heads,
            torch.empty(0),
            torch.cat([self.query.bias, self.key.bias, self.value.bias]),
            None,
            None,
            False,
            0.0,
            self.proj.weight,
            self.proj.bias,
            self.training,
            use_separate_proj_weight=True,
            q_proj_weight=self.query.weight,
            k_proj_weight=self.key.weight,
            v_proj_weight=self.value.weight,
        )
        return self.read((stream + mixed).transpose(0, 1))


class CopiesForEachHead(Toy):
    """What all heads share is shown once a head: as many copies as heads, none of them a head's own."""

    PIXELS = (PLACES, 6)
    GROUPS = (
        units(
            "query",
            3,
            "query.weight:0*4 key.weight:0*4",
            "",
            "query.bias:0*4 key.bias:0*4",
            kind="head",
            mixed=True,
        ),
        units(
            "query#2",
            4,
            "query.weight:0*3 key.weight:0*3",
            "",
            "query.bias:0*3 key.bias:0*3",
            kind="head_dim",
        ),
    )
    MACS = PLACES * (2 * 6 * 12 + 6 * 4) + PLACES * PLACES * (12 + 6)

    def __init__(self) -> None:
        super().__init__()
        self.heads = 3
        self.query, self.key, self.read = nn.Linear(6, 12), nn.Linear(6, 12), nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        query, key = (
            layer(x).view(*x.shape[:2], self.heads, -1).transpose(1, 2) for layer in (self.query, self.key)
        )
        weights = (query @ key.mT * 0.5).softmax(-1).mean(1)
        copies = weights[:, None].expand(-1, self.heads, -1, -1)
        assert copies.shape[1] == self.heads
        return self.read(weights @ x)


class MultipliersInARow(Toy):
    """Each channel becomes two, and each of these two again; a residual sum then meets all three in one."""

    PIXELS = (3, 8, 8)
    GROUPS = (
        units(
            "stem",
            4,
            "stem.weight:0 two.weight:0*2 four.weight:0*4",
            "head.fc.weight:1*4",
            "stem.bias:0 two.bias:0*2 four.bias:0*4 deep.weight:0*4 deep.bias:0*4",
        ),
        units(
            "two",
            2,
            "two.weight:0*4 four.weight:0*8",
            "head.fc.weight:1*8",
            "two.bias:0*4 four.bias:0*8 deep.weight:0*8 deep.bias:0*8",
        ),
        units(
            "four",
            2,
            "four.weight:0*8",
            "head.fc.weight:1*8",
            "four.bias:0*8 deep.weight:0*8 deep.bias:0*8",
        ),
    )
    MACS = 64 * (4 * 3 * 9 + 8 * 9 + 16 * 9 + 16 * 9) + 16 * 4

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.two, self.four = conv(3, 4), conv(4, 8, groups=4), conv(8, 16, groups=8)
        self.deep, self.head = conv(16, 16, groups=16), Head(16)

    def forward(self, x: Tensor) -> Tensor:
        x = self.four(F.relu(self.two(F.relu(self.stem(x)))))
        return self.head(x + self.deep(x))


class ComplexWeights(Toy):
    """A layer of a Fourier neural operator: complex weights mix the channels of each low frequency."""

    PIXELS = (12, 3)
    GROUPS = (
        units("lift", 6, "lift.weight:0", "modes:0", "lift.bias:0", kind="neuron"),
        units("modes", 7, "modes:1", "read.weight:1"),
    )
    LOCKED: ClassVar = {"modes:2": "fixed size"}
    MACS = 12 * (3 * 6 + 7 * 4) + 4 * 6 * 7

    def __init__(self) -> None:
        super().__init__()
        self.lift, self.read = nn.Linear(3, 6), nn.Linear(7, 4)
        self.modes = nn.Parameter(0.3 * torch.randn(6, 7, 4, dtype=torch.cfloat))

    def forward(self, x: Tensor) -> Tensor:
        frequencies = torch.fft.rfft(self.lift(x), dim=1)[:, :4].transpose(0, 1)  # (4, B, 6)
        mixed = (frequencies @ self.modes.permute(2, 0, 1)).transpose(0, 1)  # (B, 4, 7)
        return self.read(torch.fft.irfft(mixed, n=x.shape[1], dim=1))
