"""Which rule belongs to which operator, and how its arguments reach it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias, TypeVar

import torch
from torch._ops import HigherOrderOperator

from secateurs.graph.packed import call_tensors, results_of
from secateurs.graph.rules.common import refuse
from secateurs.graph.tracing import Rule, Tracer


class _Operators:
    """The ATen operators by name; one that this release of torch lacks reads as None."""

    def __getattr__(self, name: str) -> Any:
        return getattr(torch.ops.aten, name, None)


aten = _Operators()


class Arguments(tuple[Any, ...]):
    """The positional arguments of a call, in the order of the operator's schema, its defaults filled in.

    However a call was written, ``args[1]`` is the second argument, and ``args.get("dim")`` the one of that
    name, `None` where the overload has none.
    """

    names: tuple[str, ...]

    def get(self, name: str, default: Any = None) -> Any:
        """The argument of that name, ``default`` where the operator has none or it is None."""
        if name not in self.names:
            return default
        value = self[self.names.index(name)]
        return default if value is None else value


OperatorRule: TypeAlias = Callable[[Tracer, Arguments, dict[str, Any], Any], None]
_Registered = TypeVar("_Registered", bound=OperatorRule)

_RULES: dict[Any, OperatorRule] = {}
_FOUND: dict[Any, Rule | None] = {}


def rule(*operators: Any) -> Callable[[_Registered], _Registered]:
    """Register the label rule of one or more ATen (or custom) operators.

    Args:
        operators: Operator packets such as ``torch.ops.aten.relu`` (all overloads), single overloads such
            as ``torch.ops.aten.add.Tensor``, or names such as ``"torchvision::roi_align"`` of operators that
            need not be loaded yet. An overload's own rule goes before its packet's.

    Returns:
        A decorator for a function ``(tracer, args, kwargs, out) -> None`` that says how the labels of the
        arguments become those of the results, by calling methods of `secateurs.graph.Tracer`. ``args`` holds
        all positional arguments in the order of the operator's schema, with defaults filled in, and finds
        them by name (``args.get("dim")``); ``kwargs`` holds the keyword-only ones.

    Example:
        >>> import torch
        >>> @torch.library.custom_op("doc::double", mutates_args=())
        ... def double(x: torch.Tensor) -> torch.Tensor:
        ...     return 2 * x
        >>> @rule(torch.ops.doc.double)
        ... def double_rule(tracer, args, kwargs, out):
        ...     tracer.set(out, tracer.dims(args[0]))
    """

    def register(function: _Registered) -> _Registered:
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
    """The rule of an operator overload, which binds a call's arguments to the operator's schema.

    It is the overload's own, its packet's, the pointwise rule if the operator is tagged so, or that of the
    operator which does the same out of place. Operators that take functions (`flex_attention`) have none.
    """
    if isinstance(operator, HigherOrderOperator):
        return None
    if operator not in _FOUND:
        found = _registered(operator)
        _FOUND[operator] = None if found is None else _bound(operator, found)
    return _FOUND[operator]


def _registered(operator: Any) -> OperatorRule | None:
    name = operator._schema.name
    found = _RULES.get(operator) or _RULES.get(operator.overloadpacket) or _RULES.get(name)
    if found is None and torch.Tag.pointwise in operator.tags:
        return _RULES[torch.Tag.pointwise]
    if found is None and name.startswith("aten::") and name.endswith("_"):
        twin = getattr(aten, name.removeprefix("aten::").removesuffix("_"))
        return None if twin is None else _RULES.get(twin) or _of_any_overload(twin)
    return found


def _of_any_overload(packet: Any) -> OperatorRule | None:
    overloads = [getattr(packet, name) for name in packet.overloads()]
    pointwise = any(torch.Tag.pointwise in overload.tags for overload in overloads)
    return _RULES[torch.Tag.pointwise] if pointwise else None


def _bound(operator: Any, function: OperatorRule) -> Rule:
    """The rule as it is called: arguments in order, and what it fails on locked instead of passed on."""
    schema = [argument for argument in operator._schema.arguments if not argument.kwarg_only]
    keyword_only = {a.name: a.default_value for a in operator._schema.arguments if a.kwarg_only}
    names = tuple(argument.name for argument in schema)
    defaults = tuple(argument.default_value for argument in schema)

    def bound(t: Tracer, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
        full = Arguments(args + defaults[len(args) :])
        if kwargs:
            full = Arguments(kwargs.get(name, value) for name, value in zip(names, full, strict=True))
            rest = {**keyword_only, **{name: v for name, v in kwargs.items() if name in keyword_only}}
        else:
            rest = keyword_only
        full.names = names
        try:
            function(t, full, rest, out)
        except Exception as error:  # a faulty rule costs reduction, not the trace
            reason = f"the rule of {operator} failed: {type(error).__name__}: {error}"
            refuse(t, operator, call_tensors(args, kwargs), results_of(out), reason)

    return bound
