"""Operators that compute each element from the elements at the same place."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from secateurs.graph.labels import Dim
from secateurs.graph.packed import call_tensors, results_of
from secateurs.graph.rules.common import place_of
from secateurs.graph.rules.registry import Arguments, aten, rule
from secateurs.graph.tracing import Tracer


@rule(
    torch.Tag.pointwise,
    aten.clone,
    aten.copy,
    aten.copy_,
    aten.detach,
    aten.alias,
    aten.lift_fresh,
    aten.lift_fresh_copy,
    aten._to_copy,
    aten.contiguous,
    aten.dropout,
    aten.native_dropout,
    aten.bernoulli,
    aten.bernoulli_,
    aten.zero_,
    aten.fill_,
    aten.normal_,
    aten.uniform_,
    aten.masked_fill,
    aten.masked_fill_,
    aten.where,
    aten.addcmul,
    aten.addcdiv,
    aten.lerp,
    aten.prelu,
    aten._prelu_kernel,
    aten.hardswish,
    aten.hardswish_,
    aten.hardsigmoid,
    aten.hardsigmoid_,
    aten.hardtanh,
    aten.hardtanh_,
    aten.leaky_relu_,
    aten.elu_,
    aten.celu_,
    aten.selu_,
    aten.threshold,
    aten.threshold_,
    aten.softplus,
    aten.log_sigmoid_forward,
    aten.rrelu_with_noise,
    aten.glu_jvp,
    aten.fake_quantize_per_tensor_affine_cachemask,
    aten._conj,
    aten._neg_view,
    aten.complex,
    aten.polar,
    aten.copysign,
    aten.floor_divide,
    aten.rsub,
    aten.fill,
    aten.zero,
    aten.lift,
    aten.random,
    aten.normal,
    aten.normal_functional,
    aten.uniform,
    aten.exponential,
    aten.cauchy,
    aten.geometric,
    aten.log_normal,
    aten.poisson,
    aten.binomial,
    aten._standard_gamma,
    aten._add_relu,
    aten._masked_scale,
    aten.rrelu_with_noise_functional,
    aten._pin_memory,
    aten.eq,
    aten.ge,
    aten.gt,
    aten.le,
    aten.lt,
    aten.ne,
    aten.gelu,
    aten.mish,
    aten.abs,
)
def pointwise(t: Tracer, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
    """Dimensions that meet are one; a dimension of length 1 that is spread out says nothing."""
    operands = call_tensors(args, kwargs)
    for result in results_of(out):
        t.set(result, [_meet(t, operands, result, place) for place in range(-result.dim(), 0)])


def _meet(t: Tracer, operands: Sequence[Tensor], result: Tensor, place: int) -> Dim:
    size = result.shape[place]
    if size == 1:
        return Dim(1, (), _sources(t, operands, place, size))
    dims = [t.dims(a)[place] for a in operands if a.dim() >= -place and a.shape[place] == size]
    if not dims:
        return t.labels.fresh(size)
    chosen = next((dim for dim in dims if dim.factors), dims[0])
    for dim in dims:
        t.unify(chosen, dim)
    return Dim(size, chosen.factors, _sources(t, operands, place, size))


def _sources(t: Tracer, operands: Sequence[Tensor], place: int, size: int) -> frozenset[int]:
    dims = [t.dims(a)[place] for a in operands if a.dim() >= -place and a.shape[place] == size]
    return frozenset().union(*(dim.sources for dim in dims))


@rule(aten.glu)
def glu(t: Tracer, args: Arguments, kwargs: dict[str, Any], out: Tensor) -> None:
    """One half of a dimension gated by the other: both lose the same places."""
    dims = list(t.dims(args[0]))
    place = place_of(args[1], args[0])
    halves, within = t.labels.split(dims[place], [2, dims[place].size // 2])
    t.lock(halves, "it is split into equal pieces")
    dims[place] = within
    t.set(out, dims)


@rule(
    aten.empty,
    aten.zeros,
    aten.ones,
    aten.full,
    aten.rand,
    aten.randn,
    aten.new_zeros,
    aten.new_ones,
    aten.new_full,
    aten.new_empty,
    aten.new_empty_strided,
    aten.empty_strided,
    aten.empty_permuted,
)
def constant(t: Tracer, args: tuple[Any, ...], kwargs: dict[str, Any], out: Tensor) -> None:
    """A new tensor with the same value everywhere: its dimensions are free until they meet others."""
    dims = [t.labels.fresh(int(size)) for size in out.shape]
    t.set(out, dims)
    for place, dim in enumerate(dims):
        t.size_argument(dim.size, dim, position=place, of=len(dims))


@rule(
    aten.empty_like,
    aten.zeros_like,
    aten.ones_like,
    aten.full_like,
    aten.rand_like,
    aten.randn_like,
    aten.randint_like,
)
def like(t: Tracer, args: tuple[Any, ...], kwargs: dict[str, Any], out: Tensor) -> None:
    """A new tensor shaped like another."""
    t.set(out, t.dims(args[0]))


@rule(
    aten.arange,
    aten.linspace,
    aten.eye,
    aten.scalar_tensor,
    aten.randperm,
    aten.randint,
    aten.tril_indices,
    aten.triu_indices,
    aten.logspace,
    aten.range,
    aten.hann_window,
    aten.hamming_window,
    aten.bartlett_window,
    aten.blackman_window,
    aten.kaiser_window,
    aten.fft_fftfreq,
    aten.fft_rfftfreq,
)
def values(t: Tracer, args: tuple[Any, ...], kwargs: dict[str, Any], out: Tensor) -> None:
    """A tensor whose values depend on their place keeps its size."""
    t.set(out, [Dim(int(size)) for size in out.shape])


@rule(
    aten._local_scalar_dense,
    aten.equal,
    aten.allclose,
    aten.sym_size,
    aten.is_same_size,
    aten._assert_async,
    aten._functional_assert_async,
    aten._assert_tensor_metadata,
    aten.is_pinned,
)
def nothing(t: Tracer, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
    """Operators that return no tensor and change none."""
