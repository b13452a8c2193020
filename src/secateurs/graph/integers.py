"""Python's own integers: sizes that a model's `forward` holds, reads off shapes and computes with.

After the surgery `forward` runs again as ordinary Python, so an attribute such as ``groups``,
``normalized_shape`` or ``num_heads`` that held a size which shrank must shrink with it; and where ``forward``
derives one size from others, as ``C // self.num_heads``, the counts of what is cut must agree. No attribute
is known by its name: during the trace the integer attributes of every module, and every length that is read
off a shape, are `Traced` integers, which remember the expression that they came from. When one arrives at
an operator as the length of a dimension, expression and dimension make a `Statement`.
"""

from __future__ import annotations

import copy
import operator
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import BuiltinFunctionType, FunctionType, MethodType, ModuleType
from typing import Any, TypeAlias

from torch import Tensor, nn

from secateurs.graph.copying import modules_of
from secateurs.graph.labels import Dim
from secateurs.graph.running import source_line


@dataclass(frozen=True, slots=True)
class Constant:
    """A number that stays."""

    value: int


@dataclass(frozen=True, slots=True)
class Attribute:
    """An integer that a module holds.

    Args:
        module: Path of the module in the model.
        attribute: Name of its attribute; ``config.num_heads`` for an attribute, or the key of a dictionary,
            of an object that it holds.
        position: Index where the attribute is a tuple or list, else None.
        value: The integer before any cut.
    """

    module: str
    attribute: str
    position: int | None
    value: int

    @property
    def key(self) -> tuple[str, str, int | None]:
        """Where the attribute is."""
        return self.module, self.attribute, self.position


@dataclass(frozen=True, slots=True, eq=False)
class Length:
    """The length of a labelled dimension, read off a tensor's shape."""

    dim: Dim


@dataclass(frozen=True, slots=True, eq=False)
class Operation:
    """Two integers combined by an operator of Python, one of `OPERATORS`."""

    name: str
    left: Expression
    right: Expression


Expression: TypeAlias = "Constant | Attribute | Length | Operation"

OPERATORS: dict[str, Callable[[Any, Any], Any]] = {
    "add": operator.add,
    "sub": operator.sub,
    "mul": operator.mul,
    "floordiv": operator.floordiv,
    "mod": operator.mod,
}
COMPARISONS: dict[str, Callable[[Any, Any], bool]] = {
    "eq": operator.eq,
    "lt": operator.lt,
    "gt": operator.gt,
    "le": operator.le,
    "ge": operator.ge,
}
_INT_COMPARISONS = {name: getattr(int, f"__{name}__") for name in COMPARISONS}
_SIGNS = {
    "eq": "==",
    "lt": "<",
    "gt": ">",
    "le": "<=",
    "ge": ">=",
    "add": "+",
    "sub": "-",
    "mul": "*",
    "floordiv": "//",
    "mod": "%",
}


@dataclass(frozen=True, slots=True, eq=False)
class Statement:
    """The model's code says that a dimension has the length of an expression.

    Args:
        expression: What it says.
        dim: The dimension.
        where: The line of the model's source.
    """

    expression: Expression
    dim: Dim
    where: str = ""


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
        """Compare, and note it: equality with anything, an order among integers that are known."""
        outcome: bool = _INT_COMPARISONS[name](self, other)
        known = type(other) is Traced and other.book is self.book
        if known or (name == "eq" and type(other) is int):
            compared = Comparison(name, self.expression, expression_of(other), outcome, source_line())
            self.book.compared.append(compared)
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


def negative(expression: Expression) -> Expression:
    """Minus an expression."""
    return Operation("sub", Constant(0), expression)


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


def evaluate(expression: Any, leaf: Callable[[Any], Any]) -> Any:
    """The value of an expression.

    Args:
        expression: The expression.
        leaf: Gives the value of what is neither a constant nor an operation: a number, or an array of them.
    """
    if isinstance(expression, Constant):
        return expression.value
    if isinstance(expression, Operation):
        left, right = evaluate(expression.left, leaf), evaluate(expression.right, leaf)
        return OPERATORS[expression.name](left, right)
    return leaf(expression)


def replaced(expression: Expression, leaf: Callable[[Any], Any]) -> Any:
    """The same expression with other leaves."""
    if isinstance(expression, Operation):
        return Operation(expression.name, replaced(expression.left, leaf), replaced(expression.right, leaf))
    return expression if isinstance(expression, Constant) else leaf(expression)


def leaves_of(expression: Any) -> Iterator[Any]:
    """What an expression reads: attributes, lengths, constants."""
    if isinstance(expression, Operation):
        yield from leaves_of(expression.left)
        yield from leaves_of(expression.right)
    else:
        yield expression


def attributes_in(expression: Any) -> list[Attribute]:
    """The attributes that an expression reads, as often as it does."""
    return [leaf for leaf in leaves_of(expression) if isinstance(leaf, Attribute)]


def solve(expression: Any, target: int, leaf: Callable[[Any], int]) -> int | None:
    """The value of the one attribute in an expression for which it reaches a target, None if there is none.

    Args:
        expression: Reads exactly one attribute, once.
        target: What it is to give.
        leaf: Gives the values of its other leaves.
    """
    if isinstance(expression, Attribute):
        return target
    on_left = bool(attributes_in(expression.left))
    inner, other = (expression.left, expression.right) if on_left else (expression.right, expression.left)
    wanted = _inverse(expression.name, target, evaluate(other, leaf), on_left)
    return None if wanted is None else solve(inner, wanted, leaf)


def _inverse(name: str, target: int, known: int, on_left: bool) -> int | None:
    if name == "add":
        return target - known
    if name == "sub":
        return target + known if on_left else known - target
    if name == "mul":
        return target // known if known and target % known == 0 else None
    if name == "floordiv" and on_left:
        return target * known
    if name == "floordiv" and target:
        guess = known // target
        return guess if guess and known // guess == target else None
    return None


def sign_of(name: str) -> str:
    """The sign of an operator or comparison in Python."""
    return _SIGNS[name]


def in_words(expression: Expression) -> str:
    """An expression as a person would write it."""
    if isinstance(expression, Constant):
        return str(expression.value)
    if isinstance(expression, Length):
        return f"a length of {expression.dim.size}"
    if isinstance(expression, Attribute):
        item = "" if expression.position is None else f"[{expression.position}]"
        return f"{expression.attribute}{item}"
    left, right = in_words(expression.left), in_words(expression.right)
    return f"({left} {_SIGNS[expression.name]} {right})"


# -- attributes ---------------------------------------------------------------------------------------


def attach_origins(model: nn.Module, book: Book) -> None:
    """Replace the integer attributes of a private copy of a model by integers that know their origin.

    Objects and dictionaries that a module holds, such as a configuration, are looked into one level deep;
    each module gets a copy of its own, so that it is known which module read a value.
    """
    for path, module in modules_of(model):
        for name, value in list(module.__dict__.items()):
            if name in _MODULE_INTERNALS or type(value) in _PLAIN:
                continue
            traced = _traced(value, path, name, book)
            if traced is not None:
                module.__dict__[name] = traced
            elif (inside := _contents(value)) is not None:
                found = {
                    key: _traced(item, path, f"{name}.{key}", book)
                    for key, item in inside.items()
                    if isinstance(key, str) and not key.startswith("_")
                }
                if any(item is not None for item in found.values()):
                    owned = copy.copy(value)
                    if owned is not value:  # as for members of an enumeration
                        _contents_of(owned).update({k: item for k, item in found.items() if item is not None})
                        module.__dict__[name] = owned


_MODULE_INTERNALS = frozenset(nn.Module().__dict__)
_PLAIN = frozenset((bool, float, str, type(None)))
_NOT_HOLDERS = (nn.Module, Tensor, type, ModuleType, FunctionType, BuiltinFunctionType, MethodType)


def _traced(value: Any, path: str, name: str, book: Book) -> Any:
    """The same value as traced integers; None where it is no integer and no tuple or list with some."""
    if type(value) is int:
        return Traced.of(value, Attribute(path, name, None, value), book)
    if type(value) in (tuple, list) and any(type(item) is int for item in value):
        return type(value)(
            Traced.of(item, Attribute(path, name, place, item), book) if type(item) is int else item
            for place, item in enumerate(value)
        )
    return None


def _contents(value: Any) -> dict[Any, Any] | None:
    """What an object or a dictionary holds, if it is one to look into."""
    if type(value) is dict:
        return value
    if isinstance(value, _NOT_HOLDERS) or callable(value) or type(value).__module__ == "builtins":
        return None
    held = getattr(value, "__dict__", None)
    return held if type(held) is dict else None


def _contents_of(value: Any) -> dict[Any, Any]:
    held: dict[Any, Any] = value if type(value) is dict else value.__dict__
    return held


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
    """The shapes among the arguments of a call: sequences of integers, and integers in a row."""
    found: list[list[int]] = []
    run: list[int] = []
    for value in args:
        if isinstance(value, int) and not isinstance(value, bool):
            run.append(value)
        elif isinstance(value, (tuple, list)) and value and all(isinstance(item, int) for item in value):
            found.append(list(value))
    for value in kwargs.values():
        if isinstance(value, (tuple, list)) and value and all(isinstance(item, int) for item in value):
            found.append(list(value))
    return [*found, run] if run else found


def unflattened_sizes(args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[list[int]]:
    """The whole shape that a call of `unflatten` asks for, of which its arguments hold a part."""
    tensor, dim, sizes = (*args, *(kwargs[name] for name in ("input", "dim", "sizes") if name in kwargs))
    if not isinstance(dim, int):  # the name of a dimension
        return size_lists(args, kwargs)
    place = dim % tensor.dim()
    return [[0] * place + list(sizes) + [0] * (tensor.dim() - place - 1)]


def set_integer(model: nn.Module, module: str, attribute: str, position: int | None, value: int) -> None:
    """Write a new size into a module's attribute, or into one item of it.

    An object between the module and the attribute, which others may share, is copied first.
    """
    held = model.get_submodule(module).__dict__
    *holders, name = attribute.split(".", 1)
    for holder in holders:
        held[holder] = copy.copy(held[holder])
        held = _contents_of(held[holder])
    if position is None:
        held[name] = value
    else:
        items = list(held[name])
        items[position] = value
        held[name] = type(held[name])(items)
