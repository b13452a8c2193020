"""Formulas over lengths and attributes: where an integer of a model's own code came from."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, TypeAlias

from secateurs.graph.labels import Dim


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


def negative(expression: Expression) -> Expression:
    """Minus an expression."""
    return Operation("sub", Constant(0), expression)


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
