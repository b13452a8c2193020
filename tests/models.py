"""Toy networks named after the trap that each one sets, with the answer written by hand.

Each toy states its groups (`units`), some of its locked dimensions with words of the reason, and its
multiply-accumulates for one sample. Images are 8x8 with three channels unless a toy says otherwise.
"""

from __future__ import annotations

from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import library_models
import more_models
import sequence_models
import unusual_models
from toy import PIXELS, Head, Toy, conv, units


class PlainVgg(Toy):
    """Nothing unusual: convolution, norm, ReLU, pooling, flatten, linear."""

    GROUPS = (
        units("conv1", 8, "conv1.weight:0", "conv2.weight:1", "conv1.bias:0 bn1:norm"),
        units("conv2", 12, "conv2.weight:0", "fc1.weight:1*4", "conv2.bias:0"),
        units("fc1", 10, "fc1.weight:0", "fc2.weight:1", "fc1.bias:0", kind="neuron"),
    )
    LOCKED: ClassVar = {"conv1.weight:1": "fixed size", "fc2.weight:0": "output"}
    MACS = 64 * 8 * 3 * 9 + 16 * 12 * 8 * 9 + 48 * 10 + 10 * 4

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1, self.conv2 = conv(3, 8), nn.BatchNorm2d(8), conv(8, 12)
        self.fc1, self.fc2 = nn.Linear(48, 10), nn.Linear(10, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(F.relu(self.bn1(self.conv1(x))), 2)
        x = F.max_pool2d(F.relu(self.conv2(x)), 2)
        return self.fc2(F.relu(self.fc1(x.flatten(1))))


class SharedConv(Toy):
    """One convolution applied to its own output, so that its filters and its input planes are one group."""

    GROUPS = (
        units(
            "stem",
            8,
            "stem.weight:0 shared.weight:0",
            "shared.weight:1 head.fc.weight:1",
            "stem.bias:0 shared.bias:0",
        ),
    )
    MACS = PIXELS * (8 * 3 * 9 + 2 * 8 * 8 * 9) + 8 * 4

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.shared, self.head = conv(3, 8), conv(8, 8), Head(8)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x))
        return self.head(F.relu(self.shared(F.relu(self.shared(x)))))


class ConcatThenAdd(Toy):
    """A convolution added to two others side by side: its filters fall into two groups."""

    GROUPS = (
        units("a", 4, "a.weight:0 both.weight:0", "head.fc.weight:1", "a.bias:0 both.bias:0"),
        units("b", 6, "b.weight:0 both.weight:0", "head.fc.weight:1", "b.bias:0 both.bias:0"),
    )
    MACS = PIXELS * 20 * 3 * 9 + 10 * 4

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.both, self.head = conv(3, 4), conv(3, 6), conv(3, 10), Head(10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.relu(torch.cat([self.a(x), self.b(x)], 1) + self.both(x)))


class FlattenHead(Toy):
    """A linear layer after a flatten reads 49 columns of each channel."""

    PIXELS = (3, 7, 7)
    GROUPS = (units("conv", 6, "conv.weight:0", "fc.weight:1*49", "conv.bias:0"),)
    MACS = 49 * 6 * 3 * 9 + 6 * 49 * 4

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.fc = conv(3, 6), nn.Linear(6 * 49, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(torch.flatten(F.relu(self.conv(x)), 1))


class TiedWeights(Toy):
    """The embedding is the head's weight too: its columns both make and read the same units."""

    GROUPS = (
        units("embed", 6, "embed.weight:1 down.weight:0", "up.weight:1", "down.bias:0", kind="embedding"),
        units("up", 8, "up.weight:0", "down.weight:1", "up.bias:0", kind="neuron"),
    )
    LOCKED: ClassVar = {"embed.weight:0": "looked up"}
    MACS = 5 * (6 * 8 + 8 * 6 + 6 * 11)

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.up, self.down = nn.Embedding(11, 6), nn.Linear(6, 8), nn.Linear(8, 6)
        self.head = nn.Linear(6, 11, bias=False)
        self.head.weight = self.embed.weight

    def example(self, batch: int = 2) -> Tensor:
        return torch.randint(11, (batch, 5))

    def forward(self, words: Tensor) -> Tensor:
        return self.head(self.down(F.relu(self.up(self.embed(words)))))


class HardCodedView(Toy):
    """A literal size in `forward` becomes an attribute, and what it touches can be cut."""

    PIXELS = (10,)
    GROUPS = (
        units("fc", 6, "fc.weight:0*49", "conv.weight:1", "fc.bias:0*49", kind="neuron"),
        units("conv", 8, "conv.weight:0", "head.fc.weight:1", "conv.bias:0"),
    )
    MACS = 10 * 294 + 49 * 8 * 6 * 9 + 8 * 4

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.conv, self.head = nn.Linear(10, 6 * 49), conv(6, 8), Head(8)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.fc(x)).view(-1, 6, 7, 7)
        return self.head(F.relu(self.conv(x)))


def as_maps(x: Tensor) -> Tensor:
    """Six maps of 7 x 7 pixels."""
    return x.view(-1, 6, 7, 7)


class HardCodedFunction(Toy):
    """A literal size in a function outside cannot shrink: it locks what it touches, not what is beside it."""

    PIXELS = (10,)
    GROUPS = (units("conv", 8, "conv.weight:0", "head.fc.weight:1", "conv.bias:0"),)
    LOCKED: ClassVar = {"fc.weight:0": "fixed length 6", "conv.weight:1": "fixed length 6"}
    MACS = 10 * 294 + 49 * 8 * 6 * 9 + 8 * 4

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.conv, self.head = nn.Linear(10, 6 * 49), conv(6, 8), Head(8)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.relu(self.conv(as_maps(F.relu(self.fc(x))))))


class ChunkToTwoConvs(Toy):
    """Halves that go different ways stay equally long: they lose the same places."""

    GROUPS = (
        units("wide", 6, "wide.weight:0*2", "left.weight:1 right.weight:1", "wide.bias:0*2"),
        units("left", 4, "left.weight:0", "head.fc.weight:1", "left.bias:0"),
        units("right", 5, "right.weight:0", "head.fc.weight:1", "right.bias:0"),
    )
    MACS = PIXELS * (12 * 3 * 9 + 4 * 6 * 9 + 5 * 6 * 9) + 9 * 4

    def __init__(self) -> None:
        super().__init__()
        self.wide, self.left, self.right, self.head = conv(3, 12), conv(6, 4), conv(6, 5), Head(9)

    def forward(self, x: Tensor) -> Tensor:
        a, b = F.relu(self.wide(x)).chunk(2, 1)
        return self.head(F.relu(torch.cat([self.left(a), self.right(b)], 1)))


class UnequalSplit(Toy):
    """Pieces of different lengths are groups of their own; the lengths are attributes and follow."""

    GROUPS = (
        units("wide", 4, "wide.weight:0", "left.weight:1", "wide.bias:0"),
        units("wide#2", 8, "wide.weight:0", "right.weight:1", "wide.bias:0"),
        units("left", 5, "left.weight:0 right.weight:0", "head.fc.weight:1", "left.bias:0 right.bias:0"),
    )
    MACS = PIXELS * (12 * 3 * 9 + 5 * 12 * 9) + 5 * 4

    def __init__(self) -> None:
        super().__init__()
        self.wide, self.left, self.right, self.head = conv(3, 12), conv(4, 5), conv(8, 5), Head(5)
        self.sizes = [4, 8]

    def forward(self, x: Tensor) -> Tensor:
        a, b = F.relu(self.wide(x)).split(self.sizes, 1)
        return self.head(F.relu(self.left(a) + self.right(b)))


class GroupedConv(Toy):
    """With 4 groups of 2 -> 3 channels: whole groups, places within a group going in, and coming out."""

    GROUPS = (
        units(
            "stem",
            4,
            "stem.weight:0*2 grouped.weight:0*3",
            "head.fc.weight:1*3",
            "stem.bias:0*2 grouped.bias:0*3",
            kind="conv_group",
        ),
        units("stem#2", 2, "stem.weight:0*4", "grouped.weight:1", "stem.bias:0*4"),
        units("grouped", 3, "grouped.weight:0*4", "head.fc.weight:1*4", "grouped.bias:0*4"),
    )
    MACS = PIXELS * (8 * 3 * 9 + 12 * 2 * 9) + 12 * 4

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.grouped, self.head = conv(3, 8), conv(8, 12, groups=4), Head(12)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.relu(self.grouped(F.relu(self.stem(x)))))


class DepthwiseConv(Toy):
    """A depthwise filter only carries its channel; `groups` follows."""

    GROUPS = (
        units("stem", 8, "stem.weight:0", "point.weight:1", "stem.bias:0 bn1:norm depth.weight:0 bn2:norm"),
        units("point", 6, "point.weight:0", "head.fc.weight:1"),
    )
    MACS = PIXELS * (8 * 3 * 9 + 8 * 9 + 6 * 8) + 6 * 4

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.bn1 = conv(3, 8), nn.BatchNorm2d(8)
        self.depth, self.bn2 = conv(8, 8, groups=8, bias=False), nn.BatchNorm2d(8)
        self.point, self.head = conv(8, 6, 1, bias=False), Head(6)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu6(self.bn1(self.stem(x)))
        return self.head(F.hardswish(self.point(F.relu6(self.bn2(self.depth(x))))))


class ChannelShuffle(Toy):
    """Channel ``(half, i)`` becomes ``(i, half)`` by views with literal halves: half goes as a whole."""

    GROUPS = (
        units("stem", 6, "stem.weight:0*2", "mix.weight:1*2", "stem.bias:0*2"),
        units("mix", 5, "mix.weight:0", "head.fc.weight:1", "mix.bias:0"),
    )
    MACS = PIXELS * (12 * 3 * 9 + 5 * 12 * 9) + 5 * 4

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.mix, self.head = conv(3, 12), conv(12, 5), Head(5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x))
        batch, channels, height, width = x.shape
        x = x.view(batch, 2, channels // 2, height, width).transpose(1, 2).reshape(batch, -1, height, width)
        return self.head(F.relu(self.mix(x)))


class LearnedScale(Toy):
    """A broadcast product with a raw parameter of shape (1, C, 1, 1)."""

    GROUPS = (units("conv", 8, "conv.weight:0", "head.fc.weight:1", "conv.bias:0 scale:1"),)
    MACS = PIXELS * 8 * 3 * 9 + 8 * 4

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.head = conv(3, 8), Head(8)
        self.scale = nn.Parameter(torch.rand(1, 8, 1, 1) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.relu(self.conv(x) * self.scale))


class PixelShuffle(Toy):
    """Four channels become the four pixels of one: they go together."""

    GROUPS = (
        units("wide", 3, "wide.weight:0*4", "last.weight:1", "wide.bias:0*4"),
        units("last", 5, "last.weight:0", "head.fc.weight:1", "last.bias:0"),
    )
    MACS = PIXELS * 12 * 3 * 9 + 256 * 5 * 3 * 9 + 5 * 4

    def __init__(self) -> None:
        super().__init__()
        self.wide, self.shuffle, self.last, self.head = conv(3, 12), nn.PixelShuffle(2), conv(3, 5), Head(5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.relu(self.last(self.shuffle(F.relu(self.wide(x))))))


class PixelUnshuffle(Toy):
    """One channel becomes four: the reader loses four planes."""

    GROUPS = (
        units("first", 4, "first.weight:0", "last.weight:1*4", "first.bias:0"),
        units("last", 5, "last.weight:0", "head.fc.weight:1", "last.bias:0"),
    )
    MACS = PIXELS * 4 * 3 * 9 + 16 * 5 * 16 * 9 + 5 * 4

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last, self.head = conv(3, 4), conv(16, 5), Head(5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.relu(self.last(F.pixel_unshuffle(F.relu(self.first(x)), 2))))


class OneChannel(Toy):
    """A convolution with one filter has nothing to give."""

    GROUPS = (units("second", 8, "second.weight:0", "head.fc.weight:1", "second.bias:0"),)
    MACS = PIXELS * (3 * 9 + 8 * 9) + 8 * 4

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.head = conv(3, 1), conv(1, 8), Head(8)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.relu(self.second(F.relu(self.first(x)))))


class TwelveChannels(Toy):
    """Twelve channels, of which half is no multiple of eight."""

    GROUPS = (
        units("first", 12, "first.weight:0", "second.weight:1", "first.bias:0"),
        units("second", 24, "second.weight:0", "head.fc.weight:1", "second.bias:0"),
    )
    MACS = PIXELS * (12 * 3 * 9 + 24 * 12 * 9) + 24 * 4

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.head = conv(3, 12), conv(12, 24), Head(24)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.relu(self.second(F.relu(self.first(x)))))


class BlockCalledThreeTimes(Toy):
    """The same residual block three times over: its cost counts three times, its weights once."""

    GROUPS = (
        units(
            "stem",
            8,
            "stem.weight:0 block.1.weight:0",
            "block.0.weight:1 head.fc.weight:1",
            "stem.bias:0 block.1.bias:0",
        ),
        units("block.0", 6, "block.0.weight:0", "block.1.weight:1", "block.0.bias:0"),
    )
    MACS = PIXELS * (8 * 3 * 9 + 3 * (6 * 8 * 9 + 8 * 6 * 9)) + 8 * 4

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.block, self.head = conv(3, 8), nn.ModuleList([conv(8, 6), conv(6, 8)]), Head(8)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x))
        for _ in range(3):
            x = F.relu(x + self.block[1](F.relu(self.block[0](x))))
        return self.head(x)


class TwoInputs(Toy):
    """Two positional inputs that meet in a sum."""

    GROUPS = (units("a", 8, "a.weight:0 b.weight:0", "head.fc.weight:1", "a.bias:0 b.bias:0"),)
    MACS = PIXELS * 8 * 4 * 9 + 8 * 4

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.head = conv(3, 8), conv(1, 8), Head(8)

    def example(self, batch: int = 2) -> tuple[Tensor, Tensor]:
        return torch.randn(batch, 3, 8, 8), torch.randn(batch, 1, 8, 8)

    def forward(self, image: Tensor, depth: Tensor) -> Tensor:
        return self.head(F.relu(self.a(image) + self.b(depth)))


class DictInputs(Toy):
    """Keyword inputs, a dictionary of outputs."""

    GROUPS = (units("conv", 8, "conv.weight:0", "head.fc.weight:1", "conv.bias:0"),)
    MACS = PIXELS * 8 * 3 * 9 + 8 * 4

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.head = conv(3, 8), Head(8)

    def example(self, batch: int = 2) -> dict[str, Tensor]:
        return {"image": torch.randn(batch, 3, 8, 8), "mask": torch.rand(batch, 1, 8, 8)}

    def forward(self, *, image: Tensor, mask: Tensor) -> dict[str, Tensor]:
        return {"classes": self.head(F.relu(self.conv(image)) * mask), "coverage": mask.mean((1, 2, 3))}


class SqueezeExcite(Toy):
    """Channels scaled by numbers that were computed from all of them."""

    GROUPS = (
        units(
            "stem",
            8,
            "stem.weight:0 expand.weight:0",
            "squeeze.weight:1 head.fc.weight:1",
            "stem.bias:0 expand.bias:0",
        ),
        units("squeeze", 4, "squeeze.weight:0", "expand.weight:1", "squeeze.bias:0"),
    )
    MACS = PIXELS * 8 * 3 * 9 + 8 * 4 + 4 * 8 + 8 * 4

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.squeeze, self.expand, self.head = conv(3, 8), conv(8, 4, 1), conv(4, 8, 1), Head(8)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x))
        scale = self.expand(F.relu(self.squeeze(F.adaptive_avg_pool2d(x, 1))))
        return self.head(x * torch.sigmoid(scale))


class InstanceNormRunning(Toy):
    """Instance norm folds the batch into the channels; its running statistics are per channel."""

    GROUPS = (units("conv", 8, "conv.weight:0", "head.fc.weight:1", "conv.bias:0 norm:norm"),)
    MACS = PIXELS * 8 * 3 * 9 + 8 * 4

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.head = conv(3, 8), Head(8)
        self.norm = nn.InstanceNorm2d(8, affine=True, track_running_stats=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.relu(self.norm(self.conv(x))))


class InstanceNormPlain(Toy):
    """Instance norm without statistics of its own computes them from each image, in any mode."""

    GROUPS = (units("conv", 8, "conv.weight:0", "head.fc.weight:1", "conv.bias:0"),)
    MACS = PIXELS * 8 * 3 * 9 + 8 * 4

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.head = conv(3, 8), nn.InstanceNorm2d(8), Head(8)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.relu(self.norm(self.conv(x)) + x.mean()))


class GroupNormNet(Toy):
    """Three norm groups of four channels: whole norm groups go exactly, places within them are mixed."""

    GROUPS = (
        units(
            "conv",
            3,
            "conv.weight:0*4",
            "head.fc.weight:1*4",
            "conv.bias:0*4 norm.weight:0*4 norm.bias:0*4",
        ),
        units(
            "conv#2",
            4,
            "conv.weight:0*3",
            "head.fc.weight:1*3",
            "conv.bias:0*3 norm.weight:0*3 norm.bias:0*3",
            mixed=True,
        ),
    )
    MACS = PIXELS * 12 * 3 * 9 + 12 * 4

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.head = conv(3, 12), nn.GroupNorm(3, 12), Head(12)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.relu(self.norm(self.conv(x))))


class LayerNormNet(Toy):
    """Layer norm computes across its units; `normalized_shape` follows."""

    PIXELS = (5, 6)
    GROUPS = (
        units(
            "first",
            10,
            "first.weight:0",
            "second.weight:1",
            "first.bias:0 norm.weight:0 norm.bias:0",
            kind="neuron",
            mixed=True,
        ),
        units("second", 8, "second.weight:0", "last.weight:1", "second.bias:0", kind="neuron"),
    )
    MACS = 5 * (6 * 10 + 10 * 8 + 8 * 4)

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = nn.Linear(6, 10), nn.LayerNorm(10)
        self.second, self.last = nn.Linear(10, 8), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(F.gelu(self.second(self.norm(self.first(x)))))


class TransposedConv(Toy):
    """A transposed convolution keeps its filters in dimension 1."""

    GROUPS = (
        units("down", 8, "down.weight:0", "up.weight:0", "down.bias:0"),
        units("up", 6, "up.weight:1", "head.fc.weight:1", "up.bias:0"),
    )
    MACS = 16 * 8 * 3 * 9 + 16 * 8 * 6 * 4 + 6 * 4

    def __init__(self) -> None:
        super().__init__()
        self.down = nn.Conv2d(3, 8, 3, stride=2, padding=1)
        self.up, self.head = nn.ConvTranspose2d(8, 6, 2, stride=2), Head(6)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.relu(self.up(F.relu(self.down(x)))))


class DenseBlock(Toy):
    """Every layer reads all that came before it."""

    GROUPS = (
        units(
            "stem",
            6,
            "stem.weight:0",
            "first.weight:1 second.weight:1 head.fc.weight:1",
            "norm1:norm norm2:norm",
        ),
        units("first", 4, "first.weight:0", "second.weight:1 head.fc.weight:1", "norm2:norm"),
        units("second", 5, "second.weight:0", "head.fc.weight:1"),
    )
    MACS = PIXELS * 9 * (6 * 3 + 4 * 6 + 5 * 10) + 15 * 4

    def __init__(self) -> None:
        super().__init__()
        self.stem = conv(3, 6, bias=False)
        self.norm1, self.first = nn.BatchNorm2d(6), conv(6, 4, bias=False)
        self.norm2, self.second = nn.BatchNorm2d(10), conv(10, 5, bias=False)
        self.head = Head(15)

    def forward(self, x: Tensor) -> Tensor:
        features = [self.stem(x)]
        for norm, layer in ((self.norm1, self.first), (self.norm2, self.second)):
            features.append(layer(F.relu(norm(torch.cat(features, 1)))))
        return self.head(torch.cat(features, 1))


class ResidualStream(Toy):
    """Two residual blocks: one group along the stream, one inside each block."""

    GROUPS = (
        units(
            "stem",
            8,
            "stem.weight:0 blocks.0.out.weight:0 blocks.1.out.weight:0",
            "blocks.0.into.weight:1 blocks.1.into.weight:1 head.fc.weight:1",
            "bn:norm blocks.0.out.bias:0 blocks.1.out.bias:0",
        ),
        units("blocks.0.into", 6, "blocks.0.into.weight:0", "blocks.0.out.weight:1", "blocks.0.into.bias:0"),
        units("blocks.1.into", 6, "blocks.1.into.weight:0", "blocks.1.out.weight:1", "blocks.1.into.bias:0"),
    )
    MACS = PIXELS * 9 * (8 * 3 + 4 * 6 * 8) + 8 * 4

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.into, self.out = conv(8, 6), conv(6, 8)

        def forward(self, x: Tensor) -> Tensor:
            y = self.out(F.relu(self.into(x)))
            y += x
            return F.relu_(y)

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.bn, self.head = conv(3, 8, bias=False), nn.BatchNorm2d(8), Head(8)
        self.blocks = nn.Sequential(self.Block(), self.Block())

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(F.relu(self.bn(self.stem(x)))))


class PaddedShortcut(Toy):
    """A shortcut that strides and pads with zero channels: the padded places of the sum stay."""

    GROUPS = (
        units(
            "stem",
            4,
            "stem.weight:0 out.weight:0",
            "into.weight:1 head.fc.weight:1",
            "stem.bias:0 out.bias:0",
        ),
        units("into", 6, "into.weight:0", "out.weight:1", "into.bias:0"),
    )
    MACS = PIXELS * 4 * 3 * 9 + 16 * (6 * 4 * 9 + 8 * 6 * 9) + 8 * 4

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.into = conv(3, 4), nn.Conv2d(4, 6, 3, stride=2, padding=1)
        self.out, self.head = conv(6, 8), Head(8)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x))
        y = self.out(F.relu(self.into(x)))
        return self.head(F.relu(y + F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 2, 2))))


class UnusedParameters(Toy):
    """A layer that `forward` never calls."""

    GROUPS = (units("conv", 8, "conv.weight:0", "head.fc.weight:1", "conv.bias:0"),)
    LOCKED: ClassVar = {"unused.weight:0": "does not use it", "unused.weight:1": "does not use it"}
    MACS = PIXELS * 8 * 3 * 9 + 8 * 4

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.unused, self.head = conv(3, 8), conv(8, 8), Head(8)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.relu(self.conv(x)))


class AuxHeadInTraining(Toy):
    """A second head that only training uses reads the same units."""

    GROUPS = (
        units("stem", 8, "stem.weight:0", "deep.weight:1 aux.fc.weight:1", "stem.bias:0"),
        units("deep", 6, "deep.weight:0", "head.fc.weight:1", "deep.bias:0"),
    )
    MACS = PIXELS * 9 * (8 * 3 + 6 * 8) + 6 * 4

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.aux, self.deep, self.head = conv(3, 8), Head(8), conv(8, 6), Head(6)

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        x = F.relu(self.stem(x))
        main = self.head(F.relu(self.deep(x)))
        return (main, self.aux(x)) if self.training else main


class PreluNet(Toy):
    """A slope for each channel, and one for all."""

    GROUPS = (
        units("first", 8, "first.weight:0", "second.weight:1", "first.bias:0 each.weight:0"),
        units("second", 6, "second.weight:0", "head.fc.weight:1", "second.bias:0"),
    )
    MACS = PIXELS * 9 * (8 * 3 + 6 * 8) + 6 * 4

    def __init__(self) -> None:
        super().__init__()
        self.first, self.each, self.second = conv(3, 8), nn.PReLU(8), conv(8, 6)
        self.one, self.head = nn.PReLU(), Head(6)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.one(self.second(self.each(self.first(x)))))


class Conv1dNet(Toy):
    """Sequences."""

    PIXELS = (3, 16)
    GROUPS = (
        units("first", 8, "first.weight:0", "second.weight:1", "first.bias:0 norm:norm"),
        units("second", 6, "second.weight:0", "head.fc.weight:1", "second.bias:0"),
    )
    MACS = 16 * 8 * 3 * 3 + 8 * 6 * 8 * 3 + 6 * 4

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = nn.Conv1d(3, 8, 3, padding=1), nn.BatchNorm1d(8)
        self.second, self.head = nn.Conv1d(8, 6, 3, padding=1), Head(6)

    def forward(self, x: Tensor) -> Tensor:
        x = F.avg_pool1d(F.relu(self.norm(self.first(x))), 2)
        return self.head(F.relu(self.second(x)))


class Conv3dNet(Toy):
    """Volumes."""

    PIXELS = (2, 4, 4, 4)
    GROUPS = (
        units("first", 8, "first.weight:0", "second.weight:1", "first.bias:0 norm:norm"),
        units("second", 6, "second.weight:0", "head.fc.weight:1", "second.bias:0"),
    )
    MACS = 64 * 8 * 2 * 27 + 8 * 6 * 8 * 27 + 6 * 4

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = nn.Conv3d(2, 8, 3, padding=1), nn.BatchNorm3d(8)
        self.second, self.head = nn.Conv3d(8, 6, 3, padding=1), Head(6)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool3d(F.relu(self.norm(self.first(x))), 2)
        return self.head(F.relu(self.second(x)))


class FrozenParameters(PlainVgg):
    """The convolutions are frozen, as in the first stage of transfer learning."""

    def __init__(self) -> None:
        super().__init__()
        for layer in (self.conv1, self.bn1, self.conv2):
            layer.requires_grad_(False)


class NonPersistentBuffer(Toy):
    """A buffer that is in no state_dict is cut all the same."""

    GROUPS = (units("conv", 8, "conv.weight:0", "head.fc.weight:1", "conv.bias:0 scale:0"),)
    MACS = PIXELS * 8 * 3 * 9 + 8 * 4

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.head = conv(3, 8), Head(8)
        self.register_buffer("scale", torch.rand(8, 1, 1) + 0.5, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.relu(self.conv(x)) * self.scale)


class IntegerAttribute(Toy):
    """A size that `forward` reads from an attribute follows the cut."""

    PIXELS = (10,)
    GROUPS = (
        units("fc", 6, "fc.weight:0*49", "conv.weight:1", "fc.bias:0*49", kind="neuron"),
        units("conv", 8, "conv.weight:0", "head.fc.weight:1", "conv.bias:0"),
    )
    MACS = 10 * 294 + 49 * 8 * 6 * 9 + 8 * 4

    def __init__(self) -> None:
        super().__init__()
        self.channels = 6
        self.fc, self.conv, self.head = nn.Linear(10, 6 * 49), conv(6, 8), Head(8)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.fc(x)).view(-1, self.channels, 7, 7)
        return self.head(F.relu(self.conv(x)))


@torch.library.custom_op("secateurs_tests::double", mutates_args=())
def double(x: Tensor) -> Tensor:
    """An operator that the tool has never heard of."""
    return x * 2


@double.register_fake
def _(x: Tensor) -> Tensor:
    return torch.empty_like(x)


double.register_autograd(lambda ctx, gradient: gradient * 2)


class UnknownOperator(Toy):
    """An operator without a rule costs its neighbourhood only."""

    GROUPS = (
        units("second", 5, "second.weight:0", "third.weight:1", "second.bias:0"),
        units("third", 6, "third.weight:0", "head.fc.weight:1", "third.bias:0"),
    )
    LOCKED: ClassVar = {
        "first.weight:0": "secateurs_tests.double.default has no rule",
        "first.bias:0": "secateurs_tests.double.default has no rule",
    }
    LOCKED_AT = "double(self.first(x))"
    MACS = PIXELS * 9 * (8 * 3 + 5 * 8 + 6 * 5) + 6 * 4

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third, self.head = conv(3, 8), conv(8, 5), conv(5, 6), Head(6)

    def forward(self, x: Tensor) -> Tensor:
        x = self.second(double(self.first(x)))
        return self.head(F.relu(self.third(F.relu(x))))


class RawParameters(Toy):
    """No modules at all: parameters in functional calls."""

    GROUPS = (
        units("kernel", 8, "kernel:0", "matrix:0", "offset:0"),
        units("matrix", 6, "matrix:1", "last:0", kind="neuron"),
    )
    MACS = PIXELS * 8 * 3 * 9 + 8 * 6 + 6 * 4

    def __init__(self) -> None:
        super().__init__()
        self.kernel, self.offset = nn.Parameter(torch.randn(8, 3, 3, 3)), nn.Parameter(torch.randn(8))
        self.matrix, self.last = nn.Parameter(torch.randn(8, 6) / 9), nn.Parameter(torch.randn(6, 4))

    def forward(self, x: Tensor) -> Tensor:
        x = F.conv2d(x, self.kernel, self.offset, padding=1).relu().amax((2, 3))
        return torch.tanh(x @ self.matrix) @ self.last


class BatchOfOne(Toy):
    """A fixed leading dimension that looks like a channel count: 8 channels, batches of 8 allowed."""

    GROUPS = (units("conv", 8, "conv.weight:0", "head.fc.weight:1", "conv.bias:0"),)
    MACS = PIXELS * 8 * 3 * 9 + 8 * 4

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.head = conv(3, 8), Head(8)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.conv(x))
        return self.head(x.reshape(x.shape[0], x.shape[1], -1).reshape(x.shape))


class BranchIsDropped(Toy):
    """Half of a layer's output is never read: those filters are a group without consumers."""

    GROUPS = (units("wide", 6, "wide.weight:0*2", "head.fc.weight:1", "wide.bias:0*2"),)
    MACS = PIXELS * 12 * 3 * 9 + 6 * 4

    def __init__(self) -> None:
        super().__init__()
        self.wide, self.head = conv(3, 12), Head(6)

    def forward(self, x: Tensor) -> Tensor:
        kept, _ = F.relu(self.wide(x)).chunk(2, 1)
        return self.head(kept)


class SoftmaxOverChannels(Toy):
    """A softmax over channels computes across the units."""

    GROUPS = (units("conv", 8, "conv.weight:0", "head.fc.weight:1", "conv.bias:0", mixed=True),)
    MACS = PIXELS * 8 * 3 * 9 + 8 * 4

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.head = conv(3, 8), Head(8)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.conv(x).softmax(1))


class MeanOverChannels(Toy):
    """A mean over channels divides by their number."""

    GROUPS = (units("conv", 8, "conv.weight:0", "head.fc.weight:1", "conv.bias:0", mixed=True),)
    MACS = PIXELS * 8 * 3 * 9 + 8 * 4

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.head = conv(3, 8), Head(8)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.conv(x))
        return self.head(x - x.mean(1, keepdim=True))


class Gpt2Linear(Toy):
    """A linear layer that keeps its weight as (inputs, outputs)."""

    PIXELS = (6,)
    GROUPS = (units("up", 8, "up:1", "down:0", "up_bias:0", kind="neuron"),)
    MACS = 6 * 8 + 8 * 4

    def __init__(self) -> None:
        super().__init__()
        self.up, self.up_bias = nn.Parameter(torch.randn(6, 8)), nn.Parameter(torch.randn(8))
        self.down, self.down_bias = nn.Parameter(torch.randn(8, 4)), nn.Parameter(torch.randn(4))

    def forward(self, x: Tensor) -> Tensor:
        return torch.addmm(self.down_bias, F.gelu(torch.addmm(self.up_bias, x, self.up)), self.down)


class TiedAutoencoder(Toy):
    """One matrix encodes and, transposed, decodes: its rows both make and read the code."""

    PIXELS = (10,)
    GROUPS = (units("code", 6, "code.weight:0", "", "code.bias:0", kind="neuron"),)
    MACS = 2 * 10 * 6

    def __init__(self) -> None:
        super().__init__()
        self.code = nn.Linear(10, 6)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(torch.relu(self.code(x)), self.code.weight.t())


TOYS: tuple[type[Toy], ...] = tuple(
    value
    for names in (
        globals(),
        vars(sequence_models),
        vars(more_models),
        vars(unusual_models),
        vars(library_models),
    )
    for value in list(names.values())
    if isinstance(value, type) and issubclass(value, Toy) and value.__module__ == names["__name__"]
)


def build(toy: type[Toy], *, seed: int = 0) -> Toy:
    """A toy in evaluation mode, with norms whose parameters and statistics are not those of a fresh layer."""
    torch.manual_seed(seed)
    model = toy()
    generator = torch.Generator().manual_seed(seed + 1)
    for module in model.modules():
        for name in ("weight", "bias", "running_mean", "running_var"):
            tensor = getattr(module, name, None)
            if isinstance(tensor, Tensor) and tensor.dim() == 1:
                noise = torch.rand(tensor.shape, generator=generator)
                tensor.data.copy_(noise + 0.5 if name in ("weight", "running_var") else noise - 0.5)
    return model.eval()
