"""Sizes written into a model's code, such as ``x.view(-1, 16 * 5 * 5)``: which expression a call is given.

A size in the code of a method cannot follow a cut, and neither can one that it derives from a length that
stays, as ``B, N, C = x.shape; y.reshape(B, N, C)`` does. Where nothing else helps, an attribute takes the
place of that expression (`rewriting`), and changes with the cut as any other does. The expression is found
from the running frame: an instruction knows the columns of its source.
"""

from __future__ import annotations

import ast
import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from types import CodeType, FrameType, FunctionType, ModuleType
from typing import Any

from torch import nn

from secateurs.graph.expressions import Constant, Expression, Operation
from secateurs.graph.methods import Method, Place
from secateurs.graph.rewriting import WrittenSize, can_have, unwritten
from secateurs.graph.running import model_frame

_SHAPED = {  # the names under which calls may be given sizes
    "view": ("size", "shape"),
    "reshape": ("shape",),
    "expand": ("size",),
    "broadcast_to": ("size",),
    "repeat": ("repeats",),
    "split": ("split_size", "split_size_or_sections"),
    "split_with_sizes": ("split_sizes",),
    "layer_norm": ("normalized_shape",),
    "group_norm": ("num_groups",),
    "unflatten": ("sizes",),
    "new_zeros": ("size",),
    "new_ones": ("size",),
    "new_empty": ("size",),
    "new_full": ("size",),
}
_MADE = frozenset(("zeros", "ones", "empty", "full", "rand", "randn"))  # of sizes alone
_ONE_BY_ONE = frozenset(
    ("view", "reshape", "expand", "repeat", "new_zeros", "new_ones", "new_empty", *(_MADE - {"full"}))
)
_SINGLE = frozenset(("split", "group_norm"))  # one size will do


@dataclass(frozen=True, slots=True, eq=False)
class Spot:
    """A call in a method of a module that gives sizes, as it was met in a trace.

    Args:
        module: Path of the module.
        kind: Its class.
        method: The code of the method.
        code: The code that is running: the method's, or that of a function or comprehension within it.
        instruction: Number of the call's instruction.
        position: Which of the sizes is meant; None where the call is given a single one.
        of: How many there are.
    """

    module: str
    kind: type[nn.Module]
    method: CodeType
    code: CodeType
    instruction: int
    position: int | None
    of: int

    @property
    def key(self) -> tuple[Any, ...]:
        """Equal for the same place in the code of the same module."""
        return self.module, self.code, self.instruction, self.position, self.of

    def written(self, value: int, expression: Expression | None) -> tuple[WrittenSize, int] | None:
        """The size that stands there, if an attribute can take its place, and the attribute's value.

        That is the size itself, or the part of a product that is written in figures: ``8`` in ``8 * h * w``.

        Args:
            value: The size.
            expression: Where it came from; None for a number without an origin, which must then be written
                there in figures.
        """
        method = _method_of(self.kind, self.method)
        if method is None or not method.can_be_rewritten:
            return None
        if expression is None:
            key = self.code, self.instruction, self.position, self.of, value
            if key not in method.sizes:
                method.sizes[key] = self._find(method, value, None)
            found = method.sizes[key]
        else:
            found = self._find(method, value, expression)
        if found is None:
            return None
        place, value = found
        size = WrittenSize(module=self.module, **place._asdict())
        return (size, value) if can_have(self.kind, size) else None

    def _find(self, method: Method, value: int, expression: Expression | None) -> tuple[Place, int] | None:
        """The place of the expression, and the value of the attribute that can take its place."""
        _, line, _, column = next(islice(self.code.co_positions(), self.instruction, None))
        given, node = method.endings.get((line, column)), None
        if isinstance(given, ast.Call):
            node = _size_in(given, self.position, self.of, method)
        elif isinstance(given, ast.Subscript):
            node = _bound_in(given, value, method)
        if expression is None:
            node, value = _in_figures(node, value, method) if node is not None else (None, 0)
        elif node is not None and not _comes_from(node, expression, method):
            node = None
        if node is None:
            return None
        return method.place_of(node), value


def spot_here(paths: Mapping[int, str], position: int | None, of: int) -> Spot | None:
    """The call in a model's own code that is running, where that is in a method of one of its modules.

    Args:
        paths: The path of each module of the model, by its ``id``.
        position: Which of the sizes that the call is given is meant.
        of: How many there are.
    """
    frame = running = model_frame()
    while frame is not None:
        path, module = _module_of(frame, paths)
        if path is not None and running is not None:
            return Spot(path, type(module), frame.f_code, running.f_code, running.f_lasti // 2, position, of)
        code, frame = frame.f_code, frame.f_back if frame.f_code.co_flags & inspect.CO_NESTED else None
        while frame is not None and code not in frame.f_code.co_consts:  # to the function that it stands in
            frame = frame.f_back
    return None


def _module_of(frame: FrameType, paths: Mapping[int, str]) -> tuple[str | None, Any]:
    """The module whose method a frame runs, with its path; no path where it is none of the model's."""
    code = frame.f_code
    module = frame.f_locals.get(code.co_varnames[0]) if code.co_argcount else None
    return (paths.get(id(module)), module) if isinstance(module, nn.Module) else (None, None)


_methods: dict[tuple[type, CodeType], Method | None] = {}


def _method_of(kind: type, code: CodeType) -> Method | None:
    """The method of a class that is running, if it is a plain function of it."""
    if (kind, code) not in _methods:
        function = inspect.getattr_static(kind, code.co_name, None)
        is_running = isinstance(function, FunctionType) and function.__code__ is code
        function = inspect.getattr_static(unwritten(kind)[0], code.co_name) if is_running else None
        _methods[kind, code] = Method(code.co_name, function) if isinstance(function, FunctionType) else None
    return _methods[kind, code]


def _size_in(call: ast.Call, position: int | None, of: int, method: Method) -> ast.expr | None:
    """The expression of one size among the arguments of a call."""
    name = call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "")
    if name not in _SHAPED and name not in _MADE:
        return None
    keywords = _SHAPED.get(name, ("size",))
    place = 1 if name == "unflatten" else 0  # behind the tensor
    holder = call.func.value if isinstance(call.func, ast.Attribute) else None
    if isinstance(holder, ast.Name) and holder.id == method.owner:
        return None
    is_function = holder is None or isinstance(_named(holder, method.names), ModuleType)
    given = call.args[place + (is_function and name not in _MADE) :]
    given += [each.value for each in call.keywords if each.arg in keywords]
    if name in _SINGLE and given and not isinstance(given[0], ast.Tuple | ast.List):
        return method.origin(given[0])
    one_by_one = name in _ONE_BY_ONE and len(given) > 1
    size = _item_of(given, position, of, method, one_by_one=one_by_one, is_part=name == "unflatten")
    return None if size is None else method.origin(size)


def _item_of(
    given: Sequence[ast.expr],
    position: int | None,
    of: int,
    method: Method,
    *,
    one_by_one: bool,
    is_part: bool,
) -> ast.expr | None:
    """One of the sizes that are given one by one or as a tuple, which a name may stand for."""
    if not given or position is None:
        return None
    if one_by_one and not isinstance(given[0], ast.Tuple | ast.List):
        whole = any(isinstance(each, ast.Starred) for each in given)
        return _counted(given, position % of - of, of) if whole or len(given) == of else None
    shape = given[0].value if isinstance(given[0], ast.Starred) else given[0]
    if of == 1 and not isinstance(shape, ast.Tuple | ast.List | ast.Name):
        return shape
    shape = method.origin(shape)
    if is_part and len(getattr(shape, "elts", ())) != of:
        return None
    return _item(shape, position if position < 0 else position - of, of, method)


def _item(shape: ast.expr, position: int, of: int, method: Method) -> ast.expr | None:
    """An item of a tuple, or of one of two tuples that are added.

    Args:
        shape: The tuple.
        position: Place of the item, counted from the end: -1 is the last.
        of: How many items there are, of both together.
        method: Knows what names stand for.
    """
    if isinstance(shape, ast.BinOp) and isinstance(shape.op, ast.Add):
        first, last = method.origin(shape.left), method.origin(shape.right)
        if isinstance(last, ast.Tuple | ast.List):
            return _item(last, position, of, method) if -position <= len(last.elts) else None
        if isinstance(first, ast.Tuple | ast.List) and of + position < len(first.elts):
            return _item(first, of + position - len(first.elts), len(first.elts), method)
        return None
    return _counted(shape.elts, position, of) if isinstance(shape, ast.Tuple | ast.List) else None


def _counted(items: Sequence[ast.expr], position: int, of: int) -> ast.expr | None:
    """An item counted from the end, or from the beginning where a ``*sizes`` lies behind it."""
    stars = [place for place, each in enumerate(items) if isinstance(each, ast.Starred)]
    if not stars or position > stars[-1] - len(items):
        return items[position] if -position <= len(items) else None
    return items[of + position] if 0 <= of + position < stars[0] else None


def _bound_in(subscript: ast.Subscript, value: int, method: Method) -> ast.expr | None:
    """The one end of a range in square brackets that has a value."""
    parts = subscript.slice.elts if isinstance(subscript.slice, ast.Tuple) else [subscript.slice]
    found = []
    for part in parts:
        for end in (part.lower, part.upper) if isinstance(part, ast.Slice) else ():
            figure = end.operand if isinstance(end, ast.UnaryOp) and isinstance(end.op, ast.USub) else end
            if figure is not None and method.value(method.origin(figure)) == value:
                found.append(method.origin(figure))
    return found[0] if len(found) == 1 else None


def _named(node: ast.expr, names: Mapping[str, Any]) -> Any:
    """What a dotted name stands for, if that is known."""
    if isinstance(node, ast.Name):
        return names.get(node.id)
    return getattr(_named(node.value, names), node.attr, None) if isinstance(node, ast.Attribute) else None


def _comes_from(node: ast.expr, expression: Expression, method: Method) -> bool:
    """Whether an expression computes with nothing but lengths and attributes that are known, and figures."""
    parts = [part for part in ast.walk(node) if isinstance(part, ast.Constant | ast.Name)]
    return _constants(expression) <= {
        method.value(part) for part in parts
    }  # others may be sizes of the inputs


def _in_figures(node: ast.expr, value: int, method: Method) -> tuple[ast.expr | None, int]:
    """The expression, where it has the value by its figures alone, or its largest factor that does."""
    known = method.value(node)
    if known is not None:
        return (node, value) if known == value else (None, 0)
    factors = [(method.value(each), each) for each in _factors(node)]
    fitting = [(n, each) for n, each in factors if n is not None and n > 1 and value % n == 0]
    largest, part = max(fitting, key=lambda each: each[0], default=(0, None))
    return part, largest


def _factors(node: ast.expr) -> list[ast.expr]:
    """What is multiplied, where an expression is a product."""
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Mult):
        return [node.left, node.right, *_factors(node.left), *_factors(node.right)]
    return []


def _constants(expression: Expression) -> set[int]:
    if isinstance(expression, Operation):
        return _constants(expression.left) | _constants(expression.right)
    return {expression.value} if isinstance(expression, Constant) else set()
