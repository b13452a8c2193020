"""A plan: which units leave, as data that prints, saves, compares and composes."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from secateurs.errors import PlanError
from secateurs.files import whole_file
from secateurs.graph.cost import Cost
from secateurs.graph.counts import CountCondition, CountConstraint
from secateurs.graph.groups import Graph, Removed, removed_places
from secateurs.graph.rewriting import WrittenSize
from secateurs.planning.parts import (
    AxisCut,
    Factors,
    GroupCut,
    IntegerChange,
    RowScale,
    as_scales,
    compose_axes,
    compose_groups,
    compose_scales,
)

_FORMAT = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """A decision, before any action: what leaves, for which architecture, and what that saves.

    Args:
        fingerprint: Hash of the names and shapes of the model that the plan fits.
        groups: What each group loses; groups that lose nothing are left out.
        axes: The same for every dimension of every parameter.
        integers: Attributes of modules that change with it.
        before: Cost of the model.
        after: Forecast of the pruned model's cost.
        source: Where the plan came from: criterion, budget, scope, ...
        rescaled: Rows that are multiplied by a factor.
        written: Sizes in the code of modules that attributes take the place of; `integers` has their values.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> import secateurs
        >>> net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3))
        >>> graph = secateurs.trace(net, torch.zeros(1, 3, 8, 8))
        >>> cut = secateurs.Plan.of(graph, {"0": [1, 5]})
        >>> cut.groups[0].removed, cut.before.params, cut.after.params
        ((1, 5), 516, 388)
    """

    fingerprint: str
    groups: tuple[GroupCut, ...]
    axes: tuple[AxisCut, ...]
    integers: tuple[IntegerChange, ...]
    before: Cost
    after: Cost
    source: Mapping[str, Any] = field(default_factory=dict)
    rescaled: tuple[RowScale, ...] = ()
    written: tuple[WrittenSize, ...] = ()

    def __len__(self) -> int:
        """Units that leave."""
        return sum(len(group.removed) for group in self.groups)

    def __repr__(self) -> str:
        params, macs = self.after.share_of(self.before)
        return f"Plan({len(self)} units leave; params {params:.1%}, macs {macs:.1%} remain)"

    @classmethod
    def of(cls, graph: Graph, removed: Removed, source: Mapping[str, Any] | None = None) -> Plan:
        """The plan that removes the given units.

        Args:
            graph: The graph of the model.
            removed: Indices of the units that leave, by group name.
            source: Where the decision came from; kept with the plan.

        Raises:
            PlanError: A group is unknown, an index out of range, a group would lose every unit, or counts
                that the model's own code derives from one another would not agree.
        """
        chosen = {name: _checked(graph, name, indices) for name, indices in removed.items() if len(indices)}
        gone = graph.mask(chosen)
        _check_counts(graph, gone)
        cuts = tuple(
            GroupCut(
                name=g.name,
                kind=g.kind,
                size=g.size,
                removed=chosen[g.name],
                mixed_by=graph.mixed_by(g),
            )
            for g in graph.groups
            if g.name in chosen
        )
        needed = [tie for tie in graph.ties if tie.after(gone) != tie.value]
        needed += graph.stand_ins(gone)
        integers = tuple(
            IntegerChange(
                module=t.module,
                attribute=t.attribute,
                position=t.position,
                before=t.value,
                after=t.after(gone),
            )
            for t in needed
        )
        return cls(
            fingerprint=graph.fingerprint,
            groups=cuts,
            axes=tuple(_axes(graph, gone)),
            integers=integers,
            before=graph.cost(),
            after=graph.costs.evaluate(gone),
            source=dict(source or {}),
            rescaled=_row_scales(graph, gone),
            written=tuple(tie.written for tie in needed if tie.written is not None),
        )

    def then(self, following: Plan) -> Plan:
        """This cut and then another one, made on the result, as one cut of the first model.

        Args:
            following: A plan for the model that this plan gives.

        Returns:
            A plan for this plan's model.
        """
        axes = {(axis.parameter, axis.dim): axis for axis in self.axes}
        for axis in following.axes:
            key = (axis.parameter, axis.dim)
            earlier = axes.get(key)
            axes[key] = axis if earlier is None else compose_axes(earlier, axis)
        groups = list(self.groups)
        for group in following.groups:  # numbered names move up where a group is down to one unit
            alike = (group.name, group.size)
            same = [n for n, known in enumerate(groups) if (known.name, known.kept) == alike]
            if same:
                groups[same[0]] = compose_groups(groups[same[0]], group)
            else:
                groups.append(group)
        integers = {(c.module, c.attribute, c.position): c for c in self.integers}
        for change in following.integers:
            key3 = (change.module, change.attribute, change.position)
            first = integers.get(key3, change)
            integers[key3] = IntegerChange(
                module=change.module,
                attribute=change.attribute,
                position=change.position,
                before=first.before,
                after=change.after,
            )
        return Plan(
            fingerprint=self.fingerprint,
            groups=tuple(groups),
            axes=tuple(axes.values()),
            integers=tuple(integers.values()),
            before=self.before,
            after=following.after,
            source={**self.source, **following.source},
            rescaled=compose_scales(
                self.rescaled,
                following.rescaled,
                earlier={(axis.parameter, axis.dim): axis for axis in self.axes},
                both=axes,
            ),
            written=tuple(dict.fromkeys((*self.written, *following.written))),
        )

    def to_json(self) -> str:
        """The plan as JSON, for people and for `from_json`."""
        return json.dumps({"format": _FORMAT, **asdict(self)}, indent=1)

    @classmethod
    def from_json(cls, text: str) -> Plan:
        """Read a plan back.

        Raises:
            PlanError: The text is not a plan that this release reads.
        """
        try:
            data = json.loads(text)
            if data.pop("format") != _FORMAT:
                raise ValueError("another format")
            return cls(
                fingerprint=str(data["fingerprint"]),
                groups=tuple(GroupCut(**{**g, "removed": tuple(g["removed"])}) for g in data["groups"]),
                axes=tuple(
                    AxisCut(**{**a, "removed": tuple(a["removed"]), "silenced": tuple(a["silenced"])})
                    for a in data["axes"]
                ),
                integers=tuple(IntegerChange(**change) for change in data["integers"]),
                before=Cost(**data["before"]),
                after=Cost(**data["after"]),
                source=data["source"],
                rescaled=tuple(
                    RowScale(**{**each, "indices": tuple(each["indices"])})
                    for each in data.get("rescaled", ())  # older plans rescale nothing
                ),
                written=tuple(WrittenSize(**each) for each in data.get("written", ())),
            )
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise PlanError(
                f"this is not a plan of format {_FORMAT}: {type(error).__name__}: {error}"
            ) from error

    def save(self, path: str | Path) -> None:
        """Write the plan as JSON; the file appears whole or not at all.

        Raises:
            RunError: The file cannot be written.
        """
        with whole_file(Path(path)) as temporary:
            temporary.write_text(self.to_json())

    @classmethod
    def load(cls, path: str | Path) -> Plan:
        """Read a plan from a JSON file.

        Raises:
            PlanError: The file is missing or not a plan.
        """
        try:
            text = Path(path).read_text()
        except (OSError, UnicodeDecodeError) as error:
            raise PlanError(f"cannot read a plan from {str(path)!r}: {error}", where=str(path)) from error
        return cls.from_json(text)


def _checked(graph: Graph, name: str, indices: Any) -> tuple[int, ...]:
    group = graph.by_name.get(name)
    if group is None:
        raise PlanError(f"the graph has no group {name!r}", fix=f"use one of: {', '.join(graph.by_name)}")
    chosen = tuple(sorted({int(index) for index in indices}))
    if chosen[0] < 0 or chosen[-1] >= group.size:
        raise PlanError(f"group {name!r} has units 0 to {group.size - 1}, got {chosen[0]} to {chosen[-1]}")
    if len(chosen) == group.size:
        raise PlanError(f"group {name!r} would lose all of its {group.size} units", fix="keep at least one")
    return chosen


def _check_counts(graph: Graph, gone: np.ndarray[Any, np.dtype[np.bool_]]) -> None:
    rules: tuple[CountConstraint | CountCondition, ...] = (*graph.constraints, *graph.conditions)
    for each in rules:
        if not each.holds(gone) and not getattr(each, "instead", ()):
            names = ", ".join(repr(graph.groups[place].name) for place in sorted(each.groups))
            problem = (
                f"the counts of {names} do not fit together: forward computes {each.reason}"
                if isinstance(each, CountConstraint)
                else f"with this count of {names} forward would take another path, at {each.reason}"
            )
            raise PlanError(problem, where=each.where, fix="let secateurs.plan choose the counts")


def _axes(graph: Graph, gone: np.ndarray[Any, np.dtype[np.bool_]]) -> list[AxisCut]:
    readers = {(p.parameter, p.dim) for group in graph.groups for p in group.slices if p.consumes}
    bare = np.zeros_like(gone)
    bare[graph.bare_units] = gone[graph.bare_units]
    known: dict[tuple[int, ...], tuple[tuple[int, ...], tuple[int, ...]]] = {}
    cuts = []
    for name, dim, units in graph.axes:
        size = graph.parameters[name][dim]
        key = tuple(map(id, units))  # dimensions that are cut alike hold the same arrays
        if key not in known:
            places = (removed_places(units, gone, size), removed_places(units, bare, size))
            known[key] = (_listed(places[0]), _listed(places[1]))
        removed, silenced = known[key]
        if removed:
            silenced = removed if (name, dim) in readers else silenced
            cuts.append(AxisCut(parameter=name, dim=dim, size=size, removed=removed, silenced=silenced))
    return cuts


def _row_scales(graph: Graph, gone: np.ndarray[Any, np.dtype[np.bool_]]) -> tuple[RowScale, ...]:
    """The rows that stay and are rescaled."""
    factors: Factors = {}
    lost = {
        (name, dim): removed_places(units, gone, graph.parameters[name][dim])
        for name, dim, units in graph.axes
    }
    for each in graph.rescalings:
        factor = each.factor(gone)
        for name, dim, indices in each.places if factor != 1 else ():
            leaving = lost.get((name, dim))
            staying = indices if leaving is None else indices[~leaving[indices]]
            factors.setdefault((name, dim), {}).update(dict.fromkeys(staying.tolist(), factor))
    return as_scales(factors)


def _listed(places: np.ndarray[Any, np.dtype[np.bool_]]) -> tuple[int, ...]:
    return tuple(np.flatnonzero(places).tolist())
