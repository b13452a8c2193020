"""Which rule belongs to which operator."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

import torch

from secateurs.graph.tracing import Rule, Tracer


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


CallRule: TypeAlias = Callable[["Tracer", tuple[Any, ...], dict[str, Any]], None]
_CALL_RULES: dict[Any, CallRule] = {}


def call_rule(function: Any) -> Callable[[CallRule], CallRule]:
    """Register a rule for a torch function, run before its operators, for what these no longer show."""

    def register(each: CallRule) -> CallRule:
        _CALL_RULES[function] = each
        return each

    return register


def find_call_rule(function: Any) -> CallRule | None:
    """The rule of a torch function, if it has one."""
    return _CALL_RULES.get(function)


def find_rule(operator: Any) -> Rule | None:
    """The rule of an operator overload: its own, its packet's, or the pointwise rule if it is tagged so."""
    if operator not in _FOUND:
        found = _RULES.get(operator) or _RULES.get(operator.overloadpacket)
        if found is None and torch.Tag.pointwise in operator.tags:
            found = _RULES[torch.Tag.pointwise]
        _FOUND[operator] = found
    return _FOUND[operator]
