"""What modules keep for themselves: a forward pass may leave tables there, which the next one finds.

LeViT keeps its biases of attention, ConViT its relative positions. The second pass then calls less than the
first, so that the numbers of its calls mean others.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Iterator
from typing import Any
from weakref import WeakKeyDictionary

from torch import nn

from secateurs.graph.copying import modules_of
from secateurs.graph.memos import memos_opened

_OF_TORCH = frozenset(("_parameters", "_modules", "training"))
_CONTAINERS = (dict, list, set)


class Attributes:
    """The plain attributes of all modules of a model, and what dictionaries, lists and sets hold.

    Buffers are in such a dictionary: another one in the place of one is a change, other values are none.

    Args:
        model: The model.

    Example:
        >>> net = nn.Sequential(nn.ReLU())
        >>> before = Attributes(net)
        >>> net[0].table = [1, 2]
        >>> before.are_changed()
        True
        >>> before.put_back()
        >>> hasattr(net[0], "table"), before.are_changed()
        (False, False)
    """

    def __init__(self, model: nn.Module) -> None:
        self._of = [
            (weakref.ref(module), {name: (value, _content(value)) for name, value in _plain(module)})
            for _, module in modules_of(model)
        ]

    def are_changed(self) -> bool:
        """Whether any differs from what it was."""
        for module, before in self._modules():
            now = dict(_plain(module))
            if now.keys() != before.keys():
                return True
            if any(
                now[name] is not value or not _is_same(value, was) for name, (value, was) in before.items()
            ):
                return True
        return False

    def put_back(self) -> None:
        """Make all what they were."""
        for module, before in self._modules():
            own = module.__dict__
            for name in [name for name, _ in _plain(module) if name not in before]:
                del own[name]
            for name, (value, was) in before.items():
                if own.get(name) is not value:
                    own[name] = value
                if not _is_same(value, was):
                    _refill(value, was)

    def _modules(self) -> Iterator[tuple[nn.Module, dict[str, tuple[Any, Any]]]]:
        return ((module, before) for ref, before in self._of if (module := ref()) is not None)


_TRACED: WeakKeyDictionary[nn.Module, Attributes] = WeakKeyDictionary()


def remember(model: nn.Module) -> None:
    """A model was traced: passes that follow the trace by its numbers begin with the attributes of now."""
    _TRACED[model] = Attributes(model)


@contextlib.contextmanager
def as_traced(model: nn.Module) -> Iterator[None]:
    """The modules of a model have the attributes that they had in the trace; those of now are put back after.

    Args:
        model: The model; one that was not traced stays as it is.
    """
    now = Attributes(model)
    _TRACED.get(model, now).put_back()
    try:
        yield
    finally:
        now.put_back()


@contextlib.contextmanager
def passes_alike(model: nn.Module) -> Iterator[None]:
    """Each pass of a model begins with the attributes of now, and with empty memos; none leaves anything.

    Args:
        model: The model; passes one after another, none while another one waits.
    """
    before = Attributes(model)
    with contextlib.ExitStack() as memos:

        def begin(*_: Any) -> None:
            before.put_back()
            memos.close()
            memos.enter_context(memos_opened(model))

        handle = model.register_forward_pre_hook(begin, prepend=True)
        try:
            yield
        finally:
            handle.remove()
            before.put_back()


def _plain(module: nn.Module) -> list[tuple[str, Any]]:
    """What a module keeps that holds no other module, which might be the one above it."""
    return [
        (name, value)
        for name, value in module.__dict__.items()
        if name not in _OF_TORCH and "_hooks" not in name and not _holds_module(value)
    ]


def _holds_module(value: Any) -> bool:
    if type(value) in _CONTAINERS:
        return any(isinstance(each, nn.Module) for each in (value.values() if type(value) is dict else value))
    return callable(value) or isinstance(value, nn.Module)


def _content(value: Any) -> Any:
    return value.copy() if type(value) in _CONTAINERS else None


def _is_same(value: Any, was: Any) -> bool:
    """Whether a container still holds the very things that it held."""
    if was is None:
        return True
    if len(value) != len(was):
        return False
    if isinstance(value, dict):
        return all(name in was and was[name] is each for name, each in value.items())
    if isinstance(value, set):
        return bool(value == was)
    return all(one is other for one, other in zip(value, was, strict=True))


def _refill(value: Any, was: Any) -> None:
    value.clear()
    if isinstance(value, list):
        value.extend(was)
    else:
        value.update(was)
