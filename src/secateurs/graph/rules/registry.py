"""Which rule belongs to which operator."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from secateurs.graph.tracing import Rule


class _Operators:
    """The ATen operators by name; one that this release of torch lacks reads as None."""

    def __getattr__(self, name: str) -> Any:
        return getattr(torch.ops.aten, name, None)


aten = _Operators()

_RULES: dict[Any, Rule] = {}
_FOUND: dict[Any, Rule | None] = {}


def rule(*operators: Any) -> Callable[[Rule], Rule]:
    """Register the label rule of one or more ATen (or custom) operators.

    Args:
        operators: Operator packets such as ``torch.ops.aten.relu`` (all overloads) or single overloads such
            as ``torch.ops.aten.add.Tensor``; an overload's own rule goes before its packet's.

    Returns:
        A decorator for a function ``(tracer, args, kwargs, out) -> None`` that says how the labels of the
        arguments become those of the results, by calling methods of `secateurs.graph.Tracer`.

    Example:
        >>> import torch
        >>> @torch.library.custom_op("doc::double", mutates_args=())
        ... def double(x: torch.Tensor) -> torch.Tensor:
        ...     return 2 * x
        >>> @rule(torch.ops.doc.double)
        ... def double_rule(tracer, args, kwargs, out):
        ...     tracer.set(out, tracer.dims(args[0]))
    """

    def register(function: Rule) -> Rule:
        for operator in operators:
            if operator is not None:
                _RULES[operator] = function
        _FOUND.clear()
        return function

    return register


def find_rule(operator: Any) -> Rule | None:
    """The rule of an operator overload: its own, its packet's, or the pointwise rule if it is tagged so."""
    if operator not in _FOUND:
        found = _RULES.get(operator) or _RULES.get(operator.overloadpacket)
        if found is None and torch.Tag.pointwise in operator.tags:
            found = _RULES[torch.Tag.pointwise]
        _FOUND[operator] = found
    return _FOUND[operator]
