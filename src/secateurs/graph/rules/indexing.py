"""Joining, splitting and picking along a dimension."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from torch import Tensor

from secateurs.graph.expressions import Length, negative
from secateurs.graph.labels import Dim
from secateurs.graph.rules.common import place_of
from secateurs.graph.rules.registry import Arguments, aten, rule
from secateurs.graph.tracing import Tracer


@rule(aten.cat, aten.concat)
def cat(t: Tracer, args: tuple[Any, ...], kwargs: dict[str, Any], out: Tensor) -> None:
    """One tensor after the other along a dimension; the other dimensions are one."""
    parts = [part for part in args[0] if part.dim() == out.dim()]
    place = (args[1] if len(args) > 1 else kwargs.get("dim", 0)) % out.dim()
    dims = list(t.dims(parts[0]))
    for part in parts[1:]:
        for axis, dim in enumerate(t.dims(part)):
            if axis != place:
                t.unify(dims[axis], dim)
    dims[place] = t.labels.concatenate([t.dims(part)[place] for part in parts])
    t.set(out, dims)


@rule(aten.stack)
def stack(t: Tracer, args: tuple[Any, ...], kwargs: dict[str, Any], out: Tensor) -> None:
    """Tensors side by side along a new dimension, whose length is Python's."""
    parts = args[0]
    place = (args[1] if len(args) > 1 else 0) % out.dim()
    dims = list(t.dims(parts[0]))
    for part in parts[1:]:
        for a, b in zip(dims, t.dims(part), strict=True):
            t.unify(a, b)
    across = t.labels.fresh(len(parts))
    t.lock(across, "Python code puts its places side by side one by one, as for a list of modules")
    t.set(out, [*dims[:place], across, *dims[place:]])


@rule(aten.split, aten.split_with_sizes, aten.chunk, aten.tensor_split, aten.unsafe_split, aten.unsafe_chunk)
def split(t: Tracer, args: tuple[Any, ...], kwargs: dict[str, Any], out: Sequence[Tensor]) -> None:
    """Pieces of a dimension. Equal pieces lose the same places, so that they stay equal."""
    x = args[0]
    place = (args[2] if len(args) > 2 else kwargs.get("dim", 0)) % x.dim()
    sizes = [int(piece.shape[place]) for piece in out]
    pieces = split_dim(t, t.dims(x)[place], sizes)
    for number, (piece, dim) in enumerate(zip(out, pieces, strict=True)):
        t.set(piece, [dim if axis == place else d for axis, d in enumerate(t.dims(x))])
        t.size_argument(dim.size, dim, position=number, of=len(pieces))
    if isinstance(args[1], int) and len(set(sizes)) > 1:  # all have one size, but the last has what is left
        for other in pieces[1:-1]:
            t.state(Length(pieces[0]), other)
        t.book.compare("le", Length(pieces[-1]), Length(pieces[0]), True)


def split_dim(t: Tracer, dim: Dim, sizes: Sequence[int]) -> list[Dim]:
    """Cut a dimension into consecutive pieces of the given sizes."""
    starts = np.cumsum([0, *sizes])
    if len(set(sizes)) == 1 and len(sizes) > 1 and sum(sizes) == dim.size:
        across, within = t.labels.split(dim, [len(sizes), sizes[0]])
        t.lock(across, "it is split into equal pieces")
        return [Dim(within.size, within.factors, dim.sources) for _ in sizes]
    pieces = []
    for start, size in zip(starts, sizes, strict=False):
        piece = t.labels.take(dim, slice(int(start), int(start + size)))
        if size == 1:
            t.lock(
                Dim(1, tuple(f[start : start + 1] for f in dim.factors)), "a single index is taken out of it"
            )
        pieces.append(piece)
    return pieces


@rule(aten.slice, aten.slice_copy)
def slice_(t: Tracer, args: tuple[Any, ...], kwargs: dict[str, Any], out: Tensor) -> None:
    """A range of a dimension. Aligned equal parts lose the same places, others are taken as they are."""
    x = args[0]
    place = (args[1] if len(args) > 1 else kwargs.get("dim", 0)) % x.dim()
    dims = list(t.dims(x))
    old, size = dims[place], int(out.shape[place])
    start, stop, step = (args[n] if len(args) > n else None for n in (2, 3, 4))
    if old.size != size or step not in (None, 1):
        end = old.size if stop is None else int(stop)
        dims[place] = _range(t, old, size, int(start or 0), end, step or 1, place)
    t.set(out, dims)


@rule(aten.narrow)
def narrow(t: Tracer, args: tuple[Any, ...], kwargs: dict[str, Any], out: Tensor) -> None:
    """A range of a dimension, given by its start and length."""
    x, place, start, length = args[:4]
    dims = list(t.dims(x))
    place, old = place % len(dims), dims[place]
    if old.size != length:
        dims[place] = _range(t, old, int(length), int(start), int(start) + int(length), 1, place)
    t.set(out, dims)


def _range(t: Tracer, old: Dim, size: int, start: int, stop: int, step: int, place: int) -> Dim:
    if not old.factors or size == 0:
        return Dim(size)
    if step != 1:
        return _every_few(t, old, size, start, step)
    first = max(0, start + old.size if start < 0 else start)
    last = first + size
    ends = [(first, start, first > 0), (last, stop, last < old.size)]
    stated = [t.source_of(given) is not None for _, given, matters in ends if matters]
    if all(stated) and size > 1 and old.size % size == 0 and first % size == 0:
        result = split_dim(t, old, [size] * (old.size // size))[first // size]
    else:
        result = t.labels.take(old, slice(first, last))
    for number, (end, given, matters) in enumerate(ends):
        if matters:
            _end(t, old, end, given, 2 * place + number)
    if size == 1:
        part = tuple(factor[first:last] for factor in old.factors)
        t.lock(Dim(1, part), "a single index is taken out of it")
    return result


def _end(t: Tracer, old: Dim, end: int, given: int, number: int) -> None:
    """What lies before an end of a range (behind, if it counts from the end) has a stated length."""
    part = t.labels.take(old, slice(end, None) if given < 0 else slice(0, end))
    expression = t.source_of(given)
    if expression is None:
        if not t.written(part, number):
            t.lock(part, f"a range of it is taken that ends at the fixed place {given}")
    else:
        t.state(negative(expression) if given < 0 else expression, part)


def _every_few(t: Tracer, old: Dim, size: int, start: int, step: int) -> Dim:
    """Every second (third, ...) index, as for pairs of neighbours: the pairs go together."""
    if step > 1 and 0 <= start < step and old.size == size * step:
        pairs, within = t.labels.split(old, [size, step])
        t.lock(within, "every few of its indices are taken")
        return pairs
    t.lock(old, "some of its indices are taken")
    return Dim(size)


@rule(aten.select, aten.select_copy)
def select(t: Tracer, args: tuple[Any, ...], kwargs: dict[str, Any], out: Tensor) -> None:
    """One index of a dimension."""
    x, place = args[0], args[1] % args[0].dim()
    t.lock(t.dims(x)[place], "a single index is taken out of it")
    t.set(out, [dim for axis, dim in enumerate(t.dims(x)) if axis != place])


@rule(aten.unbind)
def unbind(t: Tracer, args: tuple[Any, ...], kwargs: dict[str, Any], out: Sequence[Tensor]) -> None:
    """Every index of a dimension by itself."""
    x, place = args[0], (args[1] if len(args) > 1 else 0) % args[0].dim()
    t.lock(t.dims(x)[place], "its indices are taken one by one")
    for piece in out:
        t.set(piece, [dim for axis, dim in enumerate(t.dims(x)) if axis != place])


rule(aten.unsafe_split_with_sizes)(split)


@rule(aten.select_scatter, aten.slice_scatter)
def slice_scatter(t: Tracer, args: Arguments, kwargs: dict[str, Any], out: Tensor) -> None:
    """A part of a tensor exchanged: the dimension that the part is taken from keeps its size."""
    x, part = args[0], args[1]
    place = place_of(args.get("dim", 0), x)
    t.lock(t.dims(x)[place], "a part of it is exchanged")
    given = list(t.dims(part))
    if part.dim() == x.dim():
        t.lock(given.pop(place), "a part of it is exchanged")
    for a, b in zip([d for axis, d in enumerate(t.dims(x)) if axis != place], given, strict=True):
        t.unify(a, b)
    t.set(out, t.dims(x))
