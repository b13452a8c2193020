"""What many rules say: these dimensions are fixed, these meet, these are locked."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from torch import Tensor

from secateurs.graph.labels import Dim
from secateurs.graph.running import source_line
from secateurs.graph.tracing import Tracer


def fixed(tensor: Tensor) -> list[Dim]:
    """Dimensions of a tensor that keep their lengths."""
    return [Dim(int(size)) for size in tensor.shape]


def lock_all(t: Tracer, dims: Iterable[Dim], reason: str) -> None:
    """Lock several dimensions for one reason."""
    for dim in dims:
        t.lock(dim, reason)


def lock_call(t: Tracer, operands: Sequence[Tensor], results: Sequence[Tensor], reason: str) -> None:
    """Lock all dimensions that go into a call and those of its results."""
    known = {id(tensor) for tensor in operands}
    for tensor in operands:
        lock_all(t, t.dims(tensor), reason)
    for result in results:
        if id(result) not in known:
            made = [t.labels.fresh(int(size)) for size in result.shape]
            lock_all(t, made, reason)  # so that what meets them later knows why it is locked
            t.set(result, made)


def refuse(
    t: Tracer, operator: Any, operands: Sequence[Tensor], results: Sequence[Tensor], reason: str
) -> None:
    """Lock all that a call touches, and report its operator as not understood."""
    t.unknown.setdefault(str(operator), source_line())
    lock_call(t, operands, results, reason)


def meet(t: Tracer, dims: Iterable[Dim], size: int) -> Dim:
    """What dimensions become that lie at one place; one of length 1 that is spread out says nothing."""
    met = [dim for dim in dims if dim.size == size]
    if size == 1 or not met:
        return Dim(size)
    chosen = next((dim for dim in met if dim.factors), met[0])
    for dim in met:
        t.unify(chosen, dim)
    return Dim(size, chosen.factors, frozenset().union(*(dim.sources for dim in met)))


def broadcast(t: Tracer, operands: Sequence[Sequence[Dim]], shape: Sequence[int]) -> list[Dim]:
    """The dimensions of operands that are aligned at their ends and spread out to one shape."""
    return [
        meet(t, [dims[place] for dims in operands if len(dims) >= -place], int(shape[place]))
        for place in range(-len(shape), 0)
    ]


def place_of(dim: int, tensor: Tensor) -> int:
    """A dimension argument as a position from the front; 0 for a tensor without dimensions."""
    return int(dim) % max(tensor.dim(), 1)


def without(dims: Sequence[Dim], place: int, result: Tensor) -> list[Dim]:
    """The dimensions of a result in which the one at ``place`` changed its length or vanished."""
    if result.dim() == len(dims):
        return [Dim(int(result.shape[i])) if i == place else dim for i, dim in enumerate(dims)]
    return [dim for i, dim in enumerate(dims) if i != place]
