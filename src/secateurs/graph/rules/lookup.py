"""Picking and placing at positions that a tensor holds: what is indexed stays, what rides along passes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from secateurs.graph.labels import Dim
from secateurs.graph.packed import call_tensors, results_of
from secateurs.graph.rules.common import broadcast, fixed, lock_all, lock_call, meet, place_of
from secateurs.graph.rules.registry import aten, rule
from secateurs.graph.tracing import Tracer

_INDEXED = "it is indexed by a tensor"
_COMPUTED = "it is gathered or scattered at computed places"


@rule(aten.index, aten._unsafe_index)
def index(t: Tracer, args: tuple[Any, ...], kwargs: dict[str, Any], out: Tensor) -> None:
    """Picking with index tensors: indexed dimensions keep their size, the others pass through.

    The dimensions of the index tensors pass as well, as those of the positions by which a table of relative
    positions is read. A mask counts as many dimensions as it has, and gives one.
    """
    x = args[0]
    if t.is_weight(x) and not all(t.is_weight(i) for i in args[1] if i is not None):
        t.add_role(t.dims(x), "producer")
    t.set(out, _indexed(t, x, args[1])[0])


def _indexed(t: Tracer, x: Tensor, indices: Sequence[Tensor | None]) -> tuple[list[Dim], set[int]]:
    """The dimensions of ``x[indices]``, and which of them the index tensors made."""
    picked: list[int] = []
    shapes: list[list[Dim]] = []
    place = 0
    for chosen in indices:
        if chosen is None:
            place += 1
        elif chosen.dtype in (torch.bool, torch.uint8):
            lock_all(t, t.dims(chosen), "its values decide what is picked")
            picked += range(place, place + chosen.dim())
            shapes.append([Dim(chosen.numel())])
            place += chosen.dim()
        else:
            picked.append(place)
            shapes.append(list(t.dims(chosen)))
            place += 1
    dims = t.dims(x)
    lock_all(t, [dims[p] for p in picked], _INDEXED)
    rest = [dim for p, dim in enumerate(dims) if p not in picked]
    adjacent = picked == list(range(picked[0], picked[-1] + 1))
    lead = picked[0] if adjacent else 0
    shape = torch.broadcast_shapes(*(tuple(dim.size for dim in each) for each in shapes))
    made = broadcast(t, shapes, shape)
    return [*rest[:lead], *made, *rest[lead:]], set(range(lead, lead + len(made)))


@rule(aten.index_put, aten._unsafe_index_put, aten._index_put_impl)
def index_put(t: Tracer, args: tuple[Any, ...], kwargs: dict[str, Any], out: Tensor) -> None:
    """Placing at computed positions: what the index tensors make keeps its size, on both sides."""
    x, values = args[0], args[2]
    view, made = _indexed(t, x, args[1])
    lock_all(t, [view[place] for place in made], _COMPUTED)
    given = t.dims(values)
    for place in range(-min(len(given), len(view)), 0):
        if len(view) + place in made:
            t.lock(given[place], _COMPUTED)
        elif given[place].size == view[place].size:
            t.unify(given[place], view[place])
    t.set(out, t.dims(x))


@rule(aten.index_select)
def index_select(t: Tracer, args: tuple[Any, ...], kwargs: dict[str, Any], out: Tensor) -> None:
    """Picking some indices of one dimension."""
    x, place = args[0], place_of(args[1], args[0])
    chosen = t.dims(args[2])
    lock_all(t, t.dims(x)[place : place + 1], _INDEXED)
    picked = chosen[0] if chosen else Dim(1)
    t.set(out, [picked if axis == place else dim for axis, dim in enumerate(t.dims(x))])


@rule(aten.index_add, aten.index_copy, aten.index_reduce, aten.index_fill)
def index_add(t: Tracer, args: tuple[Any, ...], kwargs: dict[str, Any], out: Tensor) -> None:
    """Placing whole slices along one dimension; the others are one."""
    x, place, chosen = args[0], place_of(args[1], args[0]), args[2]
    lock_all(t, (*t.dims(chosen), *t.dims(x)[place : place + 1]), _INDEXED)
    if len(args) > 3 and isinstance(args[3], Tensor) and args[3].dim() == x.dim():
        for axis, (a, b) in enumerate(zip(t.dims(x), t.dims(args[3]), strict=True)):
            if axis == place:
                t.lock(b, _COMPUTED)
            else:
                t.unify(a, b)
    t.set(out, t.dims(x))


@rule(aten.gather)
def gather(t: Tracer, args: tuple[Any, ...], kwargs: dict[str, Any], out: Tensor) -> None:
    """Picking along one dimension; index and source are one along the others."""
    x, place, chosen = args[0], place_of(args[1], args[0]), args[2]
    if x.dim() != chosen.dim():
        lock_call(t, [x, chosen], [out], _COMPUTED)
        return
    lock_all(t, t.dims(x)[place : place + 1], _COMPUTED)
    made = [_ride(t, a, b) for a, b in zip(t.dims(x), t.dims(chosen), strict=True)]
    t.set(out, [t.dims(chosen)[axis] if axis == place else dim for axis, dim in enumerate(made)])


def _ride(t: Tracer, whole: Dim, part: Dim) -> Dim:
    """The part of a dimension that rides along: all of it, or a fixed range at its start."""
    if whole.size == part.size:
        return meet(t, [part, whole], part.size)
    lock_all(t, (whole, part), "a range of it is taken")
    return part


@rule(aten.scatter, aten.scatter_add, aten.scatter_reduce)
def scatter(t: Tracer, args: tuple[Any, ...], kwargs: dict[str, Any], out: Tensor) -> None:
    """Placing along one dimension; target, index and source are one along the others."""
    x, place, chosen = args[0], place_of(args[1], args[0]), args[2]
    given = [tensor for tensor in args[2:4] if isinstance(tensor, Tensor) and tensor.dim() == x.dim()]
    if chosen.dim() != x.dim():
        lock_call(t, call_tensors(args, kwargs), [out], _COMPUTED)
        return
    for axis, dim in enumerate(t.dims(x)):
        for tensor in given:
            if axis == place:
                lock_all(t, (dim, t.dims(tensor)[axis]), _COMPUTED)
            else:
                _ride(t, t.dims(tensor)[axis], dim)
    t.set(out, t.dims(x))


@rule(aten.masked_scatter)
def masked_scatter(t: Tracer, args: tuple[Any, ...], kwargs: dict[str, Any], out: Tensor) -> None:
    """Places filled in order from a source: a last dimension that the mask takes whole is one with it."""
    x, mask, source = args[:3]
    dims, given = t.dims(x), t.dims(source)
    whole = mask.dim() == 0 or mask.shape[-1] == 1 or mask.stride(-1) == 0
    rides = bool(dims and given) and whole and dims[-1].size == given[-1].size
    if rides:
        t.unify(dims[-1], given[-1])
    end = -1 if rides else None
    lock_all(t, (*dims[:end], *given[:end], *t.dims(mask)[:end]), _COMPUTED)
    t.set(out, dims)


@rule(aten.take, aten.put)
def take(t: Tracer, args: tuple[Any, ...], kwargs: dict[str, Any], out: Tensor) -> None:
    """Picking from a tensor laid out flat, or placing into it."""
    lock_all(t, t.dims(args[0]), _COMPUTED)
    if len(args) > 2:  # put: its values go to computed places
        lock_all(t, (*t.dims(args[1]), *t.dims(args[2])), _COMPUTED)
    t.set(out, t.dims(args[1]) if len(args) == 2 else t.dims(args[0]))


@rule(aten.masked_select, aten.nonzero, aten.nonzero_static, aten.argwhere)
def pick_by_value(t: Tracer, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
    """How many there are is decided by values."""
    lock_call(t, call_tensors(args, kwargs), results_of(out), "its values decide what is picked")


@rule(aten.embedding)
def embedding(t: Tracer, args: tuple[Any, ...], kwargs: dict[str, Any], out: Tensor) -> None:
    """Rows of a table: the rows stay, the columns are the units."""
    weight, indices = args[0], args[1]
    rows, columns = t.dims(weight)
    t.lock(rows, "it is looked up by index")
    t.add_role([columns], "producer")
    t.name_kind(columns, "embedding")
    t.set(out, [*t.dims(indices), columns])


@rule(aten.embedding_renorm)
def embedding_renorm(t: Tracer, args: tuple[Any, ...], kwargs: dict[str, Any], out: Tensor) -> None:
    """Rows of a table scaled to a largest norm, which all columns share."""
    rows, columns = t.dims(args[0])
    t.lock(rows, "it is looked up by index")
    t.mix(columns, "the norm of an embedding")
    t.set(out, [rows, columns])


@rule(aten._embedding_bag, aten._embedding_bag_forward_only)
def embedding_bag(t: Tracer, args: tuple[Any, ...], kwargs: dict[str, Any], out: Sequence[Tensor]) -> None:
    """Sums, means or maxima of rows of a table."""
    rows, columns = t.dims(args[0])
    t.lock(rows, "it is looked up by index")
    for tensor in call_tensors(args[1:], kwargs):
        lock_all(t, t.dims(tensor), "its values decide what is picked")
    t.add_role([columns], "producer")
    t.name_kind(columns, "embedding")
    t.set(out[0], [Dim(int(out[0].shape[0])), columns])
    for extra in out[1:]:
        follows = extra.dim() == 2 and extra.shape[1] == columns.size
        t.set(
            extra, [Dim(int(extra.shape[0])), Dim(columns.size, columns.factors)] if follows else fixed(extra)
        )
