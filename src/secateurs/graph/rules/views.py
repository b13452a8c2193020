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
    t.set(out, result)


@rule(aten.repeat)
def repeat(t: Tracer, args: tuple[Any, ...], kwargs: dict[str, Any], out: Tensor) -> None:
    """Each dimension several times over."""
    dims, times = t.dims(args[0]), [int(n) for n in args[1]]
    padded = [Dim(1)] * (len(times) - len(dims)) + list(dims)
    result = []
    for count, dim in zip(times, padded, strict=True):
        if dim.size == 1 and count > 1:
            result.append(t.labels.fresh(count))
        else:
            result.append(t.labels.merge([Dim(count), dim]) if count > 1 else dim)
    t.set(out, result)


@rule(aten.flip, aten.roll)
def same_place_shuffle(t: Tracer, args: tuple[Any, ...], kwargs: dict[str, Any], out: Tensor) -> None:
    """Indices of some dimensions change places."""
    dims = list(t.dims(args[0]))
    listed = args[1] if len(args) == 2 and not kwargs else (args[2] if len(args) > 2 else args[1])
    for place in listed if isinstance(listed, (list, tuple)) else [listed]:
        t.lock(dims[place], "its indices change places")
    t.set(out, dims)


@rule(aten.as_strided_, aten.as_strided, aten.resize_)
def strided(t: Tracer, args: tuple[Any, ...], kwargs: dict[str, Any], out: Tensor) -> None:
    """A change of memory layout; a change of shape locks everything."""
    dims = t.dims(args[0])
    if [dim.size for dim in dims] == [int(size) for size in out.shape]:
        t.set(out, dims)
        return
    for dim in dims:
        t.lock(dim, "as_strided reads its memory directly")
    t.set(out, [Dim(int(size)) for size in out.shape])


@rule(aten.view_as_real, aten.view_as_complex, aten._fft_r2c, aten._fft_c2r, aten._fft_c2c)
def complex_numbers(t: Tracer, args: tuple[Any, ...], kwargs: dict[str, Any], out: Tensor) -> None:
    """Real and imaginary parts, and Fourier transforms: transformed dimensions keep their size."""
    dims = t.dims(args[0])
    moved = (
        {place % len(dims) for place in args[1]}
        if len(args) > 1 and isinstance(args[1], (list, tuple))
        else set()
    )
    if out.dim() != len(dims):
        moved = {len(dims) - 1} if out.dim() < len(dims) else set()
    for place in moved:
        t.lock(dims[place], "it is transformed as a whole")
    kept = [Dim(d.size) if place in moved else d for place, d in enumerate(dims)]
    result = kept[: out.dim()] + [Dim(int(size)) for size in out.shape[len(kept) :]]
    t.set(out, [d if d.size == s else Dim(int(s)) for d, s in zip(result, out.shape, strict=True)])
