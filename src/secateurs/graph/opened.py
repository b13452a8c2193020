"""Torch functions whose body is Python, opened so that modes see what they call.

A ``TorchFunctionMode`` sees ``functional.multi_head_attention_forward`` as one call and is left out of its
body, so that the lengths it derives there (``embed_dim // num_heads``) are numbers without an origin, and
what its output projection reads is not seen. The same body, without the question whether a mode wants the
call as a whole, is an ordinary piece of a model's own code.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FunctionType
from typing import Any

from torch.nn import functional


def opened(function: Any) -> Callable[..., Any]:
    """A function of ``torch.nn.functional`` that modes see through.

    Args:
        function: The function; it asks ``has_torch_function`` before it does anything.

    Returns:
        A function with the same code, signature and results.
    """
    names = {**function.__globals__, "has_torch_function": lambda arguments: False}
    twin = FunctionType(function.__code__, names, function.__name__, function.__defaults__)
    twin.__kwdefaults__ = function.__kwdefaults__
    return twin


_NAME = "multi_head_attention_forward"
_AS_IT_IS = functional.multi_head_attention_forward
_ATTENTION = opened(_AS_IT_IS)
_SEEN: set[str] = set()
_HOLDERS: list[Any] = []


@contextmanager
def attention_opened() -> Iterator[None]:
    """Attention called as a function is opened meanwhile, in every module that holds it by its name."""
    holders = [each for each in _holders() if getattr(each, _NAME, None) is _AS_IT_IS]
    for holder in holders:
        setattr(holder, _NAME, _ATTENTION)
    try:
        yield
    finally:
        for holder in holders:
            setattr(holder, _NAME, _AS_IT_IS)


def _holders() -> list[Any]:
    """The modules that hold the function by its name; each is looked at once, since there are thousands."""
    for name, module in list(sys.modules.items()):
        if name not in _SEEN:
            if name != "__main__":
                _SEEN.add(name)
            if getattr(module, "__dict__", {}).get(_NAME) is _AS_IT_IS and module not in _HOLDERS:
                _HOLDERS.append(module)
    return _HOLDERS
