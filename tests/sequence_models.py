"""Toy networks on sequences: attention in the ways that it is written, and what stands around it.

Unless a toy says otherwise a sample has five positions of six features.
"""

from __future__ import annotations

from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from toy import Toy, units

PLACES = 5


class AttentionWrittenOut(Toy):
    """One layer makes queries, keys and values; ``C // self.heads`` ties the stream to the heads."""

    PIXELS = (PLACES, 6)
    GROUPS = (
        units(
            "embed",
            12,
            "embed.weight:0 proj.weight:0",
            "qkv.weight:1 read.weight:1",
            "embed.bias:0 proj.bias:0",
            kind="neuron",
        ),
        units("qkv", 3, "qkv.weight:0*12", "proj.weight:1*4", "qkv.bias:0*12", kind="head"),
        units("qkv#2", 4, "qkv.weight:0*9", "proj.weight:1*3", "qkv.bias:0*9", kind="head_dim"),
    )
    TIED = (frozenset({"embed", "qkv", "qkv#2"}),)
    MACS = PLACES * (6 * 12 + 12 * 36 + 12 * 12 + 12 * 4) + 2 * PLACES * PLACES * 12

    def __init__(self) -> None:
        super().__init__()
        self.heads = 3
        self.embed, self.qkv, self.proj = nn.Linear(6, 12), nn.Linear(12, 36), nn.Linear(12, 12)
        self.read = nn.Linear(12, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        batch, places, width = x.shape
        qkv = self.qkv(x).reshape(batch, places, 3, self.heads, width // self.heads)
        query, key, value = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        weights = (query @ key.transpose(-2, -1) * 0.5).softmax(-1)
        return self.read(x + self.proj((weights @ value).transpose(1, 2).reshape(batch, places, width)))


class StackedExperts(Toy):
    """Experts whose weights are stacked, all asked: one leaves with its output of the router."""

    PIXELS = (5,)
    GROUPS = (
        units(
            "router",
            6,
            "router.weight:0",
            "",
            "router.bias:0 up:0 down:0",
            kind="branch",
            mixed=True,
        ),
        units("embed", 8, "embed.weight:0", "router.weight:1 up:1", "embed.bias:0", kind="neuron"),
        units("up", 7, "up:2", "down:1"),
        units("down", 9, "down:2", "read.weight:1"),
    )
    MACS = 5 * 8 + 8 * 6 + 6 * (8 * 7 + 7 * 9) + 6 * 9 + 9 * 4

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.router, self.read = nn.Linear(5, 8), nn.Linear(8, 6), nn.Linear(9, 4)
        self.up, self.down = nn.Parameter(torch.randn(6, 8, 7)), nn.Parameter(torch.randn(6, 7, 9))

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        shares = self.router(x).softmax(-1)
        experts = torch.relu(x.expand(self.up.shape[0], *x.shape) @ self.up) @ self.down
        return self.read((shares[:, None] @ experts.transpose(0, 1)).squeeze(1))


class BranchesInAList(Toy):
    """A learned mixture of modules in a list: Python's own loop makes the branches, so their number stays."""

    PIXELS = (5,)
    GROUPS = (
        units(
            "branches.0",
            8,
            "branches.0.weight:0 branches.1.weight:0 branches.2.weight:0",
            "read.weight:1",
            "branches.0.bias:0 branches.1.bias:0 branches.2.bias:0",
            kind="neuron",
        ),
    )
    LOCKED: ClassVar = {"shares:0": "one by one, as for a list of modules"}
    LOCKED_AT = "torch.stack("
    MACS = 3 * 5 * 8 + 8 * 4

    def __init__(self) -> None:
        super().__init__()
        self.branches = nn.ModuleList([nn.Linear(5, 8) for _ in range(3)])
        self.shares, self.read = nn.Parameter(torch.zeros(3)), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        made = torch.stack([torch.relu(branch(x)) for branch in self.branches])  # (3, B, 8)
        return self.read((self.shares.softmax(0)[:, None, None] * made).sum(0))


class AsManyHeadsAsPairs(Toy):
    """Four heads of four rotated pairs and eight values: heads leave alone, pairs and values together."""

    PIXELS = (PLACES, 6)
    GROUPS = (
        units("query", 4, "query.weight:0*8 key.weight:0*8 value.weight:0*8", "out.weight:1*8", kind="head"),
        units("query#2", 4, "query.weight:0*8 key.weight:0*8", "", "", kind="head_dim"),
        units("value", 8, "value.weight:0*4", "out.weight:1*4", kind="neuron"),
    )
    TIED = (frozenset({"query#2", "value"}),)
    MACS = PLACES * (3 * 6 * 32 + 32 * 4) + 2 * PLACES * PLACES * 32

    def __init__(self) -> None:
        super().__init__()
        self.size = 8
        self.query, self.key, self.value = (nn.Linear(6, 32, bias=False) for _ in range(3))
        self.out = nn.Linear(32, 4)

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = (
            layer(x).view(*x.shape[:2], -1, self.size).transpose(1, 2)
            for layer in (self.query, self.key, self.value)
        )
        scores = self.rotated(query) @ self.rotated(key).transpose(-2, -1)
        return self.out((scores * 0.3).softmax(-1).matmul(value).transpose(1, 2).flatten(2))

    @staticmethod
    def rotated(x: Tensor) -> Tensor:
        first, second = x.chunk(2, -1)
        return x * 0.8 + torch.cat([-second, first], -1) * 0.6


class MultiQueryAttention(Toy):
    """All heads share one key and one value: a head takes its queries alone with it."""

    PIXELS = (PLACES, 6)
    GROUPS = (
        units("query", 3, "query.weight:0*4", "out.weight:1*4", "query.bias:0*4", kind="head"),
        units(
            "query#2",
            4,
            "query.weight:0*3 key.weight:0",
            "",
            "query.bias:0*3 key.bias:0",
            kind="head_dim",
        ),
        units("value", 4, "value.weight:0", "out.weight:1*3", "value.bias:0", kind="neuron"),
    )
    MACS = PLACES * 6 * (12 + 4 + 4) + 2 * PLACES * PLACES * 12 + PLACES * 12 * 4

    def __init__(self) -> None:
        super().__init__()
        self.heads = 3
        self.query, self.key, self.value = nn.Linear(6, 12), nn.Linear(6, 4), nn.Linear(6, 4)
        self.out = nn.Linear(12, 4)

    def forward(self, x: Tensor) -> Tensor:
        query = self.query(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        key, value = self.key(x).unsqueeze(1), self.value(x).unsqueeze(1)
        weights = (query @ key.mT * 0.5).softmax(-1)
        return self.out((weights @ value).transpose(1, 2).flatten(2))


class RelativePositionBias(Toy):
    """A table with a column for each head is looked up by distance and added to the scores."""

    PIXELS = (PLACES, 6)
    GROUPS = (
        units(
            "qkv",
            3,
            "qkv.weight:0*12",
            "out.weight:1*4",
            "qkv.bias:0*12 table:1",
            kind="head",
        ),
        units("qkv#2", 4, "qkv.weight:0*9", "out.weight:1*3", "qkv.bias:0*9", kind="head_dim"),
    )
    MACS = PLACES * 6 * 36 + 2 * PLACES * PLACES * 12 + PLACES * 12 * 4

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(6, 36), nn.Linear(12, 4)
        self.heads = 3
        self.table = nn.Parameter(torch.randn(2 * PLACES - 1, 3))
        places = torch.arange(PLACES)
        self.register_buffer("distances", places[:, None] - places + PLACES - 1)

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        bias = self.table[self.distances.view(-1)].view(PLACES, PLACES, -1).permute(2, 0, 1)
        weights = (query @ key.mT * 0.5 + bias).softmax(-1)
        return self.out((weights @ value).transpose(1, 2).flatten(2))


class ShiftedWindows(Toy):
    """Attention in windows of 2x2 of an image that is rolled before and rolled back after."""

    PIXELS = (3, 4, 4)
    GROUPS = (
        units(
            "embed",
            8,
            "embed.weight:0 proj.weight:0",
            "qkv.weight:1 read.weight:1",
            "embed.bias:0 proj.bias:0",
        ),
        units("qkv", 2, "qkv.weight:0*12", "proj.weight:1*4", "qkv.bias:0*12", kind="head"),
        units("qkv#2", 4, "qkv.weight:0*6", "proj.weight:1*2", "qkv.bias:0*6", kind="head_dim"),
    )
    TIED = (frozenset({"embed", "qkv", "qkv#2"}),)
    MACS = 16 * (3 * 8 + 8 * 24 + 8 * 8 + 8 * 4) + 4 * 2 * 4 * 4 * 8

    def __init__(self) -> None:
        super().__init__()
        self.heads, self.window = 2, 2
        self.embed, self.qkv, self.proj = nn.Conv2d(3, 8, 1), nn.Linear(8, 24), nn.Linear(8, 8)
        self.read = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x).permute(0, 2, 3, 1)
        batch, height, width, channels = x.shape
        side = self.window
        rolled = torch.roll(x, (-1, -1), (1, 2))
        windows = rolled.view(batch, height // side, side, width // side, side, channels)
        windows = windows.permute(0, 1, 3, 2, 4, 5).reshape(-1, side * side, channels)
        qkv = self.qkv(windows).reshape(len(windows), -1, 3, self.heads, channels // self.heads)
        query, key, value = qkv.permute(2, 0, 3, 1, 4)
        mixed = (query * 0.5 @ key.mT).softmax(-1) @ value
        mixed = self.proj(mixed.transpose(1, 2).reshape(len(windows), -1, channels))
        mixed = mixed.view(batch, height // side, width // side, side, side, channels)
        mixed = mixed.permute(0, 1, 3, 2, 4, 5).reshape(batch, height, width, channels)
        return self.read(x + torch.roll(mixed, (1, 1), (1, 2)))


class GatedLinearUnit(Toy):
    """``glu`` halves its input: a neuron leaves with its gate."""

    PIXELS = (6,)
    GROUPS = (units("up", 7, "up.weight:0*2", "down.weight:1", "up.bias:0*2", kind="neuron"),)
    MACS = 6 * 14 + 7 * 4

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(6, 14), nn.Linear(7, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.glu(self.up(x)))


class LayerScale(Toy):
    """Each channel of a branch is scaled by a number of its own before it joins the stream."""

    PIXELS = (PLACES, 6)
    GROUPS = (
        units(
            "embed",
            8,
            "embed.weight:0 down.weight:0",
            "up.weight:1 read.weight:1",
            "embed.bias:0 down.bias:0 gamma:0",
            kind="neuron",
        ),
        units("up", 10, "up.weight:0", "down.weight:1", "up.bias:0", kind="neuron"),
    )
    MACS = PLACES * (6 * 8 + 8 * 10 + 10 * 8 + 8 * 4)

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.up, self.down = nn.Linear(6, 8), nn.Linear(8, 10), nn.Linear(10, 8)
        self.gamma, self.read = nn.Parameter(torch.rand(8) + 0.5), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        return self.read(x + self.gamma * self.down(F.gelu(self.up(x))))


class ClassToken(Toy):
    """A learned token is put before the patches, learned positions are added, and only the token is read."""

    PIXELS = (3, 8, 8)
    GROUPS = (
        units(
            "patches",
            12,
            "patches.weight:0 down.weight:0",
            "mix.weight:1 head.weight:1",
            "patches.bias:0 token:2 positions:2 down.bias:0",
        ),
        units("mix", 10, "mix.weight:0", "down.weight:1", "mix.bias:0", kind="neuron"),
    )
    MACS = 4 * 12 * 3 * 16 + 5 * 2 * 12 * 10 + 12 * 4

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 12, 4, stride=4)
        self.token = nn.Parameter(torch.randn(1, 1, 12))
        self.positions = nn.Parameter(torch.randn(1, 5, 12))
        self.mix, self.down, self.head = nn.Linear(12, 10), nn.Linear(10, 12), nn.Linear(12, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(x.shape[0], -1, -1), x], 1) + self.positions
        return self.head((x + self.down(F.gelu(self.mix(x))))[:, 0])


class EmbeddingThenMean(Toy):
    """The mean over words leaves the columns of the table apart."""

    GROUPS = (units("embed", 6, "embed.weight:1", "head.weight:1", kind="embedding"),)
    LOCKED: ClassVar = {"embed.weight:0": "looked up"}
    MACS = 6 * 4

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(11, 6), nn.Linear(6, 4)

    def example(self, batch: int = 2) -> Tensor:
        return torch.randint(11, (batch, PLACES))

    def forward(self, words: Tensor) -> Tensor:
        return self.head(self.embed(words).mean(1))


class Gpt2Conv1d(Toy):
    """GPT-2's layer states its width in an attribute and flattens all positions into rows."""

    PIXELS = (PLACES, 6)
    GROUPS = (units("up", 8, "up.weight:1", "down.weight:0", "up.bias:0", kind="neuron"),)
    MACS = PLACES * (6 * 8 + 8 * 4)

    class Layer(nn.Module):
        def __init__(self, outputs: int, inputs: int) -> None:
            super().__init__()
            self.nf = outputs
            self.weight = nn.Parameter(torch.randn(inputs, outputs))
            self.bias = nn.Parameter(torch.zeros(outputs))

        def forward(self, x: Tensor) -> Tensor:
            shape = (*x.size()[:-1], self.nf)
            return torch.addmm(self.bias, x.view(-1, x.size(-1)), self.weight).view(shape)

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = self.Layer(8, 6), self.Layer(4, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.gelu(self.up(x)))


class LstmBetweenLinears(Toy):
    """A hidden unit of an LSTM owns four rows of two matrices and a column of one."""

    PIXELS = (PLACES, 6)
    GROUPS = (
        units("embed", 8, "embed.weight:0", "lstm.weight_ih_l0:1", "embed.bias:0", kind="neuron"),
        units(
            "lstm.weight_ih_l0",
            7,
            "lstm.weight_ih_l0:0*4 lstm.weight_hh_l0:0*4",
            "lstm.weight_hh_l0:1 read.weight:1",
            "lstm.bias_ih_l0:0*4 lstm.bias_hh_l0:0*4",
            kind="neuron",
        ),
    )
    MACS = PLACES * (6 * 8 + 4 * 7 * (8 + 7) + 7 * 4)

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.lstm, self.read = nn.Linear(6, 8), nn.LSTM(8, 7, batch_first=True), nn.Linear(7, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.read(self.lstm(F.relu(self.embed(x)))[0])
