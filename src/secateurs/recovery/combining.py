"""Combinations of what layers gave, once a cut has left fewer dimensions for queries and keys, or for values.

The plan says which of a layer's outputs stay. Where these are multiplied with those of another layer, or with
a weight, and nothing else reads them, the two can give the best combinations of all instead; see
`secateurs.recovery.low_rank`. So can all layers that write into a linear stream and read it; see
`secateurs.recovery.streams`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import TypeAlias

import torch
from torch import Tensor, nn

from secateurs.graph.running import Inputs, call_model, device_of
from secateurs.planning.plan import Plan
from secateurs.recovery.both import Both
from secateurs.recovery.factor_search import factors_in
from secateurs.recovery.factors import Factors
from secateurs.recovery.in_parameter import place_in
from secateurs.recovery.kept import Kept, inputs_kept, outputs_kept
from secateurs.recovery.low_rank import LowRank
from secateurs.recovery.points import chain_of
from secateurs.recovery.readers import Reader, Watching
from secateurs.recovery.recording import Recorder
from secateurs.recovery.streams import Stream, StreamRank, streams_in
from secateurs.recovery.writing import as_cut
from secateurs.recovery.written_out import WrittenOut

Place: TypeAlias = tuple[int, bool]  # the call of a layer; whether the columns of its weight are meant
Exchangeable: TypeAlias = Factors | Stream


def exchangeable(
    model: nn.Module,
    plan: Plan,
    inputs: Inputs,
    record: Recorder,
    before: Mapping[str, Tensor],
    *,
    agree: Callable[[bool], bool] = bool,
) -> dict[Exchangeable, dict[Place, Kept]]:
    """The factors and streams that a plan takes dimensions from, and what it leaves in each place.

    Args:
        model: The network before the cut, in evaluation mode.
        plan: The cut.
        inputs: A batch.
        record: A pass of the model on it, with recurrent layers written out.
        before: The model's parameters by name.
        agree: Whether something holds in all processes, for what holds in this one.
    """
    found: dict[Exchangeable, dict[Place, Kept]] = {}
    factors = factors_in(model, inputs, record, agree=agree)
    taken = {place for each in factors for place in each.places}
    every: list[Exchangeable] = [*factors, *streams_in(model, inputs, record, taken, agree=agree)]
    for each in every:
        everywhere = {place: _left(place, plan, record, before) for place in each.places}
        left = {place: kept for place, kept in everywhere.items() if kept is not None}
        if len(left) == len(everywhere):
            sides = zip(each.places, each.sides(), strict=True)
            counts = torch.cat([left[place].mask[factor.channels].sum(1) for place, (factor, _) in sides])
            counts = counts[counts > 0].unique()  # a head may have left as a whole
            if len(counts) == 1 and int(counts) < each.depth:
                found[each] = left
    return found


def _left(place: Place, plan: Plan, record: Recorder, before: Mapping[str, Tensor]) -> Kept | None:
    """What a plan leaves in a place; None where the weight is no parameter, or no rows of one."""
    call, is_weight = place
    reader, find = record.readers[call], inputs_kept if is_weight else outputs_kept
    name = record.name_of(reader.weight)
    return None if name is None else find(reader, plan, name, before[name])


def can_be_refitted(both: Both, found: Exchangeable, left: Mapping[Place, Kept]) -> bool:
    """Whether the layers have what a plan says, with weights, biases and norms of their own."""
    for call, end in found.writers.items() if isinstance(found, Stream) else ():
        norm = chain_of(both.small, call).norm if call in both.small.readers else None
        if (norm is not None) != (end != call):
            return False
    for (call, is_weight), each in left.items():
        whole, small = both.whole.readers[call], both.small.readers.get(call)
        name = None if small is None else both.small.name_of(small.weight)
        if small is None or name is None or place_in(small, both.after[name]) is None:
            return False
        if not is_weight and small.bias is not None and both.small.uses(small.bias) != 1:
            return False
        before, after = list(both.whole.shapes[call]), list(both.small.shapes[call])
        lengths = before.pop(whole.channel), after.pop(small.channel)
        columns = whole.columns // whole.kernel, small.columns // small.kernel
        lengths = columns if is_weight else lengths
        if lengths != (each.count, len(each.indices)) or before != after:
            return False
    return True


def have_combinations(both: Both, left: Mapping[Place, Kept], plan: Plan) -> bool:
    """Whether layers of the smaller network have other weights than the cut alone would have left.

    Args:
        both: A pass of both networks.
        left: What the plan leaves in each place.
        plan: The cut.
    """
    for call in {call for call, _ in left}:
        whole, small = both.whole.readers[call], both.small.readers.get(call)
        rows, columns = (_left((call, side), plan, both.whole, both.before) for side in (False, True))
        if small is None or rows is None or columns is None:
            return True
        weight = as_cut(small, whole, rows.matrix, columns.matrix)
        if weight.shape != small.weight.shape or not torch.allclose(weight, small.weight):
            return True
    return False


def combinations(
    model: nn.Module,
    found: Mapping[Exchangeable, Mapping[Place, Kept]],
    inputs: Iterable[Inputs],
    record: Recorder,
    add_up: Callable[[Tensor], Tensor],
) -> tuple[dict[Place, Tensor], int]:
    """What each place is to hold: combinations of what was there before the cut, ``(C', C)``.

    Args:
        model: The network before the cut, in evaluation mode.
        found: The factors and streams, and what is left of each.
        inputs: All batches.
        record: The pass of the model whose calls are meant.
        add_up: Gives the sum of a tensor over all processes.

    Returns:
        The combinations, and the bytes that the sums took.
    """
    device = device_of(model)
    ranks = {
        each: StreamRank(each, device) if isinstance(each, Stream) else LowRank(each, device)
        for each in found
    }

    def see(call: int, reader: Reader, result: Tensor) -> None:
        for rank in ranks.values():
            rank.see(call, reader, result)

    for batch in inputs if ranks else ():
        numbers = record.numbers_in(model, batch)
        with torch.no_grad(), Watching(see, numbers), WrittenOut():
            call_model(model, batch)
    mixes: dict[Place, Tensor] = {}
    for each, left in found.items():
        rank = ranks[each]
        for sums in rank.sums:
            sums.copy_(add_up(sums))
        place, (factor, _) = each.places[0], next(each.sides())
        count = int(left[place].mask[factor.channels].sum(1).max())
        for place, (factor, parts), best in zip(
            each.places, each.sides(), rank.combinations(count), strict=True
        ):
            own = left[place]
            mix = mixes.setdefault(place, own.matrix)
            rows = own.mask.cumsum(0) - 1
            for channels, part in zip(factor.channels, parts, strict=True):
                places = rows[channels[own.mask[channels]]]
                if not len(places):  # the head is gone
                    continue
                mix[places] = 0
                mix[places[:, None], channels] = best[part].T.cpu() * own.factors[places, None]
    return mixes, sum(sums.nbytes for rank in ranks.values() for sums in rank.sums)
