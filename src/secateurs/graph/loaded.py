"""Where loaded Python modules hold something, and putting another thing there for a while."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from types import CellType
from typing import Any

_WITHOUT_MODELS = sys.stdlib_module_names | {"secateurs", "torch", "numpy", "scipy", "sympy"}


class Holders:
    """Every place in loaded modules that holds a thing of some kind, under whatever name.

    A module is looked at once, because there are thousands of them; ``__main__`` each time.

    Args:
        is_meant: Whether a thing is of that kind.
        also: Names of modules to look at among those of Python, torch and ours, which are left out.

    Example:
        >>> import fractions
        >>> held = Holders(lambda thing: thing is fractions.Fraction, also=["fractions"])
        >>> [(module.__name__, name) for module, name in held.places() if module is fractions]
        [('fractions', 'Fraction')]
    """

    def __init__(self, is_meant: Callable[[Any], bool], also: Iterable[str] = ()) -> None:
        self._is_meant, self._also = is_meant, frozenset(also)
        self._found: dict[str, tuple[str, ...]] = {}

    def names(self, holder: Any) -> tuple[str, ...]:
        """The names under which a module or class holds such a thing."""
        return tuple(
            name for name, thing in list(getattr(holder, "__dict__", {}).items()) if self._is_meant(thing)
        )

    def places(self) -> list[tuple[Any, str]]:
        """Modules and names."""
        for name, module in list(sys.modules.items()):
            if name not in self._found or name == "__main__":
                is_left_out = name.partition(".")[0] in _WITHOUT_MODELS and name not in self._also
                self._found[name] = () if is_left_out else self.names(module)
        return [
            (sys.modules[name], key)
            for name, keys in self._found.items()
            if keys and name in sys.modules
            for key in keys
        ]


@contextmanager
def exchanged(places: Iterable[tuple[Any, str]], exchange: Callable[[Any], Any]) -> Iterator[None]:
    """Other things stand in some places meanwhile.

    Args:
        places: Modules or classes, and names; or cells of closures, and ``"cell_contents"``.
        exchange: Gives what stands there in the place of a thing.
    """
    before = [
        (holder, key, holder.cell_contents if isinstance(holder, CellType) else vars(holder)[key])
        for holder, key in places
        if isinstance(holder, CellType) or key in vars(holder)
    ]
    for holder, key, thing in before:
        setattr(holder, key, exchange(thing))
    try:
        yield
    finally:
        for holder, key, thing in before:
            setattr(holder, key, thing)
