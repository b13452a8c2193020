"""What a criterion is, and the registry of those with a name."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import ClassVar, Literal, TypeAlias

import torch
from torch import Tensor

from secateurs.criteria.observed import Batch, Reading
from secateurs.criteria.processes import add_up
from secateurs.errors import ScoreError, UnknownNameError, UnrankedError
from secateurs.graph.groups import Graph, Group, Slice

Weights: TypeAlias = Mapping[str, Tensor]
WeightFunction: TypeAlias = Callable[[Group, Weights], Tensor]


class Criterion:
    """A rule that gives every unit an importance, larger means keep. Subclass it for one of your own.

    A criterion that needs only weights overrides `importance`. One that needs data sets `needs_data`; then
    `start` is called once, `begin_batch` before each batch, `observe` for every reading of it, `end_batch`
    after it, and `importance` at the end. State lives in the object from `start` on.

    Attributes:
        name: The name under which `register` makes it known.
        needs_data: Whether it has to see data.
        readings: What its readings must hold: ``"gradients"`` beside the activations, ``"activations"``
            alone, for which a forward pass will do and no loss is needed, or ``"none"`` where it takes no
            readings.
        weight_gradients: Whether `observe_gradients` is to be called with the gradients of the weights.
        needs_loss: Whether it asks a batch for its loss itself.
        normalization: What its importances are divided by, by group, unless `score` is told otherwise.
        has_curves: Whether `curve` gives the error after 0, 1, ... of a group's units have left.
        remark: How the importances were found, where there are several ways; set by the pass.
    """

    name: ClassVar[str] = ""
    needs_data: ClassVar[bool] = False
    readings: ClassVar[Literal["gradients", "activations", "none"]] = "gradients"
    weight_gradients: ClassVar[bool] = False
    needs_loss: ClassVar[bool] = False
    normalization: ClassVar[str] = "none"
    has_curves: ClassVar[bool] = False
    remark: str = ""

    def start(self, graph: Graph, device: torch.device) -> None:
        """Forget everything; a new pass over the data begins."""

    def begin_batch(self, batch: Batch) -> None:
        """A batch comes; passes of the criterion's own over it are made here."""

    def observe(self, reading: Reading) -> None:
        """Take in one reading of one batch."""

    def observe_gradients(self, gradients: Weights, weights: Weights, batch: Batch) -> None:
        """Take in the gradients of the batch's mean loss with respect to the weights that make units."""

    def end_batch(self, examples: int) -> None:
        """All readings of a batch have been given."""

    def sums(self) -> Sequence[Tensor]:
        """The tensors of its state, all sums over the data, so that processes can add them up."""
        raise ScoreError(
            f"{self.name or type(self).__name__} does not say what adds up over several processes",
            fix="override Criterion.sums() to return the tensors that are sums over the data",
        )

    def combine(self) -> None:
        """Make the state that of all processes together; called in each of several, after the last batch."""
        for tensor in self.sums():
            add_up(tensor)

    def importance(self, group: Group, weights: Weights) -> Tensor:
        """The importance of each unit of a group.

        Args:
            group: The group.
            weights: The model's parameters and buffers by name.

        Returns:
            ``(group.size,)``, any float dtype.
        """
        raise NotImplementedError

    def curve(self, group: Group) -> Tensor:
        """The error after 0, 1, ... of a group's units have left, ``(group.size,)``; for `has_curves`.

        One measure for all groups: `secateurs.plan` adds them up.
        """
        raise NotImplementedError


class Scores(Mapping[str, Tensor]):
    """Importances by group name: ``(units,)`` in float64 on the CPU, larger means keep.

    Args:
        criterion: The name of the criterion.
        values: The importances.
        curves: By group name the error after 0, 1, ... of the group's units have left, where the criterion
            has one.
        remark: How they were found, where the criterion has several ways.
        missing: By group name why the criterion has nothing to rank the group by; such groups can be skipped.
    """

    def __init__(
        self,
        criterion: str,
        values: Mapping[str, Tensor],
        *,
        curves: Mapping[str, Tensor] | None = None,
        remark: str = "",
        missing: Mapping[str, UnrankedError] | None = None,
    ) -> None:
        self.criterion = criterion
        self.curves = curves
        self.remark = remark
        self.missing = dict(missing or {})
        self._values = dict(values)

    def __getitem__(self, name: str) -> Tensor:
        if name in self.missing:
            raise self.missing[name]
        return self._values[name]

    def __contains__(self, name: object) -> bool:
        return name in self._values

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)

    def __repr__(self) -> str:
        units = sum(len(values) for values in self._values.values())
        missing = f", {len(self.missing)} groups without" if self.missing else ""
        remark = f", {self.remark}" if self.remark else ""
        return f"Scores({self.criterion!r}, {len(self)} groups, {units} units{missing}{remark})"


class FromFunction(Criterion):
    """A criterion made of a plain function ``(group, weights) -> importances``."""

    def __init__(self, function: WeightFunction) -> None:
        self._function = function

    def importance(self, group: Group, weights: Weights) -> Tensor:
        """Call the function."""
        return self._function(group, weights)


_CRITERIA: dict[str, Callable[[], Criterion]] = {}


def register(factory: type[Criterion]) -> type[Criterion]:
    """Make a criterion known under its name; a class decorator."""
    _CRITERIA[factory.name] = factory
    return factory


def names() -> list[str]:
    """The names of all registered criteria, sorted."""
    return sorted(_CRITERIA)


def resolve(criterion: str | Criterion | WeightFunction) -> tuple[str, Criterion]:
    """A criterion and its name, from a name, a criterion or a function.

    Raises:
        UnknownNameError: Nothing is registered under the name.
    """
    if isinstance(criterion, str):
        if criterion not in _CRITERIA:
            raise UnknownNameError("criterion", criterion, _CRITERIA)
        return criterion, _CRITERIA[criterion]()
    if isinstance(criterion, Criterion):
        return criterion.name or type(criterion).__name__, criterion
    if callable(criterion):
        return getattr(criterion, "__name__", "function"), FromFunction(criterion)
    raise ScoreError(f"a criterion is a name, a Criterion or a function, got {criterion!r}")


def unit_rows(tensor: Tensor, place: Slice) -> Tensor:
    """The part of a parameter that belongs to each unit.

    Args:
        tensor: The parameter.
        place: A slice of a group in it.

    Returns:
        ``(units, values of one unit)``, a copy.
    """
    units = place.indices.shape[0]
    flat = torch.from_numpy(place.indices.reshape(-1)).to(tensor.device)
    return tensor.detach().index_select(place.dim, flat).movedim(place.dim, 0).reshape(units, -1)


def unit_sums(tensor: Tensor, place: Slice, power: int) -> Tensor:
    """The sum of ``|w|^power`` over the part of a parameter that belongs to each unit.

    Returns:
        ``(units,)`` in float64; a parameter of real numbers is read once and not copied.
    """
    others = [dim for dim in range(tensor.dim()) if dim != place.dim]
    data = tensor.detach().abs() if tensor.is_complex() else tensor.detach()
    norms = (
        torch.linalg.vector_norm(data, power, others, dtype=torch.float64) if others else data.double().abs()
    )
    indices = torch.from_numpy(place.indices).to(tensor.device)
    return norms.pow(power)[indices].sum(1)


def unit_totals(tensor: Tensor, place: Slice) -> Tensor:
    """The sum, with signs, of the part of a tensor of a parameter's shape that belongs to each unit.

    Returns:
        ``(units,)`` in float64.
    """
    others = [dim for dim in range(tensor.dim()) if dim != place.dim]
    data = tensor.detach()
    totals = data.sum(others, dtype=torch.float64) if others else data.double()
    return totals[torch.from_numpy(place.indices).to(tensor.device)].sum(1)


def weights_of_unit(tensor: Tensor, place: Slice) -> int:
    """How many numbers of a parameter belong to one unit."""
    return int(place.indices.shape[1]) * (tensor.numel() // tensor.shape[place.dim])


def producers(group: Group, criterion: str) -> tuple[Slice, ...]:
    """The slices of the weights that make the units.

    Where no weights make them from other activations, they are the parameters that hold the units' own values
    (learned queries, a table that a product of weights reads), or else those that read them.

    Raises:
        UnrankedError: The group has none.
    """
    found = group.by_role("producer") or group.by_role("carrier") or group.by_role("consumer")
    if not found:
        raise UnrankedError(
            f"{criterion} reads the weights that make a unit, but group {group.name!r} has none",
            where=", ".join(part.parameter for part in group.slices),
            fix=f"plan with skip=[{group.name!r}], or use a criterion of your own",
        )
    return found
