"""Counts that satisfy every constraint: those nearest to what a plan wants, by propagation and search.

Constraints that share a group form a component, whose groups shrink together, each by about the same share.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from secateurs.graph.counts import CountCondition, CountConstraint, Indices

_MOST_BRANCHES = 12


class CountSystem:
    """All constraints of a graph, and counts that satisfy them.

    Args:
        sizes: The number of units of each group.
        constraints: Counts that must agree.
        conditions: Comparisons that must come out as they did.
    """

    def __init__(
        self,
        sizes: Sequence[int],
        constraints: Sequence[CountConstraint],
        conditions: Sequence[CountCondition] = (),
    ) -> None:
        self._sizes = [int(size) for size in sizes]
        self._conditions = list(conditions)
        self.components = _components(constraints)

    def loosened(self, free: Sequence[bool]) -> CountSystem:
        """The same without constraints that attributes can stand in for, where these let nothing leave.

        Args:
            free: Which groups may lose units at all.
        """
        multiples = [1] * len(self._sizes)
        kept: list[CountConstraint] = []
        for component, constraints in self.components:
            is_free = any(free[group] for group in component)
            is_tied = is_free and any(each.instead for each in constraints)
            if is_tied and self._nearest(component, constraints, 0.5, free, multiples, lower=True) is None:
                constraints = [each for each in constraints if not each.instead]
            kept += constraints
        return CountSystem(self._sizes, kept, self._conditions)

    @property
    def is_loose(self) -> bool:
        """Whether attributes can stand in for a constraint."""
        return any(each.instead for _, constraints in self.components for each in constraints)

    def bound(self) -> CountSystem:
        """The same without any constraint that attributes can stand in for."""
        kept = [each for _, constraints in self.components for each in constraints if not each.instead]
        return CountSystem(self._sizes, kept, self._conditions)

    def settle(
        self,
        kept: Sequence[int],
        free: Sequence[bool],
        multiples: Sequence[int],
        *,
        lower: bool = False,
    ) -> list[int]:
        """Counts near the wanted ones that satisfy every constraint.

        Args:
            kept: The wanted number of units of each group.
            free: Which groups may lose units at all.
            multiples: What the count of each group is to be a multiple of, unless it keeps all.
            lower: Where nothing at or above the wanted counts is possible, whether to go below them.

        Returns:
            The counts; a component whose groups cannot shrink together keeps all of its units.
        """
        wanted = list(kept)
        while True:
            result = self._agreeing(wanted, free, multiples, lower)
            broken = [each for each in self._conditions if not each.holds_for(result)]
            raised = {g for each in broken for g in each.groups if free[g] and result[g] < self._sizes[g]}
            if not raised:
                return result
            for group in raised:  # one more of each is kept, until the comparison comes out as it did
                wanted[group] = min(max(wanted[group], result[group]) + multiples[group], self._sizes[group])

    def _agreeing(
        self, kept: Sequence[int], free: Sequence[bool], multiples: Sequence[int], lower: bool
    ) -> list[int]:
        """Counts near the wanted ones that satisfy every constraint, whatever the conditions."""
        result = [int(k) if f else size for k, f, size in zip(kept, free, self._sizes, strict=True)]
        for component, constraints in self.components:
            if all(each.holds_for(result) for each in constraints):
                continue
            wanted = sum(result[g] for g in component if free[g])
            whole = sum(self._sizes[g] for g in component if free[g])
            found = None
            if whole:
                found = self._nearest(component, constraints, wanted / whole, free, multiples, lower)
            for group in component:
                result[group] = self._sizes[group] if found is None else found[group]
        return result

    def _nearest(
        self,
        component: Sequence[int],
        constraints: Sequence[CountConstraint],
        share: float,
        free: Sequence[bool],
        multiples: Sequence[int],
        lower: bool,
    ) -> dict[int, int] | None:
        """The solution with the least share of units at or above the given one."""
        times = {g: sum(g in each.groups for each in constraints) for g in component if free[g]}
        master = max(times, key=lambda g: (times[g], self._sizes[g], -g))
        values = _allowed(self._sizes[master], multiples[master])
        start = min(int(np.searchsorted(values, share * self._sizes[master] - 1e-9)), len(values) - 1)
        order = [*range(start, len(values) - 1)]
        if lower:
            order += [*range(start - 1, -1, -1)]
        for place in order:
            count = int(values[place])
            fixed = {g: self._sizes[g] for g in component if not free[g]}
            found = self._complete(
                {**fixed, master: count},
                component,
                constraints,
                count / self._sizes[master],
                multiples,
            )
            if found is not None:
                return found
        return None

    def _complete(
        self,
        known: dict[int, int],
        component: Sequence[int],
        constraints: Sequence[CountConstraint],
        share: float,
        multiples: Sequence[int],
    ) -> dict[int, int] | None:
        """Give every group of a component a count near a share of its size, by propagation and search."""
        reached = self._propagated(known, constraints, share, multiples)
        if reached is None:
            return None
        known, pending = reached
        if not pending:
            return {g: known.get(g, self._sizes[g]) for g in component}
        unknown = {g for each in pending for g in each.groups if g not in known}
        group = max(unknown, key=lambda g: (self._sizes[g], -g))
        values = _allowed(self._sizes[group], multiples[group])
        near = values[np.argsort(np.abs(values - share * self._sizes[group]), kind="stable")]
        for value in near[:_MOST_BRANCHES].tolist():
            found = self._complete({**known, group: value}, component, pending, share, multiples)
            if found is not None:
                return found
        return None

    def _propagated(
        self,
        known: dict[int, int],
        constraints: Sequence[CountConstraint],
        share: float,
        multiples: Sequence[int],
    ) -> tuple[dict[int, int], list[CountConstraint]] | None:
        """The counts that follow from known ones, and the constraints that leave several open.

        None where a constraint cannot hold.
        """
        known = dict(known)
        counts: list[Any] = [known.get(group, size) for group, size in enumerate(self._sizes)]
        pending, is_moving = list(constraints), True
        while is_moving:
            rest = []
            for each in pending:
                unknown = [g for g in each.groups if g not in known]
                if len(unknown) > 1:
                    rest.append(each)
                elif unknown:
                    group = unknown[0]
                    found = each.solutions(counts, group, _allowed(self._sizes[group], multiples[group]))
                    if not found.size:
                        return None
                    best = int(found[np.argmin(np.abs(found - share * self._sizes[group]))])
                    known[group] = counts[group] = best
                elif not each.holds_for(counts):
                    return None
            is_moving = len(rest) < len(pending)
            pending = rest
        return known, pending


def _allowed(size: int, multiple: int) -> Indices:
    """The counts that a group of this size may have, ascending; all of it is always one."""
    values = np.arange(multiple, size + 1, multiple, dtype=np.int64)
    return values if values.size and values[-1] == size else np.append(values, size)


def _components(
    constraints: Sequence[CountConstraint],
) -> list[tuple[tuple[int, ...], list[CountConstraint]]]:
    """Constraints that share groups, with all of their groups."""
    found: list[tuple[set[int], list[CountConstraint]]] = []
    for each in constraints:
        touching = [entry for entry in found if entry[0] & each.groups]
        groups, members = set(each.groups), [each]
        for entry in touching:
            groups |= entry[0]
            members = entry[1] + members
            found.remove(entry)
        found.append((groups, members))
    return [(tuple(sorted(groups)), members) for groups, members in found]
