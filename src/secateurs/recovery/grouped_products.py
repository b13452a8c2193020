"""Rows that are dealt out to experts, each range of them times a matrix of its own, as single products."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

GROUPED = frozenset(
    getattr(owner, name)
    for owner, name in ((functional, "grouped_mm"), (torch, "_grouped_mm"))
    if hasattr(owner, name)
)


_NAMES = {"mat_a": "x", "self": "x", "mat_b": "matrices", "mat2": "matrices"}


def grouped_steps(
    args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[Callable[[], Tensor], Mapping[int, tuple[int, int]]] | None:
    """What runs ``grouped_mm(rows, matrices, offs=ends)`` as one product for each matrix.

    There is one for each matrix on every batch, so that calls keep their numbers; to some go no rows.

    Args:
        args: The positional arguments of the call.
        kwargs: Its arguments by name.

    Returns:
        The function, and which dimension of the rows the products sum over, as `WideProduct.units`. None for
        a call that is no such product.

    Example:
        >>> rows, experts = torch.randn(5, 4), torch.randn(3, 4, 2)
        >>> run, _ = grouped_steps((rows, experts), {"offs": torch.tensor([2, 2, 5])})
        >>> torch.allclose(run(), torch.cat([rows[:2] @ experts[0], rows[2:] @ experts[2]]), atol=1e-6)
        True
    """
    named = dict(zip(("x", "matrices", "offs", "bias", "out_dtype"), args, strict=False))
    named |= {_NAMES.get(name, name): value for name, value in kwargs.items()}
    x, matrices, offs = (named.get(name) for name in ("x", "matrices", "offs"))
    if not (isinstance(x, Tensor) and isinstance(matrices, Tensor) and isinstance(offs, Tensor)):
        return None
    if (x.dim(), matrices.dim()) != (2, 3) or any(
        named.get(name) is not None for name in ("bias", "out_dtype")
    ):
        return None
    ends = [0, *offs.tolist()]

    def run() -> Tensor:
        given = [x[start:end] @ matrices[each] for each, (start, end) in enumerate(pairwise(ends))]
        rest = x.new_zeros(len(x) - ends[-1], matrices.shape[2])  # rows that no expert has
        return torch.cat([*given, rest])

    return run, {1: (x.shape[1], 1)}
