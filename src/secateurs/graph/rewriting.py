"""Classes derived from a model's own, in which sizes that stand in the code are attributes.

A size in the code of a method cannot follow a cut. So the module gets a class of the same name, derived from
its own, in which that one expression is an attribute; all else of the method is the code that it was. Such a
module can be copied, pickled, compiled, exported and scripted as before. Its class is made again from the
original and from the places of the expressions.
"""

from __future__ import annotations
import __future__

import ast
import copy
import inspect
import linecache
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from types import CodeType, FunctionType
from typing import Any
from zlib import crc32

from torch import nn

from secateurs.errors import ApplyError
from secateurs.graph.methods import Method, Place
from secateurs.graph.running import EDITED

_SIZES = "_secateurs_sizes"
_BASE = "_secateurs_base"
_OWN_COPIES = ("__copy__", "__deepcopy__", "__reduce__", "__reduce_ex__")
_FUTURE = {getattr(__future__, name).compiler_flag for name in __future__.all_feature_names}
_classes: dict[tuple[type, frozenset[Place]], type] = {}


@dataclass(frozen=True, slots=True, kw_only=True)
class WrittenSize:
    """A size in the code of a method, which an attribute takes the place of.

    Args:
        module: Path of the module.
        method: Name of its method.
        line: Line of the expression, counted from the method's first, 0.
        column: Its column, in bytes.
        text: The expression.
    """

    module: str
    method: str
    line: int
    column: int
    text: str

    @property
    def attribute(self) -> str:
        """The name of the attribute."""
        return self.place.attribute

    @property
    def place(self) -> Place:
        """Where it stands in the class, whichever module has it."""
        return Place(self.method, self.line, self.column, self.text)


def write_sizes(model: nn.Module, sizes: Iterable[WrittenSize]) -> None:
    """Give modules classes in which these sizes are attributes; the attributes are to be set next.

    Raises:
        ApplyError: The code of a module is not the code that the sizes were found in.
    """
    of_module: dict[str, set[Place]] = {}
    for size in sizes:
        of_module.setdefault(size.module, set()).add(size.place)
    found: list[tuple[nn.Module, type]] = []
    for path, places in of_module.items():
        module = model.get_submodule(path)
        base, before = unwritten(type(module))
        try:
            found.append((module, _with_attributes(base, before | places)))
        except _OtherCodeError as error:
            raise ApplyError(
                f"the code of {base.__name__} is not what the plan was made for: {error}",
                fix="install the code that the plan was made with, or make the plan again",
                where=path,
            ) from error
    for module, kind in found:
        module.__class__ = kind


def unwritten(kind: type) -> tuple[type, frozenset[Place]]:
    """The class that a class of ours was derived from, and the places that were rewritten in it."""
    held = kind.__dict__
    return (held[_BASE], held[_SIZES]) if _BASE in held else (kind, frozenset())


def can_have(kind: type, size: WrittenSize) -> bool:
    """Whether a class can be derived from this one in which the size is an attribute."""
    base, before = unwritten(kind)
    if hasattr(kind, size.attribute):
        return False
    try:
        _with_attributes(base, before | {size.place})
    except Exception:  # whatever the class's own machinery raises: then the size stays as it is
        return False
    return True


class _OtherCodeError(Exception):
    """The expression is not there, or the class is not one to derive from."""


def _with_attributes(base: type, places: frozenset[Place]) -> type:
    """A class derived from another in which expressions are attributes."""
    if (base, places) not in _classes:
        if any(getattr(base, name, None) is not getattr(nn.Module, name, None) for name in _OWN_COPIES):
            raise _OtherCodeError("its objects are copied in a way of their own")
        methods = {
            name: _rewritten(base, name, places) for name in sorted({place.method for place in places})
        }
        about = {"__module__": base.__module__, "__qualname__": base.__qualname__, "__doc__": base.__doc__}
        ours = {_BASE: base, _SIZES: places, "__reduce_ex__": _reduce}
        _classes[base, places] = type(base)(base.__name__, (base,), {**about, **methods, **ours})
    return _classes[base, places]


def _reduce(module: nn.Module, protocol: int) -> tuple[Any, ...]:
    """How an object of such a class is pickled: by the original class and what was rewritten in it."""
    held = type(module).__dict__
    return _bare, (held[_BASE], held[_SIZES]), module.__getstate__()


def _bare(base: type, places: frozenset[Place]) -> Any:
    return object.__new__(_with_attributes(base, places))


def _rewritten(base: type, name: str, places: frozenset[Place]) -> FunctionType:
    """A method of a class with attributes in the place of expressions."""
    function = inspect.getattr_static(base, name, None)
    if not isinstance(function, FunctionType):
        raise _OtherCodeError(f"{name!r} is no plain method")
    method = Method(name, function)  # with a tree of its own, which is changed here
    if not method.can_be_rewritten or method.tree is None:
        raise _OtherCodeError(f"the source of {name!r} cannot be read")
    if not _is_source_of(method.tree, function):
        raise _OtherCodeError(f"the source of {name!r} has changed since it was imported")
    attributes: dict[ast.expr, str] = {}
    for place in places:
        if place.method == name:
            node = method.at(place)
            if node is None:
                raise _OtherCodeError(f"{place.text!r} is not in line {place.line + 1} of {name!r}")
            attributes[node] = place.attribute
    file = _edited_file(method, attributes)
    code = _compiled(_Exchange(attributes, method.owner).visit(method.tree), function, file)
    cells = dict(zip(function.__code__.co_freevars, function.__closure__ or (), strict=True))
    closure = tuple(cells[each] for each in code.co_freevars)
    made = FunctionType(code, function.__globals__, name, function.__defaults__, closure)
    made.__kwdefaults__, made.__qualname__ = function.__kwdefaults__, function.__qualname__
    made.__doc__, made.__module__ = function.__doc__, function.__module__
    made.__annotations__, made.__dict__ = dict(function.__annotations__), dict(function.__dict__)
    return made


def _is_source_of(tree: ast.FunctionDef, function: FunctionType) -> bool:
    """Whether a function was compiled from this tree; pytest adds to the assertions of test modules."""
    running = function.__code__
    if any(name.startswith("@py_assert") for name in running.co_varnames):
        return True
    return _told(_compiled(copy.deepcopy(tree), function, running.co_filename)) == _told(running)


def _told(code: CodeType) -> tuple[Any, ...]:
    """What the code of a function names and in which lines; instructions also depend on imports around it."""
    inner = [_told(each) for each in code.co_consts if isinstance(each, CodeType)]
    plain = [each for each in code.co_consts if not isinstance(each, CodeType)]
    lines = {line for _, _, line in code.co_lines()}
    return code.co_names, code.co_varnames, code.co_freevars, plain, lines, inner


class _Exchange(ast.NodeTransformer):
    """Puts attributes in the place of expressions."""

    def __init__(self, attributes: Mapping[ast.expr, str], owner: str) -> None:
        self._attributes, self._owner = attributes, owner

    def visit(self, node: ast.AST) -> Any:
        """The node, or the attribute that takes its place."""
        if not isinstance(node, ast.expr) or node not in self._attributes:
            return self.generic_visit(node)
        owner = ast.copy_location(ast.Name(self._owner, ast.Load()), node)
        return ast.copy_location(ast.Attribute(owner, self._attributes[node], ast.Load()), node)


def _compiled(tree: ast.FunctionDef, function: FunctionType, file: str) -> CodeType:
    """The code of a function of this tree, within one that has the names which the original has from outside.

    Defaults and annotations are left out: the function has its own already.
    """
    tree.returns = None
    for each in ast.walk(tree.args):
        if isinstance(each, ast.arg):
            each.annotation = None
    nothing = ast.Constant(None)
    tree.args.defaults = [nothing for _ in tree.args.defaults]
    tree.args.kw_defaults = [None if each is None else nothing for each in tree.args.kw_defaults]
    around = ast.parse(f"def around({', '.join(function.__code__.co_freevars)}): pass")
    outer = around.body[0]
    assert isinstance(outer, ast.FunctionDef)
    outer.body = [tree]
    flags = function.__code__.co_flags & sum(_FUTURE)
    code: CodeType = compile(ast.fix_missing_locations(around), file, "exec", flags=flags, dont_inherit=True)
    for name in (outer.name, tree.name):
        inner = [each for each in code.co_consts if isinstance(each, CodeType) and each.co_name == name]
        code = inner[0]
    return code.replace(co_qualname=function.__code__.co_qualname)


def _edited_file(method: Method, attributes: Mapping[ast.expr, str]) -> str:
    """A name under which tracebacks, `inspect` and TorchScript find the source with the attributes."""
    lines = [line.encode() for line in method.lines]
    ends = [
        (node.lineno, node.col_offset, node.end_lineno, node.end_col_offset, n)
        for node, n in attributes.items()
    ]
    for first, start, last, end, name in sorted(ends, reverse=True):
        top, bottom = first - method.first_line, (last or first) - method.first_line
        rest = lines[bottom][end:]
        lines[top] = lines[top][:start] + f"{method.owner}.{name}".encode() + rest
        lines[top + 1 : bottom + 1] = [b"\n"] * (bottom - top)
    text = "\n" * (method.first_line - 1) + b"".join(lines).decode()
    file = f"{method.function.__code__.co_filename}{EDITED}{crc32(text.encode()):08x}"
    linecache.cache[file] = len(text), None, text.splitlines(keepends=True), file
    return file
