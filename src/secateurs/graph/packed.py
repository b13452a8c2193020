"""The tensors that the arguments and results of a call hold, however they are packed."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields, is_dataclass
from types import ModuleType
from typing import Any

from torch import Tensor, nn


def results_of(out: Any) -> list[Tensor]:
    """The tensors that an operator returned."""
    return [out] if isinstance(out, Tensor) else call_tensors((out,), {})


def first_tensor(out: Any) -> Tensor | None:
    """What a module gives: a tensor, or a tuple that begins with it."""
    first = out[0] if isinstance(out, (tuple, list)) and out else out
    return first if isinstance(first, Tensor) else None


def call_tensors(args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Tensor]:
    """The tensors among the arguments of a call, in a fixed order."""
    found: list[Tensor] = []
    for value in args:
        if isinstance(value, Tensor):
            found.append(value)
        elif isinstance(value, (tuple, list, dict)):
            _collect((value,), found)
    if kwargs:
        _collect(kwargs.values(), found)
    return found


def _collect(values: Iterable[Any], into: list[Tensor]) -> None:
    for value in values:
        if isinstance(value, Tensor):
            into.append(value)
        elif isinstance(value, (tuple, list)):
            _collect(value, into)
        elif isinstance(value, dict):
            _collect(value.values(), into)


def tensors_in(value: Any) -> list[Tensor]:
    """The tensors that a value holds, however they are packed, in a fixed order.

    Looks into mappings, sequences, dataclasses and the attributes of other objects.

    Example:
        >>> import torch
        >>> from types import SimpleNamespace
        >>> packed = {"boxes": [torch.zeros(2, 4)], "more": SimpleNamespace(scores=torch.ones(2))}
        >>> [tuple(tensor.shape) for tensor in tensors_in(packed)]
        [(2, 4), (2,)]
    """
    found: list[Tensor] = []
    _unpack(value, found, set())
    return found


def _unpack(value: Any, into: list[Tensor], above: set[int]) -> None:
    if isinstance(value, Tensor):
        into.append(value)
    elif id(value) not in above:
        for item in _items(value):
            _unpack(item, into, above | {id(value)})


def _items(value: Any) -> Sequence[Any]:
    if isinstance(value, Mapping):
        return list(value.values())
    if isinstance(value, (tuple, list)):
        return value
    if isinstance(value, (type, ModuleType, nn.Module)):
        return ()
    if is_dataclass(value):
        return [getattr(value, each.name, None) for each in fields(value)]
    return list(getattr(value, "__dict__", {}).values())
