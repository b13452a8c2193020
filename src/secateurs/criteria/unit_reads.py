"""Which calls of a pass read units with weights that could be refitted, and which groups none reads."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import nn

from secateurs.criteria.readings import scoring_mode
from secateurs.errors import UnrankedError
from secateurs.graph.groups import NO_UNIT, Graph, Group, UnitProduct, UnitRead
from secateurs.recovery.readers import Reader
from secateurs.recovery.recording import Recorder


def unrankable(
    model: nn.Module, graph: Graph, inputs: Any, data: Iterable[Any] = ()
) -> dict[str, UnrankedError]:
    """The groups that have units which no understood call reads, and why; from one forward pass.

    Args:
        model: The model.
        graph: Its graph.
        inputs: What it is called on; a tensor, or a tuple or dictionary of arguments.
        data: Such inputs as it will be ranked on. A network that chooses by its activations runs on them too:
            what none of them comes to, such as an expert without a row, cannot be ranked either.
    """
    with scoring_mode(model, gradients=False), torch.no_grad():
        recorder = Recorder(model, inputs, written_out=True)
        unseen = reads_of(graph, recorder, _in_trace(model, graph, inputs, recorder)).unseen
        reached = set[int]()
        for batch in data if recorder.choices else ():
            reached |= _reached(model, graph, batch)
    found = {}
    for group in graph.groups:
        strange = next((read for read in unseen if has_units(read, group)), None)
        each: list[UnitRead | UnitProduct] = [*graph.reads, *graph.products]
        calls = {one.call for one in each if has_units(one, group)}
        if strange is not None or not calls:
            found[group.name] = not_understood(group, None if strange is None else strange.call)
        elif reached and reached.isdisjoint(calls):
            found[group.name] = not_reached(group, None)
    return found


def _in_trace(model: nn.Module, graph: Graph, inputs: Any, recorder: Recorder) -> list[int]:
    """The numbers that the calls of a recorded pass have in the trace."""
    way = graph.numbers_in(model, inputs)
    return recorder.plain if way is None else [way[plain] for plain in recorder.plain]


def _reached(model: nn.Module, graph: Graph, inputs: Any) -> set[int]:
    """The calls of the trace that a pass makes on at least one position."""
    recorder = Recorder(model, inputs, written_out=True)
    in_trace = _in_trace(model, graph, inputs, recorder)
    return {in_trace[call] for call, shape in recorder.shapes.items() if shape.numel()}


@dataclass(frozen=True, slots=True)
class Reads:
    """The reads of units, as far as they are understood.

    Args:
        of_calls: Those of each reader, by its number where recurrent layers are written out.
        unseen: Those of calls that are no readers, or read along other dimensions.
    """

    of_calls: Mapping[int, Sequence[UnitRead]]
    unseen: Sequence[UnitRead]


def reads_of(graph: Graph, recorder: Recorder, in_trace: Sequence[int]) -> Reads:
    """Tell which readers of a pass are the reads of a graph.

    Args:
        graph: The graph.
        recorder: One pass of its model, with recurrent layers written out.
        in_trace: The numbers of its calls in the trace.
    """
    by_call: dict[int, list[UnitRead]] = {}
    for read in graph.reads:
        by_call.setdefault(read.call, []).append(read)
    parts = Counter(in_trace)
    products = {in_trace[number] for number in recorder.units}
    layers = {call for call in by_call if parts[call] > 1 and call not in products}
    seen = {read for call in layers for read in by_call[call] if read.argument}  # else the state is constant
    found: dict[int, list[UnitRead]] = {}
    for number, reader in recorder.readers.items():
        call = in_trace[number]
        reads = by_call.get(call, [])
        if number in recorder.units:
            of_call = _of_product(reads, recorder.units[number], reader.groups)
            seen.update(each for each in reads if each.dim in recorder.units[number])
        elif call in layers:
            one = _of_layer(reads, reader, of_inputs=recorder.reads_inputs(number))
            of_call = [] if one is None else [one]
            seen.update(each for each in reads if not each.argument)
        else:
            of_call = [read for read in reads if _along(read, reader)]
            seen.update(of_call)
        if of_call:
            found[number] = of_call
    return Reads(found, [read for read in graph.reads if read not in seen])


def _of_layer(reads: Sequence[UnitRead], reader: Reader, *, of_inputs: bool) -> UnitRead | None:
    """What a reader inside of a recurrent layer reads.

    The units of its states are those that the layer, one call of the graph, reads in the state before the
    first step. A later level reads those of all directions of the level below.

    Args:
        reads: The reads of the layer's call.
        reader: The reader.
        of_inputs: Whether it reads the inputs of the layer, and not its states.
    """
    read = next((read for read in reads if (read.argument == 0) == of_inputs), None)
    if read is None or of_inputs:
        return read
    units = np.tile(read.units, reader.columns // len(read.units))
    return replace(read, units=units, dim=reader.source.dim() - 1)


def _of_product(
    reads: Sequence[UnitRead], units: Mapping[int, tuple[int, int]], groups: int
) -> list[UnitRead]:
    """What the columns of a product read whose weight has more than two dimensions.

    Args:
        reads: The reads of the call.
        units: For each dimension that it sums over its length, and how far apart its indices are.
        groups: Matrices that read the same units each.
    """
    columns = np.arange(groups * math.prod(length for length, _ in units.values()))
    found = []
    for read in reads:
        if read.dim in units:
            length, apart = units[read.dim]
            found.append(replace(read, units=read.units[columns // apart % length]))
    return found


def _along(read: UnitRead, reader: Reader) -> bool:
    """Whether a reader sums over the dimension in which the units lie."""
    return read.dim == reader.source.dim() + reader.source_dim and (
        len(read.units) == reader.source.shape[-1 - len(reader.windows)]
    )


def has_units(read: UnitRead | UnitProduct, group: Group) -> bool:
    """Whether any of the units that are read are of a group."""
    units = read.units[read.units != NO_UNIT]
    return bool(((units >= group.first) & (units < group.first + group.size)).any())


def not_reached(group: Group, call: int | None) -> UnrankedError:
    """No example comes to the call that reads a group's units, or to any."""
    return UnrankedError(
        f"none of the examples comes to the weights that read the units of group {group.name!r}",
        where=_where(group, call),
        fix=f"give more examples, plan with skip=[{group.name!r}], or use a criterion such as 'l2'",
    )


def not_understood(group: Group, call: int | None) -> UnrankedError:
    """The call that reads a group's units is none of a layer, or there is none."""
    return UnrankedError(
        f"reconstruction needs weights that read the units of group {group.name!r} in a linear layer, "
        "a convolution or a product with a matrix, and there are none",
        where=_where(group, call),
        fix=f"plan with skip=[{group.name!r}], or use a criterion such as 'l2' or 'taylor'",
    )


def _where(group: Group, call: int | None) -> str:
    """The call; without one the parameters that hold the units."""
    if call is not None:
        return f"torch function call {call} of the forward pass"
    return ", ".join(part.parameter for part in group.slices)
