"""What a plan is made of: what dimensions and groups lose, rows that are rescaled, attributes that change.

Two parts of the same kind, of one cut after another, compose into one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TypeAlias

import numpy as np

from secateurs.errors import PlanError

Factors: TypeAlias = dict[tuple[str, int], dict[int, float]]


@dataclass(frozen=True, slots=True, kw_only=True)
class AxisCut:
    """The indices that one dimension of one parameter loses.

    Args:
        parameter: Name of the parameter or buffer.
        dim: The dimension.
        size: Its length before the cut.
        removed: The indices that leave, ascending.
        silenced: Those of them that are zeroed to silence the units in the original: all where the
            parameter consumes the units, and all of units that are summed over without weights.
    """

    parameter: str
    dim: int
    size: int
    removed: tuple[int, ...]
    silenced: tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class RowScale:
    """Rows that are multiplied with the cut, to make up for a scale that is derived from a length.

    An attention kernel that is given no scale takes ``1 / sqrt(d)`` of heads of length ``d``: where they are
    cut to ``d'``, the rows of the queries are multiplied by ``sqrt(d' / d)``.

    Args:
        parameter: Name of the parameter or buffer.
        dim: The dimension.
        indices: The rows, as indices before the cut, ascending; rows that leave are left out.
        factor: What they are multiplied by.
    """

    parameter: str
    dim: int
    indices: tuple[int, ...]
    factor: float


@dataclass(frozen=True, slots=True, kw_only=True)
class IntegerChange:
    """A module's attribute (or one item of it) that held a length which changes."""

    module: str
    attribute: str
    position: int | None
    before: int
    after: int


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupCut:
    """The units that one group loses.

    Args:
        name: The group.
        kind: What a unit is.
        size: Units before the cut.
        removed: Indices of the units that leave, ascending.
        mixed_by: The operator that computes across the units, if any: then silencing is not removing.
    """

    name: str
    kind: str
    size: int
    removed: tuple[int, ...]
    mixed_by: str | None = None

    @property
    def kept(self) -> int:
        """Units that remain."""
        return self.size - len(self.removed)


def compose_scales(
    first: Sequence[RowScale],
    second: Sequence[RowScale],
    *,
    earlier: Mapping[tuple[str, int], AxisCut],
    both: Mapping[tuple[str, int], AxisCut],
) -> tuple[RowScale, ...]:
    """The factors of two cuts, one after the other, of the rows that both leave.

    Args:
        first: What the first cut rescales.
        second: The same of the second; its rows are counted after the first cut.
        earlier: What each parameter dimension loses by the first cut.
        both: The same by both.
    """
    factors: Factors = {}
    for scales, cut in ((first, {}), (second, earlier)):
        for scale in scales:
            key = scale.parameter, scale.dim
            axis = cut.get(key)
            indices = scale.indices if axis is None else _in_first(axis.size, axis.removed, scale.indices)
            rows = factors.setdefault(key, {})
            for index in indices:
                rows[index] = rows.get(index, 1.0) * scale.factor
    for key, rows in factors.items():
        for index in both[key].removed if key in both else ():
            rows.pop(index, None)
    return as_scales(factors)


def as_scales(factors: Factors) -> tuple[RowScale, ...]:
    """One entry for all rows of a dimension that have the same factor."""
    found = []
    for (name, dim), rows in factors.items():
        for factor in sorted(set(rows.values())):
            indices = tuple(sorted(index for index, each in rows.items() if each == factor))
            found.append(RowScale(parameter=name, dim=dim, indices=indices, factor=factor))
    return tuple(found)


def _in_first(size: int, removed: tuple[int, ...], later: tuple[int, ...]) -> list[int]:
    """Indices after a cut, as indices before it."""
    kept: list[int] = np.delete(np.arange(size), np.asarray(removed, np.int64))[
        np.asarray(later, np.int64)
    ].tolist()
    return kept


def compose_axes(first: AxisCut, second: AxisCut) -> AxisCut:
    """What one dimension loses by two cuts, one after the other.

    Raises:
        PlanError: The second cut is of another length than the first one leaves.
    """
    if first.size - len(first.removed) != second.size:
        raise PlanError(
            f"the second plan expects length {second.size} of {second.parameter!r} dimension {second.dim}, "
            f"the first leaves {first.size - len(first.removed)}"
        )
    removed = _in_first(first.size, first.removed, second.removed)
    silenced = _in_first(first.size, first.removed, second.silenced)
    return replace(
        first,
        removed=tuple(sorted({*first.removed, *removed})),
        silenced=tuple(sorted({*first.silenced, *silenced})),
    )


def compose_groups(first: GroupCut, second: GroupCut) -> GroupCut:
    """What one group loses by two cuts, one after the other."""
    removed = _in_first(first.size, first.removed, second.removed)
    mixed = first.mixed_by or second.mixed_by
    return replace(first, removed=tuple(sorted({*first.removed, *removed})), mixed_by=mixed)
