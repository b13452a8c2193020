"""From the integers of a trace to what they demand: attributes to rewrite, and counts that must agree."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from secateurs.graph.counts import CountCondition, CountConstraint, Counted, SizeTie
from secateurs.graph.expressions import (
    Attribute,
    Constant,
    Length,
    Operation,
    attributes_in,
    in_words,
    replaced,
    sign_of,
)
from secateurs.graph.groups import Graph, Group
from secateurs.graph.labels import Dim
from secateurs.graph.tracing import Tracer
from secateurs.graph.written import Spot

Indices: TypeAlias = npt.NDArray[np.int64]
_Key: TypeAlias = "tuple[str, str, int | None]"
_TRIALS = 3
_MORE_TRIALS = 12  # of small groups, which may keep as many by chance
_MANY = 100_000  # units
_ASKED_FOR = ("head", "head_dim")


class SizeReader:
    """Reads the statements and comparisons of a trace, for one numbering of the units.

    Args:
        tracer: The finished trace.
        groups: The groups of units.
        group_of: The group of each unit.
        unit_factors: Gives the unit numbers of a dimension.
    """

    def __init__(
        self,
        tracer: Tracer,
        groups: Sequence[Group],
        group_of: Indices,
        unit_factors: Callable[[Dim], tuple[Indices, ...]],
    ) -> None:
        self._tracer = tracer
        self._sizes = np.asarray([group.size for group in groups], np.int64)
        self._group_of = group_of
        self._unit_factors = unit_factors
        self._counted: dict[tuple[int, ...], Counted] = {}
        self._ties: dict[_Key, SizeTie] = {}
        self._stated: set[_Key] = set()

    def read(self) -> tuple[tuple[SizeTie, ...], tuple[CountConstraint, ...], tuple[CountCondition, ...]]:
        """The attributes that must change with a cut, the constraints on counts, and the conditions."""
        self._tie_plain()
        self._tie_formulas()
        constraints = []
        for left, right, where, spot in self._equalities():
            a, b = self._resolved(left), self._resolved(right)
            if not self._differ(a, b):
                continue
            tie = self._written(spot, left, right.dim, where) if spot is not None else None
            if isinstance(left, Constant):  # without an attribute the dry run will tell
                known = self._ties.setdefault((tie.module, tie.attribute, None), tie) if tie else None
                if known is None or not self._differ(known.length, b):
                    continue
                a, tie = known.length, None
            reason = f"{in_words(left)} where {in_words(right)} is expected"
            if isinstance(left, Length) and isinstance(right, Length):
                reason = f"with two lengths of {left.dim.size} that have to agree"
            elif isinstance(left, Operation) and left.name == "mod" and right == Constant(0):
                reason = f"{in_words(left.left)}, which has to stay a multiple of {in_words(left.right)}"
            elif isinstance(right, Constant):
                reason = f"a number from {in_words(left)}, which has to stay {in_words(right)}"
            constraints.append(CountConstraint.of(a, b, reason, where, (tie,) if tie else ()))
        return tuple(self._ties.values()), tuple(_distinct(constraints)), tuple(self._conditions())

    def _conditions(self) -> list[CountCondition]:
        """The comparisons that must come out as they did, so that `forward` takes the path that it took."""
        found: dict[Any, CountCondition] = {}
        for each in self._tracer.book.compared:
            if each.name == "eq" and each.outcome:
                continue
            a, b = self._resolved(each.left), self._resolved(each.right)
            pair = CountConstraint.of(a, b, "", "")
            if pair.groups:
                reason = f"{in_words(each.left)} {sign_of(each.name)} {in_words(each.right)}"
                condition = CountCondition(each.name, each.outcome, a, b, pair.groups, reason, each.where)
                found.setdefault((each.name, each.outcome, _form(a), _form(b)), condition)
        return list(found.values())

    def _counted_dim(self, dim: Dim) -> Counted:
        units = self._unit_factors(dim)
        key = (dim.size, *map(id, units))  # equal arrays are one
        if key not in self._counted:
            self._counted[key] = Counted.of(dim.size, units, self._group_of, self._sizes)
        return self._counted[key]

    def _written(self, spot: Spot, stated: Any, dim: Dim, where: str) -> SizeTie | None:
        """The attribute that can take the place of what a call is given; None where none can."""
        if spot.key in self._tracer.refused or self._tracer.given[spot.key] != {dim.size}:
            return None
        found = spot.written(dim.size, None if isinstance(stated, Constant) else stated)
        if found is None:
            return None
        size, value = found
        attribute = Attribute(size.module, size.attribute, None, value)
        return SizeTie(
            module=size.module,
            attribute=size.attribute,
            position=None,
            value=value,
            length=self._counted_dim(dim),
            expression=None
            if value == dim.size
            else Operation("mul", attribute, Constant(dim.size // value)),
            written=size,
            where=where,
            spot=spot.key,
        )

    def _equalities(self) -> Iterator[tuple[Any, Any, str, Spot | None]]:
        """All pairs of expressions that must have one value."""
        for each in self._tracer.statements:
            yield each.expression, Length(each.dim), each.where, each.spot
        for compared in self._tracer.book.compared:
            if compared.name == "eq" and compared.outcome:
                yield compared.left, compared.right, compared.where, None

    # -- attributes -------------------------------------------------------------------------------

    def _tie_plain(self) -> None:
        """Tie the attributes that are themselves stated as, or compared with, a length that can change."""
        for left, right, *_ in self._equalities():
            for one, other in ((left, right), (right, left)):
                if isinstance(one, Attribute) and isinstance(other, Length):
                    self._stated.add(one.key)
                    length = self._counted_dim(other.dim)
                    if length.units:
                        self._tie(one, length)

    def _tie_formulas(self) -> None:
        """Tie the attributes that are only ever stated as a part of a formula, such as ``3 * self.dim``."""
        for each in self._tracer.statements:
            if not isinstance(each.expression, Operation):
                continue
            length = self._counted_dim(each.dim)
            unknown = [a for a in attributes_in(each.expression) if a.key not in self._stated]
            if len(unknown) == 1 and length.units and unknown[0].key not in self._ties:
                as_it_is = self._resolved(each.expression)
                if self._differ(as_it_is, length):
                    self._tie(unknown[0], length, replaced(each.expression, self._leaf_but(unknown[0].key)))

    def _tie(self, attribute: Attribute, length: Counted, expression: Any = None) -> None:
        self._ties.setdefault(
            attribute.key,
            SizeTie(
                module=attribute.module,
                attribute=attribute.attribute,
                position=attribute.position,
                value=attribute.value,
                length=length,
                expression=expression,
            ),
        )

    # -- expressions ------------------------------------------------------------------------------

    def _resolved(self, expression: Any) -> Any:
        """An expression over lengths that can change; everything else in it is a constant."""
        if isinstance(expression, Constant):
            return expression
        return replaced(expression, self._leaf)

    def _leaf(self, leaf: Any) -> Any:
        if isinstance(leaf, Length):
            length = self._counted_dim(leaf.dim)
            return length if length.units else Constant(length.size)
        tie = self._ties.get(leaf.key)
        if tie is None:
            return Constant(leaf.value)
        return tie.length if tie.expression is None else tie

    def _leaf_but(self, unknown: _Key) -> Callable[[Any], Any]:
        """Resolve every leaf but one attribute."""

        def leaf(each: Any) -> Any:
            return each if isinstance(each, Attribute) and each.key == unknown else self._leaf(each)

        return leaf

    def _differ(self, a: Any, b: Any) -> bool:
        """Whether some cut makes two resolved expressions differ."""
        if isinstance(a, Counted) and isinstance(b, Counted):
            if _same(a.units, b.units):
                return False
            if _is_simple(a) and _is_simple(b) and (a.terms, a.fixed) != (b.terms, b.fixed):
                return True  # small groups might by chance keep as many in every trial
        if isinstance(a, Constant) and isinstance(b, Counted):
            return bool(b.groups)
        pair = CountConstraint.of(a, b, "", "")
        return bool(pair.groups) and not all(pair.holds(gone) for gone in self._masks())

    def _masks(self) -> Iterator[npt.NDArray[np.bool_]]:
        """A few cuts of all groups, by shares that differ."""
        random = np.random.default_rng(0)
        for _ in range(_TRIALS if len(self._group_of) > _MANY else _MORE_TRIALS):
            gone = np.zeros(len(self._group_of) + 1, np.bool_)
            share = random.uniform(0.2, 0.8, len(self._sizes))
            gone[:-1] = random.uniform(size=len(self._group_of)) < share[self._group_of]
            gone[np.cumsum(self._sizes) - 1] = False  # every group keeps a unit
            yield gone


def _is_simple(length: Counted) -> bool:
    """Whether each unit of it is one of a single group, so that counts alone say how long it is."""
    return all(len(groups) == 1 for _, groups in length.terms)


def _same(one: Sequence[Indices], other: Sequence[Indices]) -> bool:
    return len(one) == len(other) and all(a is b for a, b in zip(one, other, strict=True))


def _distinct(constraints: Sequence[CountConstraint]) -> list[CountConstraint]:
    """Constraints without those that read the same dimensions in the same way, which need all attributes."""
    found: dict[Any, CountConstraint] = {}
    for each in constraints:
        form = _form(each.left), _form(each.right)
        first = found.setdefault(form, each)
        if first is not each:
            instead = (*first.instead, *each.instead) if first.instead and each.instead else ()
            found[form] = replace(first, instead=instead)
    return list(found.values())


def _form(expression: Any) -> Any:
    """An expression as something that compares equal where the counts that it reads are the same."""
    if isinstance(expression, Operation):
        return expression.name, _form(expression.left), _form(expression.right)
    if isinstance(expression, Counted):
        return expression.size, expression.fixed, expression.terms
    if isinstance(expression, SizeTie):
        return expression.module, expression.attribute, expression.position
    return expression.value


def stuck_groups(graph: Graph) -> list[tuple[Group, CountConstraint | CountCondition]]:
    """The groups that nothing allowed makes smaller, each with a constraint or condition to blame.

    Where only attributes that stand in for the model's own code would let a group shrink, and the same
    dimensions can be cut another way without, it is locked too, as the halves of a channel shuffle are. Heads
    and their dimensions are not: one may ask for either.
    """
    rules: list[CountConstraint | CountCondition] = [*graph.constraints, *graph.conditions]
    stuck, last = graph.stuck(graph.counts.loosened), graph.last_resort
    return [
        (group, next(each for each in rules if place in each.groups))
        for place, group in enumerate(graph.groups)
        if group.name in stuck
        or (group.name in last and group.kind not in _ASKED_FOR and not last.issuperset(group.crosses))
    ]
