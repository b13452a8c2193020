"""Memoised functions that compute anew where they are asked with traced integers.

``functools.lru_cache`` looks its arguments up by equality. That is no decision of the model's code, so it
must not be noted as one; and what it finds was made from other integers of the same value, of another layer.
Nor may it keep what a run of ours makes: tensors without data, or wide ones, would reach the user's calls.
"""

from __future__ import annotations

import functools
from contextlib import AbstractContextManager
from types import CellType, FunctionType, MethodType
from typing import Any

from torch import nn

from secateurs.graph.copying import modules_of
from secateurs.graph.integers import traced_in
from secateurs.graph.loaded import Holders, exchanged

_MEMO = type(functools.lru_cache(len))


class _Memo:
    """A memoised function that starts empty, and is left out where an argument is a traced integer."""

    def __init__(self, memo: Any) -> None:
        self._memo, self._own = memo, functools.lru_cache(maxsize=None)(memo.__wrapped__)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        known = any(True for _ in traced_in((*args, *kwargs.values())))
        return (self._memo.__wrapped__ if known else self._own)(*args, **kwargs)

    def __get__(self, instance: Any, owner: Any = None) -> Any:
        return self if instance is None else MethodType(self, instance)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._memo, name)


_HOLDERS = Holders(lambda thing: type(thing) is _MEMO)


def memos_opened(model: nn.Module) -> AbstractContextManager[None]:
    """Memoised functions of all loaded modules, and methods of the model's classes, start empty meanwhile.

    Args:
        model: The model that is run.
    """
    return exchanged(_places(model), _Memo)


def memos_left_out(model: nn.Module) -> AbstractContextManager[None]:
    """They compute anew in every call: passes that take turns, on batches of any size, then call the same.

    Args:
        model: The model that is run.
    """
    return exchanged(_places(model), lambda memo: memo.__wrapped__)


def _places(model: nn.Module) -> list[tuple[Any, str]]:
    """Where memos are: in modules and classes, and in what a decorator has put around a method."""
    classes = {base for _, module in modules_of(model) for base in type(module).__mro__}
    methods = [(each, key) for each in classes for key in _HOLDERS.names(each)]
    held = [getattr(each, "__func__", each) for cls in classes for each in vars(cls).values()]
    functions = [each for each in held if type(each) is FunctionType]
    cells = [cell for each in functions for cell in each.__closure__ or () if _is_full(cell)]
    inner = [(cell, "cell_contents") for cell in cells if type(cell.cell_contents) is _MEMO]
    return [*_HOLDERS.places(), *methods, *inner]


def _is_full(cell: CellType) -> bool:
    try:
        return cell.cell_contents is not None
    except ValueError:  # a name that is not bound yet
        return False
