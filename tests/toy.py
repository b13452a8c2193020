"""What every toy network has: its groups, locks and costs, written by hand."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional

PIXELS = 64


@dataclass(frozen=True)
class Units:
    """A group as a person would write it: each place is ``parameter:dim`` or ``parameter:dim*count``."""

    name: str
    kind: str
    size: int
    places: frozenset[tuple[str, str, int]]  # (parameter:dim, role, indices of one unit)
    mixed: bool = False


def units(
    name: str,
    size: int,
    makes: str,
    reads: str,
    carries: str = "",
    *,
    kind: str = "channel",
    mixed: bool = False,
) -> Units:
    """The expectation of one group; places are separated by blanks, a norm's four in short as ``bn:norm``."""
    roles = {"producer": makes, "carrier": carries, "consumer": reads}
    places = frozenset((place, role, n) for role, text in roles.items() for place, n in _places(text))
    return Units(name, kind, size, places, mixed)


def _places(text: str) -> Iterator[tuple[str, int]]:
    for word in text.split():
        place, _, count = word.partition("*")
        if place.endswith(":norm"):
            for leaf in ("weight", "bias", "running_mean", "running_var"):
                yield f"{place[:-5]}.{leaf}:0", int(count or 1)
        else:
            yield place, int(count or 1)


class Toy(nn.Module):
    """A toy network; subclasses are collected in `TOYS`."""

    GROUPS: ClassVar[tuple[Units, ...]] = ()
    LOCKED: ClassVar[dict[str, str]] = {}  # "parameter:dim" -> words of the reason
    LOCKED_AT: ClassVar[str] = ""  # the line of `forward` that all of `LOCKED` is to be blamed on
    TIED: ClassVar[tuple[frozenset[str], ...]] = ()  # groups whose counts `forward` derives from one another
    MACS: ClassVar[int] = 0
    PIXELS: ClassVar[tuple[int, ...]] = (3, 8, 8)

    def example(self, batch: int = 2) -> Any:
        return torch.randn(batch, *self.PIXELS)


def conv(inputs: int, outputs: int, kernel: int = 3, **options: Any) -> nn.Conv2d:
    """A convolution that keeps the size of the image."""
    return nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2, **options)


class Head(nn.Module):
    """The mean over all pixels, then a linear layer of 4 classes; ``fc.weight`` reads the channels."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.fc = nn.Linear(channels, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x.flatten(2).mean(2))


class OwnNorm(nn.Module):
    """A batch norm that is none of torch's modules."""

    running_mean: Tensor
    running_var: Tensor

    def __init__(self, channels: int, *, by_operator: bool = False) -> None:
        super().__init__()
        self.by_operator = by_operator
        self.weight, self.bias = nn.Parameter(torch.ones(channels)), nn.Parameter(torch.zeros(channels))
        self.register_buffer("running_mean", torch.zeros(channels))
        self.register_buffer("running_var", torch.ones(channels))

    def forward(self, x: Tensor) -> Tensor:
        mean, var = self.running_mean, self.running_var
        if self.by_operator:
            return torch.batch_norm(x, self.weight, self.bias, mean, var, self.training, 0.1, 1e-5, False)
        return functional.batch_norm(x, mean, var, self.weight, self.bias, self.training)
