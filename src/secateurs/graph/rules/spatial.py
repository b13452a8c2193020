"""Operators that work on trailing spatial dimensions and leave the leading ones alone."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from secateurs.graph.labels import Dim
from secateurs.graph.rules.registry import aten, rule
from secateurs.graph.tracing import Tracer


def _packets(*names: str) -> list[Any]:
    return [getattr(aten, name) for name in names]


_SPATIAL_DIMS = {
    1: _packets(
        "max_pool1d", "avg_pool1d", "adaptive_avg_pool1d", "adaptive_max_pool1d", "upsample_nearest1d",
        "upsample_linear1d", "reflection_pad1d", "replication_pad1d", "_upsample_nearest_exact1d",
    ),
    2: _packets(
        "max_pool2d_with_indices", "max_pool2d", "avg_pool2d", "_adaptive_avg_pool2d", "adaptive_avg_pool2d",
        "adaptive_max_pool2d", "fractional_max_pool2d", "upsample_nearest2d", "upsample_bilinear2d",
        "_upsample_bilinear2d_aa", "upsample_bicubic2d", "_upsample_bicubic2d_aa", "reflection_pad2d",
        "replication_pad2d", "_upsample_nearest_exact2d", "max_unpool2d",
        "_upsample_lanczos2d_aa",
    ),
    3: _packets(
        "max_pool3d_with_indices", "avg_pool3d", "_adaptive_avg_pool3d", "adaptive_avg_pool3d",
        "adaptive_max_pool3d", "upsample_nearest3d", "upsample_trilinear3d", "reflection_pad3d",
        "replication_pad3d", "_upsample_nearest_exact3d", "max_unpool3d", "fractional_max_pool3d",
    ),
}  # fmt: skip


def _spatial(count: int) -> Any:
    def spatial(t: Tracer, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
        dims = t.dims(args[0])
        for dim in dims[-count:]:
            t.lock(dim, "a window slides along it")
        for beside in args[1:]:  # the places that an unpooling puts back, the samples of a random pooling
            if isinstance(beside, Tensor):
                for a, b in zip(dims[:-count], t.dims(beside), strict=False):
                    t.unify(a, b)
        for result in [out] if isinstance(out, Tensor) else out:
            t.set(result, [*dims[:-count], *(Dim(int(size)) for size in result.shape[-count:])])

    return spatial


for _count, _operators in _SPATIAL_DIMS.items():
    rule(*_operators)(_spatial(_count))


@rule(aten.constant_pad_nd)
def pad(t: Tracer, args: tuple[Any, ...], kwargs: dict[str, Any], out: Tensor) -> None:
    """Padding at the ends of trailing dimensions; the padded places are constant and stay."""
    x, widths = args[0], args[1]
    dims = list(t.dims(x))
    for step in range(len(widths) // 2):
        place, before, after = x.dim() - 1 - step, int(widths[2 * step]), int(widths[2 * step + 1])
        if before or after:
            dims[place] = _padded(t, dims[place], before, after)
    t.set(out, dims)


def _padded(t: Tracer, dim: Dim, before: int, after: int) -> Dim:
    if before < 0 or after < 0:
        t.lock(dim, "it is cropped")
        return Dim(dim.size + before + after)
    return t.labels.concatenate([Dim(before), dim, Dim(after)])


@rule(aten.grid_sampler_2d, aten.grid_sampler_3d, aten.grid_sampler)
def grid_sample(t: Tracer, args: tuple[Any, ...], kwargs: dict[str, Any], out: Tensor) -> None:
    """Sampling at computed places: channels are kept apart."""
    x, grid = args[0], args[1]
    for dim in (*t.dims(x)[2:], *t.dims(grid)[1:]):
        t.lock(dim, "it is sampled at computed places")
    t.unify(t.dims(x)[0], t.dims(grid)[0])
    t.set(out, [*t.dims(x)[:2], *(Dim(int(size)) for size in out.shape[2:])])


@rule(aten.affine_grid_generator)
def affine_grid(t: Tracer, args: tuple[Any, ...], kwargs: dict[str, Any], out: Tensor) -> None:
    """Places on a grid, from one small matrix a sample."""
    batch, *matrix = t.dims(args[0])
    for dim in matrix:
        t.lock(dim, "it is a matrix of coordinates")
    t.set(out, [batch, *(Dim(int(size)) for size in out.shape[1:])])


@rule(aten.pixel_shuffle)
def pixel_shuffle(t: Tracer, args: tuple[Any, ...], kwargs: dict[str, Any], out: Tensor) -> None:
    """Channel ``(c, i, j)`` becomes pixel ``(i, j)`` of channel ``c``."""
    *lead, channel, height, width = t.dims(args[0])
    factor = int(args[1])
    each, row, column = t.labels.split(channel, [channel.size // factor**2, factor, factor])
    for dim in (row, column, height, width):
        t.lock(dim, "pixel shuffle makes pixels of it")
    t.set(out, [*lead, each, Dim(height.size * factor), Dim(width.size * factor)])


@rule(aten.pixel_unshuffle)
def pixel_unshuffle(t: Tracer, args: tuple[Any, ...], kwargs: dict[str, Any], out: Tensor) -> None:
    """Pixel ``(i, j)`` of channel ``c`` becomes channel ``(c, i, j)``."""
    *lead, channel, height, width = t.dims(args[0])
    factor = int(args[1])
    for dim in (height, width):
        t.lock(dim, "pixel unshuffle makes channels of it")
    merged = t.labels.merge([channel, Dim(factor), Dim(factor)])
    t.set(out, [*lead, merged, Dim(height.size // factor), Dim(width.size // factor)])


@rule(aten.channel_shuffle, aten.native_channel_shuffle)
def channel_shuffle(t: Tracer, args: tuple[Any, ...], kwargs: dict[str, Any], out: Tensor) -> None:
    """Channel ``(group, i)`` becomes channel ``(i, group)``; the number of groups stays."""
    batch, channel, *spatial = t.dims(args[0])
    groups = int(args[1])
    group, each = t.labels.split(channel, [groups, channel.size // groups])
    t.lock(group, "channel shuffle keeps its number of groups")
    t.set(out, [batch, t.labels.merge([each, group]), *spatial])
