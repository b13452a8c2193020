"""Units get numbers: free labels, side by side where they live in the same parameter dimensions."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from secateurs.graph.groups import NO_UNIT, Indices
from secateurs.graph.labels import Dim, Labels
from secateurs.graph.unions import LOCKED, PAIRED


class UnitNumbers:
    """The units of a finished trace, numbered by group, and any of its dimensions in these numbers.

    Args:
        labels: The labels.
        dims: The dimensions of all parameters and buffers.

    Attributes:
        count: Number of units.
        groups: The group of each unit.
        atoms: The label of each unit.
    """

    def __init__(self, labels: Labels, dims: Sequence[Dim]) -> None:
        self._labels = labels
        settled = self._settled(dims)
        self._number(settled)
        for dim, factors in zip(dims, settled, strict=True):
            self._remember(dim, factors)

    def _settled(self, dims: Sequence[Dim]) -> list[tuple[Indices, ...]]:
        """The factors of all parameter dimensions; again where resolving one found a contradiction."""
        while True:
            reasons = len(self._labels.reasons)
            self._atom_of = self._labels.atoms()
            settled = [self._resolved(dim) for dim in dims]
            if len(self._labels.reasons) == reasons:
                return settled

    def _resolved(self, dim: Dim) -> tuple[Indices, ...]:
        """The factors of a dimension as single labels."""
        if len(dim.factors) == 1:
            atoms: Indices = self._atom_of[dim.factors[0]]
            if not np.count_nonzero(atoms == PAIRED):
                return (atoms,) if np.count_nonzero(atoms) else ()
        return self._labels.resolve(dim).factors if dim.factors else ()

    def _number(self, settled: Sequence[tuple[Indices, ...]]) -> None:
        """Give every free label that lives in some parameter a unit number, ordered by group."""
        labels = [_distinct(factors) for factors in settled]
        flat = np.concatenate(labels) if labels else np.empty(0, np.int64)
        where = np.repeat(np.arange(len(labels)), [len(found) for found in labels])
        free = flat != LOCKED
        atoms, inverse = _distinct_labels(flat[free], len(self._labels))
        signature = _signatures(inverse, where[free], len(atoms), len(settled)) ^ _sides(settled, atoms)
        first_seen = np.full(len(atoms), len(flat), np.int64)
        np.minimum.at(first_seen, inverse, np.flatnonzero(free))
        kinds, group_of = np.unique(signature, return_inverse=True)
        opening = np.full(len(kinds), len(flat), np.int64)
        np.minimum.at(opening, group_of, first_seen)
        counts = np.bincount(group_of, minlength=len(kinds))
        cuttable = counts[group_of] > 1  # a group of one unit cannot lose it
        order = np.lexsort((first_seen, opening[group_of]))
        order = order[cuttable[order]]
        self.count = len(order)
        self._factors: dict[tuple[int, ...], tuple[Indices, ...]] = {}
        self._same: dict[bytes, Indices] = {}
        self._unit_of = np.full(len(self._labels), NO_UNIT, np.int64)
        self._unit_of[atoms[order]] = np.arange(self.count)
        self.groups = np.unique(opening[group_of[order]], return_inverse=True)[1]
        self.atoms = atoms[order]

    def factors(self, dim: Dim) -> tuple[Indices, ...]:
        """A dimension's factors as unit numbers, for dimensions of any tensor of the trace.

        Equal factors are one array, so that what is known of one dimension is known of all that follow it.
        """
        if not dim.factors:
            return ()
        known = self._factors.get(tuple(map(id, dim.factors)))  # the trace keeps these arrays alive
        return self._remember(dim, self._resolved(dim)) if known is None else known

    def _remember(self, dim: Dim, settled: Sequence[Indices]) -> tuple[Indices, ...]:
        units = [self._unit_of[atoms] for atoms in settled]
        factors = tuple(
            self._same.setdefault(factor.tobytes(), factor)
            for factor in units
            if np.count_nonzero(factor != NO_UNIT)
        )
        return self._factors.setdefault(tuple(map(id, dim.factors)), factors)


def _signatures(units: Indices, places: Indices, count: int, dims: int) -> npt.NDArray[np.uint64]:
    """A 64-bit hash for each unit of the multiset of parameter dimensions that it lives in."""
    weights = np.random.default_rng(0).integers(1, 2**63, size=dims, dtype=np.uint64)
    pairs, times = np.unique(units * dims + places, return_counts=True)
    with np.errstate(over="ignore"):
        mixed = weights[pairs % dims] * (times.astype(np.uint64) * np.uint64(2) + np.uint64(1))
        table = np.zeros(count, np.uint64)
        np.add.at(table, pairs // dims, mixed ^ (mixed >> np.uint64(29)))
    return table


def _distinct_labels(labels: Indices, count: int) -> tuple[Indices, Indices]:
    """What `np.unique` gives of labels below a count, and the place of each in it; without sorting."""
    place = np.zeros(count, np.int64)
    place[labels] = 1
    distinct = np.flatnonzero(place)
    place[distinct] = np.arange(len(distinct))
    return distinct, place[labels]


def _sides(settled: Sequence[tuple[Indices, ...]], atoms: Indices) -> npt.NDArray[np.uint64]:
    """A hash for each unit of the directions in which it cuts, where a dimension can be cut in several.

    As many heads as head dimensions would look alike without it, and be taken for one group.
    """
    factors = [factor for several in settled if len(several) > 1 for factor in several]
    if not factors:
        return np.zeros(len(atoms), np.uint64)
    units = [np.searchsorted(atoms, factor[factor != LOCKED]) for factor in factors]
    places = [np.full(len(found), number, np.int64) for number, found in enumerate(units)]
    return _signatures(np.concatenate(units), np.concatenate(places), len(atoms), len(factors))


def _distinct(factors: Sequence[Indices]) -> Indices:
    """The labels of a dimension, each as often as there are indices that it removes."""
    if len(factors) < 2:
        return factors[0] if factors else np.empty(0, np.int64)
    pairs = np.concatenate([np.stack([factor, np.arange(len(factor))]) for factor in factors], axis=1)
    first = np.unique(pairs, axis=1, return_index=True)[1]
    distinct: Indices = pairs[0, np.sort(first)]
    return distinct
