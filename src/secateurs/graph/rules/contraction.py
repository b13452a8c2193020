"""Products that sum over a dimension: convolutions, matrix products, attention kernels."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any

from torch import Tensor

from secateurs.graph.labels import Dim
from secateurs.graph.packed import results_of
from secateurs.graph.rules.common import broadcast, fixed, lock_all
from secateurs.graph.rules.registry import Arguments, aten, rule
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
    spatial = _spatial(t, x_dims[first + 1 :], args, out.shape[first + 1 :])
    lock_all(t, w_dims[2:], "a convolution slides along it")
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
    t.set(out, [*x_dims[:first], produced, *spatial])
    if groups > 1:
        t.size_argument(groups, group_in)
        if w_in.size > 1:
            t.name_kind(group_in, "conv_group")
    positions = [Dim(int(size)) for size in x.shape[first + 1 :]] if transposed else spatial
    depthwise = groups > 1 and w_in.size == 1 and w_out.size == 1  # its filters only carry their channel
    t.contract(
        [(x, x_each), (weight, w_in)],
        [*x_dims[:first], *positions, group_in, Dim(w_out.size, w_out.factors) if depthwise else w_out],
        prod(weight.shape[2:]),
    )


def _spatial(t: Tracer, dims: Sequence[Dim], args: tuple[Any, ...], sizes: Sequence[int]) -> list[Dim]:
    """The spatial dimensions of a convolution's result; one along which no window slides passes through."""
    weight, stride, padding = args[1], args[3], args[4]
    result = []
    for place, (dim, size) in enumerate(zip(dims, sizes, strict=True)):
        step, pad = stride[place % len(stride)], padding[place % len(padding)]
        if weight.shape[2 + place] == 1 and step == 1 and pad == 0 and dim.size == size:
            result.append(dim)
        else:
            t.lock(dim, "a convolution slides along it")
            result.append(Dim(int(size)))
    return result


def _halves(t: Tracer, dim: Dim, groups: int) -> tuple[Dim, Dim]:
    if groups == 1:
        return Dim(1), dim
    group, each = t.labels.split(dim, [groups, dim.size // groups])
    return group, each


def _mix_weights(t: Tracer, a: Tensor, b: Tensor, dim: Dim) -> None:
    """A weight that is computed by a product of weights, as a spectral norm is, depends on all of it."""
    if t.is_weight(a) and t.is_weight(b):
        t.mix(dim, "a product of weights")


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
    elif t.is_weight(a) != t.is_weight(b):  # each with a matrix of its own, as the experts of a mixture
        for dim in batch:
            t.name_kind(dim, "branch")
    _mix_weights(t, a, b, a_dims[-1])
    t.contract([(a, a_dims[-1]), (b, b_dims[-2])], [*batch, a_dims[-2], b_dims[-1]])
    t.set(out, [*batch, a_dims[-2], b_dims[-1]])


@rule(aten.addmm, aten.baddbmm)
def add_matrix_product(t: Tracer, args: tuple[Any, ...], kwargs: dict[str, Any], out: Tensor) -> None:
    """``bias + a @ b``."""
    matrix_product(t, args[1:3], kwargs, out)
    broadcast(t, [t.dims(out), t.dims(args[0])], out.shape)


@rule(aten.linear)
def linear(t: Tracer, args: tuple[Any, ...], kwargs: dict[str, Any], out: Tensor) -> None:
    """``x @ weight.T + bias``, where the operator arrives whole."""
    x, weight = args[0], args[1]
    x_dims, w_dims = t.dims(x), t.dims(weight)
    t.unify(x_dims[-1], w_dims[1])
    t.contract([(x, x_dims[-1]), (weight, w_dims[1])], [*x_dims[:-1], w_dims[0]])
    t.set(out, [*x_dims[:-1], w_dims[0]])
    if len(args) > 2 and args[2] is not None:
        broadcast(t, [t.dims(out), t.dims(args[2])], out.shape)


@rule(aten.mv, aten.dot)
def vector_product(t: Tracer, args: tuple[Any, ...], kwargs: dict[str, Any], out: Tensor) -> None:
    """A product with a vector."""
    a, b = args[0], args[1]
    t.unify(t.dims(a)[-1], t.dims(b)[0])
    _mix_weights(t, a, b, t.dims(b)[0])
    t.contract([(a, t.dims(a)[-1]), (b, t.dims(b)[0])], t.dims(a)[:-1])
    t.set(out, t.dims(a)[:-1])


@rule(
    aten._scaled_dot_product_flash_attention_for_cpu,
    aten._scaled_dot_product_flash_attention,
    aten._scaled_dot_product_efficient_attention,
    aten._scaled_dot_product_cudnn_attention,
    aten._scaled_dot_product_fused_attention_overrideable,
    aten._scaled_dot_product_attention_math,
    aten.scaled_dot_product_attention,
)
def attention(t: Tracer, args: Arguments, kwargs: dict[str, Any], out: Any) -> None:
    """``softmax(q k^T) v``, where the operator arrives whole."""
    query, key, value = args[:3]
    q, k, v = list(t.dims(query)), t.dims(key), t.dims(value)
    for place in range(-3, -len(q) - 1, -1):
        t.unify(k[place], v[place])
        q[place] = _shared_heads(t, q[place], k[place])
    t.unify(q[-1], k[-1])
    t.unify(k[-2], v[-2])
    lock_all(t, (q[-2], k[-2]), "attention computes a softmax along it")
    mask = next(
        (m for m in (args.get("attn_mask"), args.get("attn_bias"), kwargs.get("attn_mask")) if m is not None),
        None,
    )
    if mask is not None:
        broadcast(t, [[*q[:-1], k[-2]], t.dims(mask)], [*(dim.size for dim in q[:-1]), k[-2].size])
    t.contract([(query, q[-1]), (key, k[-1])], [*q[:-1], k[-2]])
    t.contract([(value, v[-2])], [*q[:-1], v[-1]])
    first, *extras = results_of(out)
    t.set(first, [*q[:-1], v[-1]])
    for extra in extras:
        follows = extra.dim() == len(q) - 1
        t.set(
            extra, [a if follows and a.size == b.size else b for a, b in zip(q, fixed(extra), strict=False)]
        )


def _shared_heads(t: Tracer, queries: Dim, keys: Dim) -> Dim:
    """Heads of queries and keys: one to one, one for all, or several queries' heads to a key's head."""
    if queries.size == keys.size:
        t.unify(queries, keys)
    elif keys.size > 1 and queries.size % keys.size == 0:
        shared, _ = t.labels.split(queries, [keys.size, queries.size // keys.size])
        t.unify(shared, keys)
    return queries
