"""Sums, means and extremes along dimensions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from secateurs.graph.labels import Dim
from secateurs.graph.rules.registry import aten, rule
from secateurs.graph.tracing import Tracer


@rule(
    aten.mean,
    aten.sum,
    aten.amax,
    aten.amin,
    aten.var,
    aten.std,
    aten.var_mean,
    aten.std_mean,
    aten.logsumexp,
    aten.linalg_vector_norm,
    aten.norm,
    aten.prod,
    aten.any,
    aten.all,
    aten.max,
    aten.min,
    aten.argmax,
    aten.argmin,
    aten.nansum,
)
def reduce(t: Tracer, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
    """The dimensions that are reduced vanish (or become 1); the others stay."""
    x = args[0]
    results = [out] if isinstance(out, Tensor) else [r for r in out if isinstance(r, Tensor)]
    if len(args) > 1 and isinstance(args[1], Tensor):  # max(a, b) is pointwise
        for a, b in zip(reversed(t.dims(x)), reversed(t.dims(args[1])), strict=False):
            if a.size == b.size:
                t.unify(a, b)
    gone = _reduced(args, kwargs, x, results[0])
    dims = t.dims(x)
    for place in gone:
        t.mix(dims[place], "a reduction")
    for result in results:
        if result.dim() == x.dim():
            t.set(result, [Dim(1) if place in gone else dim for place, dim in enumerate(dims)])
        else:
            t.set(result, [dim for place, dim in enumerate(dims) if place not in gone])


def _reduced(args: tuple[Any, ...], kwargs: dict[str, Any], x: Tensor, result: Tensor) -> set[int]:
    if len(args) > 1 and isinstance(args[1], Tensor):
        return set()
    named = kwargs.get("dim")
    lists = [a for a in args[1:3] if isinstance(a, (list, tuple))]
    single = [a for a in args[1:2] if isinstance(a, int) and not isinstance(a, bool)]
    if named is None:
        named = lists[0] if lists else (single[0] if single else None)
    if named is None or (isinstance(named, Sequence) and not named):
        return set(range(x.dim()))
    places = [named] if isinstance(named, int) else list(named)
    return {place % max(x.dim(), 1) for place in places}


@rule(aten.topk, aten.sort, aten.argsort, aten.kthvalue)
def order(t: Tracer, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
    """Picking by value along a dimension: that dimension keeps its size."""
    x = args[0]
    dim = next((a for a in args[1:] if isinstance(a, int) and not isinstance(a, bool)), -1)
    if args and len(args) > 2 and isinstance(args[2], int) and not isinstance(args[2], bool):
        dim = args[2]
    place = dim % max(x.dim(), 1)
    t.lock(t.dims(x)[place], "it is ordered by value")
    for result in [out] if isinstance(out, Tensor) else out:
        if result.dim() == x.dim():
            t.set(result, [Dim(int(result.shape[i])) if i == place else d for i, d in enumerate(t.dims(x))])
        else:
            t.set(result, [d for i, d in enumerate(t.dims(x)) if i != place])
