"""What the rules of operators say in a trace: the labels of results, what is summed, what is locked."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any

import torch
from torch import Tensor

from secateurs.graph.expressions import Constant, Expression, Length
from secateurs.graph.integers import Book, Statement, Traced
from secateurs.graph.labels import Dim, Labels
from secateurs.graph.records import Contraction
from secateurs.graph.running import MetaMode, source_line
from secateurs.graph.written import Spot, spot_here

LABELS = "_secateurs_labels"


class Marks(MetaMode):
    """Everything that rules note in one trace; `Tracer` adds the run."""

    def __init__(self) -> None:
        super().__init__()
        self.labels = Labels(self._place)
        self._followed = ""
        self.roles: dict[int, set[str]] = {}
        self.contractions: list[Contraction] = []
        self.book = Book()
        self.statements: list[Statement] = []
        self.paths: dict[int, str] = {}
        self.given: dict[Any, set[int]] = {}
        self.refused: set[Any] = set()
        self.mixed: list[tuple[Dim, str]] = []
        self.bare: list[Dim] = []
        self.kinds: list[tuple[Dim, str]] = []
        self.spread: list[Dim] = []
        self._sizes: list[tuple[Traced, bool]] = []
        self._size_lists: list[list[int]] = []
        self._contracted: list[Dim] = []
        self._multiplied: list[Dim] = []
        self._all_weights = False

    def _place(self) -> tuple[str, str]:
        """The operator that is being followed, and its line."""
        return (self._followed, source_line()) if self._followed else ("", "")

    def dims(self, tensor: Tensor) -> tuple[Dim, ...]:
        """The labelled dimensions of a tensor; a constant of unknown origin is locked."""
        found = getattr(tensor, LABELS, None)
        return found[0] if found else tuple(Dim(int(size)) for size in tensor.shape)

    def is_weight(self, tensor: Tensor) -> bool:
        """Whether a tensor was computed from parameters and buffers alone."""
        found = getattr(tensor, LABELS, None)
        return bool(found and found[1])

    def set(self, tensor: Tensor, dims: Sequence[Dim]) -> None:
        """Attach labels to the dimensions of a result."""
        if len(dims) != tensor.dim() or any(d.size != s for d, s in zip(dims, tensor.shape, strict=True)):
            raise AssertionError(
                f"labels of shape {[d.size for d in dims]} for a tensor of shape {tuple(tensor.shape)}"
            )
        if not self._all_weights:
            dims = [Dim(d.size, d.factors) if d.sources else d for d in dims]
        setattr(tensor, LABELS, (tuple(dims), self._all_weights))

    def unify(self, a: Dim, b: Dim) -> None:
        """These two dimensions lose the same indices."""
        self.labels.unify(a, b)

    def unify_all(self, dim: Dim, others: Sequence[Dim]) -> None:
        """This dimension and all the others lose the same indices."""
        self.labels.unify_all(dim, others)

    def lock(self, dim: Dim, reason: str) -> None:
        """This dimension keeps its length; the reason is reported with the line of the model's source."""
        if dim.factors:
            self.labels.lock(dim, reason, source_line())

    def mix(self, dim: Dim, operator: str) -> None:
        """The operator computes across this dimension, so that a silenced unit still has an effect."""
        if dim.factors:
            self.mixed.append((dim, operator))

    def name_kind(self, dim: Dim, kind: str) -> None:
        """The units of this dimension are of a kind of their own, such as ``head``."""
        if dim.factors:
            self.kinds.append((dim, kind))

    def add_role(self, dims: Sequence[Dim], role: str) -> None:
        """Note what a weight's dimensions do: produce, carry or consume units."""
        for dim in dims:
            for source in dim.sources:
                self.roles.setdefault(source, set()).add(role)

    def contract(
        self, operands: Sequence[tuple[Tensor, Dim]], kept: Sequence[Dim], multiplier: float = 1.0
    ) -> None:
        """Two tensors are multiplied and summed over a dimension.

        Args:
            operands: Each tensor with its dimension that is summed over.
            kept: The other dimensions that count towards the cost, weights' output dimensions among them.
            multiplier: Further multiply-accumulates per index, such as the size of a kernel.
        """
        weights = [dim for tensor, dim in operands if self.is_weight(tensor)]
        if not self._all_weights:
            self.add_role(weights, "consumer")
            self.add_role(kept, "producer")
            if not weights:  # activations with activations, as queries with keys
                self.bare += [dim for _, dim in operands]
                self._multiplied += [dim for _, dim in operands]
            elif len(weights) < len(operands):
                self._contracted += [dim for tensor, dim in operands if not self.is_weight(tensor)]
        dims = [operands[0][1], *kept]
        fixed = prod(dim.size for dim in dims if not dim.factors)
        self.contractions.append(Contraction(multiplier * fixed, tuple(d for d in dims if d.factors)))

    def size_argument(self, value: int, dim: Dim, *, position: int | None = None, of: int = 0) -> None:
        """An integer argument of this call states the length of `dim`; note where it came from.

        Args:
            value: The argument.
            dim: The dimension whose length it states.
            position: Its place in the shape that the call is given, where there is one.
            of: Number of dimensions of that shape.
        """
        expression = self._stated(value, position, of)
        spot = self._spot(value, position, of)
        if expression is None:
            if spot is not None and dim.factors:
                self.statements.append(Statement(Constant(int(value)), dim, source_line(), spot))
        elif not (isinstance(expression, Length) and _alike(expression.dim, dim)):
            self.statements.append(Statement(expression, dim, source_line(), spot))

    def written(self, dim: Dim, position: int | None, *, of: int = 0) -> bool:
        """Whether the length of `dim` is written in figures where an attribute can take their place.

        Args:
            dim: The dimension.
            position: Which of the numbers that the call is given states it.
            of: How many there are; 0 for the ends of ranges in square brackets.
        """
        spot = self._spot(dim.size, position, of)
        if spot is None or spot.written(dim.size, None) is None:
            return False
        self.statements.append(Statement(Constant(dim.size), dim, source_line(), spot))
        return True

    def _spot(self, value: int, position: int | None, of: int) -> Spot | None:
        """The running call of a module's method, which gives this size."""
        spot = spot_here(self.paths, position, of)
        if spot is not None:
            self.given.setdefault(spot.key, set()).add(int(value))
        return spot

    def state(self, expression: Expression, dim: Dim) -> None:
        """The model's code says that a dimension has the length of an expression."""
        self.statements.append(Statement(expression, dim, source_line()))

    def source_of(self, value: int) -> Expression | None:
        """The expression that an integer argument of this call came from; None for a literal."""
        return self._stated(value, None, 0)

    def _stated(self, value: int, position: int | None, of: int) -> Expression | None:
        """Where an integer argument of this call came from, if that is known."""
        if position is not None:
            for sizes in self._size_lists:
                if len(sizes) == of:
                    item = sizes[position]
                    known = isinstance(item, Traced) and int(item) == value and item.book is self.book
                    return item.expression if isinstance(item, Traced) and known else None
        for nested in (False, True):  # `groups` before the items of `stride`
            for size, within in reversed(self._sizes):
                if within is nested and int(size) == value and size.book is self.book:
                    return size.expression
        return None

    def lengths(self, tensor: Tensor, sizes: Any, dim: int | None = None) -> Any:
        """What a tensor says of its shape, as integers that know which dimension they are the length of."""
        dims = self.dims(tensor)
        if isinstance(sizes, int):
            return self._length(dims[dim]) if dim is not None else sizes
        return torch.Size([self._length(each) for each in dims])

    def count(self, tensor: Tensor) -> int:
        """What a tensor says of its number of elements, as the product of its lengths."""
        return prod(self._length(dim) for dim in self.dims(tensor))

    def _length(self, dim: Dim) -> int:
        return Traced.of(dim.size, Length(dim), self.book) if dim.factors else dim.size


def _alike(a: Dim, b: Dim) -> bool:
    """Whether two dimensions carry the very same labels."""
    return len(a.factors) == len(b.factors) and all(x is y for x, y in zip(a.factors, b.factors, strict=True))
