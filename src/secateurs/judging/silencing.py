"""What it takes to silence one unit: in the weights, as `secateurs.verify` does it, or in what they read."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property

import numpy as np
from torch import Tensor

from secateurs.graph.groups import Graph, Group, UnitRead
from secateurs.surgery.silence import zeroed


class Silencing:
    """How the units of a graph are silenced.

    Args:
        graph: The graph.
    """

    def __init__(self, graph: Graph) -> None:
        self._graph = graph
        self._readers = {
            (part.parameter, part.dim) for group in graph.groups for part in group.slices if part.consumes
        }
        self._bare = frozenset(graph.bare_units.tolist())

    def zeroed(self, tensors: Mapping[str, Tensor], group: Group, unit: int) -> dict[str, Tensor]:
        """The weights that change when one unit is silenced, with zeros where they read it.

        Args:
            tensors: The model's parameters and buffers by name.
            group: The unit's group.
            unit: Its index in the group.

        Returns:
            Changed copies by name.
        """
        places = [
            (part.parameter, part.dim, part.indices[unit])
            for part in group.slices
            if group.first in self._bare or (part.parameter, part.dim) in self._readers
        ]
        return zeroed(tensors, places)

    def reads(self, group: Group) -> list[UnitRead]:
        """The calls in which weights read the group's units."""
        return self._reads.get(group.name, [])

    @cached_property
    def _reads(self) -> dict[str, list[UnitRead]]:
        firsts = np.array([group.first for group in self._graph.groups])
        found: dict[str, list[UnitRead]] = {}
        for read in self._graph.reads:
            units = np.unique(read.units[read.units >= 0])
            for place in np.unique(np.searchsorted(firsts, units, "right") - 1):
                found.setdefault(self._graph.groups[place].name, []).append(read)
        return found

    def cannot(self, group: Group) -> str | None:
        """Why the group's units cannot be silenced at all, if so."""
        if group.first in self._bare or any(part.consumes for part in group.slices):
            return None
        return "no weights read its units"

    def not_replayed(self, group: Group) -> str | None:
        """Why the group's units cannot be silenced in what is read, if so."""
        if group.first in self._bare:
            return "its units are multiplied with each other, so the weights that make them are silenced"
        return None if self.reads(group) else "no call of its own reads its units"
