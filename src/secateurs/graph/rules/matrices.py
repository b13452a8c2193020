"""Diagonals, triangles and the rarer products of matrices and vectors."""

from __future__ import annotations

from math import prod
from typing import Any

from torch import Tensor

from secateurs.graph.expressions import Constant, Length, Operation
from secateurs.graph.labels import Dim
from secateurs.graph.packed import call_tensors, results_of
from secateurs.graph.rules.common import broadcast, fixed, lock_all, lock_call, place_of
from secateurs.graph.rules.contraction import matrix_product, vector_product
from secateurs.graph.rules.registry import Arguments, aten, rule
from secateurs.graph.tracing import Tracer

_ALIGNED = 16  # bytes: torch's grouped product refuses rows that do not fill so many


@rule(aten.tril, aten.triu)
def triangle(t: Tracer, args: Arguments, kwargs: dict[str, Any], out: Tensor) -> None:
    """What lies on one side of the diagonal is zero: both dimensions keep their size."""
    dims = t.dims(args[0])
    lock_all(t, dims[-2:], "a triangle of it is zeroed")
    t.set(out, dims)


@rule(aten.diagonal)
def diagonal(t: Tracer, args: Arguments, kwargs: dict[str, Any], out: Tensor) -> None:
    """Two dimensions become one at the end: both, if they are of one length, else a fixed one."""
    x = args[0]
    places = [place_of(args.get("dim1", 0), x), place_of(args.get("dim2", 1), x)]
    one, other = (t.dims(x)[place] for place in places)
    rest = [dim for place, dim in enumerate(t.dims(x)) if place not in places]
    if one.size == other.size and not args.get("offset", 0):
        t.unify(one, other)
        t.set(out, [*rest, one])
        return
    lock_all(t, (one, other), "a diagonal of it is taken")
    t.set(out, [*rest, fixed(out)[-1]])


@rule(aten.diag_embed)
def diag_embed(t: Tracer, args: Arguments, kwargs: dict[str, Any], out: Tensor) -> None:
    """The last dimension becomes the diagonal of two."""
    *rest, last = t.dims(args[0])
    if args[1]:
        t.lock(last, "it becomes a diagonal beside the main one")
        last = Dim(int(out.shape[args[2]]))
    places = {place_of(args[2], out), place_of(args[3], out)}
    remaining = iter(rest)
    t.set(out, [last if place in places else next(remaining) for place in range(out.dim())])


@rule(aten.diagonal_scatter, aten.trace, aten.block_diag, aten.as_strided_scatter)
def place_by_place(t: Tracer, args: Arguments, kwargs: dict[str, Any], out: Tensor) -> None:
    """Operators that are rare and tell places apart."""
    lock_call(t, call_tensors(args, kwargs), [out], "its places are told apart")


@rule(aten.addmv)
def add_vector_product(t: Tracer, args: Arguments, kwargs: dict[str, Any], out: Tensor) -> None:
    """``bias + matrix @ vector``."""
    vector_product(t, args[1:], kwargs, out)
    broadcast(t, [t.dims(out), t.dims(args[0])], out.shape)


@rule(aten.vdot)
def inner(t: Tracer, args: Arguments, kwargs: dict[str, Any], out: Tensor) -> None:
    """The product of two vectors."""
    vector_product(t, args, kwargs, out)


@rule(aten.addr, aten.ger, aten.outer)
def outer(t: Tracer, args: Arguments, kwargs: dict[str, Any], out: Tensor) -> None:
    """Every element of one vector times every element of another, perhaps added to a matrix."""
    vectors = args[-2:] if len(args) == 2 else args[1:3]
    dims = [t.dims(vectors[0])[0], t.dims(vectors[1])[0]]
    if len(args) > 2:
        broadcast(t, [dims, t.dims(args[0])], out.shape)
    t.set(out, dims)


@rule(aten.addbmm)
def add_batch_of_products(t: Tracer, args: Arguments, kwargs: dict[str, Any], out: Tensor) -> None:
    """``bias + sum of a[i] @ b[i]``: the batch is summed over as well."""
    a, b = t.dims(args[1]), t.dims(args[2])
    t.unify(a[0], b[0])
    t.unify(a[2], b[1])
    t.contract([(args[1], a[2]), (args[2], b[1])], [Dim(a[0].size, a[0].factors), a[1], b[2]])
    t.contract([(args[1], a[0]), (args[2], b[0])], [a[1], b[2]], multiplier=0)  # its cost is counted above
    t.set(out, [a[1], b[2]])
    broadcast(t, [t.dims(out), t.dims(args[0])], out.shape)


@rule(aten._addmm_activation, aten._int_mm)
def activated_product(t: Tracer, args: Arguments, kwargs: dict[str, Any], out: Tensor) -> None:
    """A matrix product with a bias and an activation in one."""
    pair = args[1:3] if len(args) > 2 else args[:2]
    matrix_product(t, pair, kwargs, out)
    if len(args) > 2:
        broadcast(t, [t.dims(out), t.dims(args[0])], out.shape)


@rule(aten._grouped_mm)
def grouped_product(t: Tracer, args: Arguments, kwargs: dict[str, Any], out: Tensor) -> None:
    """Rows of one matrix, in ranges, each range with a matrix of its own, as experts compute it."""
    x, weights, offsets, bias = args[0], args[1], args.get("offs"), args.get("bias")
    if x.dim() == weights.dim() == 3:
        matrix_product(t, args[:2], kwargs, out)
        return
    if x.dim() != 2 or weights.dim() != 3 or bias is not None:
        lock_call(t, call_tensors(args, kwargs), [out], "it is multiplied in ranges")
        return
    experts, inside, made = t.dims(weights)
    rows, last = t.dims(x)
    lock_all(
        t, (experts, rows, *(t.dims(offsets) if offsets is not None else ())), "it is dealt out in ranges"
    )
    t.unify(last, inside)
    for tensor, dim in ((x, last), (weights, inside if weights.stride(1) == 1 else made)):
        _fill_blocks(t, dim, _ALIGNED // tensor.element_size())
    t.contract([(x, last), (weights, inside)], [rows, made])
    t.set(out, [rows, made])


def _fill_blocks(t: Tracer, dim: Dim, block: int) -> None:
    """Let a dimension keep a multiple of `block` indices, if it has one."""
    if dim.size % block == 0:
        t.book.compare("eq", Operation("mod", Length(dim), Constant(block)), Constant(0), True)


@rule(aten.linalg_cross)
def cross(t: Tracer, args: Arguments, kwargs: dict[str, Any], out: Tensor) -> None:
    """The product of vectors of three coordinates."""
    dims = broadcast(t, [t.dims(args[0]), t.dims(args[1])], out.shape)
    t.lock(dims[kwargs.get("dim", -1)], "it holds three coordinates")
    t.set(out, dims)


@rule(aten._cdist_forward, aten._euclidean_dist)
def pairwise_distances(t: Tracer, args: Arguments, kwargs: dict[str, Any], out: Tensor) -> None:
    """Distances between the rows of two matrices: every coordinate takes part."""
    a, b = t.dims(args[0]), t.dims(args[1])
    t.unify(a[-1], b[-1])
    t.mix(a[-1], "a distance")
    t.contract([(args[0], a[-1]), (args[1], b[-1])], [a[-2], b[-2]], multiplier=prod(out.shape[:-2]))
    t.set(out, [*broadcast(t, [a[:-2], b[:-2]], out.shape[:-2]), a[-2], b[-2]])


@rule(aten._trilinear)
def trilinear(t: Tracer, args: Arguments, kwargs: dict[str, Any], out: Tensor) -> None:
    """``nn.Bilinear``: three tensors spread out over common dimensions, multiplied and summed over some."""
    tensors, spread, summed = args[:3], args[3:6], {int(place) for place in args[6]}
    width = tensors[0].dim() + len(spread[0])
    aligned = []
    for tensor, places in zip(tensors, spread, strict=True):
        own = iter(t.dims(tensor))
        aligned.append([Dim(1) if place in {int(p) for p in places} else next(own) for place in range(width)])
    shape = [max(dims[place].size for dims in aligned) for place in range(width)]
    dims = broadcast(t, aligned, shape)
    kept = [dim for place, dim in enumerate(dims) if place not in summed]
    for number, place in enumerate(sorted(summed)):
        beside = [Dim(dims[p].size, dims[p].factors) for p in sorted(summed - {place})]
        operands = [
            (x, each[place]) for x, each in zip(tensors, aligned, strict=True) if each[place].size > 1
        ]
        t.contract(operands, [*kept, *beside], multiplier=0.0 if number else 1.0)  # one cost for all sums
    t.set(out, kept)


@rule(
    *(
        getattr(aten, name)
        for name in (
            "_linalg_det", "_linalg_eigh", "_linalg_eigvals", "_linalg_slogdet", "_linalg_solve_ex",
            "_linalg_svd", "linalg_cholesky_ex", "linalg_eig", "linalg_householder_product",
            "linalg_inv_ex", "linalg_ldl_factor_ex", "linalg_ldl_solve", "linalg_lstsq", "linalg_lu",
            "linalg_lu_factor_ex", "linalg_lu_solve", "linalg_matrix_exp", "linalg_pinv", "linalg_polar",
            "linalg_qr", "linalg_solve_triangular", "geqrf", "ormqr", "lu_unpack", "triangular_solve",
            "cholesky_inverse", "_cholesky_solve_helper",
        )
    )
)  # fmt: skip
def decomposition(t: Tracer, args: Arguments, kwargs: dict[str, Any], out: Any) -> None:
    """Decompositions and their kin need the whole matrix."""
    lock_call(t, call_tensors(args, kwargs), results_of(out), "a matrix decomposition needs all of it")
