"""Numbers of units that are possible: rounded, enough left, tied counts agreeing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import lcm
from typing import TypeAlias

from secateurs.graph.groups import Graph, Group

Counts: TypeAlias = dict[str, int]


class Fit:
    """Turns wanted cuts into ones that are possible: rounded, enough units left, tied counts agreeing.

    Args:
        graph: The graph.
        groups: Those of its groups that may be cut.
        round_to: What a group's count is a multiple of; heads and whole convolution groups are not rounded,
            since they are not the width of anything.
        least: What a group keeps at least, by name; one unit where nothing is said.
        blocks: What the counts of single groups are to be multiples of besides, by name.
    """

    def __init__(
        self,
        graph: Graph,
        groups: Sequence[Group],
        round_to: int,
        least: Mapping[str, int] | None = None,
        blocks: Mapping[str, int] | None = None,
    ) -> None:
        self._graph, self._groups, self._least = graph, groups, least or {}
        self._multiples = {
            g.name: 1
            if g.kind in ("head", "conv_group", "branch")
            else lcm(round_to, (blocks or {}).get(g.name, 1))
            for g in groups
        }
        self._free = [group.name in self._multiples for group in graph.groups]
        self._counts = graph.counts.loosened(self._free)
        self._known: dict[tuple[int, ...], Counts] = {}

    def __call__(self, wanted: Sequence[int]) -> Counts:
        """The number of units that leave, by group, for the numbers that are to leave."""
        key = tuple(int(count) for count in wanted)
        if key not in self._known:
            self._known[key] = self._settled(key)
        return self._known[key]

    def least(self, name: str) -> int:
        """What the group keeps at least."""
        return self._least.get(name, 1)

    def multiple(self, name: str) -> int:
        """What the number of units that the group keeps is a multiple of."""
        return self._multiples[name]

    def _settled(self, wanted: Sequence[int]) -> Counts:
        counts = {}
        for group, count in zip(self._groups, wanted, strict=True):
            multiple = self._multiples[group.name]
            kept = -(-max(group.size - count, self.least(group.name)) // multiple) * multiple
            counts[group.name] = group.size - min(kept, group.size)
        if not (self._graph.constraints or self._graph.conditions):
            return counts
        kept_all = [group.size - counts.get(group.name, 0) for group in self._graph.groups]
        multiples = [self._multiples.get(group.name, 1) for group in self._graph.groups]
        settled = self._agreeing(kept_all, multiples)
        found = {g.name: g.size - kept for g, kept in zip(self._graph.groups, settled, strict=True)}
        return {name: found[name] for name in counts}

    def _agreeing(self, kept: list[int], multiples: Sequence[int]) -> list[int]:
        """Tied counts that agree, none below its least: what settles too low is asked for again with more."""
        while True:
            settled = self._counts.settle(kept, self._free, multiples)
            short = {
                place
                for place, group in enumerate(self._graph.groups)
                if settled[place] < self._least.get(group.name, 1)
            }
            if not short:
                return settled
            for component, _ in self._counts.components:
                for place in component if short & set(component) else ():
                    size = self._graph.groups[place].size
                    kept[place] = min(max(kept[place], settled[place]) + multiples[place], size)
