"""From the calls that a trace noted to what they read: which units lie in which dimension."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from secateurs.graph.groups import NO_UNIT, Indices, UnitProduct, UnitRead
from secateurs.graph.labels import Dim
from secateurs.graph.products import PRODUCTS
from secateurs.graph.records import Read
from secateurs.graph.tracing import Tracer


def unit_reads(
    noted: Sequence[Read], unit_factors: Callable[[Dim], tuple[Indices, ...]], count: int, *, batch: int = 0
) -> tuple[UnitRead, ...]:
    """The dimensions of activations that calls sum over, with their units.

    Args:
        noted: The calls.
        unit_factors: Gives the unit numbers of a dimension.
        count: How many units there are.
        batch: How many examples the trace was given. Activations of ``(N, units)`` or ``(N, units, places)``
            have them first, as rows and images do.
    """
    found = []
    for read in noted:
        wanted = np.zeros(count + 1, np.bool_)
        for dim in read.contracted:
            for factor in unit_factors(dim):
                wanted[factor] = True
        wanted[NO_UNIT] = False
        for axis, dim in enumerate(read.dims):
            for factor in unit_factors(dim):
                if wanted[factor].any():
                    first = axis == 1 and read.dims[0].size == batch
                    found.append(
                        UnitRead(
                            call=read.call,
                            argument=read.argument,
                            dim=axis,
                            units=factor,
                            examples_first=first,
                        )
                    )
    return tuple(found)


def unit_products(
    tracer: Tracer, unit_factors: Callable[[Dim], tuple[Indices, ...]], count: int
) -> tuple[UnitProduct, ...]:
    """The calls that multiply activations whose units lie where calls of their kind have them.

    Args:
        tracer: The finished trace.
        unit_factors: Gives the unit numbers of a dimension.
        count: How many units there are.
    """
    dims = {(read.call, read.argument): len(read.dims) for read in tracer.products}
    summed = {read.call: {dim.size for dim in read.contracted} for read in tracer.products}
    by_call: dict[int, list[UnitRead]] = {}
    for read in unit_reads(tracer.products, unit_factors, count):
        by_call.setdefault(read.call, []).append(read)
    found = []
    for call, reads in by_call.items():
        name = tracer.called[call].name
        if name in PRODUCTS:  # positions that are learned tokens may be summed over in the same call
            first, second, is_turned = PRODUCTS[name]
            usual = {(first, -1), (second, -2 if is_turned else -1)}
            reads = [
                read
                for read in reads
                if dims[call, read.argument] >= 2
                and (read.argument, read.dim - dims[call, read.argument]) in usual
            ]
        elif name != "einsum" or summed[call] != {len(reads[0].units)}:
            continue
        if len(reads) == 2 and np.array_equal(reads[0].units, reads[1].units):
            found.append(UnitProduct(call=call, units=reads[0].units))
    return tuple(found)
