"""Torch functions whose body is Python, opened so that modes see what they call.

A ``TorchFunctionMode`` sees ``functional.multi_head_attention_forward`` as one call and is left out of its
body, so that the lengths it derives there (``embed_dim // num_heads``) are numbers without an origin, and
what its output projection reads is not seen. The same body, without the question whether a mode wants the
call as a whole, is an ordinary piece of a model's own code.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from types import FunctionType
from typing import Any

from torch.nn import functional

from secateurs.graph.loaded import Holders, exchanged


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


_AS_IT_IS = functional.multi_head_attention_forward
_ATTENTION = opened(_AS_IT_IS)
_HOLDERS = Holders(lambda thing: thing is _AS_IT_IS, also=["torch.nn.functional"])


def attention_opened() -> AbstractContextManager[None]:
    """Attention called as a function is opened meanwhile, in every module that holds it."""
    return exchanged(_HOLDERS.places(), lambda held: _ATTENTION if held is _AS_IT_IS else held)
