"""Toy networks written as libraries for many models write theirs, with the answer written by hand.

Unless a toy says otherwise a sample has five positions of six features.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor, nn

from toy import Toy, units

PLACES = 5


@functools.lru_cache
def _memoised_parts(shape: tuple[int, ...], heads: int) -> tuple[int, int]:
    if shape[-1] % heads != 0:
        raise ValueError(f"{shape[-1]} features cannot be divided among {heads} heads")
    return heads, shape[-1] // heads


class MemoisedSizes(Toy):
    """Two layers of one size ask a memoised function, which checks a rest, how to be viewed as heads."""

    PIXELS = (PLACES, 6)
    GROUPS = tuple(
        group
        for name in ("first", "second")
        for group in (
            units(
                f"{name}.make",
                3,
                f"{name}.make.weight:0*4",
                f"{name}.read.weight:1*4",
                f"{name}.make.bias:0*4 {name}.gain:0",
                kind="neuron",
            ),
            units(
                f"{name}.make#2",
                4,
                f"{name}.make.weight:0*3",
                f"{name}.read.weight:1*3",
                f"{name}.make.bias:0*3",
                kind="neuron",
            ),
        )
    )
    MACS = PLACES * 2 * (6 * 12 + 12 * 4)

    class _Layer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.heads = 3
            self.make, self.read = nn.Linear(6, 12), nn.Linear(12, 4)
            self.gain = nn.Parameter(torch.rand(3, 1) + 0.5)

        def forward(self, x: Tensor) -> Tensor:
            made = self.make(x)
            each = made.view(*made.shape[:-1], *_memoised_parts(made.shape, self.heads))
            return self.read((each * self.gain).relu().flatten(-2))

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = self._Layer(), self._Layer()

    def forward(self, x: Tensor) -> Tensor:
        return self.first(x) + self.second(x)


class CountedTokens(Toy):
    """Learned tokens stand beside the positions; a table of whole numbers says how far each is from which."""

    PIXELS = (PLACES, 6)
    GROUPS = (units("tokens", 4, "", "", "tokens:0 distances:1", kind="position", mixed=True),)
    MACS = PLACES * 9 * 6 * 2 + PLACES * 6 * 4

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.bias = nn.Parameter(torch.randn(4, 6)), nn.Parameter(torch.randn(7))
        self.register_buffer("distances", torch.randint(7, (PLACES, 9)))
        self.read = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        seen = torch.cat([self.tokens.expand(len(x), -1, -1), x], 1)
        weights = (x @ seen.mT + self.bias[self.distances]).softmax(-1)
        return self.read(weights @ seen)
