"""Counts that are tied: where a model derives one size from another, what is cut must agree in number.

``C // self.num_heads`` in a `forward` makes the width of a layer, the number of heads and the length of a
head agree, whichever units leave. Such a constraint speaks of counts, not of indices.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod, sqrt
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from secateurs.graph.expressions import COMPARISONS, Constant, evaluate, leaves_of, solve
from secateurs.graph.rewriting import WrittenSize

Indices: TypeAlias = npt.NDArray[np.int64]
Mask: TypeAlias = npt.NDArray[np.bool_]
_NO_VALUE = -1


@dataclass(frozen=True, slots=True, eq=False)
class Counted:
    """The length of a dimension as a function of what is left of each group.

    Args:
        size: The length before any cut.
        units: Unit numbers of its indices, an array for each factor.
        fixed: How many indices belong to no unit.
        terms: ``coefficient x product of the counts of some groups``, to be added up.
    """

    size: int
    units: tuple[Indices, ...]
    fixed: int
    terms: tuple[tuple[float, tuple[int, ...]], ...]

    @classmethod
    def of(cls, size: int, units: tuple[Indices, ...], group_of: Indices, sizes: Indices) -> Counted:
        """Count the indices of a dimension by the groups that can remove them."""
        if not units:
            return cls(size, (), size, ())
        owners = np.stack([np.where(factor >= 0, group_of[factor], _NO_VALUE) for factor in units])
        if len(units) == 1:  # much quicker than columns
            patterns, cells = np.unique(owners, return_counts=True)
            patterns = patterns[None]
        else:
            patterns, cells = np.unique(owners, axis=1, return_counts=True)
        fixed, terms = 0, []
        for pattern, count in zip(patterns.T, cells, strict=True):
            groups = tuple(sorted({int(group) for group in pattern} - {_NO_VALUE}))
            if groups:
                terms.append((float(count) / prod(int(sizes[group]) for group in groups), groups))
            else:
                fixed += int(count)
        return cls(size, units, fixed, tuple(terms))

    @property
    def groups(self) -> frozenset[int]:
        """The groups that can shorten it."""
        return frozenset(group for _, groups in self.terms for group in groups)

    def by_counts(self, counts: Sequence[Any]) -> Any:
        """Its length where so many units of each group are left; arrays of counts give arrays."""
        total: Any = float(self.fixed)
        for coefficient, groups in self.terms:
            total = total + coefficient * prod(counts[group] for group in groups)
        return np.rint(total).astype(np.int64) if isinstance(total, np.ndarray) else round(total)

    def by_mask(self, gone: Mask) -> int:
        """Its length without the units in a mask."""
        removed = np.zeros(self.size, np.bool_)
        for factor in self.units:
            removed |= gone[factor]
        return self.size - int(removed.sum())


@dataclass(frozen=True, slots=True, eq=False)
class SizeTie:
    """An integer in a module's attribute that must follow the length of a dimension.

    Args:
        module: Path of the module.
        attribute: Name of the attribute.
        position: Index where it is a tuple or list, else None.
        value: The integer before any cut.
        length: The length that it states.
        expression: Where the model states the length by a formula with this attribute in it, the formula.
        written: The size in the model's code that the attribute takes the place of, where it is none of the
            model's own.
        where: The line of that code.
        spot: The place that it was found for.
    """

    module: str
    attribute: str
    position: int | None
    value: int
    length: Counted
    expression: Any = None
    written: WrittenSize | None = None
    where: str = ""
    spot: Any = None

    def after(self, gone: Mask) -> int:
        """The integer after a cut; as before where no integer makes the formula come out."""
        found = int(_read(self, lambda length: length.by_mask(gone)))
        return self.value if found == _NO_VALUE else found


@dataclass(frozen=True, slots=True, eq=False)
class Rescaling:
    """Rows that make up for a scale which a kernel derives from a length: ``1 / sqrt(length)``.

    Args:
        length: The length.
        places: Parameters, dimensions of them, and indices of these before the cut.
    """

    length: Counted
    places: tuple[tuple[str, int, Indices], ...]

    def factor(self, gone: Mask) -> float:
        """What these rows are multiplied by with a cut."""
        return sqrt(self.length.by_mask(gone) / self.length.size)


@dataclass(frozen=True, slots=True, eq=False)
class CountConstraint:
    """Two lengths that the model's own code needs to be equal.

    Args:
        left: An expression over `Counted` lengths and `SizeTie` attributes.
        right: The same.
        groups: The groups, by their place in the graph, whose counts they depend on.
        reason: What the code computes, in words.
        where: The line of the model's source.
        instead: Attributes that can take the places of what the code computes there: a cut that does not
            respect the constraint needs them. Without any the constraint must be respected.
    """

    left: Any
    right: Any
    groups: frozenset[int]
    reason: str
    where: str
    instead: tuple[SizeTie, ...] = ()

    @classmethod
    def of(
        cls, left: Any, right: Any, reason: str, where: str, instead: tuple[SizeTie, ...] = ()
    ) -> CountConstraint:
        """Collect the groups that both sides depend on."""
        groups: set[int] = set()
        for leaf in (*leaves_of(left), *leaves_of(right)):
            if isinstance(leaf, SizeTie):
                groups |= leaf.length.groups
                inner = leaves_of(leaf.expression) if leaf.expression is not None else ()
                groups |= {g for each in inner if isinstance(each, Counted) for g in each.groups}
            elif isinstance(leaf, Counted):
                groups |= leaf.groups
        return cls(left, right, frozenset(groups), reason, where, instead)

    def holds(self, gone: Mask) -> bool:
        """Whether a cut respects it."""
        return self._agree(lambda length: length.by_mask(gone))

    def holds_for(self, counts: Sequence[Any]) -> bool:
        """Whether counts of units respect it."""
        return self._agree(lambda length: length.by_counts(counts))

    def solutions(self, counts: list[Any], group: int, values: Indices) -> Indices:
        """The counts of one group among `values` that respect it, all other counts being given."""
        leaves = (*leaves_of(self.left), *leaves_of(self.right))
        trial = list(counts)
        if not any(isinstance(leaf, SizeTie) for leaf in leaves):
            trial[group] = values

            def read(leaf: Counted) -> Any:
                return leaf.by_counts(trial)

            agree = np.asarray(evaluate(self.left, read) == evaluate(self.right, read))
            chosen: Indices = values[np.broadcast_to(agree, values.shape)]
            return chosen
        found = []
        for value in values.tolist():
            trial[group] = value
            if self.holds_for(trial):
                found.append(value)
        return np.asarray(found, np.int64)

    def _agree(self, length: Any) -> bool:
        def read(leaf: Any) -> Any:
            return _read(leaf, length)

        left, right = evaluate(self.left, read), evaluate(self.right, read)
        return bool(left == right) and (left > 0 or self._leaves_nothing)

    @property
    def _leaves_nothing(self) -> bool:
        """Whether it says that something is zero, as the rest of a division; all else are lengths."""
        return isinstance(self.right, Constant) and self.right.value == 0


@dataclass(frozen=True, slots=True, eq=False)
class CountCondition:
    """A comparison in the model's code that must come out as it did, or another path is taken.

    Args:
        name: How the two are compared: ``eq``, ``lt``, ...
        outcome: What must come out.
        left: An expression over `Counted` lengths and `SizeTie` attributes.
        right: The same.
        groups: The groups, by their place in the graph, that it depends on.
        reason: The comparison in words.
        where: The line of the model's source.
    """

    name: str
    outcome: bool
    left: Any
    right: Any
    groups: frozenset[int]
    reason: str
    where: str

    def holds(self, gone: Mask) -> bool:
        """Whether it comes out as it did after a cut."""
        return self._compare(lambda length: length.by_mask(gone))

    def holds_for(self, counts: Sequence[Any]) -> bool:
        """Whether it comes out as it did where so many units of each group are left."""
        return self._compare(lambda length: length.by_counts(counts))

    def _compare(self, length: Any) -> bool:
        def read(leaf: Any) -> Any:
            return _read(leaf, length)

        compared = COMPARISONS[self.name](evaluate(self.left, read), evaluate(self.right, read))
        return bool(compared) is self.outcome


def _read(leaf: Any, length: Any) -> Any:
    """The value of a leaf, given a way to read lengths."""
    if isinstance(leaf, Counted):
        return length(leaf)
    target = length(leaf.length)
    if leaf.expression is None:
        return target
    found = solve(leaf.expression, int(target), lambda other: _read(other, length))
    return _NO_VALUE if found is None else found
