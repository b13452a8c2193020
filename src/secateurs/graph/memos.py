"""Memoised functions that compute anew where they are asked with traced integers.

``functools.lru_cache`` looks its arguments up by equality. That is no decision of the model's code, so it
must not be noted as one; and what it finds was made from other integers of the same value, of another layer.
Nor may it keep what a run of ours makes: tensors without data, or wide ones, would reach the user's calls.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import MethodType
from typing import Any

from torch import nn

from secateurs.graph.copying import modules_of
from secateurs.graph.integers import traced_in

_MEMO = type(functools.lru_cache(len))
_WITHOUT_MODELS = sys.stdlib_module_names | {"torch", "numpy", "scipy", "sympy"}
_FOUND: dict[str, tuple[str, ...]] = {}  # by module, because to look takes 0.1 s for a thousand of them


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


@contextmanager
def memos_opened(model: nn.Module) -> Iterator[None]:
    """Memoised functions of all loaded modules, and methods of the model's classes, start empty meanwhile.

    Args:
        model: The model that is run.
    """
    classes = {base for _, module in modules_of(model) for base in type(module).__mro__}
    held: list[tuple[Any, str]] = [
        (sys.modules[name], key) for name, keys in _memos().items() for key in keys
    ]
    held += [(each, key) for each in classes for key in _names(each)]
    memos = [(holder, key, vars(holder)[key]) for holder, key in held if key in vars(holder)]
    for holder, key, memo in memos:
        setattr(holder, key, _Memo(memo))
    try:
        yield
    finally:
        for holder, key, memo in memos:
            setattr(holder, key, memo)


def _memos() -> dict[str, tuple[str, ...]]:
    for name, module in list(sys.modules.items()):
        if name not in _FOUND or name == "__main__":
            _FOUND[name] = () if name.partition(".")[0] in _WITHOUT_MODELS else _names(module)
    return {name: keys for name, keys in _FOUND.items() if keys and name in sys.modules}


def _names(holder: Any) -> tuple[str, ...]:
    return tuple(
        name for name, value in list(getattr(holder, "__dict__", {}).items()) if type(value) is _MEMO
    )
