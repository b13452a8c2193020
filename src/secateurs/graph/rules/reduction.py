"""Sums, means and extremes along dimensions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from secateurs.graph.labels import Dim
from secateurs.graph.packed import results_of
from secateurs.graph.rules.common import broadcast, fixed
from secateurs.graph.rules.registry import Arguments, aten, rule
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
    aten.nansum,
    aten.count_nonzero,
    aten.aminmax,
    aten._aminmax,
    aten._is_all_true,
    aten._is_any_true,
)
def reduce(t: Tracer, args: Arguments, kwargs: dict[str, Any], out: Any) -> None:
    """The dimensions that are reduced vanish (or become 1); the others stay."""
    x = args[0]
    results = results_of(out)
    gone = _reduced(args, kwargs, x)
    other = args.get("other")
    dims = t.dims(x) if other is None else broadcast(t, [t.dims(x), t.dims(other)], out.shape)
    for place in gone:
        t.mix(dims[place], "a reduction")
    for result in results:
        if result.dim() == len(dims):
            t.set(result, [Dim(1) if place in gone else dim for place, dim in enumerate(dims)])
        else:
            t.set(result, [dim for place, dim in enumerate(dims) if place not in gone])


def _reduced(args: Arguments, kwargs: dict[str, Any], x: Tensor) -> set[int]:
    if args.get("other") is not None or x.dim() == 0:  # max(a, b) is pointwise
        return set()
    named = args.get("dim", args.get("dims", kwargs.get("dim")))
    if named is None or (isinstance(named, Sequence) and not named):
        return set(range(x.dim()))
    return {place % x.dim() for place in ([named] if isinstance(named, int) else named)}


@rule(aten.dist, aten._pdist_forward)
def distance(t: Tracer, args: Arguments, kwargs: dict[str, Any], out: Tensor) -> None:
    """Distances between all that is given."""
    operands = [tensor for tensor in args[:2] if isinstance(tensor, Tensor)]
    if len(operands) == 2:
        broadcast(t, [t.dims(tensor) for tensor in operands], operands[0].shape)
        for dim in t.dims(operands[0]):
            t.mix(dim, "a distance")
        t.set(out, fixed(out))
        return
    rows, columns = t.dims(args[0])
    t.lock(rows, "its pairs are listed")
    t.mix(columns, "a distance")
    t.set(out, fixed(out))
