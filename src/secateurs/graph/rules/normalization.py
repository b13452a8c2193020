"""Batch, layer and group normalisation, and softmax."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from secateurs.graph.labels import Dim
from secateurs.graph.packed import results_of
from secateurs.graph.rules.common import fixed
from secateurs.graph.rules.registry import aten, rule
from secateurs.graph.tracing import Tracer


@rule(
    aten.native_batch_norm,
    aten._native_batch_norm_legit,
    aten._native_batch_norm_legit_no_training,
    aten._batch_norm_with_update,
    aten._batch_norm_with_update_functional,
    aten._native_batch_norm_legit_functional,
    aten._batch_norm_no_update,
    aten.cudnn_batch_norm,
    aten.miopen_batch_norm,
    aten.batch_norm,
)
def batch_norm(t: Tracer, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
    """Per channel: scale, shift and statistics go with their channel.

    Statistics of the batch itself are computed across all other dimensions.
    """
    x = args[0]
    channel = t.dims(x)[1]
    if next((value for value in args if isinstance(value, bool)), False):
        for place, dim in enumerate(t.dims(x)):
            if place != 1:
                t.mix(dim, "batch statistics")
    t.unify_all(channel, [t.dims(parameter)[0] for parameter in args[1:5] if isinstance(parameter, Tensor)])
    results = [out] if isinstance(out, Tensor) else [r for r in out if isinstance(r, Tensor)]
    t.set(results[0], t.dims(x))
    for statistic in results[1:]:
        fits = statistic.dim() == 1 and statistic.shape[0] == channel.size
        t.set(
            statistic,
            [Dim(channel.size, channel.factors)] if fits else [Dim(int(s)) for s in statistic.shape],
        )


@rule(aten.native_layer_norm, aten._fused_rms_norm, aten.rms_norm)
def layer_norm(t: Tracer, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
    """Across the last dimensions: a missing unit changes the statistics of the others."""
    x, shape = args[0], args[1]
    dims = t.dims(x)
    trailing = dims[-len(shape) :]
    for place, (value, dim) in enumerate(zip(shape, trailing, strict=True)):
        t.size_argument(int(value), dim, position=place, of=len(trailing))
        t.mix(dim, "layer normalisation")
    for parameter in args[2:4]:
        if isinstance(parameter, Tensor):
            for a, b in zip(t.dims(parameter), trailing, strict=True):
                t.unify(a, b)
    _set_with_statistics(t, x, out)


@rule(aten.native_group_norm)
def group_norm(t: Tracer, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
    """Across the channels of a group: each group loses the same places, or whole groups go."""
    x, groups = args[0], int(args[6])
    channel = t.dims(x)[1]
    group, each = t.labels.split(channel, [groups, channel.size // groups])
    if groups < channel.size:
        t.mix(each, "group normalisation")
    for parameter in args[1:3]:
        if isinstance(parameter, Tensor):
            t.unify(t.dims(parameter)[0], channel)
    t.size_argument(groups, group)
    normalised, *statistics = out
    t.set(normalised, t.dims(x))
    for statistic in statistics:
        t.set(statistic, [t.dims(x)[0], group])


@rule(
    aten._softmax,
    aten._log_softmax,
    aten._safe_softmax,
    aten.softmax,
    aten.log_softmax,
)
def softmax(t: Tracer, args: tuple[Any, ...], kwargs: dict[str, Any], out: Tensor) -> None:
    """Across one dimension."""
    t.mix(t.dims(args[0])[args[1]], "softmax")
    t.set(out, t.dims(args[0]))


@rule(aten._weight_norm_interface)
def weight_norm(t: Tracer, args: tuple[Any, ...], kwargs: dict[str, Any], out: Sequence[Tensor]) -> None:
    """A weight as direction and length: the length is one along all dimensions but one."""
    direction, length, place = args[:3]
    dims = t.dims(direction)
    place %= len(dims)
    t.unify(dims[place], t.dims(length)[place])
    for axis, dim in enumerate(dims):
        if axis != place:
            t.mix(dim, "the norm of a weight")
    t.set(out[0], dims)
    t.set(out[1], t.dims(length))


@rule(aten.renorm)
def renorm(t: Tracer, args: tuple[Any, ...], kwargs: dict[str, Any], out: Tensor) -> None:
    """Slices along one dimension scaled to a largest norm, which all other dimensions share."""
    dims = t.dims(args[0])
    for axis, dim in enumerate(dims):
        if axis != args[2] % len(dims):
            t.mix(dim, "a norm")
    t.set(out, dims)


def _set_with_statistics(t: Tracer, x: Tensor, out: Any) -> None:
    first, *statistics = results_of(out)
    t.set(first, t.dims(x))
    for statistic in statistics:  # one a row of what is normalised
        same = zip(t.dims(x), fixed(statistic), strict=False)
        t.set(statistic, [a if a.size == b.size else b for a, b in same])
