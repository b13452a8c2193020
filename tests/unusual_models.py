"""Toy networks of designs that are seldom seen, with the answer written by hand.

Unless a toy says otherwise a sample has five positions of six features.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from toy import Toy, units

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
