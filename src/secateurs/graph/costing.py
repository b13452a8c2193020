"""What a finished trace says of costs, in unit numbers: parameters, contractions, the work of each call."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TypeAlias

from secateurs.graph.cost import CallWork, CostModel, Indices, LengthStore, Term, Work
from secateurs.graph.labels import Dim
from secateurs.graph.tracing import Tracer

Factors: TypeAlias = Callable[[Dim], tuple[Indices, ...]]


def costs_of(
    tracer: Tracer,
    shapes: Mapping[str, tuple[int, ...]],
    widths: Mapping[str, int],
    batch: int,
    factors: Factors,
) -> CostModel:
    """Parameters, multiply-accumulates of one sample, and bytes.

    Args:
        tracer: The trace.
        shapes: The shapes of parameters and buffers by name.
        widths: Bytes of a number of each tensor that the ``state_dict`` holds.
        batch: Samples in the example.
        factors: The unit numbers of a dimension.
    """
    trainable: dict[str, list[tuple[int, tuple[Indices, ...]]]] = {}
    for place in tracer.parameter_dims:
        trainable.setdefault(place.parameter, []).append((place.size, factors(place.labels)))
    contractions = [
        (each.multiplier / batch, [(dim.size, factors(dim)) for dim in each.dims])
        for each in tracer.contractions
    ]
    return CostModel.build(trainable, shapes, contractions, tracer.buffers, widths)


def work_of(tracer: Tracer, factors: Factors) -> Work:
    """What each call of a torch function does, of the whole example.

    Args:
        tracer: The trace.
        factors: The unit numbers of a dimension.
    """
    store = LengthStore()
    known: dict[tuple[object, ...], Term] = {}  # most tensors have the dimensions of another one

    def term(fixed: float, dims: Sequence[Dim]) -> Term:
        key = fixed, *(tuple(map(id, dim.factors)) if dim.factors else dim.size for dim in dims)
        if key not in known:
            known[key] = store.term(fixed, [(dim.size, factors(dim)) for dim in dims])
        return known[key]

    calls = tuple(
        CallWork(
            name=call.name,
            macs=tuple(
                term(each.multiplier, each.dims) for each in tracer.contractions[slice(*call.contractions)]
            ),
            values=tuple(term(1.0, dims) for dims in call.tensors),
        )
        for call in tracer.called
    )
    return Work(tuple(store.lengths), calls)
