"""What the engine has to know of an operator besides its rule, looked up once for each."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch._ops import HigherOrderOperator

_aten = torch.ops.aten
_LAYOUT = frozenset((_aten.clone.default, _aten.detach.default, _aten.alias.default))
_VIEWS = frozenset((_aten.view.default, _aten._unsafe_view.default, _aten._reshape_alias.default))
_ASKS = (torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape)
_ASKS_UNTAGGED = ("torchvision::nms",)
_MAKERS = frozenset(
    getattr(_aten, name)
    for name in (
        "arange", "zeros", "ones", "full", "eye", "linspace", "scalar_tensor", "tril_indices", "triu_indices",
    )
)  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Operator:
    """What is the same for all calls of one operator.

    Args:
        compared: The operator as it is compared between two runs: None for copies, one name for all
            reshapes. Which of them a reshape turns into depends on strides, and so on lengths that a cut
            changes.
        numbers: The types of the numbers that it computes with: floats, and where it works point by point
            integers too.
        asks: Whether its result may depend on values, so that its shape alone does not tell.
        draws: Whether it draws random numbers.
        makes: Whether it makes a tensor whose values follow from the call alone.
        is_mutable: Whether it changes one of its arguments.
        takes_tensors: Whether any of its arguments may be a tensor.
    """

    compared: Any
    numbers: tuple[type, ...]
    asks: bool
    draws: bool
    makes: bool
    is_mutable: bool
    takes_tensors: bool


_KNOWN: dict[Any, Operator] = {}


def operator(func: Any) -> Operator:
    """What is known of an operator overload.

    Example:
        >>> operator(torch.ops.aten.relu_.default).is_mutable
        True
    """
    found = _KNOWN.get(func)
    if found is None:
        _KNOWN[func] = found = _described(func)
    return found


def _described(func: Any) -> Operator:
    if isinstance(func, HigherOrderOperator):  # it takes functions, and has no schema
        return Operator(
            compared=func, numbers=(float,), asks=False, draws=False, makes=False, is_mutable=False,
            takes_tensors=False,
        )  # fmt: skip
    schema, tags = func._schema, func.tags
    return Operator(
        compared=None if func in _LAYOUT else _aten.view.default if func in _VIEWS else func,
        numbers=(float, int) if torch.Tag.pointwise in tags else (float,),
        asks=schema.name in _ASKS_UNTAGGED or any(tag in tags for tag in _ASKS),
        draws=torch.Tag.nondeterministic_seeded in tags,
        makes=func.overloadpacket in _MAKERS,
        is_mutable=schema.is_mutable,
        takes_tensors=any("Tensor" in str(argument.type) for argument in schema.arguments),
    )


def canonical(func: Any) -> Any:
    """The operator as it is compared between two runs; see `Operator.compared`."""
    return operator(func).compared
