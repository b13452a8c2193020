"""Parameters, multiply-accumulates, bytes and the work of each call, of any plan, in closed form."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from math import prod
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

Indices: TypeAlias = npt.NDArray[np.int64]
Length: TypeAlias = tuple[int, tuple[Indices, ...]]
Lengths: TypeAlias = Sequence[Length]
Term: TypeAlias = tuple[float, tuple[int, ...]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Cost:
    """What a model costs.

    Args:
        params: Number of parameters (buffers not counted).
        macs: Multiply-accumulates of one forward pass of one sample; 1 MAC = 2 FLOPs.
        bytes: What the tensors of the ``state_dict`` take, each in its own type; a file adds their names.
            0 in plans that were saved before it was counted.
    """

    params: int
    macs: int
    bytes: int = 0

    def share_of(self, whole: Cost) -> tuple[float, float]:
        """Parameters and MACs as shares of another cost."""
        return self.params / max(whole.params, 1), self.macs / max(whole.macs, 1)


class LengthStore:
    """Distinct labelled dimensions, and products over them; equal dimensions are stored once.

    Attributes:
        lengths: Each as its length and its factors in unit numbers.
    """

    def __init__(self) -> None:
        self.lengths: list[Length] = []
        self._places: dict[tuple[int, bytes], int] = {}

    def term(self, fixed: float, dims: Lengths) -> Term:
        """A product as its fixed factor and the places of its labelled dimensions."""
        places = []
        for size, factors in dims:
            if not factors:
                fixed *= size
                continue
            key = (size, b"|".join(factor.tobytes() for factor in factors))
            if key not in self._places:
                self._places[key] = len(self.lengths)
                self.lengths.append((size, factors))
            places.append(self._places[key])
        return fixed, tuple(places)


@dataclass(frozen=True, slots=True, eq=False)
class CostModel:
    """Products of lengths: a term a parameter, a term a contraction.

    Args:
        lengths: Every distinct labelled dimension, as its length and its factors in unit numbers.
        params: For each parameter its fixed factor and the dimensions (indices into `lengths`).
        macs: The same for each contraction.
        bytes: The same for each parameter and buffer of the ``state_dict``.
    """

    lengths: tuple[Length, ...]
    params: tuple[Term, ...]
    macs: tuple[Term, ...]
    bytes: tuple[Term, ...]

    @classmethod
    def build(
        cls,
        tensors: Mapping[str, Lengths],
        shapes: Mapping[str, Sequence[int]],
        contractions: Sequence[tuple[float, Lengths]],
        buffers: AbstractSet[str],
        widths: Mapping[str, int],
    ) -> CostModel:
        """Collect the terms; `widths` has the bytes of a number of each tensor of the ``state_dict``."""
        store = LengthStore()
        numbers = {
            name: store.term(1.0, tensors[name]) if tensors.get(name) else (float(prod(shape)), ())
            for name, shape in shapes.items()
        }
        params = [term for name, term in numbers.items() if name not in buffers]
        macs = [store.term(multiplier, dims) for multiplier, dims in contractions]
        held = [(widths[name] * fixed, dims) for name, (fixed, dims) in numbers.items() if name in widths]
        return cls(tuple(store.lengths), tuple(params), tuple(macs), tuple(held))

    def evaluate(self, gone: npt.NDArray[np.bool_]) -> Cost:
        """The cost after the units in the mask are gone."""
        kept = kept_lengths(self.lengths, gone)
        return Cost(
            params=_total(self.params, kept), macs=_total(self.macs, kept), bytes=_total(self.bytes, kept)
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class CallWork:
    """What one call of a torch function does, as products of lengths.

    Args:
        name: The function.
        macs: Multiply-accumulates of all samples.
        values: Numbers that it reads and writes: a term for each tensor that it is given and that it gives.
    """

    name: str
    macs: tuple[Term, ...]
    values: tuple[Term, ...]


@dataclass(frozen=True, slots=True, eq=False)
class Work:
    """The calls of torch functions in one forward pass, in the order in which they run.

    Args:
        lengths: Every distinct labelled dimension, as in `CostModel`.
        calls: One entry for each numbered call.
    """

    lengths: tuple[Length, ...]
    calls: tuple[CallWork, ...]


def kept_lengths(lengths: Sequence[Length], gone: npt.NDArray[np.bool_]) -> npt.NDArray[np.float64]:
    """The length of every labelled dimension after a cut.

    Args:
        lengths: The dimensions.
        gone: A mask over all units.
    """
    kept = np.empty(len(lengths))
    for place, (size, factors) in enumerate(lengths):
        removed = gone[factors[0]]
        for factor in factors[1:]:
            removed = removed | gone[factor]
        kept[place] = size - np.count_nonzero(removed)
    return kept


def _total(terms: Sequence[Term], kept: npt.NDArray[np.float64]) -> int:
    total = 0.0
    for fixed, places in terms:
        for place in places:
            fixed *= kept[place]
        total += fixed
    return round(total)
