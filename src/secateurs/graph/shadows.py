"""Shadows: for each element of a tensor the row of a parameter that it scales with."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
from torch import Tensor

Rows: TypeAlias = npt.NDArray[np.int64]
_SHADOW = "_secateurs_rows"


def shadow_of(tensor: Any) -> Tensor | None:
    """The shadow that a tensor carries, if any."""
    found: Tensor | None = getattr(tensor, _SHADOW, None)
    return found


def cast(tensor: Tensor, shadow: Tensor) -> None:
    """Give a tensor a shadow of its own shape."""
    if shadow.shape != tensor.shape:
        raise AssertionError(f"a shadow of shape {tuple(shadow.shape)} for {tuple(tensor.shape)}")
    setattr(tensor, _SHADOW, shadow)


def spread(rows: Tensor, place: int, shape: Sequence[int]) -> Tensor:
    """One row for each index of one dimension, the same along all others."""
    return rows.reshape([-1 if axis == place else 1 for axis in range(len(shape))]).expand(*shape)


def constant_along(shadow: Tensor | None, dim: int) -> Tensor | None:
    """A shadow without a dimension along which it does not change; None where it does."""
    if shadow is None or shadow.shape[dim] == 0:
        return None
    first = shadow.select(dim, 0)
    same = shadow.stride(dim) == 0 or bool((shadow == first.unsqueeze(dim)).all())
    return first if same else None


def narrowed(shadows: Sequence[Tensor], but: int | None = None) -> list[Tensor]:
    """Shadows without the extent of dimensions along which all of them are merely spread out."""
    result = list(shadows)
    for axis in range(result[0].dim()):
        if axis != but and all(each.stride(axis) == 0 for each in result):
            result = [each.narrow(axis, 0, min(each.shape[axis], 1)) for each in result]
    return result


def size_of(shadow: Tensor) -> int:
    """How many numbers a shadow really holds, those that are spread out counted once."""
    return narrowed([shadow])[0].numel()


def distinct_rows(shadow: Tensor) -> Rows:
    """The rows that appear in a shadow, ascending."""
    distinct: Rows = narrowed([shadow])[0].unique().numpy()
    return distinct
