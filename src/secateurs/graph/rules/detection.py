"""The operators that torchvision brings for detection."""

from __future__ import annotations

from math import prod
from typing import Any

from torch import Tensor

from secateurs.graph.labels import Dim
from secateurs.graph.packed import call_tensors, results_of
from secateurs.graph.rules.common import fixed, lock_all, lock_call
from secateurs.graph.rules.registry import rule
from secateurs.graph.tracing import Tracer

_SAMPLED = "it is sampled at computed places"


@rule("torchvision::roi_align", "torchvision::roi_pool")
def roi_align(t: Tracer, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
    """One patch for each box; channels are kept apart."""
    batch, channel, *spatial = t.dims(args[0])
    boxes, coordinates = t.dims(args[1])
    lock_all(t, (batch, *spatial, coordinates), _SAMPLED)
    for result in results_of(out):
        t.set(result, [boxes, channel, *fixed(result)[2:]])


@rule("torchvision::ps_roi_align", "torchvision::ps_roi_pool")
def ps_roi_align(t: Tracer, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
    """Channel ``(c, i, j)`` gives pixel ``(i, j)`` of channel ``c`` of each box's patch."""
    batch, channel, *spatial = t.dims(args[0])
    boxes, coordinates = t.dims(args[1])
    high, wide = (int(size) for size in results_of(out)[0].shape[2:])
    each, *pixel = t.labels.split(channel, [channel.size // (high * wide), high, wide])
    lock_all(t, (batch, *spatial, coordinates, *pixel), _SAMPLED)
    for result in results_of(out):
        t.set(result, [boxes, each, *fixed(result)[2:]])


@rule("torchvision::deform_conv2d")
def deform_conv2d(t: Tracer, args: tuple[Any, ...], kwargs: dict[str, Any], out: Tensor) -> None:
    """A convolution that reads where its offsets say; the offsets themselves keep their size."""
    x, weight, offset, mask, bias = args[:5]
    groups, offset_groups = (int(count) for count in args[11:13])
    batch, channel, *spatial = t.dims(x)
    filters, plane, *kernel = t.dims(weight)
    lock_all(t, (*spatial, *kernel, *t.dims(offset)[1:], *t.dims(mask)[1:]), _SAMPLED)
    for tensor in (offset, mask):
        if tensor.dim() and tensor.shape[0] == batch.size:
            t.unify(batch, t.dims(tensor)[0])
    if offset_groups > 1:
        across, _ = t.labels.split(channel, [offset_groups, channel.size // offset_groups])
        t.lock(across, "each part of it has offsets of its own")
    group, read, made = Dim(1), channel, filters
    if groups > 1:
        group, read = t.labels.split(channel, [groups, channel.size // groups])
        made_group, made = t.labels.split(filters, [groups, filters.size // groups])
        t.unify(group, made_group)
        t.lock(group, "the operator derives its number of groups from it")
    t.unify(read, plane)
    t.unify(t.dims(bias)[0], filters)
    positions = int(out.shape[0]) * prod(out.shape[2:])
    t.contract([(x, read), (weight, plane)], [group, made], positions * prod(weight.shape[2:]))
    t.set(out, [batch, filters, *fixed(out)[2:]])


@rule("torchvision::nms")
def suppression(t: Tracer, args: tuple[Any, ...], kwargs: dict[str, Any], out: Tensor) -> None:
    """Which boxes stay is decided by values."""
    lock_call(t, call_tensors(args, kwargs), results_of(out), "its values decide what is picked")
