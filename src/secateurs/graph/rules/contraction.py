"""Products that sum over a dimension: convolutions, matrix products, attention kernels."""

from __future__ import annotations

from math import prod
from typing import Any

from torch import Tensor
from torch.nn import functional

from secateurs.graph.labels import Dim
from secateurs.graph.rules.registry import aten, call_rule, rule
from secateurs.graph.tracing import Tracer


@rule(aten.convolution)
def convolution(t: Tracer, args: tuple[Any, ...], kwargs: dict[str, Any], out: Tensor) -> None:
    """Any convolution: grouped, depthwise, transposed, of any number of spatial dimensions.

    With ``g`` groups, input channel ``(group, i)`` meets the weight's input plane ``i``, and filter
    ``(group, o)`` makes output channel ``(group, o)``: a unit is a whole group, an ``i``, or an ``o``.
    """
    x, weight, bias = args[0], args[1], args[2]
    transposed, groups = bool(args[6]), int(args[8])
    x_dims, w_dims = t.dims(x), t.dims(weight)
    first = x.dim() - (weight.dim() - 1)  # position of the channel: 1, or 0 without a batch
    _lock_all(t, (*x_dims[first + 1 :], *w_dims[2:]), "a convolution slides along it")
    x_in = x_dims[first]
    if transposed:  # weight: (C_in, C_out / groups, *kernel)
        group_in, x_each = _halves(t, x_in, groups)
        group_w, w_in = _halves(t, w_dims[0], groups)
        w_out, group_out = w_dims[1], group_in
        t.unify(group_in, group_w)
        produced = t.labels.merge([group_out, w_out]) if groups > 1 else w_out
    else:  # weight: (C_out, C_in / groups, *kernel)
        group_in, x_each = _halves(t, x_in, groups)
        group_out, w_out = _halves(t, w_dims[0], groups)
        w_in = w_dims[1]
        t.unify(group_in, group_out)
        produced = w_dims[0]
    t.unify(x_each, w_in)
    if bias is not None:
        t.unify(t.dims(bias)[0], produced)
    spatial = [Dim(int(size)) for size in out.shape[first + 1 :]]
    t.set(out, [*x_dims[:first], produced, *spatial])
    if groups > 1:
        t.size_argument(groups, group_in)
        if w_in.size > 1:
            t.name_kind(group_in, "conv_group")
    positions = prod(x.shape[first + 1 :]) if transposed else prod(out.shape[first + 1 :])
    batch = prod(out.shape[:first])
    depthwise = groups > 1 and w_in.size == 1 and w_out.size == 1  # its filters only carry their channel
    t.contract(
        [(x, x_each), (weight, w_in)],
        [group_in, Dim(w_out.size, w_out.factors) if depthwise else w_out],
        batch * positions * prod(weight.shape[2:]),
    )


def _halves(t: Tracer, dim: Dim, groups: int) -> tuple[Dim, Dim]:
    if groups == 1:
        return Dim(1), dim
    group, each = t.labels.split(dim, [groups, dim.size // groups])
    return group, each


def _lock_all(t: Tracer, dims: tuple[Dim, ...], reason: str) -> None:
    for dim in dims:
        t.lock(dim, reason)


@rule(aten.mm, aten.bmm)
def matrix_product(t: Tracer, args: tuple[Any, ...], kwargs: dict[str, Any], out: Tensor) -> None:
    """``(n, k) @ (k, m)``, or a batch of them."""
    a, b = args[0], args[1]
    a_dims, b_dims = t.dims(a), t.dims(b)
    batch = list(a_dims[:-2])
    for left, right in zip(a_dims[:-2], b_dims[:-2], strict=True):
        t.unify(left, right)
    t.unify(a_dims[-1], b_dims[-2])
    if not t.is_weight(a) and not t.is_weight(b):
        t.name_kind(a_dims[-1], "head_dim")
        for dim in batch:
            t.name_kind(dim, "head")
    t.contract([(a, a_dims[-1]), (b, b_dims[-2])], [*batch, a_dims[-2], b_dims[-1]])
    t.set(out, [*batch, a_dims[-2], b_dims[-1]])


@rule(aten.addmm, aten.baddbmm)
def add_matrix_product(t: Tracer, args: tuple[Any, ...], kwargs: dict[str, Any], out: Tensor) -> None:
    """``bias + a @ b``."""
    matrix_product(t, args[1:], kwargs, out)
    _unify_trailing(t, args[0], out)


@rule(aten.linear)
def linear(t: Tracer, args: tuple[Any, ...], kwargs: dict[str, Any], out: Tensor) -> None:
    """``x @ weight.T + bias``, where the operator arrives whole."""
    x, weight = args[0], args[1]
    x_dims, w_dims = t.dims(x), t.dims(weight)
    t.unify(x_dims[-1], w_dims[1])
    t.contract([(x, x_dims[-1]), (weight, w_dims[1])], [*x_dims[:-1], w_dims[0]])
    t.set(out, [*x_dims[:-1], w_dims[0]])
    if len(args) > 2 and args[2] is not None:
        _unify_trailing(t, args[2], out)


@rule(aten.mv, aten.dot)
def vector_product(t: Tracer, args: tuple[Any, ...], kwargs: dict[str, Any], out: Tensor) -> None:
    """A product with a vector."""
    a, b = args[0], args[1]
    t.unify(t.dims(a)[-1], t.dims(b)[0])
    t.contract([(a, t.dims(a)[-1]), (b, t.dims(b)[0])], t.dims(a)[:-1])
    t.set(out, t.dims(a)[:-1])


def _unify_trailing(t: Tracer, bias: Tensor, out: Tensor) -> None:
    out_dims = t.dims(out)
    for place, dim in enumerate(reversed(t.dims(bias)), start=1):
        if dim.size == out_dims[-place].size:
            t.unify(dim, out_dims[-place])


@call_rule(functional.scaled_dot_product_attention)
def attention_scale(t: Tracer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Without a stated scale the kernel derives one from the head dimension, which then must stay."""
    query = args[0] if args else kwargs["query"]
    if kwargs.get("scale") is None:
        t.lock(t.dims(query)[-1], "attention derives its scale from this length")


@rule(
    aten._scaled_dot_product_flash_attention_for_cpu,
    aten._scaled_dot_product_flash_attention,
    aten._scaled_dot_product_efficient_attention,
    aten._scaled_dot_product_cudnn_attention,
    aten._scaled_dot_product_fused_attention_overrideable,
    aten._scaled_dot_product_attention_math,
    aten.scaled_dot_product_attention,
)
def attention(t: Tracer, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
    """``softmax(q k^T) v``, where the operator arrives whole."""
    query, key, value = args[:3]
    q, k, v = t.dims(query), t.dims(key), t.dims(value)
    for left, middle, right in zip(q[:-2], k[:-2], v[:-2], strict=True):
        t.unify(left, middle)
        t.unify(middle, right)
    t.unify(q[-1], k[-1])
    t.unify(k[-2], v[-2])
    for dim in (q[-2], k[-2]):
        t.lock(dim, "attention computes a softmax along it")
    t.contract([(query, q[-1]), (key, k[-1])], [*q[:-1], k[-2]])
    t.contract([(value, v[-2])], [*q[:-1], v[-1]])
    results = [out] if isinstance(out, Tensor) else [r for r in out if isinstance(r, Tensor)]
    t.set(results[0], [*q[:-1], v[-1]])
    for extra in results[1:]:
        t.set(extra, [Dim(int(size)) for size in extra.shape])
