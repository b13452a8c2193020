"""Combinations of what layers gave, once a cut has left fewer dimensions for queries and keys, or for values.

The plan says which of a layer's outputs stay. Where these are multiplied with those of another layer, or with
a weight, and nothing else reads them, the two can give the best combinations of all instead; see
`secateurs.recovery.low_rank`.
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
from secateurs.recovery.kept import Kept, inputs_kept, outputs_kept
from secateurs.recovery.low_rank import LowRank
from secateurs.recovery.readers import Reader, Watching, place_in
from secateurs.recovery.recording import Recorder
from secateurs.recovery.recurrence import RecurrenceWrittenOut

Place: TypeAlias = tuple[int, bool]  # the call of a layer; whether the columns of its weight are meant


def exchangeable(
    model: nn.Module,
    plan: Plan,
    inputs: Inputs,
    record: Recorder,
    before: Mapping[str, Tensor],
    *,
    agree: Callable[[bool], bool] = bool,
) -> dict[Factors, dict[Place, Kept]]:
    """The factors that a plan takes dimensions from, and what it leaves of both.

    Args:
        model: The network before the cut, in evaluation mode.
        plan: The cut.
        inputs: A batch.
        record: A pass of the model on it, with recurrent layers written out.
        before: The model's parameters by name.
        agree: Whether something holds in all processes, for what holds in this one.
    """
    found = {}
    for factors in factors_in(model, inputs, record, agree=agree):
        both = {place: _left(place, plan, record, before) for place in factors.places}
        left = {place: each for place, each in both.items() if each is not None}
        if len(left) == len(both):
            sides = zip(factors.places, factors.sides(), strict=True)
            counts = torch.cat([left[place].mask[factor.channels].sum(1) for place, (factor, _) in sides])
            counts = counts[counts > 0].unique()  # a head may have left as a whole
            if len(counts) == 1 and int(counts) < factors.depth:
                found[factors] = left
    return found


def _left(place: Place, plan: Plan, record: Recorder, before: Mapping[str, Tensor]) -> Kept | None:
    """What a plan leaves in a place; None where the weight is no parameter, or no rows of one."""
    call, is_weight = place
    reader, find = record.readers[call], inputs_kept if is_weight else outputs_kept
    name = record.name_of(reader.weight)
    return None if name is None else find(reader, plan, name, before[name])


def can_be_refitted(both: Both, left: Mapping[Place, Kept]) -> bool:
    """Whether the layers have what a plan says, with weights and biases of their own."""
    for (call, is_weight), each in left.items():
        whole, small = both.whole.readers[call], both.small.readers.get(call)
        name = None if small is None else both.small.name_of(small.weight)
        if small is None or name is None or place_in(small, both.after[name]) is None:
            return False
        if not is_weight and small.bias is not None and both.small.uses(small.bias) != 1:
            return False
        before, after = list(both.whole.shapes[call]), list(both.small.shapes[call])
        lengths = before.pop(whole.channel), after.pop(small.channel)
        lengths = (whole.columns, small.columns) if is_weight else lengths
        if lengths != (each.count, len(each.indices)) or before != after:
            return False
    return True


def combinations(
    model: nn.Module,
    found: Mapping[Factors, Mapping[Place, Kept]],
    inputs: Iterable[Inputs],
    add_up: Callable[[Tensor], Tensor],
) -> tuple[dict[Place, Tensor], int]:
    """What each place is to hold: combinations of what was there before the cut, ``(C', C)``.

    Args:
        model: The network before the cut, in evaluation mode.
        found: The factors, and what is left of both.
        inputs: All batches.
        add_up: Gives the sum of a tensor over all processes.

    Returns:
        The combinations, and the bytes that the sums took.
    """
    ranks = {factors: LowRank(factors, device_of(model)) for factors in found}

    def see(call: int, reader: Reader, result: Tensor) -> None:
        for rank in ranks.values():
            rank.see(call, reader, result)

    for batch in inputs if ranks else ():
        with torch.no_grad(), Watching(see), RecurrenceWrittenOut():
            call_model(model, batch)
    mixes: dict[Place, Tensor] = {}
    for factors, left in found.items():
        rank = ranks[factors]
        for each in rank.sums:
            each.copy_(add_up(each))
        count = int(left[factors.places[0]].mask[factors.first.channels].sum(1).max())
        sides = zip(factors.places, factors.sides(), rank.combinations(count), strict=True)
        for place, (factor, parts), best in sides:
            own = left[place]
            mix = mixes.setdefault(place, own.matrix)
            rows = own.mask.cumsum(0) - 1
            for channels, part in zip(factor.channels, parts, strict=True):
                places = rows[channels[own.mask[channels]]]
                if not len(places):  # the head is gone
                    continue
                mix[places] = 0
                mix[places[:, None], channels] = best[part].T.cpu() * own.factors[places, None]
    return mixes, sum(each.nbytes for rank in ranks.values() for each in rank.sums)
