"""Leaving ``torch.inference_mode``, whose tensors do not say whether they were changed in place."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

P = ParamSpec("P")
R = TypeVar("R")


def outside_inference_mode(func: Callable[P, R]) -> Callable[P, R]:
    """The same function, which runs in normal mode also where it is called in inference mode.

    Example:
        >>> made = outside_inference_mode(lambda: torch.ones(2))
        >>> with torch.inference_mode():
        ...     made().is_inference(), torch.ones(2).is_inference()
        (False, True)
    """

    @wraps(func)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        if not torch.is_inference_mode_enabled():
            return func(*args, **kwargs)
        with torch.inference_mode(False):
            return func(*args, **kwargs)

    return run


def as_normal(inputs: Any) -> Any:
    """Inputs with copies of the tensors that were made in inference mode; for a call outside of it."""
    if torch.is_inference_mode_enabled():
        return inputs
    with torch._C.DisableTorchFunction():  # no call of the model's, for modes that watch it
        return tree_map_only(Tensor, lambda each: each.clone() if each.is_inference() else each, inputs)
