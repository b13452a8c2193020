"""What layers give for products, such as queries and keys, once a cut has left fewer dimensions for them.

The plan says which of a layer's outputs stay. Where they are multiplied with those of another layer, and
nothing else reads them, the two can give the best combinations of all instead; see
`secateurs.recovery.low_rank`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from secateurs.graph.running import Inputs, call_model, device_of
from secateurs.planning.plan import Plan
from secateurs.recovery.factors import Factors, factors_in
from secateurs.recovery.layout import Both, outputs_left
from secateurs.recovery.low_rank import LowRank
from secateurs.recovery.readers import Reader, Watching, place_in
from secateurs.recovery.recording import Recorder
from secateurs.recovery.recurrence import RecurrenceWrittenOut


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Outputs:
    """What of a layer's outputs a plan leaves.

    Args:
        kept: ``(C',)`` indices of those that stay.
        factors: ``(C',)`` what the cut multiplied them by.
        count: ``C``: how many there were.
    """

    kept: Tensor
    factors: Tensor
    count: int

    @property
    def mask(self) -> Tensor:
        """``(C,)``: whether an output stays."""
        mask = torch.zeros(self.count, dtype=torch.bool)
        mask[self.kept] = True
        return mask


def exchangeable(
    model: nn.Module,
    plan: Plan,
    inputs: Inputs,
    record: Recorder,
    before: Mapping[str, Tensor],
    *,
    agree: Callable[[bool], bool] = bool,
) -> dict[Factors, dict[int, Outputs]]:
    """The products that a plan takes dimensions from, and what it leaves of the two layers' outputs.

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
        outputs = {}
        for factor, _ in factors.sides():
            reader = record.readers[factor.call]
            name = record.name_of(reader.weight)
            place = None if name is None else place_in(reader, before[name])
            if name is not None and place is not None:
                _, dim, first = place
                kept, scales = outputs_left(reader, plan, name, before[name].shape[dim], dim, first)
                outputs[factor.call] = Outputs(kept=kept, factors=scales, count=reader.outputs)
        if all(factor.call in outputs for factor, _ in factors.sides()):
            counts = (outputs[factor.call].mask[factor.channels].sum(1) for factor, _ in factors.sides())
            left = torch.cat([*counts]).unique()
            if len(left) == 1 and 0 < int(left) < factors.depth:
                found[factors] = outputs
    return found


def can_be_refitted(both: Both, outputs: Mapping[int, Outputs]) -> bool:
    """Whether the layers of a product give what a plan says, with weights and biases of their own."""
    for call, each in outputs.items():
        whole, small = both.whole.readers[call], both.small.readers.get(call)
        name = None if small is None else both.small.name_of(small.weight)
        if small is None or name is None or place_in(small, both.after[name]) is None:
            return False
        if small.bias is not None and both.small.uses(small.bias) != 1:
            return False
        before, after = list(both.whole.shapes[call]), list(both.small.shapes[call])
        lengths = before.pop(whole.channel), after.pop(small.channel)
        if lengths != (each.count, len(each.kept)) or before != after:
            return False
    return True


def combinations(
    model: nn.Module,
    found: Mapping[Factors, Mapping[int, Outputs]],
    inputs: Iterable[Inputs],
    add_up: Callable[[Tensor], Tensor],
) -> dict[int, Tensor]:
    """What each layer is to give: combinations of its outputs before the cut, ``(C', C)``, by its call.

    Args:
        model: The network before the cut, in evaluation mode.
        found: The products, and what is left of the layers' outputs.
        inputs: All batches.
        add_up: Gives the sum of a tensor over all processes.
    """
    ranks = {factors: LowRank(factors, device_of(model)) for factors in found}

    def see(call: int, reader: Reader, result: Tensor) -> None:
        for rank in ranks.values():
            rank.see(call, reader, result)

    for batch in inputs if ranks else ():
        with torch.no_grad(), Watching(see), RecurrenceWrittenOut():
            call_model(model, batch)
    mixes: dict[int, Tensor] = {}
    for factors, outputs in found.items():
        rank = ranks[factors]
        for each in rank.sums:
            each.copy_(add_up(each))
        kept = next(iter(factors.sides()))[0]
        left = int(outputs[kept.call].mask[kept.channels[0]].sum())
        for (factor, parts), best in zip(factors.sides(), rank.combinations(left), strict=True):
            own = outputs[factor.call]
            mix = mixes.setdefault(factor.call, _as_planned(own))
            rows = own.mask.cumsum(0) - 1
            for channels, part in zip(factor.channels, parts, strict=True):
                places = rows[channels[own.mask[channels]]]
                mix[places] = 0
                mix[places[:, None], channels] = best[part].T.cpu() * own.factors[places, None]
    return mixes


def _as_planned(outputs: Outputs) -> Tensor:
    """The outputs that stay, each for itself."""
    mix = torch.zeros(len(outputs.kept), outputs.count, dtype=torch.float64)
    mix[torch.arange(len(outputs.kept)), outputs.kept] = outputs.factors
    return mix
