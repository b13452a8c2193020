"""Dimensions that a network sums over and nothing else looks at, as those of queries and keys, or of values.

The results of ``Q K'`` say nothing of the ``d`` dimensions that they sum over: with any invertible ``T`` the
factors ``Q T`` and ``K inv(T)'`` give the same. So what layers give there can be exchanged for other
combinations of it (`secateurs.recovery.low_rank`). ``Q`` and ``K`` may be what two layers give; or ``Q`` what
one gives, averaged over positions as attention does with values, and ``K`` the weight that reads it.

Which output of which layer ends up in which place is seen by putting numbers in their place, as
`secateurs.recovery.moves` does; and that nothing else reads them by such an exchange, which must not change
what the model gives.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from math import isfinite
from typing import Any

import torch
from torch import Tensor, nn

from secateurs.graph.calls import is_numbered
from secateurs.graph.einsum import factors_of
from secateurs.graph.packed import call_tensors, tensors_in
from secateurs.graph.running import Inputs, call_model
from secateurs.recovery.passes import exchanged
from secateurs.recovery.readers import Reader, Watching, reader_of
from secateurs.recovery.recording import Recorder
from secateurs.recovery.recurrence import RecurrenceWrittenOut

_PRODUCTS = {  # the places of the factors, and whether the second has what is summed over last but one
    **dict.fromkeys(("matmul", "__matmul__", "mm", "bmm"), (0, 1, True)),
    "baddbmm": (1, 2, True),
    "scaled_dot_product_attention": (0, 1, False),
}
_FIRST, _SECOND, _READ = range(3)  # and from there on what may be averaged
_WIDE = (torch.float32, torch.float64)  # in which numbers of outputs are told apart
_NEAR = 0.05  # by which a number that was moved, scaled and averaged may miss a whole one
_EVEN = 1e-4  # by which what should be one number for all may differ, as a share of it
_SAME = 1e-4  # by which outputs may differ, as a share of the largest


@dataclass(frozen=True, slots=True, eq=False)
class Factor:
    """One side of the products of a call.

    Args:
        call: Number of the call of the layer that gives it.
        channels: ``(heads, d)``: which of the layer's outputs each head takes.
    """

    call: int
    channels: Tensor


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Factors:
    """Where what one layer gives is multiplied with what another gives, or with the weight of another.

    Args:
        call: Number of the call that multiplies, with recurrent layers written out.
        first: The layer that gives the first factor.
        second: The layer that gives the second; or that has it, and `channels` are columns of its weight.
        heads: ``(pairs, 2)``: which head of the first meets which of the second.
        is_read: Whether the second is a weight.
        is_centred: Whether it is no matter what all rows of one factor have in common: of the second, where a
            softmax takes the results; of the first, where the layer that reads it has a bias.
    """

    call: int
    first: Factor
    second: Factor
    heads: Tensor
    is_read: bool = False
    is_centred: bool = False

    @property
    def depth(self) -> int:
        """Length of the dimension that is summed over."""
        return int(self.first.channels.shape[1])

    @property
    def parts(self) -> Tensor:
        """``(pairs,)`` numbers: pairs that share a head of either side are of one part."""
        return self.heads[:, int(len(self.second.channels) <= len(self.first.channels))]

    @property
    def places(self) -> tuple[tuple[int, bool], tuple[int, bool]]:
        """For both factors the call of the layer, and whether the factor is its weight."""
        return (self.first.call, False), (self.second.call, self.is_read)

    def sides(self) -> Iterator[tuple[Factor, Tensor]]:
        """Both factors, each with the part that its heads are of, ``(heads,)``."""
        for side, factor in enumerate((self.first, self.second)):
            part = torch.empty(len(factor.channels), dtype=torch.long)
            part[self.heads[:, side]] = self.parts
            yield factor, part


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
    usable = {
        call: reader
        for call, reader in record.readers.items()
        if reader.groups == 1 and record.uses(reader.weight) == 1 and reader.weight.dtype in _WIDE
    }
    if not usable:
        return ()
    with torch.no_grad():
        found = _on_their_own(_Search(usable).run(model, inputs))
        if not found:
            return ()
        test = _Test(model, inputs, record, agree)
        free = test.passed(found, _other_combinations)
        softened = test.passed([each for each in free if not each.is_read], _shifted_seconds)
        biased = [each for each in free if each.is_read and record.readers[each.call].bias is not None]
        return tuple(replace(each, is_centred=each in softened or each in biased) for each in free)


def operands_of(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Tensor, Tensor] | None:
    """Both factors of a call that multiplies, ``(..., n, d)`` and ``(..., m, d)`` with one leading shape.

    Args:
        func: The torch function.
        args: Its positional arguments.
        kwargs: Its arguments by name.

    Example:
        >>> one, other = operands_of(torch.matmul, (torch.zeros(2, 3, 4), torch.zeros(4, 5)), {})
        >>> one.shape, other.shape
        (torch.Size([2, 3, 4]), torch.Size([2, 5, 4]))
    """
    name = getattr(func, "__name__", "")
    if name == "einsum":
        both = factors_of(args) if not kwargs else None
        if both is None:
            return None
        first, second = both
    elif name in _PRODUCTS:
        tensors, (one, other, is_turned) = call_tensors(args, kwargs), _PRODUCTS[name]
        if len(tensors) <= other or min(tensors[one].dim(), tensors[other].dim()) < 2:
            return None
        first, second = tensors[one], tensors[other].mT if is_turned else tensors[other]
    else:
        return None
    if not first.numel() or not second.numel():
        return None
    if first.dim() > 3 and second.dim() > 3 and first.shape[-3] != second.shape[-3] > 1:
        second = second.repeat_interleave(first.shape[-3] // second.shape[-3], -3)  # heads that share keys
    whole = torch.broadcast_shapes(first.shape[:-2], second.shape[:-2]) or (1,)
    return first.expand(*whole, *first.shape[-2:]), second.expand(*whole, *second.shape[-2:])


def _averaged(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Iterator[Tensor]:
    """What a call may average over positions, ``(..., m, d)``."""
    if getattr(func, "__name__", "") == "scaled_dot_product_attention":
        tensors = call_tensors(args, kwargs)
        if len(tensors) > 2 and tensors[2].dim() > 2 and tensors[2].numel():
            yield tensors[2]
    elif (both := operands_of(func, args, kwargs)) is not None:
        yield from (each.mT for each in reversed(both))


class _Exchanging(Watching):
    """A pass in which layers give or weigh something else, and which shows what is multiplied."""

    def __init__(
        self,
        exchange: Callable[[int, Reader, Tensor], Tensor | None],
        *,
        meet: Callable[[int, int, Tensor], None] | None = None,
        columns: Mapping[int, Tensor] | None = None,
    ) -> None:
        super().__init__(exchange)
        self._meet, self._columns = meet, columns or {}

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if self._meet is not None and is_numbered(func):
            for side, factor in enumerate(operands_of(func, args, kwargs) or ()):
                self._meet(self._call, side, factor)
            for side, values in enumerate(_averaged(func, args, kwargs), _READ + 1):
                self._meet(self._call, side, values)
        mix = self._columns.get(self._call) if is_numbered(func) else None
        reader = None if mix is None else reader_of(func, args, kwargs)
        if reader is not None and mix is not None:
            weight = (reader.matrix().double() @ mix.to(reader.weight.device)).to(reader.weight.dtype)
            args, kwargs = exchanged(args, kwargs, {id(reader.weight): reader.unfolded(weight)})
        return super().__torch_function__(func, types, args, kwargs)


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
                with _Exchanging(partial(self._exchange, give, meet), meet=meet), RecurrenceWrittenOut():
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
        if reader.kernel == 1 and not reader.stretch and reader.source.numel() and reader.source.dim() > 1:
            meet(call, _READ, reader.source.movedim(-1 - len(reader.windows), -1).flatten(0, -2)[None])
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
            if side > _READ:
                heads.setdefault(self._sources[call, side], []).append(channels.unique(dim=0))
        for (call, side), channels in self._channels.items():
            if side != _READ:
                continue
            source, columns = self._sources[call, side], dict[int, list[int]]()
            for column, channel in enumerate(channels[0].tolist()):
                columns.setdefault(channel, []).append(column)
            alone = torch.tensor([[*columns]])
            averaged = (
                each for each in heads.get(source, ()) if columns.keys() >= {*each.flatten().tolist()}
            )
            given = next(averaged, alone)
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


@dataclass(frozen=True, slots=True)
class _Change:
    """What layers give, or weigh, in place of what they did.

    Args:
        outputs: What is done to a layer's outputs, ``(..., C)``, by its call.
        columns: What a layer's weight, ``(C, K)``, is multiplied by, ``(K, K)``.
    """

    outputs: Mapping[int, Callable[[Tensor], Tensor]]
    columns: Mapping[int, Tensor]


class _Test:
    """Whether the model's outputs stay as they are where layers give something else for some factors."""

    def __init__(
        self, model: nn.Module, inputs: Inputs, record: Recorder, agree: Callable[[bool], bool]
    ) -> None:
        self._model, self._inputs, self._record, self._agree = model, inputs, record, agree
        self._wanted = tensors_in(call_model(model, inputs))

    def passed(self, found: list[Factors], change: Callable[[Factors, Recorder], _Change]) -> list[Factors]:
        """The factors for which they do; all are tried together, and halves where that is too many."""
        if not found or self._agree(self._is_the_same([change(each, self._record) for each in found])):
            return found
        half = len(found) // 2
        return [*self.passed(found[:half], change), *self.passed(found[half:], change)] if half else []

    def _is_the_same(self, changes: Sequence[_Change]) -> bool:
        columns: dict[int, Tensor] = {}
        for change in changes:
            for call, mix in change.columns.items():
                columns[call] = columns[call] @ mix if call in columns else mix

        def exchange(call: int, reader: Reader, result: Tensor) -> Tensor | None:
            own = [change.outputs[call] for change in changes if call in change.outputs]
            values = result.movedim(reader.channel, -1).double()
            for each in own:
                values = each(values)
            return values.to(result.dtype).movedim(-1, reader.channel) if own else None

        with _Exchanging(exchange, columns=columns), RecurrenceWrittenOut():
            given = tensors_in(call_model(self._model, self._inputs))
        return len(given) == len(self._wanted) and all(
            one.shape == other.shape and bool((one - other).abs().max() <= _SAME * other.abs().max())
            for one, other in zip(given, self._wanted, strict=True)
            if other.is_floating_point() and other.numel()
        )


def _other_combinations(found: Factors, record: Recorder) -> _Change:
    """Other factors of the same products."""
    turns = _any_turns(int(found.parts.max()) + 1, found.depth)
    outputs: dict[int, Tensor] = {}
    columns: dict[int, Tensor] = {}
    both = ((outputs, turns), (columns if found.is_read else outputs, torch.linalg.inv(turns).mT))
    for (factor, parts), (mixes, turn) in zip(found.sides(), both, strict=True):
        reader = record.readers[factor.call]
        count = reader.columns if mixes is columns else reader.outputs
        mix = mixes.setdefault(factor.call, torch.eye(count, dtype=turn.dtype))
        for channels, part in zip(factor.channels, parts, strict=True):
            mix[channels[:, None], channels] = turn[part]
    return _Change({call: partial(_mixed, mix) for call, mix in outputs.items()}, columns)


def _mixed(mix: Tensor, values: Tensor) -> Tensor:
    given: Tensor = values @ mix.to(values)
    return given


def _shifted_seconds(found: Factors, record: Recorder) -> _Change:
    """Something is added to all rows of the second factor."""
    channels = found.second.channels
    shift = torch.zeros(record.readers[found.second.call].outputs, dtype=torch.float64)
    shift[channels] = torch.linspace(-1, 1, channels.numel(), dtype=torch.float64).view_as(channels)
    return _Change({found.second.call: lambda values: values + shift.to(values) * values.std()}, {})


def _any_turns(count: int, depth: int) -> Tensor:
    """``(count, depth, depth)`` invertible matrices that stretch by a half to two."""
    chance = torch.Generator().manual_seed(0)
    given = torch.randn(count, depth, depth, generator=chance, dtype=torch.float64)
    left, _, right = torch.linalg.svd(given)
    turns: Tensor = left @ torch.linspace(0.5, 2.0, depth, dtype=torch.float64).diag() @ right
    return turns
