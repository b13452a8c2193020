"""The integers that modules hold: given an origin for the trace, and rewritten after a cut."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator
from types import BuiltinFunctionType, FunctionType, MethodType, ModuleType
from typing import Any

from torch import Tensor, nn

from secateurs.graph.copying import modules_of
from secateurs.graph.expressions import Attribute
from secateurs.graph.integers import Book, Traced


def attach_origins(model: nn.Module, book: Book) -> None:
    """Replace the integer attributes of a private copy of a model by integers that know their origin.

    Objects and dictionaries that a module holds, such as a configuration, are looked into one level deep;
    each module gets a copy of its own, so that it is known which module read a value. Where a module keeps
    the items of such a dictionary beside it, they are the dictionary's own values.
    """
    for path, module in modules_of(model):
        twins = list(_twins(module))
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
        for name, twin in twins:
            module.__dict__[twin] = type(module.__dict__[twin])(module.__dict__[name].items())


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


def _twins(module: nn.Module) -> Iterator[tuple[str, str]]:
    """The dictionaries with integers and the tuples or lists of their items that a module holds, by name.

    einops' layers compute with such a tuple, and rebuild it from the dictionary when they are copied.
    """
    held = module.__dict__
    for name, value in held.items():
        if name in _MODULE_INTERNALS or type(value) is not dict or not _are_sizes(value.values()):
            continue
        for twin, other in held.items():
            if type(other) not in (tuple, list) or len(other) != len(value):
                continue
            are_items = all(type(each) is tuple and len(each) == 2 for each in other)
            if are_items and _are_sizes(each[1] for each in other) and list(other) == list(value.items()):
                yield name, twin


def _are_sizes(values: Iterable[Any]) -> bool:
    """Whether all values are plain, as sizes and options are, and some of them integers."""
    kinds = {type(value) for value in values}
    return any(issubclass(kind, int) and kind is not bool for kind in kinds) and all(
        kind in _PLAIN or issubclass(kind, int) for kind in kinds
    )


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


def set_integer(model: nn.Module, module: str, attribute: str, position: int | None, value: int) -> None:
    """Write a new size into a module's attribute, or into one item of it.

    An object between the module and the attribute, which others may share, is copied first. The items of
    a dictionary that stand beside it become those of the changed one.
    """
    owner = model.get_submodule(module)
    held, twins = owner.__dict__, []
    *holders, name = attribute.split(".", 1)
    for holder in holders:
        twins = [twin for each, twin in _twins(owner) if each == holder]
        held[holder] = copy.copy(held[holder])
        held = _contents_of(held[holder])
    if position is None:
        held[name] = value
    else:
        items = list(held[name])
        items[position] = value
        held[name] = type(held[name])(items)
    for twin in twins:
        owner.__dict__[twin] = type(owner.__dict__[twin])(held.items())
