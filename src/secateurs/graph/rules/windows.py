"""Windows that slide along a dimension, and other reading of memory by strides."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from secateurs.graph.labels import Dim
from secateurs.graph.rules.common import fixed, lock_all
from secateurs.graph.rules.registry import aten, rule
from secateurs.graph.tracing import Tracer

_SLIDES = "a window slides along it"


@rule(aten.im2col)
def im2col(t: Tracer, args: tuple[Any, ...], kwargs: dict[str, Any], out: Tensor) -> None:
    """``F.unfold``: column ``(c, i, j)`` holds pixel ``(i, j)`` of every window of channel ``c``."""
    *lead, channel, height, width = t.dims(args[0])
    lock_all(t, (height, width), _SLIDES)
    rows, columns = (int(size) for size in args[1])
    t.set(out, [*lead, t.labels.merge([channel, Dim(rows), Dim(columns)]), Dim(int(out.shape[-1]))])


@rule(aten.col2im)
def col2im(t: Tracer, args: tuple[Any, ...], kwargs: dict[str, Any], out: Tensor) -> None:
    """``F.fold``, the opposite of ``F.unfold``."""
    *lead, columns, windows = t.dims(args[0])
    rows, across = (int(size) for size in args[2])
    channel, *pixel = t.labels.split(columns, [columns.size // (rows * across), rows, across])
    lock_all(t, (*pixel, windows), "fold makes pixels of it")
    t.set(out, [*lead, channel, *fixed(out)[-2:]])


@rule(aten.unfold)
def unfold(t: Tracer, args: tuple[Any, ...], kwargs: dict[str, Any], out: Tensor) -> None:
    """``Tensor.unfold``: windows become a dimension at the end.

    Windows that do not overlap are a view of one dimension as two, and whole windows may leave.
    """
    dims = list(t.dims(args[0]))
    if not dims:
        t.set(out, fixed(out))
        return
    place, size, step = args[1] % len(dims), int(args[2]), int(args[3])
    windows = Dim(int(out.shape[place]))
    if size == step and windows.size * size == dims[place].size:
        windows, inside = t.labels.split(dims[place], [windows.size, size])
        t.lock(inside, "it is the length of a window")
    else:
        t.lock(dims[place], _SLIDES)
    dims[place] = windows
    t.set(out, [*dims, Dim(size)])


@rule(aten.as_strided, aten.resize)
def strided(t: Tracer, args: tuple[Any, ...], kwargs: dict[str, Any], out: Tensor) -> None:
    """Memory read by strides: a dimension that is read as it lies passes, the others keep their size."""
    x, dims = args[0], t.dims(args[0])
    if tuple(x.shape) == tuple(out.shape) and x.stride() == out.stride():
        t.set(out, dims)
        return
    passing = _as_they_lie(x, out) if out.storage_offset() == x.storage_offset() else {}
    for place, dim in enumerate(dims):
        if place not in passing.values():
            t.lock(dim, "its memory is read by strides")
    t.set(out, [dims[passing[p]] if p in passing else dim for p, dim in enumerate(fixed(out))])


def _as_they_lie(x: Tensor, out: Tensor) -> dict[int, int]:
    """For each dimension of the result that is one of ``x``, which one that is.

    It has the length and the stride of a dimension of ``x``, and no other stride of the result moves along
    it: larger ones go by multiples of its whole extent, smaller ones stay within one step.
    """
    found: dict[int, int] = {}
    if not x.is_contiguous():
        return found
    for place, (size, stride) in enumerate(zip(out.shape, out.stride(), strict=True)):
        if size < 2 or stride == 0:
            continue
        others = [(n, s) for p, (n, s) in enumerate(zip(out.shape, out.stride(), strict=True)) if p != place]
        if _stays_out(others, int(size), stride):
            for axis in range(x.dim()):
                if x.shape[axis] == size and x.stride(axis) == stride:
                    found[place] = axis
    return found


def _stays_out(others: Sequence[tuple[int, int]], size: int, stride: int) -> bool:
    larger = [s for n, s in others if n > 1 and s >= stride]
    reach = sum((n - 1) * s for n, s in others if s < stride)
    return all(s % (size * stride) == 0 for s in larger) and reach < stride
