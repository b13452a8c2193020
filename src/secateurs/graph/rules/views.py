"""Operators that rearrange dimensions without computing."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any

import torch
from torch import Tensor

from secateurs.graph.labels import Dim
from secateurs.graph.rules.registry import aten, rule
from secateurs.graph.tracing import Tracer


@rule(
    aten.view,
    aten._unsafe_view,
    aten.reshape,
    aten._reshape_alias,
    aten.unflatten,
    aten.flatten,
    aten.view_copy,
)
def view(t: Tracer, args: tuple[Any, ...], kwargs: dict[str, Any], out: Tensor) -> None:
    """Old and new dimensions are matched block by block: the shortest runs of equal product."""
    if args and isinstance(args[1] if len(args) > 1 else None, torch.dtype):
        t.set(out, t.dims(args[0]))
        return
    dims = reshape_dims(t, t.dims(args[0]), [int(size) for size in out.shape])
    t.set(out, dims)
    for place, dim in enumerate(dims):
        t.size_argument(dim.size, dim, position=place, of=len(dims))


def reshape_dims(t: Tracer, old: Sequence[Dim], new: Sequence[int]) -> list[Dim]:
    """The labels of a tensor of dimensions `old` after a row-major reshape to the lengths `new`."""
    if prod(new) == 0:
        for dim in old:
            t.lock(dim, "it is part of an empty tensor")
        return [Dim(size) for size in new]
    result: list[Dim] = []
    i = j = 0
    while i < len(old) or j < len(new):
        if i < len(old) and j < len(new) and old[i].size == new[j]:
            result.append(old[i])
            i, j = i + 1, j + 1
            continue
        block: list[Dim] = []
        sizes: list[int] = []
        have = want = 1
        while have != want or not (block or sizes):
            if have <= want and i < len(old):
                have *= old[i].size
                block.append(old[i])
                i += 1
            else:
                want *= new[j]
                sizes.append(new[j])
                j += 1
        result += _regroup(t, block, sizes)
    return result


def _regroup(t: Tracer, block: list[Dim], sizes: list[int]) -> list[Dim]:
    if not sizes:
        return []
    if not block:
        return [Dim(size) for size in sizes]
    real = [dim for dim in block if dim.size > 1]
    if len(real) == 1 and real[0].size in sizes:  # only dimensions of length 1 come or go
        return [real[0] if size == real[0].size else Dim(size) for size in sizes]
    return t.labels.split(t.labels.merge(block), sizes)


@rule(aten.permute)
def permute(t: Tracer, args: tuple[Any, ...], kwargs: dict[str, Any], out: Tensor) -> None:
    """Dimensions in another order."""
    dims = t.dims(args[0])
    t.set(out, [dims[place] for place in args[1]])


@rule(aten.t, aten.numpy_T, aten.mT)
def transpose_matrix(t: Tracer, args: tuple[Any, ...], kwargs: dict[str, Any], out: Tensor) -> None:
    """The transposed matrix."""
    t.set(out, t.dims(args[0])[::-1])


@rule(aten.transpose, aten.transpose_, aten.swapaxes)
def transpose(t: Tracer, args: tuple[Any, ...], kwargs: dict[str, Any], out: Tensor) -> None:
    """Two dimensions change places."""
    dims = list(t.dims(args[0]))
    a, b = args[1], args[2]
    dims[a], dims[b] = dims[b], dims[a]
    t.set(out, dims)


@rule(aten.unsqueeze, aten.unsqueeze_)
def unsqueeze(t: Tracer, args: tuple[Any, ...], kwargs: dict[str, Any], out: Tensor) -> None:
    """A new dimension of length 1."""
    dims = list(t.dims(args[0]))
    place = args[1] % out.dim()
    t.set(out, [*dims[:place], Dim(1), *dims[place:]])


@rule(aten.squeeze, aten.squeeze_)
def squeeze(t: Tracer, args: tuple[Any, ...], kwargs: dict[str, Any], out: Tensor) -> None:
    """Dimensions of length 1 vanish."""
    dims = list(t.dims(args[0]))
    if len(args) == 1:
        places = set(range(len(dims)))
    else:
        wanted = [args[1]] if isinstance(args[1], int) else list(args[1])
        places = {place % max(len(dims), 1) for place in wanted}
    t.set(out, [dim for place, dim in enumerate(dims) if not (place in places and dim.size == 1)])


@rule(aten.expand, aten.broadcast_to, aten.expand_copy)
def expand(t: Tracer, args: tuple[Any, ...], kwargs: dict[str, Any], out: Tensor) -> None:
    """Dimensions of length 1 are spread out; what they meet decides their labels."""
    dims = t.dims(args[0])
    result = []
    for place in range(-out.dim(), 0):
        size = int(out.shape[place])
        same = len(dims) >= -place and dims[place].size == size
        result.append(dims[place] if same else t.labels.fresh(size))
        if not same:
            t.size_argument(size, result[-1], position=place, of=out.dim())
            t.spread.append(result[-1])
    t.set(out, result)


@rule(aten.repeat)
def repeat(t: Tracer, args: tuple[Any, ...], kwargs: dict[str, Any], out: Tensor) -> None:
    """Each dimension several times over."""
    dims, times = t.dims(args[0]), [int(n) for n in args[1]]
    padded = [Dim(1)] * (len(times) - len(dims)) + list(dims)
    result = []
    for place, (count, dim) in enumerate(zip(times, padded, strict=True)):
        if dim.size == 1 and count > 1:
            result.append(t.labels.fresh(count))
            t.size_argument(count, result[-1], position=place, of=len(times))
            t.spread.append(result[-1])
        else:
            result.append(t.labels.merge([Dim(count), dim]) if count > 1 else dim)
    t.set(out, result)


@rule(aten.flip)
def flip(t: Tracer, args: tuple[Any, ...], kwargs: dict[str, Any], out: Tensor) -> None:
    """Some dimensions the other way round, their labels too."""
    dims = list(t.dims(args[0]))
    for place in args[1]:
        dims[place] = t.labels.take(dims[place], slice(None, None, -1))
    t.set(out, dims)


@rule(aten.roll, aten.rot90)
def roll(t: Tracer, args: tuple[Any, ...], kwargs: dict[str, Any], out: Tensor) -> None:
    """Indices move by a number of places, which is another move once some are gone: they stay."""
    dims = list(t.dims(args[0]))
    for place in args[2] or range(len(dims)):  # without dimensions the whole tensor is rolled, laid out flat
        t.lock(dims[place], "its indices change places")
    t.set(
        out, [dim if dim.size == size else Dim(int(size)) for dim, size in zip(dims, out.shape, strict=True)]
    )
