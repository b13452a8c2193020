"""The label algebra: which indices of which dimensions must be cut together.

A *label* is an integer in a union-find. Every index of every parameter dimension starts with a label of
its own; operators make labels equal, and what ends up with one label is one unit. The algebra knows no
operator and no model, and has no Python loop over indices: every call works on whole arrays.

Three things go beyond a plain union-find:

* a label can be *locked*: what is equal to it is never cut, and the reason is kept;
* a label can *stand for a pair* of labels. ``qkv.view(3, heads, head_dim)`` says that row ``i`` goes when its
  head goes or when its head dimension goes, so its label becomes the pair (head, head dimension), nested
  pairs where there are more axes;
* so a dimension carries several label arrays, *factors*: an index is removed when any of its factors is.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from math import prod

import numpy as np

from secateurs.graph.unions import DEEPEST_PAIR, FIXED, LOCKED, NO_PAIR, LabelArray, Unions

_WIDEST_LEVEL = 64


@dataclass(frozen=True, slots=True, eq=False)
class Dim:
    """One dimension of a tensor, with the labels of its indices.

    Args:
        size: Length of the dimension.
        factors: Label arrays, each of length ``size``. An index is removed when its label in *any*
            factor is removed; none at all means that the dimension is locked.
        sources: The parameter dimensions, as numbers, that this dimension is a view of.
    """

    size: int
    factors: tuple[LabelArray, ...] = ()
    sources: frozenset[int] = field(default=frozenset())

    @property
    def is_locked(self) -> bool:
        """Whether no label at all is attached (labels may be locked later)."""
        return not self.factors


class Labels(Unions):
    """The labels of a model's dimensions.

    Args:
        place: Says which operator is being followed and at which line of the model's source, for reasons that
            the algebra finds by itself; two empty texts where none is.

    Example:
        >>> labels = Labels()
        >>> a, b = labels.fresh(3), labels.fresh(3)
        >>> labels.unify(a, b)
        >>> bool((labels.find(a.factors[0]) == labels.find(b.factors[0])).all())
        True
    """

    def __init__(self, place: Callable[[], tuple[str, str]] = lambda: ("", "")) -> None:
        super().__init__()
        self.place = place

    def fresh(self, size: int, source: int | None = None) -> Dim:
        """A dimension with a fresh label for each index; one of length 1 cannot shrink and is locked."""
        sources = frozenset() if source is None else frozenset((source,))
        return Dim(size, (self.new(size),) if size > 1 else (), sources)

    def lock(self, dim: Dim, reason: str, where: str = "") -> None:
        """Lock every index of a dimension, for a reason in words and a line of source."""
        if dim.factors:
            self.reasons.append((reason, where))
            for factor in dim.factors:
                self.lock_labels(factor, len(self.reasons) - 1)

    def unify(self, a: Dim, b: Dim) -> None:
        """Join two dimensions of one length, index by index; a locked side locks the other."""
        if len(a.factors) == len(b.factors) and all(
            x is y for x, y in zip(a.factors, b.factors, strict=True)
        ):
            return
        if a.size != b.size:
            raise ValueError(f"cannot unify dimensions of lengths {a.size} and {b.size}")
        if not a.factors or not b.factors:
            self._fix(a if a.factors else b)
            return
        if len(a.factors) < 2 and len(b.factors) < 2 and not (self._is_paired(a) and self._is_paired(b)):
            self.join(self._index_labels(a), self._index_labels(b))
        else:  # pairs may be nested in another order, as ((a, b), c) and (c, (a, b)): their atoms are met
            self._join_factors(list(self.resolve(a).factors), list(self.resolve(b).factors))

    def _fix(self, dim: Dim) -> None:
        """Lock a dimension that met one without labels, unless it is locked already."""
        if any(not self.why(factor).all() for factor in dim.factors):
            self.lock(dim, FIXED, self.place()[1])

    def unify_all(self, dim: Dim, others: Sequence[Dim]) -> None:
        """Join a dimension with several others; those of one factor in one go, as for the four of a norm."""
        plain = [
            other
            for other in others
            if len(other.factors) == 1 and other.size == dim.size and not self._is_paired(other)
        ]
        if len(dim.factors) == 1 and len(plain) > 1:
            labels = self._index_labels(dim)
            self.join(
                np.tile(labels, len(plain)), np.concatenate([self._index_labels(each) for each in plain])
            )
            others = [other for other in others if other not in plain]
        for other in others:
            self.unify(dim, other)

    def _is_paired(self, dim: Dim) -> bool:
        """Whether some label of a dimension of one factor stands for a pair."""
        return self._has_pairs and any(
            np.count_nonzero(self._first[self.find(factor)] != NO_PAIR) for factor in dim.factors
        )

    def _join_factors(self, first: list[LabelArray], second: list[LabelArray]) -> None:
        """Join dimensions of several factors: those that part the indices alike, then the rest as a whole.

        What one side has besides the other's factors stays, as for the heads of learned queries that are
        repeated for every sample, and those of the keys.
        """
        for factor in list(first):
            partner = next((place for place, other in enumerate(second) if _alike(factor, other)), None)
            if partner is not None:
                first = [other for other in first if other is not factor]
                self.join(factor, second.pop(partner))
        if first and second:
            self.join(self._combined(first), self._combined(second))
        for factor in first if not second else second if not first else ():
            self._fix(Dim(len(factor), (factor,)))

    def _index_labels(self, dim: Dim) -> LabelArray:
        """One label an index: the factor itself, or pairs of the factors where there are several."""
        factors = dim.factors if len(dim.factors) < 2 else self.resolve(dim).factors
        if not factors:
            return np.zeros(dim.size, np.int64)
        if len(factors) == 1:
            return self._without_locked_halves(factors[0])
        return self._combined(factors)

    def _combined(self, factors: Sequence[LabelArray]) -> LabelArray:
        """One label an index for several factors: nested pairs."""
        combined = factors[-1]
        for factor in reversed(factors[:-1]):
            pairs = np.where(factor == LOCKED, combined, factor)
            both = (factor != LOCKED) & (combined != LOCKED)
            pairs[both] = self._pair(factor[both], combined[both])
            combined = pairs
        return combined

    def _without_locked_halves(self, labels: LabelArray) -> LabelArray:
        """Labels that stand for a pair of which one half is locked, exchanged for the other half."""
        while self._has_pairs:
            roots = self.find(labels)
            paired = (self._first[roots] != NO_PAIR) & (self._why[roots] == 0)
            if not np.count_nonzero(paired):
                return labels
            first, second = self.find(self._first[roots[paired]]), self.find(self._second[roots[paired]])
            lone = (self._why[first] > 0) != (self._why[second] > 0)
            if not np.count_nonzero(lone):
                return labels
            labels = roots.copy()
            labels[np.flatnonzero(paired)[lone]] = np.where(self._why[first] > 0, second, first)[lone]
        return labels

    def resolve(self, dim: Dim) -> Dim:
        """The dimension with its factors reduced to single free labels; locked labels read `LOCKED`.

        Returns:
            A dimension whose factors hold representatives only: no pair, no locked label but `LOCKED`, and
            no factor that is locked throughout.
        """
        factors: list[LabelArray] = []
        level = list(dim.factors)
        depth = 0
        while level:
            if depth > DEEPEST_PAIR or len(level) > _WIDEST_LEVEL:  # pairs that contain themselves
                operator, where = self.place()
                met = f", as {operator} finds" if operator else ""
                for factor in level:
                    self.lock(Dim(dim.size, (factor,)), f"its layout contradicts itself{met}", where)
                return self.resolve(dim)
            below: dict[bytes, LabelArray] = {}
            for factor in level:
                self._expand(factor, factors, below)
            level, depth = list(below.values()), depth + 1
        return Dim(dim.size, tuple(factors), dim.sources)

    def _expand(self, factor: LabelArray, into: list[LabelArray], below: dict[bytes, LabelArray]) -> None:
        """One level of pairs: a factor of single labels is done, the halves of pairs go a level down."""
        roots = self.find(factor)
        free = self._why[roots] == 0  # a locked pair has locked halves
        paired = free & (self._first[roots] != NO_PAIR)
        if np.count_nonzero(paired):
            for half in (
                np.where(paired, self._first[roots], roots),
                np.where(paired, self._second[roots], LOCKED),
            ):
                found = self.find(half)
                below[found.tobytes()] = found
            return
        atoms = np.where(free, roots, LOCKED)
        if np.count_nonzero(atoms) and not any(np.array_equal(atoms, other) for other in into):
            into.append(atoms)

    def split(self, dim: Dim, sizes: Sequence[int]) -> list[Dim]:
        """A view of one dimension as several, outermost first.

        A factor that is constant along all new axes but one goes to that axis; one that varies along several
        is replaced by pairs of new labels, one an axis, everywhere in the model.
        """
        if len(sizes) == 1:
            return [dim]
        if prod(sizes) != dim.size:
            raise ValueError(f"cannot split a dimension of length {dim.size} into {tuple(sizes)}")
        outer, inner = int(sizes[0]), prod(sizes[1:])
        left: list[LabelArray] = []
        right: list[LabelArray] = []
        for factor in self.resolve(dim).factors:
            grid = factor.reshape(outer, inner)
            if outer > 1 and (inner == 1 or (grid == grid[:, :1]).all()):
                left.append(grid[:, 0].copy())
            elif outer == 1 or (grid == grid[:1]).all():
                right.append(grid[0].copy())
            else:
                rows, columns = self.new(outer), self.new(inner)
                pairs = self._pair(np.repeat(rows, inner), np.tile(columns, outer))
                self.join(factor, pairs)
                left.append(rows)
                right.append(columns)
        head = Dim(outer, tuple(left) if outer > 1 else (), dim.sources)
        return [head, *self.split(Dim(inner, tuple(right) if inner > 1 else (), dim.sources), sizes[1:])]

    def merge(self, dims: Sequence[Dim]) -> Dim:
        """A view of several dimensions as one, row-major; the opposite of `split`."""
        if len(dims) == 1:
            return dims[0]
        sizes = [dim.size for dim in dims]
        factors = []
        for axis, dim in enumerate(dims):
            before, after = prod(sizes[:axis]), prod(sizes[axis + 1 :])
            factors += [np.tile(np.repeat(factor, after), before) for factor in dim.factors]
        return Dim(prod(sizes), tuple(factors), frozenset().union(*(dim.sources for dim in dims)))

    def concatenate(self, dims: Sequence[Dim]) -> Dim:
        """One dimension after the other."""
        resolved = [self.resolve(dim) if len(dim.factors) > 1 else dim for dim in dims]
        factors = []
        for level in range(max(len(dim.factors) for dim in resolved)):
            parts = [
                d.factors[level] if level < len(d.factors) else np.zeros(d.size, np.int64) for d in resolved
            ]
            factors.append(np.concatenate(parts))
        return Dim(
            sum(dim.size for dim in dims), tuple(factors), frozenset().union(*(d.sources for d in dims))
        )

    def take(self, dim: Dim, index: slice | LabelArray) -> Dim:
        """The dimension restricted to some of its indices, in that order."""
        factors = tuple(factor[index] for factor in dim.factors)
        size = len(factors[0]) if factors else len(np.arange(dim.size)[index])
        return Dim(size, factors if size > 1 else (), dim.sources)


def _alike(a: LabelArray, b: LabelArray) -> bool:
    """Whether two factors part the indices of a dimension in the same way."""
    parts = len(np.unique(a))
    return parts == len(np.unique(b)) and parts == len(np.unique(a * (int(b.max()) + 1) + b))
