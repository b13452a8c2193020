"""From labels to units and groups: what can be cut, what goes with it, and what is locked and why."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from typing import Literal, TypeAlias

import numpy as np
import numpy.typing as npt
from torch import nn

from secateurs.graph.copying import registered_tensors, unsaved_buffers
from secateurs.graph.cost import Cost, CostModel, Work
from secateurs.graph.counts import CountCondition, CountConstraint, Mask, Rescaling, SizeTie
from secateurs.graph.paths import CallPath, Signature, numbers_along
from secateurs.graph.running import Inputs
from secateurs.graph.settling import CountSystem

Role: TypeAlias = Literal["producer", "carrier", "consumer"]
Kind: TypeAlias = Literal[
    "channel", "neuron", "embedding", "conv_group", "head", "head_dim", "branch", "position"
]
Indices: TypeAlias = npt.NDArray[np.int64]
Removed: TypeAlias = Mapping[str, Sequence[int] | Indices]
NO_UNIT = -1


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Slice:
    """Where the units of a group live in one dimension of one parameter.

    Args:
        parameter: Name of the parameter or buffer.
        dim: The dimension.
        role: ``producer`` makes the units' values, ``carrier`` holds per-unit values (bias, norm),
            ``consumer`` sums over the units.
        indices: ``(units, count)``; row ``u`` holds the places of unit ``u``.
        consumes: Whether it sums over the units; a tied weight may both produce and consume them.
    """

    parameter: str
    dim: int
    role: Role
    indices: Indices
    consumes: bool = False

    def __repr__(self) -> str:
        units, count = self.indices.shape
        return f"Slice({self.parameter!r}, dim={self.dim}, {self.role}, {units} units x {count})"


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Group:
    """Units of one kind that stand side by side, such as the filters of a convolution.

    Args:
        name: Path of the first module that produces the units.
        kind: What one unit is.
        size: Number of units.
        slices: Where the units live.
        first: Number of the first unit among all units of the graph.
        crosses: Names of groups that cut the same dimensions in another direction (heads, head dimensions).
    """

    name: str
    kind: Kind
    size: int
    slices: tuple[Slice, ...]
    first: int
    crosses: tuple[str, ...] = ()

    def __repr__(self) -> str:
        return f"Group({self.name!r}, {self.kind}, {self.size} units, {len(self.slices)} slices)"

    def by_role(self, role: Role) -> tuple[Slice, ...]:
        """The slices of one role."""
        return tuple(part for part in self.slices if part.role == role)


@dataclass(frozen=True, slots=True, kw_only=True)
class Locked:
    """A parameter dimension that keeps its length.

    Args:
        name: Path of the module.
        parameter: Name of the parameter or buffer.
        dim: The dimension.
        size: Its length.
        reason: Why, in words.
        source: The line of the model's source where it happened, if known.
    """

    name: str
    parameter: str
    dim: int
    size: int
    reason: str
    source: str


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class UnitRead:
    """A torch function call in which weights read the activations of units.

    Args:
        call: Number of the call in the forward pass.
        argument: Position of the activation among the call's tensors.
        dim: The activation's dimension that holds units.
        units: For each index of that dimension its unit's number, `NO_UNIT` where there is none.
        examples_first: Whether the first dimension certainly counts the examples of a batch; False where
            only data can tell, as with sequences, where it may be the second.
    """

    call: int
    argument: int
    dim: int
    units: Indices
    examples_first: bool = True


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class UnitProduct:
    """A torch function call that multiplies activations of the same units and sums over these: queries, keys.

    Args:
        call: Number of the call in the forward pass.
        units: For each index of that dimension its unit's number, `NO_UNIT` where there is none.
    """

    call: int
    units: Indices


@dataclass(frozen=True, kw_only=True, eq=False)
class Graph:
    """What can be cut out of a model, and what goes with it.

    Args:
        groups: The groups of units, in the order of the model's parameters.
        locked: Parameter dimensions that keep their length, with reasons.
        fingerprint: Hash of the names and shapes of all parameters and buffers.
        parameters: Names and shapes of all parameters, buffers and constants (tensors that modules hold as
            plain attributes).
        example_only: Lines of the model's source that read values which depend on weights. Where `forward`
            branches on one, the graph knows the path that the example takes, and no other.
        path: The calls of the example's pass, where `example_only` says that others may take another path.
        state: What the model returns for itself, such as a cache of keys and values: the argument of
            `forward` that takes it back, with its class. It shrinks with the cut; outputs keep their lengths.
    """

    groups: tuple[Group, ...]
    locked: tuple[Locked, ...]
    fingerprint: str
    parameters: Mapping[str, tuple[int, ...]]
    units: int
    ties: tuple[SizeTie, ...] = field(repr=False)
    constraints: tuple[CountConstraint, ...] = field(repr=False)
    conditions: tuple[CountCondition, ...] = field(repr=False)
    reads: tuple[UnitRead, ...] = field(repr=False)
    products: tuple[UnitProduct, ...] = field(repr=False)
    bare_units: Indices = field(repr=False)
    mixers: Mapping[str, str] = field(repr=False)
    axes: tuple[tuple[str, int, tuple[Indices, ...]], ...] = field(repr=False)
    costs: CostModel = field(repr=False)
    work: Work = field(repr=False)
    unknown: Mapping[str, str] = field(default_factory=dict)
    rescalings: tuple[Rescaling, ...] = field(default=(), repr=False)
    example_only: tuple[str, ...] = ()
    path: tuple[Signature, ...] = field(default=(), repr=False)
    state: Mapping[str, str] = field(default_factory=dict)

    @cached_property
    def by_name(self) -> dict[str, Group]:
        """The groups by name."""
        return {group.name: group for group in self.groups}

    def numbers_in(self, model: nn.Module, inputs: Inputs) -> list[int] | None:
        """For each call of a pass the number of the same in the trace; None where both are the same.

        Args:
            model: The model, in evaluation mode.
            inputs: What it is called with. Where nothing depends on weights but values, no pass is needed.
        """
        return numbers_along(CallPath(model, inputs).calls, self.path) if self.path else None

    @cached_property
    def counts(self) -> CountSystem:
        """The constraints on how many units of each group are left."""
        return CountSystem([group.size for group in self.groups], self.constraints, self.conditions)

    def stand_ins(self, gone: Mask) -> list[SizeTie]:
        """The attributes that stand in for the constraints which a cut breaks."""
        broken = [each for each in self.constraints if each.instead and not each.holds(gone)]
        return list({(tie.module, tie.attribute): tie for each in broken for tie in each.instead}.values())

    @cached_property
    def sides(self) -> dict[str, int]:
        """A side for each group, such that groups that cross are on different ones.

        Of what crosses, directly or not, the largest group is on side 0, and with it what can leave at the
        same time: of an attention, either the heads or the dimensions of queries and of values. What can
        leave without attributes that stand in for the model's own code comes before what cannot.
        """
        return self._sides(self.last_resort)

    @cached_property
    def last_resort(self) -> frozenset[str]:
        """The groups that shrink only where attributes stand in for what the model's code computes."""
        stuck = self.stuck(lambda free: self.counts)
        return stuck - self.stuck(self.counts.loosened) if stuck else stuck

    def stuck(self, counts: Callable[[Sequence[bool]], CountSystem]) -> frozenset[str]:
        """The groups with tied counts that keep all units where about half of all are wanted.

        Args:
            counts: Gives the constraints to respect, for the groups that may be cut.
        """
        rules: list[CountConstraint | CountCondition] = [*self.constraints, *self.conditions]
        places = {place for each in rules for place in each.groups}
        sizes = [group.size for group in self.groups]
        wanted = [max(1, size // 2) for size in sizes]
        for free in self.freedoms(self.counts) if places else ():
            settled = counts(free).settle(wanted, free, [1] * len(sizes), lower=True)
            places = {place for place in places if settled[place] == sizes[place]}
        return frozenset(self.groups[place].name for place in places)

    def freedoms(self, counts: CountSystem) -> list[list[bool]]:
        """Which groups to cut at once: of those that cross and have tied counts, one side at a time."""
        tied = {self.groups[place] for component, _ in counts.components for place in component}
        bound = {group.name for group in tied if group.crosses}
        sides = self._sides(())
        return [
            [group.name not in bound or sides[group.name] == side for group in self.groups]
            for side in sorted({sides[name] for name in bound}) or [0]
        ]

    def _sides(self, last: Collection[str]) -> dict[str, int]:
        found: dict[str, int] = {}
        for group in sorted(self.groups, key=lambda each: (each.name in last, -each.size, each.first)):
            pending = [group.name]
            while pending:
                name = pending.pop(0)
                if name not in found:
                    rivals = self.by_name[name].crosses
                    taken = {found[rival] for rival in rivals if rival in found}
                    found[name] = next(side for side in itertools.count() if side not in taken)
                    pending += rivals
        return found

    def tied(self, group: Group) -> tuple[CountConstraint, ...]:
        """The constraints that tie the group's count to those of others."""
        place = self.groups.index(group)
        return tuple(each for each in self.constraints if place in each.groups)

    def mask(self, removed: Removed) -> npt.NDArray[np.bool_]:
        """A mask over all units of the graph, True where a unit is removed.

        Args:
            removed: Indices of the removed units by group name.
        """
        gone = np.zeros(self.units + 1, np.bool_)  # the last entry is NO_UNIT, never removed
        for name, indices in removed.items():
            gone[self.by_name[name].first + np.asarray(indices, np.int64)] = True
        gone[NO_UNIT] = False
        return gone

    def cost(self, removed: Removed | None = None) -> Cost:
        """Parameters, multiply-accumulates and bytes, in closed form, without building the pruned model.

        Args:
            removed: Indices of removed units by group name; none for the model as it is.
        """
        return self.costs.evaluate(self.mask(removed or {}))

    def mixed_by(self, group: Group) -> str | None:
        """What makes silencing the group's units differ from removing them, if anything does."""
        if group.name in self.mixers:
            return self.mixers[group.name]
        silent = any(part.consumes for part in group.slices) or np.isin(group.first, self.bare_units)
        return None if silent else "an operator without weights"

    def group_cost(self, group: Group) -> Cost:
        """What removing one unit of the group alone saves."""
        whole, without = self.cost(), self.cost({group.name: [0]})
        saved = {name: value - getattr(without, name) for name, value in asdict(whole).items()}
        return Cost(**saved)


def removed_places(units: Sequence[Indices], gone: npt.NDArray[np.bool_], size: int) -> npt.NDArray[np.bool_]:
    """Which indices of a dimension are removed: those whose unit in any factor is."""
    if not units:
        return np.zeros(size, np.bool_)
    places = gone[units[0]]
    for factor in units[1:]:
        places |= gone[factor]
    return places


def fingerprint_of(model: nn.Module) -> str:
    """A short hash of names and shapes of a model's parameters and buffers.

    It is the same for every instance of one architecture: constants and buffers that the ``state_dict``
    leaves out, which the first forward pass may make, do not count.
    """
    unsaved = unsaved_buffers(model)
    shapes = {
        name: tuple(tensor.shape) for name, tensor in registered_tensors(model).items() if name not in unsaved
    }
    text = ";".join(f"{name}:{shape}" for name, shape in sorted(shapes.items()))
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def group_names(groups: Sequence[Group], factors: Sequence[Indices]) -> list[str]:
    """Names of the groups whose units appear in the given unit-number arrays."""
    if not factors:
        return []
    units = np.unique(np.concatenate(factors))
    firsts = np.array([group.first for group in groups], np.int64)
    found = np.unique(np.searchsorted(firsts, units[units != NO_UNIT], "right") - 1)
    return [groups[place].name for place in found]
