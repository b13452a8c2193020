"""Finds factors that may be exchanged, with no names: layers give numbers, and where these end up says it.

Which output of which layer is multiplied with what is seen as `secateurs.recovery.moves` sees what a call
moves. That nothing else reads it is proved (`secateurs.recovery.factor_proof`).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from math import isfinite

import torch
from torch import Tensor, nn

from secateurs.graph.running import Inputs, call_model
from secateurs.recovery.factor_proof import (
    READ,
    Exchanging,
    Proof,
    other_combinations,
    own_layers,
    shifted_seconds,
)
from secateurs.recovery.factors import Factor, Factors
from secateurs.recovery.readers import Reader
from secateurs.recovery.recording import Recorder
from secateurs.recovery.written_out import WrittenOut

_FIRST, _SECOND = range(2)
_NEAR = 0.05  # by which a number that was moved, scaled and averaged may miss a whole one
_EVEN = 1e-4  # by which what should be one number for all may differ, as a share of it


def factors_in(
    model: nn.Module, inputs: Inputs, record: Recorder, *, agree: Callable[[bool], bool] = bool
) -> tuple[Factors, ...]:
    """The factors whose dimensions may be exchanged for combinations of them.

    They come of layers whose weights are used once, by moves, averages and one scale for all; a head of one
    side meets several of the other, or the reverse, not both; and nothing else reads what the layers give
    there. Six passes, and more where not all that look so are of this kind.

    Args:
        model: The model, in evaluation mode.
        inputs: A batch.
        record: One pass of the model on it, with recurrent layers written out.
        agree: Whether something holds in all processes, for what holds in this one.

    Example:
        >>> class Attention(nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.qkv, self.out = nn.Linear(4, 18), nn.Linear(6, 4)
        ...     def forward(self, x):
        ...         q, k, v = self.qkv(x).unflatten(-1, (3, 2, 3)).permute(2, 0, 3, 1, 4)
        ...         return self.out(((q @ k.mT).softmax(-1) @ v).transpose(1, 2).flatten(2))
        >>> net, x = Attention().eval(), torch.randn(5, 7, 4)
        >>> keys, values = factors_in(net, x, Recorder(net, x, written_out=True))
        >>> keys.first.channels.tolist(), keys.second.channels.tolist()
        ([[0, 1, 2], [3, 4, 5]], [[6, 7, 8], [9, 10, 11]])
        >>> values.first.channels.tolist(), values.second.channels.tolist(), values.is_read
        ([[12, 13, 14], [15, 16, 17]], [[0, 1, 2], [3, 4, 5]], True)
    """
    usable = own_layers(record)
    if not usable:
        return ()
    with torch.no_grad():
        found = _on_their_own(_Search(usable).run(model, inputs))
        if not found:
            return ()
        proof = Proof(model, inputs, record, agree)
        free = proof.passed(found, other_combinations)
        softened = proof.passed([each for each in free if not each.is_read], shifted_seconds)
        biased = [each for each in free if each.is_read and record.readers[each.call].bias is not None]
        return tuple(replace(each, is_centred=each in softened or each in biased) for each in free)


class _Search:
    """Finds factors that are outputs of some layers, moved, scaled, and averaged over positions.

    In a first pass these layers give -1, which shows the scales; in a second each the number of its layer; in
    a third each output its own number, every other one below zero. No activation lets all of these through.

    Args:
        usable: The layers' calls.
    """

    def __init__(self, usable: Mapping[int, Reader]) -> None:
        self._readers = usable
        self._layers = {call: number for number, call in enumerate(usable, 1)}
        self._scales: dict[tuple[int, int], float] = {}
        self._sources: dict[tuple[int, int], int] = {}
        self._channels: dict[tuple[int, int], Tensor] = {}

    def run(self, model: nn.Module, inputs: Inputs) -> list[Factors]:
        """All passes; a model that cannot be run with such values has no factors that are found."""
        try:
            for give, meet in (
                (lambda call, count: torch.full((count,), -1), self._see_scale),
                (lambda call, count: torch.full((count,), self._layers[call]), self._see_layer),
                (lambda call, count: _signed(torch.arange(count)), self._see_channels),
            ):
                with Exchanging(partial(self._exchange, give, meet), meet=meet), WrittenOut():
                    call_model(model, inputs)
        except Exception:  # it looks up what a layer gave as an index, or checks it
            return []
        return [*self._products(), *self._passages()]

    def _exchange(
        self,
        give: Callable[[int, int], Tensor],
        meet: Callable[[int, int, Tensor], None],
        call: int,
        reader: Reader,
        result: Tensor,
    ) -> Tensor | None:
        if call not in self._layers:
            return None
        if (read := reader.vectors()) is not None:
            meet(call, READ, read[None])
        along = give(call, reader.outputs).to(result).view(-1, *[1] * (-1 - reader.channel))
        return along.expand_as(result).clone()  # the model may change it in place

    def _see_scale(self, call: int, side: int, factor: Tensor) -> None:
        one = float(factor.flatten()[0])
        if one and _is_even(factor, one):
            self._scales[call, side] = -one

    def _see_layer(self, call: int, side: int, factor: Tensor) -> None:
        scale = self._scales.get((call, side))
        first = float(factor.flatten()[0])
        if scale is not None and isfinite(first) and _is_even(factor, first):
            number = round(first / scale)
            if abs(first / scale - number) <= _NEAR and 1 <= number <= len(self._layers):
                self._sources[call, side] = list(self._layers)[number - 1]

    def _see_channels(self, call: int, side: int, factor: Tensor) -> None:
        """Note the outputs of which each matrix of the factor, ``(..., n, d)``, consists."""
        source = self._sources.get((call, side))
        if source is None:
            return
        seen = factor / self._scales[call, side]
        numbers = seen[..., :1, :].round()
        if bool(((seen - numbers).abs() <= _NEAR).all()):
            given = numbers[..., 0, :].long().cpu().flatten(0, -2)  # (entries, d)
            found = given.abs() - 1
            is_sound = torch.equal(_signed(found), given)
            if is_sound and 0 <= int(found.min()) <= int(found.max()) < self._readers[source].outputs:
                self._channels[call, side] = found

    def _products(self) -> Iterator[Factors]:
        """Where what two layers give is multiplied."""
        for call in dict.fromkeys(call for call, _ in self._channels):
            places = [(call, _FIRST), (call, _SECOND)]
            if all(place in self._channels for place in places):
                sides, entries = [], []
                for place in places:
                    heads, of_entries = self._channels[place].unique(dim=0, return_inverse=True)
                    sides.append(Factor(self._sources[place], heads))
                    entries.append(of_entries)
                pairs = torch.stack(entries, 1).unique(dim=0)
                if len(pairs) in (len(sides[0].channels), len(sides[1].channels)):
                    yield Factors(call=call, first=sides[0], second=sides[1], heads=pairs)

    def _passages(self) -> Iterator[Factors]:
        """Where what one layer gives is read by another, as it is or averaged over positions."""
        heads: dict[int, list[Tensor]] = {}
        for (call, side), channels in self._channels.items():
            if side > READ:
                heads.setdefault(self._sources[call, side], []).append(channels.unique(dim=0))
        for (call, side), channels in self._channels.items():
            if side != READ:
                continue
            source, columns = self._sources[call, side], dict[int, list[int]]()
            for column, channel in enumerate(channels[0].tolist()):
                columns.setdefault(channel, []).append(column)
            alone = torch.tensor([[*columns]])
            averaged = [each for each in heads.get(source, ()) if {*each.flatten().tolist()} <= {*columns}]
            given = averaged[0] if averaged else alone
            places = [[columns.get(channel, []) for channel in head] for head in given.tolist()]
            counts = {len(each) for head in places for each in head}
            if len(counts) == 1 and min(counts) > 0:  # several where heads of queries share values
                read = torch.tensor(places).movedim(-1, 1)  # (heads, times, d)
                of_first = torch.arange(len(given)).repeat_interleave(read.shape[1])
                pairs = torch.stack([of_first, torch.arange(len(of_first))], 1)
                first, second = Factor(source, given), Factor(call, read.flatten(0, 1))
                yield Factors(call=call, first=first, second=second, heads=pairs, is_read=True)


def _signed(numbers: Tensor) -> Tensor:
    """1, -2, 3, -4, ... for 0, 1, 2, 3, ..."""
    return (numbers + 1) * (1 - 2 * (numbers % 2))


def _is_even(tensor: Tensor, number: float) -> bool:
    return bool(((tensor - number).abs() <= _EVEN * abs(number)).all())


def _on_their_own(found: Sequence[Factors]) -> list[Factors]:
    """Those of outputs and columns that no others have."""
    taken: Counter[tuple[int, bool, int]] = Counter()
    places = {each: [*_places(each)] for each in found}
    for each in found:
        taken.update(places[each])
    return [each for each in found if all(taken[place] == 1 for place in places[each])]


def _places(found: Factors) -> Iterator[tuple[int, bool, int]]:
    """Call, whether it is a column, and its number."""
    for factor, is_weight in ((found.first, False), (found.second, found.is_read)):
        for channel in factor.channels.flatten().tolist():
            yield factor.call, is_weight, channel
