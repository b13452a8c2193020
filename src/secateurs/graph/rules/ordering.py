"""Operators that order, count or accumulate along a dimension."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from secateurs.graph.packed import call_tensors, results_of
from secateurs.graph.rules.common import fixed, lock_all, lock_call, place_of, without
from secateurs.graph.rules.registry import Arguments, aten, rule
from secateurs.graph.tracing import Tracer


@rule(
    aten.topk,
    aten.sort,
    aten.argsort,
    aten.kthvalue,
    aten.mode,
    aten.median,
    aten.nanmedian,
    aten.argmax,
    aten.argmin,
    aten.cummax,
    aten.cummin,
)
def order(t: Tracer, args: Arguments, kwargs: dict[str, Any], out: Any) -> None:
    """Picking by value along a dimension: it keeps its size, since positions along it are counted."""
    x = args[0]
    dim = args.get("dim", kwargs.get("dim"))
    if x.dim() == 0 or dim is None:  # of the whole tensor
        lock_call(t, [x], results_of(out), "it is ordered by value")
        return
    place = place_of(dim, x)
    t.lock(t.dims(x)[place], "it is ordered by value")
    for result in results_of(out):
        t.set(result, without(t.dims(x), place, result))


@rule(aten.cumsum, aten.cumprod, aten.logcumsumexp, aten._logcumsumexp)
def accumulate(t: Tracer, args: Arguments, kwargs: dict[str, Any], out: Tensor) -> None:
    """Each place sums up what lies before it."""
    x = args[0]
    if x.dim():
        t.mix(t.dims(x)[place_of(args.get("dim", 0), x)], "a cumulative sum")
    t.set(out, t.dims(x))


@rule(aten._cummax_helper, aten._cummin_helper)
def accumulate_into(t: Tracer, args: Arguments, kwargs: dict[str, Any], out: Any) -> None:
    """Extremes up to each place, written into given tensors."""
    lock_call(t, call_tensors(args, kwargs), results_of(out), "positions along it are counted")


@rule(
    aten._unique,
    aten._unique2,
    aten.unique_dim,
    aten.unique_consecutive,
    aten.unique_dim_consecutive,
    aten.bincount,
    aten.histc,
    aten.histogram,
    aten._histogramdd_bin_edges,
    aten._histogramdd_from_bin_cts,
    aten.repeat_interleave,
)
def count(t: Tracer, args: Arguments, kwargs: dict[str, Any], out: Any) -> None:
    """How many results there are, or what they count, is decided by values."""
    lock_call(t, call_tensors(args, kwargs), results_of(out), "its values are counted")


@rule(aten.multinomial)
def draw(t: Tracer, args: Arguments, kwargs: dict[str, Any], out: Tensor) -> None:
    """Positions drawn by their weights."""
    dims = t.dims(args[0])
    t.lock(dims[-1], "positions along it are counted")
    t.set(out, [*dims[:-1], *fixed(out)[-1:]])


@rule(aten.bucketize)
def bucketize(t: Tracer, args: Arguments, kwargs: dict[str, Any], out: Tensor) -> None:
    """Each element's place among sorted boundaries."""
    x, boundaries = args[0], args[1]
    lock_all(t, t.dims(boundaries), "positions along it are counted")
    t.set(out, t.dims(x) if isinstance(x, Tensor) else fixed(out))


@rule(aten.searchsorted)
def searchsorted(t: Tracer, args: Arguments, kwargs: dict[str, Any], out: Tensor) -> None:
    """Each element's place in a sorted row; rows that lie side by side are one with the elements' rows."""
    rows, x = args[0], args[1]
    lock_all(t, t.dims(rows)[-1:], "positions along it are counted")
    if not isinstance(x, Tensor):
        t.set(out, fixed(out))
        return
    if rows.dim() > 1:
        for a, b in zip(t.dims(rows)[:-1], t.dims(x)[:-1], strict=True):
            t.unify(a, b)
    t.set(out, t.dims(x))


@rule(aten.isin)
def isin(t: Tracer, args: Arguments, kwargs: dict[str, Any], out: Tensor) -> None:
    """Whether each element is one of a set."""
    x, among = args[0], args[1]
    if isinstance(among, Tensor):
        lock_all(t, t.dims(among), "its elements are a set")
    t.set(out, t.dims(x) if isinstance(x, Tensor) else fixed(out))
