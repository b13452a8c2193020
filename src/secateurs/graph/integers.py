"""Python's own integers: sizes that a model's `forward` holds, reads off shapes and computes with.

After the surgery `forward` runs again as ordinary Python, so an attribute such as ``groups``,
``normalized_shape`` or ``num_heads`` that held a size which shrank must shrink with it; and where ``forward``
derives one size from others, as ``C // self.num_heads``, the counts of what is cut must agree. No attribute
is known by its name: during the trace the integer attributes of every module, and every length that is read
off a shape, are `Traced` integers, which remember the expression that they came from. When one arrives at
an operator as the length of a dimension, expression and dimension make a `Statement`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, cast

from torch import Tensor

from secateurs.graph.expressions import (
    COMPARISONS,
    OPERATORS,
    Constant,
    Expression,
    Operation,
    negative,
)
from secateurs.graph.labels import Dim
from secateurs.graph.running import source_line
from secateurs.graph.values import value_of
from secateurs.graph.written import Spot

_INT_COMPARISONS = {name: getattr(int, f"__{name}__") for name in COMPARISONS}


@dataclass(frozen=True, slots=True, eq=False)
class Statement:
    """The model's code says that a dimension has the length of an expression.

    Args:
        expression: What it says.
        dim: The dimension.
        where: The line of the model's source.
        spot: The call that was given the length, where it is in a method of a module.
    """

    expression: Expression
    dim: Dim
    where: str = ""
    spot: Spot | None = None


@dataclass(frozen=True, slots=True, eq=False)
class Comparison:
    """The model's code compared two integers, and may have chosen its path by the outcome.

    Args:
        name: One of `COMPARISONS`.
        left: What was compared.
        right: With what.
        outcome: What came out.
        where: The line of the model's source.
    """

    name: str
    left: Expression
    right: Expression
    outcome: bool
    where: str


class Book:
    """What the traced integers of one trace told: how they compared, and which floats were made of them."""

    def __init__(self) -> None:
        self.compared: list[Comparison] = []
        self.floats: list[tuple[Expression, float]] = []

    def compare(self, name: str, left: Expression, right: Expression, outcome: bool) -> None:
        """Note a comparison that must come out as it did."""
        self.compared.append(Comparison(name, left, right, outcome, source_line()))


class Traced(int):
    """An integer that remembers the expression it came from."""

    expression: Expression
    book: Book

    @classmethod
    def of(cls, value: int, expression: Expression, book: Book) -> Traced:
        """The integer ``value`` as the expression gives it."""
        traced = cls(value)
        traced.expression, traced.book = expression, book
        return traced

    def __deepcopy__(self, memo: dict[int, Any]) -> Traced:
        return self

    def __copy__(self) -> Traced:
        return self

    def __reduce__(self) -> tuple[type[int], tuple[int]]:
        return int, (int(self),)

    __hash__ = int.__hash__

    def __eq__(self, other: object) -> bool:
        return self._compared("eq", other)

    def __lt__(self, other: Any) -> bool:
        return self._compared("lt", other)

    def __gt__(self, other: Any) -> bool:
        return self._compared("gt", other)

    def __le__(self, other: Any) -> bool:
        return self._compared("le", other)

    def __ge__(self, other: Any) -> bool:
        return self._compared("ge", other)

    def _compared(self, name: str, other: Any) -> bool:
        """Compare, and note it: equality with anything, an order among integers that are known.

        Of an order with a figure only what a smaller number may change: ``self.groups > 1`` where it is true.
        """
        outcome: bool = _INT_COMPARISONS[name](self, other)
        known = type(other) is Traced and other.book is self.book
        can_fall = name in ("gt", "ge") if outcome else name in ("lt", "le")
        if known or (type(other) is int and (name == "eq" or (can_fall and other > 0))):
            self.book.compare(name, self.expression, expression_of(other), outcome)
        return outcome

    def __ne__(self, other: object) -> bool:
        same = self.__eq__(other)
        return same if same is NotImplemented else not same

    def __neg__(self) -> Traced:
        return Traced.of(int.__neg__(self), negative(self.expression), self.book)

    def __float__(self) -> float:
        value = int.__float__(self)
        self.book.floats.append((self.expression, value))
        return value

    def __truediv__(self, other: Any) -> Any:
        return self._noted(int.__truediv__(self, other))

    def __rtruediv__(self, other: Any) -> Any:
        return self._noted(int.__rtruediv__(self, other))

    def __pow__(self, other: Any, modulo: Any = None) -> Any:
        return self._noted(int.__pow__(self, other))

    def _noted(self, result: Any) -> Any:
        if isinstance(result, float) or result is NotImplemented:  # then the other operand is a float
            self.book.floats.append((self.expression, int.__float__(self)))
        return result


def expression_of(value: int) -> Expression:
    """The expression that an integer came from: itself where that is not known."""
    return value.expression if type(value) is Traced else Constant(int(value))


def _arithmetic(name: str) -> tuple[Callable[[Traced, Any], Any], Callable[[Traced, Any], Any]]:
    forward, backward = getattr(int, f"__{name}__"), getattr(int, f"__r{name}__")

    def left(self: Traced, other: Any) -> Any:
        result = forward(self, other)
        if type(result) is not int or isinstance(other, bool):
            return self._noted(result)
        return Traced.of(result, Operation(name, self.expression, expression_of(other)), self.book)

    def right(self: Traced, other: Any) -> Any:
        result = backward(self, other)
        if type(result) is not int or isinstance(other, bool):
            return self._noted(result)
        return Traced.of(result, Operation(name, expression_of(other), self.expression), self.book)

    return left, right


for _name in OPERATORS:
    _left, _right = _arithmetic(_name)
    setattr(Traced, f"__{_name}__", _left)
    setattr(Traced, f"__r{_name}__", _right)


def traced_in(args: Any, nested: bool = False) -> Iterator[tuple[Traced, bool]]:
    """The traced integers among the arguments of a call, and whether each stood in a sequence or slice."""
    for value in args:
        kind = type(value)
        if kind is Traced:
            yield value, nested
        elif kind is slice:
            yield from traced_in((value.start, value.stop, value.step), True)
        elif isinstance(value, (tuple, list)):
            yield from traced_in(value, True)


def size_lists(args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[list[int]]:
    """The shapes among the arguments of a call: sequences of integers, and integers in a row.

    Tensors that hold one integer whose value is known are integers, as in the shape of a packed sequence's
    first state.
    """
    found: list[list[int]] = []
    run: list[int] = []
    for value in args:
        if (number := _integer(value)) is not None and not isinstance(value, bool):
            run.append(number)
        elif (numbers := _integers(value)) is not None:
            found.append(numbers)
    found += [numbers for value in kwargs.values() if (numbers := _integers(value)) is not None]
    return [*found, run] if run else found


def _integers(value: Any) -> list[int] | None:
    if not isinstance(value, (tuple, list)) or not value:
        return None
    numbers = [number for item in value if (number := _integer(item)) is not None]
    return numbers if len(numbers) == len(value) else None


def _integer(value: Any) -> int | None:
    if isinstance(value, Tensor) and value.dim() == 0 and not value.is_floating_point():
        known = value_of(value)
        return None if known is None else cast(int, known.tolist())  # which no mode sees
    return value if isinstance(value, int) else None


def unflattened_sizes(args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[list[int]]:
    """The whole shape that a call of `unflatten` asks for, of which its arguments hold a part."""
    tensor, dim, sizes = (*args, *(kwargs[name] for name in ("input", "dim", "sizes") if name in kwargs))
    if not isinstance(dim, int):  # the name of a dimension
        return size_lists(args, kwargs)
    place = dim % tensor.dim()
    return [[0] * place + list(sizes) + [0] * (tensor.dim() - place - 1)]
