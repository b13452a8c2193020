"""Dimensions that a network sums over and nothing else looks at, as those of queries and keys, or of values.

The results of ``Q K'`` say nothing of the ``d`` dimensions that they sum over: with any invertible ``T`` the
factors ``Q T`` and ``K inv(T)'`` give the same. So what layers give there can be exchanged for other
combinations of it (`secateurs.recovery.low_rank`). ``Q`` and ``K`` may be what two layers give; or ``Q`` what
one gives, averaged over positions as attention does with values, and ``K`` the weight that reads it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True, eq=False)
class Factor:
    """One side of the products of a call.

    Args:
        call: Number of the call of the layer that gives it.
        channels: ``(heads, d)``: which of the layer's outputs each head takes.
    """

    call: int
    channels: Tensor


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Factors:
    """Where what one layer gives is multiplied with what another gives, or with the weight of another.

    Args:
        call: Number of the call that multiplies, with recurrent layers written out.
        first: The layer that gives the first factor.
        second: The layer that gives the second; or that has it, and `channels` are columns of its weight.
        heads: ``(pairs, 2)``: which head of the first meets which of the second.
        is_read: Whether the second is a weight.
        is_centred: Whether it is no matter what all rows of one factor have in common: of the second, where a
            softmax takes the results; of the first, where the layer that reads it has a bias.
    """

    call: int
    first: Factor
    second: Factor
    heads: Tensor
    is_read: bool = False
    is_centred: bool = False

    @property
    def depth(self) -> int:
        """Length of the dimension that is summed over."""
        return int(self.first.channels.shape[1])

    @property
    def parts(self) -> Tensor:
        """``(pairs,)`` numbers: pairs that share a head of either side are of one part."""
        return self.heads[:, int(len(self.second.channels) <= len(self.first.channels))]

    @property
    def places(self) -> tuple[tuple[int, bool], tuple[int, bool]]:
        """For both factors the call of the layer, and whether the factor is its weight."""
        return (self.first.call, False), (self.second.call, self.is_read)

    def sides(self) -> Iterator[tuple[Factor, Tensor]]:
        """Both factors, each with the part that its heads are of, ``(heads,)``."""
        for side, factor in enumerate((self.first, self.second)):
            part = torch.empty(len(factor.channels), dtype=torch.long)
            part[self.heads[:, side]] = self.parts
            yield factor, part
