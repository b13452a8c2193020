"""What one batch shows to criteria: the batch itself, and what weights read of every unit in it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from secateurs.criteria.batches import LossFunction, loss_of
from secateurs.errors import ScoreError
from secateurs.graph.running import call_model


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Batch:
    """A batch of the data, with the model in evaluation mode.

    Args:
        model: The model that is scored.
        inputs: What it is called on.
        targets: What the batch gave beside the inputs; None where it gave nothing.
        examples: Number of examples.
        loss_fn: The loss, the mean over the batch; None where no criterion asked for one.
        layouts: Where the examples lie in what weights read, by call and argument, where it is not their
            first dimension for certain.
        numbers: Those that its calls have in the trace, where it makes others; see `secateurs.graph.paths`.
    """

    model: nn.Module
    inputs: Any
    targets: Any
    examples: int
    loss_fn: LossFunction | None
    layouts: Mapping[tuple[int, int], Layout | None] = field(default_factory=dict)
    numbers: Sequence[int] | None = None

    def outputs(self) -> Any:
        """The model's outputs."""
        return call_model(self.model, self.inputs)

    def loss(self, outputs: Any) -> Tensor:
        """The mean loss of these outputs.

        Raises:
            ScoreError: It is not one finite number that depends on the model.
        """
        assert self.loss_fn is not None
        loss = loss_of(self.loss_fn, outputs, self.targets, self.examples)
        if not loss.requires_grad:
            raise ScoreError(
                "the loss does not depend on any unit", fix="pass a loss_fn that uses the model's outputs"
            )
        return loss


@dataclass(frozen=True, slots=True)
class Layout:
    """Where the examples of a batch lie in an activation.

    Args:
        dim: The dimension that counts them.
        inner: How many indices of it in a row belong to one example; None where all of an example's do.
    """

    dim: int = 0
    inner: int | None = None

    def parts(self, size: int, examples: int) -> tuple[int, int, int]:
        """The dimension as ``(repeats, examples, indices in a row)``.

        Raises:
            ScoreError: Its size is no multiple.
        """
        inner = size // examples if self.inner is None else self.inner
        outer = size // max(examples * inner, 1)
        if outer * examples * inner != size:
            raise ScoreError(
                f"a dimension of {size} cannot hold {examples} examples",
                fix="pass batches whose tensors all count examples in their first dimension",
            )
        return outer, examples, inner


EXAMPLES_FIRST = Layout()


class UnitIndex:
    """The units along a dimension of an activation, and a quick way to add values up by unit.

    Args:
        units: ``(length,)`` the unit at each index; `unit_count` where there is none.
        unit_count: Number of units in the graph.
    """

    def __init__(self, units: Tensor, unit_count: int) -> None:
        self.units, self.unit_count = units, unit_count
        self.counts = torch.bincount(units, minlength=unit_count + 1).double()
        first, count = int(units[0]), int(units.max() - units[0]) + 1
        self._run: tuple[int, int] | None = None
        if len(units) % count == 0:
            each = torch.arange(first, first + count, device=units.device)
            if torch.equal(units, each.repeat_interleave(len(units) // count)):
                self._run = first, count

    def add(self, into: Tensor, values: Tensor) -> None:
        """Add ``(rows, length)`` values to the columns of ``(rows, unit_count + 1)``, in place."""
        if self._run is None:
            into.index_add_(1, self.units, values.to(into.dtype))
            return
        first, count = self._run
        into[:, first : first + count] += values.view(len(values), count, -1).sum(2, dtype=into.dtype)


@dataclass(frozen=True, slots=True, eq=False)
class Reading:
    """What one batch shows at one place where weights read units.

    Args:
        activation: The tensor that is read.
        gradient: Gradient of the batch's *summed* loss with respect to what is read here, same shape; None
            for criteria that look at activations alone.
        dim: The dimension that holds units.
        index: The units along it.
        examples: Number of examples in the batch.
        layout: Where the examples lie; None where they cannot be told apart.
    """

    activation: Tensor
    gradient: Tensor | None
    dim: int
    index: UnitIndex
    examples: int
    layout: Layout | None = EXAMPLES_FIRST
    _known: dict[str, Tensor] = field(default_factory=dict, repr=False)

    @property
    def units(self) -> Tensor:
        """``(length of dim,)`` number of the unit at each index; `unit_count` where there is none."""
        return self.index.units

    @property
    def unit_count(self) -> int:
        """Number of units in the graph."""
        return self.index.unit_count

    @property
    def slope(self) -> Tensor:
        """The gradient, for criteria that asked for it."""
        assert self.gradient is not None
        return self.gradient

    def products(self) -> Tensor:
        """``sum activation * gradient`` for each example and index; ``(examples, length)``, made once."""
        if "products" not in self._known:
            wide = torch.promote_types(self.activation.dtype, torch.float32)
            self._known["products"] = self.by_example(self.activation.to(wide) * self.slope)
        return self._known["products"]

    def by_example(self, values: Tensor) -> Tensor:
        """Sum values of the activation's shape over everything but examples and `dim`.

        Returns:
            ``(examples, length)``, at least in single precision.
        """
        wide = torch.promote_types(values.dtype, torch.float32)
        dim = self.dim % values.dim()
        if self.examples == 1:
            return self.by_index(values)[None]
        if self.layout is None:
            raise ScoreError(
                "the examples of a batch cannot be told apart where weights read "
                f"an activation of shape {tuple(values.shape)}",
                fix="pass batches of one example, or use a criterion on weights such as 'l2'",
            )
        at = self.layout.dim
        parts = values.unflatten(at, self.layout.parts(values.shape[at], self.examples))
        kept = (at + 1, dim + 2 if dim > at else dim)
        others = [axis for axis in range(parts.dim()) if axis not in kept]
        summed: Tensor = parts.sum(others, dtype=wide) if others else parts.to(wide)
        return summed if kept[0] < kept[1] else summed.T

    def by_index(self, values: Tensor) -> Tensor:
        """Sum values of the activation's shape over everything but `dim`; ``(length,)``."""
        wide = torch.promote_types(values.dtype, torch.float32)
        others = [axis for axis in range(values.dim()) if axis != self.dim % values.dim()]
        summed: Tensor = values.sum(others, dtype=wide) if others else values.to(wide)
        return summed

    def per_example(self, values: Tensor) -> Tensor:
        """Sum values of the activation's shape over everything but examples and units.

        Returns:
            ``(examples, unit_count + 1)`` in float64; the last column collects what belongs to no unit.
        """
        total = torch.zeros(self.examples, self.unit_count + 1, dtype=torch.float64, device=values.device)
        self.index.add(total, self.by_example(values))
        return total

    def positions(self) -> Tensor:
        """For each unit the number of values that one example has here; ``(unit_count + 1,)``."""
        length = self.activation.shape[self.dim]
        return self.index.counts * (self.activation.numel() / (self.examples * length))
