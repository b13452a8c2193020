"""Python's own integers: sizes that a model's attributes hold and that its `forward` uses.

After the surgery `forward` runs again as ordinary Python, so an attribute such as ``groups``,
``normalized_shape`` or ``num_heads`` that held a size which shrank must shrink with it. No attribute is
known by its name: during the trace every integer attribute of every module is an `Origin`, an ``int`` that
remembers where it was read. When one arrives as an argument of an operator that fixes the length of a
labelled dimension, attribute and dimension are tied for good.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import nn

from secateurs.graph.labels import Dim


class Origin(int):
    """An integer that remembers the module attribute it was read from."""

    module: str
    attribute: str
    position: int | None

    @classmethod
    def of(cls, value: int, module: str, attribute: str, position: int | None) -> Origin:
        """The integer ``value`` as read from ``module.attribute`` (or its item ``position``)."""
        origin = cls(value)
        origin.module, origin.attribute, origin.position = module, attribute, position
        return origin

    def __deepcopy__(self, memo: dict[int, Any]) -> Origin:
        return self

    def __reduce__(self) -> tuple[type[int], tuple[int]]:
        return int, (int(self),)


@dataclass(frozen=True, slots=True, eq=False)
class Site:
    """An attribute that holds the length of a dimension.

    Args:
        module: Path of the module in the model.
        attribute: Name of its attribute.
        position: Index where the attribute is a tuple or list, else None.
        dim: The dimension whose length it holds.
        value: The integer before any cut.
    """

    module: str
    attribute: str
    position: int | None
    dim: Dim
    value: int


def attach_origins(model: nn.Module) -> None:
    """Replace the integer attributes of a private copy of a model by integers that know their origin."""
    for path, module in model.named_modules():
        for name, value in list(module.__dict__.items()):
            if name.startswith("_") and name in _MODULE_INTERNALS:
                continue
            if type(value) is int:
                module.__dict__[name] = Origin.of(value, path, name, None)
            elif type(value) in (tuple, list) and value and all(type(item) is int for item in value):
                items = [Origin.of(item, path, name, place) for place, item in enumerate(value)]
                module.__dict__[name] = type(value)(items)


_MODULE_INTERNALS = frozenset(nn.Module().__dict__)


def origins(args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Origin]:
    """The integers of known origin among the arguments of a call, sequences of integers included."""
    return list(_walk(args)) + list(_walk(tuple(kwargs.values()))) if kwargs else list(_walk(args))


def _walk(values: tuple[Any, ...]) -> Iterator[Origin]:
    for value in values:
        if type(value) is Origin:
            yield value
        elif isinstance(value, (tuple, list)):
            for item in value:
                if type(item) is Origin:
                    yield item


def set_integer(model: nn.Module, module: str, attribute: str, position: int | None, value: int) -> None:
    """Write a new size into a module's attribute, or into one item of it."""
    owner = model.get_submodule(module)
    if position is None:
        owner.__dict__[attribute] = value
    else:
        items = list(owner.__dict__[attribute])
        items[position] = value
        owner.__dict__[attribute] = type(owner.__dict__[attribute])(items)
