"""Operators whose results are as long as values decide: without values, everything is taken to be picked."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any

import torch
from torch import Tensor

_aten = torch.ops.aten


def _long(x: Tensor, *size: int) -> Tensor:
    return x.new_empty(size, dtype=torch.long)


def _nonzero(x: Tensor) -> Tensor:
    return _long(x, x.numel(), x.dim())


def _masked_select(x: Tensor, mask: Tensor) -> Tensor:
    return x.new_empty(prod(torch.broadcast_shapes(x.shape, mask.shape)))


def _positions(indices: Sequence[Tensor | None]) -> list[Tensor | None] | None:
    """Index tensors in which each mask is replaced by positions; None where there is no mask."""
    if all(chosen is None or chosen.dtype not in (torch.bool, torch.uint8) for chosen in indices):
        return None
    positions: list[Tensor | None] = []
    for chosen in indices:
        if chosen is not None and chosen.dtype in (torch.bool, torch.uint8):
            positions += [_long(chosen, chosen.numel()) for _ in range(chosen.dim())]
        else:
            positions.append(chosen)
    return positions


def _index(x: Tensor, indices: Sequence[Tensor | None]) -> Tensor | None:
    positions = _positions(indices)
    return None if positions is None else _aten.index.Tensor(x, positions)


def _index_put(x: Tensor, indices: Sequence[Tensor | None], *rest: Any) -> Tensor | None:
    return None if _positions(indices) is None else torch.empty_like(x)


def _index_put_in_place(x: Tensor, indices: Sequence[Tensor | None], *rest: Any) -> Tensor | None:
    return None if _positions(indices) is None else x


def _unique(
    x: Tensor, sort: bool = True, inverse: bool = False, counts: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    found = _long(x, *x.shape) if inverse else _long(x, 0)
    return x.new_empty(x.numel()), found, _long(x, x.numel() if counts else 0)


def _unique_consecutive(
    x: Tensor, inverse: bool = False, counts: bool = False, dim: int | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    return _unique(x, True, inverse, counts) if dim is None else _unique_dim(x, dim, True, inverse, counts)


def _unique_dim(
    x: Tensor, dim: int, sort: bool = True, inverse: bool = False, counts: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    size = int(x.shape[dim])
    return torch.empty_like(x), _long(x, size if inverse else 0), _long(x, size if counts else 0)


def _bincount(x: Tensor, weights: Tensor | None = None, minlength: int = 0) -> Tensor:
    return _long(x, max(minlength, 1)) if weights is None else weights.new_empty(max(minlength, 1))


def _repeat(repeats: Tensor, output_size: int | None = None) -> Tensor:
    return _long(repeats, repeats.numel() if output_size is None else output_size)


def _suppression(boxes: Tensor, scores: Tensor, threshold: float) -> Tensor:
    return _long(boxes, int(boxes.shape[0]))


COUNTED: dict[Any, Any] = {
    _aten.nonzero.default: _nonzero,
    _aten.masked_select.default: _masked_select,
    _aten.index.Tensor: _index,
    _aten.index_put.default: _index_put,
    _aten.index_put_.default: _index_put_in_place,
    _aten._unique2.default: _unique,
    _aten.unique_consecutive.default: _unique_consecutive,
    _aten.unique_dim.default: _unique_dim,
    _aten.bincount.default: _bincount,
    _aten.repeat_interleave.Tensor: _repeat,
}
COUNTED_ELSEWHERE = {"torchvision::nms": _suppression}
