"""Torch functions whose body is Python, opened so that modes see what they call.

A ``TorchFunctionMode`` sees ``functional.multi_head_attention_forward`` as one call and is left out of its
body, so that the lengths it derives there (``embed_dim // num_heads``) are numbers without an origin, and
what its output projection reads is not seen. The same body, without the question whether a mode wants the
call as a whole, is an ordinary piece of a model's own code.
"""

from __future__ import annotations

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


_ATTENTION = opened(functional.multi_head_attention_forward)


@contextmanager
def attention_opened() -> Iterator[None]:
    """Attention that is called as a function, by its name in ``torch.nn.functional``, is opened meanwhile."""
    as_it_was = functional.multi_head_attention_forward
    functional.multi_head_attention_forward = _ATTENTION
    try:
        yield
    finally:
        functional.multi_head_attention_forward = as_it_was
