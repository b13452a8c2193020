"""What leaves a model: tensors that a caller reads, and state that the model alone reads again.

Outputs keep their lengths, because a caller relies on them. A cache of keys and values is another matter: it
is handed back to the model as it is, and the smaller model makes a smaller one.
"""

from __future__ import annotations

import inspect
import sys
import typing
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields, is_dataclass
from types import SimpleNamespace
from typing import Any

from torch import Tensor, nn

from secateurs.graph.packed import tensors_in


@dataclass(frozen=True, slots=True, kw_only=True)
class Returned:
    """What one call of a model returned.

    Args:
        tensors: The tensors that a caller reads, however they are packed, in a fixed order.
        state: What the model alone reads again, by the argument of `forward` that takes it back.
    """

    tensors: tuple[Tensor, ...]
    state: Mapping[str, Any]

    @classmethod
    def by(cls, model: nn.Module, outputs: Any) -> Returned:
        """Tell the outputs of a model from its state.

        State stands beside other outputs, is an object of a class of its own (no tensor, container, mapping
        or dataclass), and the model's `forward` takes it back: it has an optional argument of the name under
        which the object is returned, or one whose annotation names its class. A tensor that is also returned
        outside of it is an output.

        Args:
            model: The model.
            outputs: What its `forward` returned.

        Example:
            >>> import torch
            >>> class Cache:
            ...     def __init__(self, keys):
            ...         self.keys = keys
            >>> class Decoder(nn.Module):
            ...     def forward(self, x, cache=None):
            ...         return {"y": x, "cache": Cache(2 * x)}
            >>> model = Decoder()
            >>> returned = Returned.by(model, model(torch.ones(1, 3)))
            >>> len(returned.tensors), list(returned.state)
            (1, ['cache'])
        """
        state: dict[str, Any] = {}
        tensors: list[Tensor] = []
        for name, value in _parts(outputs):
            found = tensors_in(value)
            argument = _argument_for(model, name, value) if found and _is_opaque(value) else None
            if argument is None or argument in state:
                tensors += found
            else:
                state[argument] = value
        return cls(tensors=tuple(tensors), state=state)


def _parts(outputs: Any) -> Iterator[tuple[str, Any]]:
    """What the outermost container holds, each with its name where it has one."""
    if isinstance(outputs, Mapping):
        yield from ((str(name), value) for name, value in outputs.items())
    elif isinstance(outputs, (tuple, list)):
        yield from zip(getattr(outputs, "_fields", [""] * len(outputs)), outputs, strict=True)
    elif is_dataclass(outputs) and not isinstance(outputs, type):
        yield from ((each.name, getattr(outputs, each.name, None)) for each in fields(outputs))
    elif found := tensors_in(outputs):  # one object is what the call is about, of whatever class
        yield "", found


_PACKING = (Tensor, Mapping, tuple, list, SimpleNamespace, nn.Module, type)


def _is_opaque(value: Any) -> bool:
    """Whether a value is an object of a class of its own, and not a way to pack tensors."""
    return not (isinstance(value, _PACKING) or is_dataclass(value))


def _argument_for(model: nn.Module, name: str, value: Any) -> str | None:
    """The optional argument of `forward` that has this name, or is annotated with the class of the value."""
    optional = [
        each.name
        for each in inspect.signature(model.forward).parameters.values()
        if each.default is not inspect.Parameter.empty
    ]
    if name in optional:
        return name
    try:
        hints = typing.get_type_hints(inspect.unwrap(model.forward))
    except Exception:  # annotations are any code, and may name what only a type checker imports
        return None
    kinds = type(value).__mro__
    return next((each for each in optional if not _classes(hints.get(each)).isdisjoint(kinds)), None)


def _classes(hint: Any) -> set[Any]:
    """The classes that an annotation names, those of a union too, without Python's own."""
    named = typing.get_args(hint) or (hint,)
    return {each for each in named if getattr(each, "__module__", "builtins") not in sys.stdlib_module_names}
