"""Parameters and multiply-accumulates of any plan, in closed form."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from math import prod
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

Indices: TypeAlias = npt.NDArray[np.int64]
Lengths: TypeAlias = Sequence[tuple[int, tuple[Indices, ...]]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Cost:
    """What a model costs.

    Args:
        params: Number of parameters (buffers not counted).
        macs: Multiply-accumulates of one forward pass of one sample; 1 MAC = 2 FLOPs.
    """

    params: int
    macs: int

    def share_of(self, whole: Cost) -> tuple[float, float]:
        """Parameters and MACs as shares of another cost."""
        return self.params / max(whole.params, 1), self.macs / max(whole.macs, 1)


@dataclass(frozen=True, slots=True, eq=False)
class CostModel:
    """Products of lengths: a term a parameter, a term a contraction.

    Args:
        lengths: Every distinct labelled dimension, as its length and its factors in unit numbers.
        params: For each parameter its fixed factor and the dimensions (indices into `lengths`).
        macs: The same for each contraction.
    """

    lengths: tuple[tuple[int, tuple[Indices, ...]], ...]
    params: tuple[tuple[float, tuple[int, ...]], ...]
    macs: tuple[tuple[float, tuple[int, ...]], ...]

    @classmethod
    def build(
        cls,
        tensors: Mapping[str, Lengths],
        shapes: Mapping[str, Sequence[int]],
        contractions: Sequence[tuple[float, Lengths]],
        buffers: AbstractSet[str],
    ) -> CostModel:
        """Collect the terms; equal dimensions are stored once."""
        store: dict[tuple[int, bytes], int] = {}
        lengths: list[tuple[int, tuple[Indices, ...]]] = []

        def term(fixed: float, dims: Lengths) -> tuple[float, tuple[int, ...]]:
            places = []
            for size, factors in dims:
                if not factors:
                    fixed *= size
                    continue
                key = (size, b"|".join(factor.tobytes() for factor in factors))
                if key not in store:
                    store[key] = len(lengths)
                    lengths.append((size, factors))
                places.append(store[key])
            return fixed, tuple(places)

        params = [
            term(1.0, tensors[name]) if tensors.get(name) else (float(prod(shape)), ())
            for name, shape in shapes.items()
            if name not in buffers
        ]
        macs = [term(multiplier, dims) for multiplier, dims in contractions]
        return cls(tuple(lengths), tuple(params), tuple(macs))

    def kept_lengths(self, gone: npt.NDArray[np.bool_]) -> npt.NDArray[np.float64]:
        """The length of every labelled dimension after a cut."""
        kept = np.empty(len(self.lengths))
        for place, (size, factors) in enumerate(self.lengths):
            removed = gone[factors[0]]
            for factor in factors[1:]:
                removed = removed | gone[factor]
            kept[place] = size - np.count_nonzero(removed)
        return kept

    def evaluate(self, gone: npt.NDArray[np.bool_]) -> Cost:
        """The cost after the units in the mask are gone."""
        kept = self.kept_lengths(gone)
        return Cost(params=_total(self.params, kept), macs=_total(self.macs, kept))


def _total(terms: Sequence[tuple[float, tuple[int, ...]]], kept: npt.NDArray[np.float64]) -> int:
    total = 0.0
    for fixed, places in terms:
        for place in places:
            fixed *= kept[place]
        total += fixed
    return round(total)
