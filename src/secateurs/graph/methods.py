"""A method of a model's class and its source: what stands where, and what its names mean."""

from __future__ import annotations

import ast
import builtins
import inspect
import linecache
from functools import cached_property
from types import CodeType, FunctionType
from typing import Any, NamedTuple

_OPERATORS = (ast.Add, ast.Sub, ast.Mult, ast.FloorDiv, ast.Mod)


class Place(NamedTuple):
    """Where an expression stands in a class.

    Args:
        method: Name of the method.
        line: Its line, counted from the method's first, 0.
        column: Its column, in bytes.
        text: The expression.
    """

    method: str
    line: int
    column: int
    text: str

    @property
    def attribute(self) -> str:
        """The name of the attribute that can take its place."""
        return f"{self.method}_size_{self.line}_{self.column}"


def _local_names(code: CodeType) -> set[str]:
    """The local variables of a function and of those within it."""
    inner = [_local_names(each) for each in code.co_consts if isinstance(each, CodeType)]
    return {*code.co_varnames, *code.co_cellvars}.union(*inner)


class Method:
    """A method as its class has it, and its source.

    Args:
        name: Its name.
        function: The function, as it was written.
    """

    def __init__(self, name: str, function: FunctionType) -> None:
        self.name, self.function = name, function
        self.first_line = function.__code__.co_firstlineno
        self.sizes: dict[Any, tuple[Place, int] | None] = {}  # what was found out about its calls

    @cached_property
    def lines(self) -> list[str]:
        """The lines of its source; none where there is no source."""
        code = self.function.__code__
        try:
            lines = linecache.getlines(code.co_filename, self.function.__globals__)
            return inspect.getblock(lines[code.co_firstlineno - 1 :])
        except (OSError, SyntaxError, IndexError):
            return []

    @cached_property
    def tree(self) -> ast.FunctionDef | None:
        """Its source as a tree, with the lines and columns that it has in its file."""
        for opening in ("if 1:\n", "\n"):  # indented, as in a class, or not
            try:
                tree = ast.parse(opening + "".join(self.lines))
            except SyntaxError:
                continue
            ast.increment_lineno(tree, self.first_line - 2)
            first = next((node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)), None)
            return first if first is not None and first.name == self.name else None
        return None

    @cached_property
    def nodes(self) -> list[ast.AST]:
        """All nodes of the tree."""
        return list(ast.walk(self.tree)) if self.tree is not None else []

    @cached_property
    def can_be_rewritten(self) -> bool:
        """Whether the same function can be made from the tree: private names and decorators hide things."""
        if self.tree is None or self.tree.decorator_list or not self.function.__code__.co_argcount:
            return False
        names = (getattr(node, "attr", getattr(node, "id", "")) for node in self.nodes)
        return not any(name.startswith("__") and not name.endswith("__") for name in names)

    @cached_property
    def owner(self) -> str:
        """The name that its module has in it."""
        return self.function.__code__.co_varnames[0]

    @cached_property
    def names(self) -> dict[str, Any]:
        """What its names stand for that are no local variables."""
        code, known = self.function.__code__, {**vars(builtins), **self.function.__globals__}
        for name, cell in zip(code.co_freevars, self.function.__closure__ or (), strict=True):
            try:
                known[name] = cell.cell_contents
            except ValueError:  # not filled yet
                known.pop(name, None)
        local = _local_names(code)
        return {name: value for name, value in known.items() if name not in local}

    @cached_property
    def assigned(self) -> dict[str, ast.expr]:
        """What the local variables stand for that are set once, and by themselves."""
        code = self.function.__code__
        stored = [n.id for n in self.nodes if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)]
        found = {}
        for node in self.nodes:
            if isinstance(node, ast.Assign) and len(node.targets) == 1:
                target = node.targets[0]
                if isinstance(target, ast.Name) and stored.count(target.id) == 1:
                    found[target.id] = node.value
        arguments = code.co_argcount + code.co_kwonlyargcount
        return {name: value for name, value in found.items() if name not in code.co_varnames[:arguments]}

    def origin(self, node: ast.expr) -> ast.expr:
        """What a local variable was set to, where that is a number or a tuple written there; else itself."""
        value = self.assigned.get(node.id) if isinstance(node, ast.Name) else None
        if value is None:
            return node
        is_number = all(isinstance(part, (ast.Constant, ast.BinOp, *_OPERATORS)) for part in ast.walk(value))
        return value if is_number or isinstance(value, ast.Tuple | ast.List | ast.BinOp) else node

    @cached_property
    def endings(self) -> dict[tuple[int | None, int | None], ast.expr]:
        """The calls, and what stands with square brackets, by the line and column where they end."""
        found = [node for node in self.nodes if isinstance(node, ast.Call | ast.Subscript)]
        return {(node.end_lineno, node.end_col_offset): node for node in found}

    def at(self, place: Place) -> ast.expr | None:
        """The expression at a place."""
        for node in self.nodes:
            if (
                isinstance(node, ast.expr)
                and node.col_offset == place.column
                and self.place_of(node) == place
            ):
                return node
        return None

    def place_of(self, node: ast.expr) -> Place:
        """Where an expression stands."""
        return Place(self.name, node.lineno - self.first_line, node.col_offset, ast.unparse(node))

    def value(self, node: ast.expr) -> int | None:
        """The value of an expression of figures and of names from outside; None for others."""
        plain = (ast.Constant, ast.Name, ast.Load, ast.BinOp, ast.UnaryOp, ast.USub, *_OPERATORS)
        parts = list(ast.walk(node))
        if not all(isinstance(part, plain) for part in parts):
            return None
        names = {part.id: self.names.get(part.id) for part in parts if isinstance(part, ast.Name)}
        figures = [part.value for part in parts if isinstance(part, ast.Constant)]
        if not all(type(each) is int for each in (*names.values(), *figures)):
            return None
        try:
            found = eval(compile(ast.Expression(node), "<size>", "eval"), {"__builtins__": {}}, names)
        except ArithmeticError:
            return None
        return found if type(found) is int else None
