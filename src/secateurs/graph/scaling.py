"""What each operator does to shadows: which rows of parameters its results scale with."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from torch import Tensor

from secateurs.graph.packed import results_of
from secateurs.graph.shadows import constant_along, narrowed, shadow_of, spread

if TYPE_CHECKING:
    from secateurs.graph.provenance import Provenance

aten = torch.ops.aten


@dataclass(frozen=True, slots=True)
class Made:
    """Shadows of an operator's results, and the operands that they come from."""

    shadows: Sequence[Tensor]
    read: Sequence[Tensor | None]
    by_columns: Tensor | None = None


_Way: TypeAlias = "Callable[[Provenance, Any, tuple[Any, ...], dict[str, Any], Any], Made | None]"
WAYS: dict[Any, _Way] = {}


def _way(*names: str) -> Callable[[_Way], _Way]:
    def register(each: _Way) -> _Way:
        for name in names:
            if (packet := getattr(aten, name, None)) is not None:
                WAYS[packet] = each
        return each

    return register


@_way("view", "_unsafe_view", "_reshape_alias", "reshape")
def _view(p: Provenance, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> Made | None:
    shadow = shadow_of(args[0])
    if shadow is None or isinstance(args[1], torch.dtype):
        return None
    return Made((shadow.reshape(out.shape),), args[:1])


@_way("clone", "contiguous", "detach", "alias", "_to_copy", "neg", "lift_fresh")
def _same(p: Provenance, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> Made | None:
    shadow = shadow_of(args[0])
    return None if shadow is None else Made((shadow,), args[:1])


@_way("permute", "t", "transpose", "slice", "select", "unbind", "split", "split_with_sizes", "unsafe_split",
      "chunk", "squeeze", "unsqueeze", "expand", "flip")  # fmt: skip
def _moved(p: Provenance, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> Made | None:
    """What only moves elements moves their shadows."""
    shadow = shadow_of(args[0])
    return None if shadow is None else Made(results_of(func(shadow, *args[1:], **kwargs)), args[:1])


@_way("cat", "stack")
def _joined(p: Provenance, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> Made | None:
    shadows = [shadow_of(tensor) for tensor in args[0]]
    known = [shadow for shadow in shadows if shadow is not None]
    if len(known) < len(shadows):
        return None
    place = int(kwargs.get("dim", args[1] if len(args) > 1 else 0)) % out.dim()
    if func.overloadpacket is aten.stack:
        known = [shadow.unsqueeze(place) for shadow in known]
    narrow = torch.cat(narrowed(known, but=place), place)
    return Made((narrow.expand(out.shape),), args[0])


@_way("mul", "div")
def _product(
    p: Provenance, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any
) -> Made | None:
    """A product scales with either factor: with the activation times a table, else with the weight."""
    factors = [value for value in args[:2] if isinstance(value, Tensor) and shadow_of(value) is not None]
    if len(factors) > 1:
        factors = [factor for factor in factors if not p.is_table(factor)]
    if len(factors) > 1:
        factors = [factor for factor in factors if p.is_weight(factor)]
    if len(factors) != 1 or kwargs.get("rounding_mode") is not None:
        return None
    shadow, is_divisor = shadow_of(factors[0]), func.overloadpacket is aten.div and factors[0] is not args[0]
    return None if shadow is None or is_divisor else Made((shadow.expand(out.shape),), factors)


@_way("add", "sub")
def _sum(p: Provenance, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> Made | None:
    if not all(isinstance(value, Tensor) for value in args[:2]):
        return None
    one, other = shadow_of(args[0]), shadow_of(args[1])
    if one is None or other is None:
        return None
    return Made((p.unite(one, other),), args[:2])


@_way("mm", "bmm", "matmul")
def _matrices(
    p: Provenance, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any
) -> Made | None:
    """A product sums over rows' elements: of ``x @ weight.T``, or of ``weight @ x``."""
    a, b = args[:2]
    for factor, summed in ((b, -2), (a, -1)):
        shadow = constant_along(shadow_of(factor), summed)
        if shadow is not None:
            return Made((shadow.unsqueeze(summed).expand(out.shape),), (factor,))
    columns = p.columns(b)
    return None if columns is None else Made((columns.expand(out.shape),), (), by_columns=b)


@_way("addmm", "baddbmm")
def _matrices_and_bias(
    p: Provenance, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any
) -> Made | None:
    made = _matrices(p, func, args[1:3], {}, out)
    bias = shadow_of(args[0])
    if made is None or bias is None:
        return None
    return Made((p.unite(made.shadows[0], bias),), (*made.read, args[0]), made.by_columns)


@_way("linear")
def _linear(p: Provenance, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> Made | None:
    shadow = constant_along(shadow_of(args[1]), -1)
    return _per_channel(p, shadow, args[1], args[2] if len(args) > 2 else None, out, out.dim() - 1)


@_way("convolution")
def _convolution(
    p: Provenance, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any
) -> Made | None:
    x, weight = args[:2]
    shadow = shadow_of(weight)
    while shadow is not None and shadow.dim() > 1:
        shadow = constant_along(shadow, -1)
    channel = x.dim() - weight.dim() + 1
    return None if args[6] else _per_channel(p, shadow, weight, args[2], out, channel)


@_way("native_batch_norm", "_native_batch_norm_legit", "_native_batch_norm_legit_no_training",
      "_batch_norm_no_update", "batch_norm", "native_group_norm")  # fmt: skip
def _channel_norm(
    p: Provenance, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any
) -> Made | None:
    return _per_channel(p, shadow_of(args[1]), args[1], args[2], results_of(out)[0], 1)


@_way("native_layer_norm", "_fused_rms_norm", "rms_norm")
def _last_norm(
    p: Provenance, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any
) -> Made | None:
    """Normalisation over the last dimensions, whose weight has their shape."""
    weight, bias = args[2], args[3] if func.overloadpacket is aten.native_layer_norm else None
    shadow, first = shadow_of(weight), results_of(out)[0]
    rows = _with_bias(p, shadow, bias)
    return None if rows is None else Made((rows.expand(first.shape),), (weight, bias))


@_way("view_as_complex")
def _complex(
    p: Provenance, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any
) -> Made | None:
    shadow = shadow_of(args[0])
    return None if shadow is None else Made((p.unite(shadow[..., 0], shadow[..., 1]),), args[:1])


@_way("view_as_real")
def _real(p: Provenance, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> Made | None:
    shadow = shadow_of(args[0])
    return None if shadow is None else Made((shadow.unsqueeze(-1).expand(out.shape),), args[:1])


def _per_channel(
    p: Provenance, rows: Tensor | None, weight: Tensor | None, bias: Tensor | None, out: Tensor, place: int
) -> Made | None:
    """A weight and perhaps a bias make each index of one dimension of a result."""
    rows = _with_bias(p, rows, bias)
    return None if rows is None else Made((spread(rows, place, out.shape),), (weight, bias))


def _with_bias(p: Provenance, rows: Tensor | None, bias: Tensor | None) -> Tensor | None:
    """Rows united with those of a bias that is added; None where one of the two has none."""
    if rows is None or bias is None:
        return rows
    offset = shadow_of(bias)
    return None if offset is None else p.unite(rows, offset)


SHAPE_ALONE = frozenset(
    getattr(aten, name)
    for name in ("empty_like", "zeros_like", "ones_like", "full_like", "new_empty", "new_zeros", "new_ones",
                 "new_full", "rand_like", "randn_like")
)  # fmt: skip


# -- shadows ---------------------------------------------------------------------------------------
