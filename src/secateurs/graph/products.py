"""Calls that multiply two activations: where both factors are, and how they are summed over."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from secateurs.graph.einsum import factors_of
from secateurs.graph.packed import call_tensors

PRODUCTS = {  # the places of the factors, and whether the second has what is summed over last but one
    **dict.fromkeys(("matmul", "__matmul__", "mm", "bmm"), (0, 1, True)),
    "baddbmm": (1, 2, True),
    "scaled_dot_product_attention": (0, 1, False),
}


def operands_of(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Tensor, Tensor] | None:
    """Both factors of a call that multiplies, ``(..., n, d)`` and ``(..., m, d)`` with one leading shape.

    Args:
        func: The torch function.
        args: Its positional arguments.
        kwargs: Its arguments by name.

    Example:
        >>> one, other = operands_of(torch.matmul, (torch.zeros(2, 3, 4), torch.zeros(4, 5)), {})
        >>> one.shape, other.shape
        (torch.Size([2, 3, 4]), torch.Size([2, 5, 4]))
    """
    name = getattr(func, "__name__", "")
    if name == "einsum":
        both = factors_of(args) if not kwargs else None
        if both is None:
            return None
        first, second = both
    elif name in PRODUCTS:
        tensors, (one, other, is_turned) = call_tensors(args, kwargs), PRODUCTS[name]
        if len(tensors) <= other or min(tensors[one].dim(), tensors[other].dim()) < 2:
            return None
        first, second = tensors[one], tensors[other].mT if is_turned else tensors[other]
    else:
        return None
    if not first.numel() or not second.numel():
        return None
    if first.dim() > 3 and second.dim() > 3 and first.shape[-3] != second.shape[-3] > 1:
        second = second.repeat_interleave(first.shape[-3] // second.shape[-3], -3)  # heads that share keys
    whole = torch.broadcast_shapes(first.shape[:-2], second.shape[:-2]) or (1,)
    return first.expand(*whole, *first.shape[-2:]), second.expand(*whole, *second.shape[-2:])


def averaged_in(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Iterator[Tensor]:
    """What a call may average over positions, as attention does with values; ``(..., m, d)``.

    Args:
        func: The torch function.
        args: Its positional arguments.
        kwargs: Its arguments by name.
    """
    if getattr(func, "__name__", "") == "scaled_dot_product_attention":
        tensors = call_tensors(args, kwargs)
        if len(tensors) > 2 and tensors[2].dim() > 2 and tensors[2].numel():
            yield tensors[2]
    elif (both := operands_of(func, args, kwargs)) is not None:
        yield from (each.mT for each in reversed(both))
