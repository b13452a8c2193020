"""What a criterion is, and the registry of those with a name."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import ClassVar, TypeAlias

import torch
from torch import Tensor

from secateurs.errors import ScoreError, UnknownNameError
from secateurs.graph.groups import Graph, Group, Slice

Weights: TypeAlias = Mapping[str, Tensor]
WeightFunction: TypeAlias = Callable[[Group, Weights], Tensor]


@dataclass(frozen=True, slots=True, eq=False)
class Reading:
    """What one batch shows at one place where weights read units.

    Args:
        activation: The tensor that is read; the first dimension counts examples (times any windows).
        gradient: Gradient of the batch's *summed* loss with respect to what is read here, same shape.
        dim: The dimension that holds units.
        units: ``(length of dim,)`` number of the unit at each index; `unit_count` where there is none.
        unit_count: Number of units in the graph.
        examples: Number of examples in the batch.
    """

    activation: Tensor
    gradient: Tensor
    dim: int
    units: Tensor
    unit_count: int
    examples: int

    def per_example(self, values: Tensor) -> Tensor:
        """Sum values of the activation's shape over everything but examples and units.

        Returns:
            ``(examples, unit_count + 1)`` in float64; the last column collects what belongs to no unit.
        """
        length = values.shape[self.dim]
        if self.dim == 1 and values.dim() > 1:
            summed = values.flatten(2).sum(2) if values.dim() > 2 else values
        else:
            summed = values.movedim(self.dim, -1)
        summed = summed.reshape(self.examples, -1, length).sum(1)
        total = torch.zeros(self.examples, self.unit_count + 1, dtype=torch.float64, device=values.device)
        return total.index_add_(1, self.units, summed.double())

    def positions(self) -> Tensor:
        """For each unit the number of values that one example has here; ``(unit_count + 1,)``."""
        length = self.activation.shape[self.dim]
        each = self.activation.numel() / (self.examples * length)
        counts = torch.bincount(self.units, minlength=self.unit_count + 1)
        return counts.double() * each


class Criterion:
    """A rule that gives every unit an importance, larger means keep. Subclass it for one of your own.

    A criterion that needs only weights overrides `importance`. One that needs data sets `needs_data`; then
    `start` is called once, `observe` for every reading of every batch, `end_batch` after each batch, and
    `importance` at the end. State lives in the object from `start` on.
    """

    name: ClassVar[str] = ""
    needs_data: ClassVar[bool] = False
    normalization: ClassVar[str] = "none"

    def start(self, graph: Graph, device: torch.device) -> None:
        """Forget everything; a new pass over the data begins."""

    def observe(self, reading: Reading) -> None:
        """Take in one reading of one batch."""

    def end_batch(self, examples: int) -> None:
        """All readings of a batch have been given."""

    def importance(self, group: Group, weights: Weights) -> Tensor:
        """The importance of each unit of a group.

        Args:
            group: The group.
            weights: The model's parameters and buffers by name.

        Returns:
            ``(group.size,)``, any float dtype.
        """
        raise NotImplementedError


class Scores(Mapping[str, Tensor]):
    """Importances by group name: ``(units,)`` in float64 on the CPU, larger means keep."""

    curves: Mapping[str, Tensor] | None = None
    """By group name the error after 0, 1, ... of the group's units have left, where the criterion has one."""

    def __init__(
        self, criterion: str, values: Mapping[str, Tensor], *, curves: Mapping[str, Tensor] | None = None
    ) -> None:
        self.criterion = criterion
        self.curves = curves
        self._values = dict(values)

    def __getitem__(self, name: str) -> Tensor:
        return self._values[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)

    def __repr__(self) -> str:
        units = sum(len(values) for values in self._values.values())
        return f"Scores({self.criterion!r}, {len(self)} groups, {units} units)"


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
        ``(units,)`` in float64; the parameter is read once and not copied.
    """
    others = [dim for dim in range(tensor.dim()) if dim != place.dim]
    data = tensor.detach()
    norms = (
        torch.linalg.vector_norm(data, power, others, dtype=torch.float64) if others else data.double().abs()
    )
    indices = torch.from_numpy(place.indices).to(tensor.device)
    return norms.pow(power)[indices].sum(1)


def producers(group: Group, criterion: str) -> tuple[Slice, ...]:
    """The slices of the weights that make the units.

    Where no weights make them from other activations, they are the parameters that hold the units' own values
    (learned queries, a table that a product of weights reads), or else those that read them.

    Raises:
        ScoreError: The group has none.
    """
    found = group.by_role("producer") or group.by_role("carrier") or group.by_role("consumer")
    if not found:
        raise ScoreError(
            f"{criterion} reads the weights that make a unit, but group {group.name!r} has none",
            where=", ".join(part.parameter for part in group.slices),
            fix=f"plan with skip=[{group.name!r}], or use a criterion of your own",
        )
    return found
