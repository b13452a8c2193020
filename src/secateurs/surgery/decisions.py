"""Decisions by value, made once for two runs that agree to rounding.

A detector sorts its boxes by score. Scores that are equal in one run may differ by the last bit in another,
and then two boxes change places: a difference as large as an image, which says nothing of the cut. Where the
second run hands such an operator what the first did, to rounding, it is given what the first was.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._ops import HigherOrderOperator
from torch.utils._pytree import tree_leaves, tree_map_only

_ORDERS = ("sort", "topk", "argsort", "argmax", "argmin", "max", "min", "kthvalue", "median")
_DECIDING = frozenset((*(f"aten::{name}" for name in _ORDERS), "torchvision::nms"))
_ROUNDING = 1e-10  # relative to the largest value


class Decisions:
    """What the operators that decide by value were given and gave, in the order of their calls.

    Example:
        >>> made = Decisions()
        >>> scores = torch.tensor([2.0, 2.0, 1.0], dtype=torch.float64)
        >>> sort = torch.ops.aten.sort.default
        >>> made.note(sort, (scores, 0, True), {}, sort(scores, 0, True))[1]
        tensor([0, 1, 2])
        >>> nearly = torch.tensor([2.0, 2.0 + 1e-15, 1.0], dtype=torch.float64)
        >>> made.again(sort, (nearly, 0, True), {}, lambda: sort(nearly, 0, True))[1]
        tensor([0, 1, 2])
    """

    def __init__(self) -> None:
        self._made: list[tuple[Any, list[Any], Any]] = []
        self._next = 0

    def note(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> Any:
        """Keep what an operator was given and gave in the first run; it returns what it gave."""
        if _decides(func):
            given = [_copied(leaf) for leaf in tree_leaves((args, kwargs))]
            self._made.append((func, given, tree_map_only(Tensor, torch.clone, out)))
        return out

    def again(
        self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], compute: Callable[[], Any]
    ) -> Any:
        """What the first run decided on the same values; where they are others, what is computed now."""
        if not _decides(func) or self._next >= len(self._made):
            return compute()
        before, given, out = self._made[self._next]
        self._next += 1
        now = tree_leaves((args, kwargs))
        if before is not func or len(given) != len(now) or not all(map(_agree, given, now)):
            return compute()
        return tree_map_only(Tensor, torch.clone, out)


def _decides(func: Any) -> bool:
    return not isinstance(func, HigherOrderOperator) and func._schema.name in _DECIDING


def _copied(leaf: Any) -> Any:
    return leaf.clone() if isinstance(leaf, Tensor) else leaf


def _agree(one: Any, other: Any) -> bool:
    if not (isinstance(one, Tensor) and isinstance(other, Tensor)):
        return type(one) is type(other) and bool(one == other)
    if one.shape != other.shape or one.dtype != other.dtype:
        return False
    if not one.is_floating_point():
        return torch.equal(one, other)
    finite = one[one.isfinite()]
    scale = float(finite.abs().max()) if finite.numel() else 0.0
    return torch.allclose(one, other, rtol=0, atol=_ROUNDING * scale, equal_nan=True)
