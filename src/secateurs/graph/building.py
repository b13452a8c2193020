"""From a finished trace to a `Graph`: units are numbered, grouped by signature, named and costed."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from math import isclose
from typing import Any, cast

import numpy as np

from secateurs.graph.costing import costs_of, work_of
from secateurs.graph.counts import Counted, Rescaling
from secateurs.graph.expressions import Constant
from secateurs.graph.groups import (
    NO_UNIT,
    Graph,
    Group,
    Indices,
    Kind,
    Locked,
    Role,
    Slice,
    group_names,
)
from secateurs.graph.integers import Comparison
from secateurs.graph.labels import Dim, Labels
from secateurs.graph.numbering import UnitNumbers
from secateurs.graph.reads import unit_products, unit_reads
from secateurs.graph.records import ParameterDim
from secateurs.graph.sizes import SizeReader, stuck_groups
from secateurs.graph.tracing import Tracer

_STRONGER = {("branch", "head"), ("head_dim", "branch")}
_POWERS = (1, -1, 0.5, -0.5, 2, 0.25, -0.25)


class GroupBuilder:
    """Turns a finished trace into a `Graph`; can be called again after more labels were locked."""

    def __init__(
        self,
        tracer: Tracer,
        shapes: Mapping[str, tuple[int, ...]],
        widths: Mapping[str, int],
        batch: int,
        fingerprint: str,
    ) -> None:
        self._tracer = tracer
        self._labels: Labels = tracer.labels
        self.values, self.device = tracer.values, tracer.device
        self.acts_on_calls = tracer.acts_on_calls
        self._pinned: set[float] = set()
        self._shapes, self._widths = shapes, widths
        self._batch, self._fingerprint = batch, fingerprint

    def build(self) -> Graph:
        """The graph of what is not locked, without groups that the traced pass never computes."""
        graph = self._build()
        while self.is_stale or self._lock_stuck(graph):
            graph = self._build()
        idle = [
            (group, reason)
            for group in graph.groups
            for names, reason in (
                (self._tracer.passed_over, "the example does not come to it"),
                (self._tracer.elsewhere, "only the other mode (training or evaluation) uses it"),
                (self._tracer.buffers, "only buffers hold it"),
            )
            if all(part.parameter in names for part in group.slices)
        ]
        idle += [
            (group, "a buffer that no file holds makes it, which the model may make anew")
            for group in graph.groups
            if any(part.parameter in self._tracer.unsaved for part in group.slices)
            and all(self._makes_nothing(part) for part in group.slices)
        ]
        for group, reason in idle:
            self.lock(group, reason, "")
        return self._build() if idle else graph

    def _makes_nothing(self, part: Slice) -> bool:
        """Whether a slice is of a buffer, or only reads units."""
        return part.parameter in self._tracer.buffers or (part.role != "producer" and part.dim > 0)

    @property
    def is_stale(self) -> bool:
        """Whether something was locked or refused since, as when a contradiction is found."""
        return (len(self._labels.reasons), len(self._tracer.refused)) != self._known

    def _build(self) -> Graph:
        """Collect the units, put those with one signature into a group, and translate the trace."""
        dims = self._tracer.parameter_dims
        self._numbers = UnitNumbers(self._labels, [place.labels for place in dims])
        self._known = len(self._labels.reasons), len(self._tracer.refused)
        groups = self._groups(dims)
        ties, constraints, conditions = SizeReader(
            self._tracer, groups, self._numbers.groups, self.unit_factors
        ).read()
        axes = tuple((p.parameter, p.dim, units) for p in dims if (units := self.unit_factors(p.labels)))
        return Graph(
            groups=groups,
            locked=tuple(self._locked(p) for p in dims if p.size > 1 and not self.unit_factors(p.labels)),
            fingerprint=self._fingerprint,
            parameters=self._shapes,
            units=self._numbers.count,
            ties=ties,
            constraints=constraints,
            conditions=conditions,
            reads=unit_reads(self._tracer.reads, self.unit_factors, self._numbers.count, batch=self._batch),
            products=unit_products(self._tracer, self.unit_factors, self._numbers.count),
            bare_units=self._bare(),
            mixers=self._mixers(groups),
            axes=axes,
            costs=costs_of(self._tracer, self._shapes, self._widths, self._batch, self.unit_factors),
            work=work_of(self._tracer, self.unit_factors),
            unknown=dict(self._tracer.unknown),
            example_only=tuple(self._tracer.example_only),
            path=tuple(each.signature for each in self._tracer.called) if self._tracer.example_only else (),
            state=dict(self._tracer.own_state),
            rescalings=self._rescalings(groups),
        )

    # -- units ------------------------------------------------------------------------------------

    def unit_factors(self, dim: Dim) -> tuple[Indices, ...]:
        """A dimension's factors as unit numbers, for dimensions of any tensor of the trace."""
        return self._numbers.factors(dim)

    def lock(self, group: Group, reason: str, where: str) -> None:
        """Lock a group for a reason found after the trace; it is gone at the next `build`."""
        self._labels.reasons.append((reason, where))
        atoms = self._numbers.atoms[group.first : group.first + group.size]
        self._labels.lock_labels(atoms, len(self._labels.reasons) - 1)

    # -- groups -----------------------------------------------------------------------------------

    def _groups(self, dims: Sequence[ParameterDim]) -> tuple[Group, ...]:
        sizes = np.bincount(self._numbers.groups) if self._numbers.count else np.empty(0, np.int64)
        firsts = (
            np.concatenate([[0], np.cumsum(sizes)[:-1]]) if self._numbers.count else np.empty(0, np.int64)
        )
        slices: list[list[Slice]] = [[] for _ in sizes]
        known: dict[tuple[int, ...], list[tuple[int, Indices]]] = {}  # one entry for all that are cut alike
        crossing: list[set[int]] = [set() for _ in sizes]
        for number, place in enumerate(dims):
            factors = self.unit_factors(place.labels)
            key = tuple(map(id, factors))
            if key not in known:
                known[key] = self._by_group(factors, sizes)
            for group, indices in known[key]:
                slices[group].append(
                    Slice(
                        parameter=place.parameter,
                        dim=place.dim,
                        role=self._role(number),
                        indices=indices,
                        consumes="consumer" in self._tracer.roles.get(number, ()),
                    )
                )
            for one, other in _crossings(factors, self._numbers.groups):
                crossing[one].add(other)
                crossing[other].add(one)
        kinds = self._named_kinds()
        names = _unique_names([_group_name(parts) for parts in slices])
        return tuple(
            Group(
                name=names[g],
                kind=self._kind(slices[g], kinds.get(g)),
                size=int(sizes[g]),
                slices=tuple(slices[g]),
                first=int(firsts[g]),
                crosses=tuple(names[other] for other in sorted(crossing[g])),
            )
            for g in range(len(sizes))
        )

    def _by_group(self, factors: Sequence[Indices], sizes: Indices) -> list[tuple[int, Indices]]:
        """For each group in a dimension the places of its units, ``(units, count)``."""
        if not factors:
            return []
        if len(factors) == 1:
            units, places = factors[0], np.arange(len(factors[0]))
        else:
            pairs = np.concatenate([np.stack([factor, np.arange(len(factor))]) for factor in factors], axis=1)
            units, places = np.unique(pairs, axis=1)
        order = np.argsort(units, kind="stable")
        order = order[np.count_nonzero(units == NO_UNIT) :]
        groups = self._numbers.groups[units[order]]  # ascending, as the units of a group stand side by side
        opening = np.flatnonzero(np.diff(groups, prepend=-1))
        parts = np.split(places[order], opening[1:])
        return [
            (g, part.reshape(int(sizes[g]), -1))
            for g, part in zip(groups[opening].tolist(), parts, strict=True)
        ]

    def _role(self, number: int) -> Role:
        roles = self._tracer.roles.get(number, set())
        return "producer" if "producer" in roles else "consumer" if "consumer" in roles else "carrier"

    def _named_kinds(self) -> dict[int, Kind]:
        """Kinds that the rules know of, by group: the first, but heads before branches before head dims.

        Heads may have a matrix each, as branches do, and the sum over branches looks like one over a head.
        """
        found: dict[int, Kind] = {}
        for dim, kind in self._tracer.kinds:
            for factor in self.unit_factors(dim):
                units = factor[factor != NO_UNIT]
                for group in np.unique(self._numbers.groups[units]).tolist():
                    if group not in found or (found[group], kind) in _STRONGER:
                        found[group] = cast(Kind, kind)
        return found

    def _kind(self, parts: Sequence[Slice], named: Kind | None) -> Kind:
        if named == "head_dim" and all(part.role == "carrier" for part in parts):
            return "position"  # no weight makes or reads it: attention sums over tokens that are learned
        if named is not None:
            return named
        producers = [part for part in parts if part.role == "producer"] or list(parts)
        if any(len(self._shapes[part.parameter]) > 2 for part in producers):
            return "channel"
        return "neuron"

    # -- the rest of the trace, in unit numbers ----------------------------------------------------

    def _locked(self, place: ParameterDim) -> Locked:
        reason, source = "it is part of a single unit", ""
        for factor in place.labels.factors:
            known = int(self._labels.why(factor).max())
            if known > 0:
                reason, source = self._labels.reasons[known]
        module = place.parameter.rpartition(".")[0]
        return Locked(
            name=module,
            parameter=place.parameter,
            dim=place.dim,
            size=place.size,
            reason=reason,
            source=source,
        )

    def _lock_stuck(self, graph: Graph) -> bool:
        """Lock the groups whose constraints leave them no smaller count; whether there are any."""
        stuck = stuck_groups(graph)
        for group, each in stuck:
            self.lock(group, f"forward computes {each.reason}", each.where)
        return bool(stuck)

    def _bare(self) -> Indices:
        """Units that are summed over without weights, so that only their producers can silence them."""
        found = [factor for dim in self._tracer.bare for factor in self.unit_factors(dim)]
        units = np.unique(np.concatenate(found)) if found else np.empty(0, np.int64)
        bare: Indices = units[units != NO_UNIT]
        return bare

    def _mixers(self, groups: Sequence[Group]) -> dict[str, str]:
        found: dict[str, str] = {}
        for dim, operator in self._tracer.mixed:
            for name in group_names(groups, self.unit_factors(dim)):
                found.setdefault(name, operator)
        return found

    def _rescalings(self, groups: Sequence[Group]) -> tuple[Rescaling, ...]:
        """What makes up for scales that are derived from lengths, as far as these can change."""
        sizes = np.asarray([group.size for group in groups], np.int64)
        return tuple(
            Rescaling(Counted.of(dim.size, units, self._numbers.groups, sizes), places)
            for dim, places in self._tracer.rescalings
            if (units := self.unit_factors(dim))
        )

    def refuse(self, spots: Iterable[Any]) -> None:
        """Let no attributes take the place of sizes at these places; the graph is stale then."""
        self._tracer.refused.update(spots)

    def pin(self, number: float, where: str) -> bool:
        """Keep the integers from which `forward` computed a number as they are.

        Returns:
            Whether such integers are known, and were not kept already.
        """
        found = [
            Comparison("eq", expression, Constant(round(value)), True, where)
            for expression, value in self._tracer.book.floats
            if any(isclose(number, value**power, rel_tol=1e-9) for power in _POWERS if value > 0)
        ]
        if not found or number in self._pinned:
            return False
        self._pinned.add(number)
        self._tracer.book.compared += found
        return True


def _group_name(parts: Sequence[Slice]) -> str:
    chosen = next((part for part in parts if part.role == "producer"), parts[0])
    module, _, leaf = chosen.parameter.rpartition(".")
    return module if module and leaf in ("weight", "bias") else chosen.parameter


def _unique_names(names: Sequence[str]) -> list[str]:
    used: dict[str, int] = {}
    result = []
    for name in names:
        used[name] = used.get(name, 0) + 1
        result.append(name if used[name] == 1 else f"{name}#{used[name]}")
    return result


def _crossings(factors: Sequence[Indices], unit_group: Indices) -> set[tuple[int, int]]:
    """Pairs of groups that claim the same indices of a dimension."""
    found: set[tuple[int, int]] = set()
    for place, one in enumerate(factors):
        for other in factors[place + 1 :]:
            both = (one != NO_UNIT) & (other != NO_UNIT)
            pairs = np.unique(np.stack([unit_group[one[both]], unit_group[other[both]]]), axis=1)
            found |= {(int(a), int(b)) for a, b in pairs.T if a != b}
    return found
