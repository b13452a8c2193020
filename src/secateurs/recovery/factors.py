"""Products of what two layers give, such as queries and keys: which of their outputs are multiplied.

The results of ``Q K'`` say nothing of the ``d`` dimensions that they sum over: with any invertible ``T`` the
factors ``Q T`` and ``K inv(T)'`` give the same. So what a layer gives there can be exchanged for other
combinations of its outputs, if nothing else reads them (`secateurs.recovery.low_rank`).

Which output of which layer ends up in which place of a product is seen by putting numbers in their place, as
`secateurs.recovery.moves` does; and that nothing else reads them by such an exchange, which must not change
what the model gives.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from secateurs.graph.calls import is_numbered
from secateurs.graph.packed import call_tensors, tensors_in
from secateurs.graph.running import Inputs, call_model
from secateurs.recovery.readers import Reader, Watching
from secateurs.recovery.recording import Recorder
from secateurs.recovery.recurrence import RecurrenceWrittenOut

_PRODUCTS = {  # the places of the factors, and whether the second has what is summed over last but one
    **dict.fromkeys(("matmul", "__matmul__", "bmm"), (0, 1, True)),
    "baddbmm": (1, 2, True),
    "scaled_dot_product_attention": (0, 1, False),
}
_WIDE = (torch.float32, torch.float64)  # in which the numbers of all outputs are told apart
_NEAR = 0.05  # by which a number that was moved and scaled may miss a whole one
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
    """A call that multiplies what two layers give.

    Args:
        call: Its number in the forward pass, with recurrent layers written out.
        first: Where the first factor comes from.
        second: Where the second comes from.
        heads: ``(pairs, 2)``: which head of the first meets which of the second.
        is_softened: Whether what all rows of the second have in common is of no matter, as where a softmax
            takes the results.
    """

    call: int
    first: Factor
    second: Factor
    heads: Tensor
    is_softened: bool = False

    @property
    def depth(self) -> int:
        """Length of the dimension that is summed over."""
        return int(self.first.channels.shape[1])

    @property
    def parts(self) -> Tensor:
        """``(pairs,)`` numbers: pairs that share a head of either side are of one part."""
        return self.heads[:, int(len(self.second.channels) <= len(self.first.channels))]

    def sides(self) -> Iterator[tuple[Factor, Tensor]]:
        """Both factors, each with the part that its heads are of, ``(heads,)``."""
        for side, factor in enumerate((self.first, self.second)):
            part = torch.empty(len(factor.channels), dtype=torch.long)
            part[self.heads[:, side]] = self.parts
            yield factor, part


def factors_in(
    model: nn.Module, inputs: Inputs, record: Recorder, *, agree: Callable[[bool], bool] = bool
) -> tuple[Factors, ...]:
    """The products whose dimensions may be exchanged for combinations of them.

    Both factors come of a layer whose weight is used once, by moves and one scale for all; a head of one side
    meets several of the other, or the reverse, not both; and nothing else reads what the layers give there.
    Five passes, and two for each product where they are not all of this kind.

    Args:
        model: The model, in evaluation mode.
        inputs: A batch.
        record: One pass of the model on it, with recurrent layers written out.
        agree: Whether something holds in all processes, for what holds in this one.

    Example:
        >>> class Attention(nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.both = nn.Linear(4, 12)
        ...     def forward(self, x):
        ...         q, k = self.both(x).unflatten(-1, (2, 2, 3)).permute(2, 0, 3, 1, 4)  # (2, N, heads, n, d)
        ...         return (q @ k.mT).softmax(-1)
        >>> net, x = Attention().eval(), torch.randn(5, 7, 4)
        >>> (found,) = factors_in(net, x, Recorder(net, x, written_out=True))
        >>> found.first.channels.tolist(), found.second.channels.tolist(), found.is_softened
        ([[0, 1, 2], [3, 4, 5]], [[6, 7, 8], [9, 10, 11]], True)
    """
    if not _PRODUCTS.keys() & set(record.names):
        return ()
    usable = {
        call: reader
        for call, reader in record.readers.items()
        if reader.groups == 1 and record.uses(reader.weight) == 1 and reader.weight.dtype in _WIDE
    }
    with torch.no_grad():
        found = _on_their_own(_Search(usable).run(model, inputs))
        if not found:
            return ()
        test = _Test(model, inputs, record, agree)
        free = test.passed(found, _other_combinations)
        softened = test.passed(free, _shifted_seconds)
        return tuple(replace(each, is_softened=each in softened) for each in free)


def operands_of(name: str, tensors: Sequence[Tensor]) -> tuple[Tensor, Tensor] | None:
    """Both factors of a call that multiplies, ``(..., n, d)`` and ``(..., m, d)`` with one leading shape.

    Args:
        name: The name of the torch function.
        tensors: What it is given.
    """
    places = _PRODUCTS.get(name)
    if places is None or len(tensors) <= places[1]:
        return None
    first, second = tensors[places[0]], tensors[places[1]]
    if min(first.dim(), second.dim()) < 3 or not first.numel() or not second.numel():
        return None
    second = second.mT if places[2] else second
    if first.dim() > 3 and second.dim() > 3 and first.shape[-3] != second.shape[-3] > 1:
        second = second.repeat_interleave(first.shape[-3] // second.shape[-3], -3)  # heads that share keys
    whole = torch.broadcast_shapes(first.shape[:-2], second.shape[:-2])
    return first.expand(*whole, *first.shape[-2:]), second.expand(*whole, *second.shape[-2:])


class _Exchanging(Watching):
    """A pass in which layers give something else, and which shows what is multiplied."""

    def __init__(
        self,
        exchange: Callable[[int, Reader, Tensor], Tensor | None],
        meet: Callable[[int, Tensor, Tensor], None] | None = None,
    ) -> None:
        super().__init__(exchange)
        self._meet = meet

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if self._meet is not None and is_numbered(func):
            both = operands_of(getattr(func, "__name__", ""), call_tensors(args, kwargs or {}))
            if both is not None:
                self._meet(self._call, *both)
        return super().__torch_function__(func, types, args, kwargs)


class _Search:
    """Finds the products both of whose factors are outputs of some layers, moved and scaled.

    In a first pass the layers give ones, which shows the scales; in a second each output its own number.

    Args:
        usable: The layers' calls.
    """

    def __init__(self, usable: Mapping[int, Reader]) -> None:
        self.found: list[Factors] = []
        self._scales: dict[tuple[int, int], float] = {}
        self._starts: dict[int, int] = {}
        self._count = 1  # so that no output is a zero
        for call, reader in usable.items():
            self._starts[call] = self._count
            self._count += reader.outputs

    def run(self, model: nn.Module, inputs: Inputs) -> list[Factors]:
        """Both passes; a model that cannot be run with such values has no products that are found."""
        try:
            for exchange, meet in ((self._ones, self._see_scales), (self._numbers, self._see_numbers)):
                with _Exchanging(exchange, meet), RecurrenceWrittenOut():
                    call_model(model, inputs)
        except Exception:  # it looks up what a layer gave as an index, or checks it
            return []
        return self.found

    def _ones(self, call: int, reader: Reader, result: Tensor) -> Tensor | None:
        return torch.ones_like(result) if call in self._starts else None

    def _numbers(self, call: int, reader: Reader, result: Tensor) -> Tensor | None:
        if call not in self._starts:
            return None
        numbers = (self._starts[call] + torch.arange(reader.outputs)).to(result)
        along = numbers.view(-1, *[1] * (-1 - reader.channel))
        return along.expand_as(result).clone()  # the model may change it in place

    def _see_scales(self, call: int, *factors: Tensor) -> None:
        for side, factor in enumerate(factors):
            one = float(factor.flatten()[0])
            if one and bool(((factor - one).abs() <= _EVEN * abs(one)).all()):
                self._scales[call, side] = one

    def _see_numbers(self, call: int, *factors: Tensor) -> None:
        sides = [
            self._heads_of(factor, self._scales.get((call, side))) for side, factor in enumerate(factors)
        ]
        first, second = sides
        if first is None or second is None:
            return
        pairs = torch.stack([first[1], second[1]], 1).unique(dim=0)
        if len(pairs) in (len(first[0].channels), len(second[0].channels)):
            self.found.append(Factors(call=call, first=first[0], second=second[0], heads=pairs))

    def _heads_of(self, factor: Tensor, scale: float | None) -> tuple[Factor, Tensor] | None:
        """Where a factor comes from, and the head of each of its matrices; None if from no single layer."""
        if scale is None:
            return None
        seen = factor.double() / scale  # (..., n, d)
        numbers = seen.round()
        is_moved = bool(((seen - numbers).abs() <= _NEAR).all()) and bool(
            (numbers == numbers[..., :1, :]).all()
        )
        if not is_moved or not 1 <= float(numbers.min()) <= float(numbers.max()) < self._count:
            return None
        rows = numbers[..., 0, :].long().cpu().flatten(0, -2)
        heads, of_entries = rows.unique(dim=0, return_inverse=True)
        calls, starts = (torch.tensor([*each]) for each in (self._starts.keys(), self._starts.values()))
        layer = torch.searchsorted(starts, heads, right=True) - 1
        if bool((layer != layer[0, 0]).any()):
            return None
        return Factor(int(calls[layer[0, 0]]), heads - starts[layer[0, 0]]), of_entries


def _on_their_own(found: Sequence[Factors]) -> list[Factors]:
    """The products of outputs that no other head takes."""
    taken: Counter[tuple[int, int]] = Counter()
    for each in found:
        for factor, _ in each.sides():
            taken.update((factor.call, channel) for channel in factor.channels.flatten().tolist())
    return [
        each
        for each in found
        if all(
            taken[factor.call, channel] == 1
            for factor, _ in each.sides()
            for channel in factor.channels.flatten().tolist()
        )
    ]


_Exchange: TypeAlias = Callable[[Tensor], Tensor]  # of a layer's outputs, ``(..., C)``


class _Test:
    """Whether outputs stay as they are where layers give something else for some products."""

    def __init__(
        self, model: nn.Module, inputs: Inputs, record: Recorder, agree: Callable[[bool], bool]
    ) -> None:
        self._model, self._inputs, self._record, self._agree = model, inputs, record, agree
        self._wanted = tensors_in(call_model(model, inputs))

    def passed(
        self, found: list[Factors], exchanges: Callable[[Factors, Recorder], dict[int, _Exchange]]
    ) -> list[Factors]:
        """The products for which they do; they are tried together first."""

        def does(some: list[Factors]) -> bool:
            return self._agree(self._is_the_same([exchanges(each, self._record) for each in some]))

        return found if not found or does(found) else [each for each in found if does([each])]

    def _is_the_same(self, exchanges: Sequence[Mapping[int, _Exchange]]) -> bool:
        def exchange(call: int, reader: Reader, result: Tensor) -> Tensor | None:
            own = [each[call] for each in exchanges if call in each]
            values = result.movedim(reader.channel, -1).double()
            for each in own:
                values = each(values)
            return values.to(result.dtype).movedim(-1, reader.channel) if own else None

        with _Exchanging(exchange), RecurrenceWrittenOut():
            given = tensors_in(call_model(self._model, self._inputs))
        return len(given) == len(self._wanted) and all(
            one.shape == other.shape and bool((one - other).abs().max() <= _SAME * other.abs().max())
            for one, other in zip(given, self._wanted, strict=True)
            if other.is_floating_point() and other.numel()
        )


def _other_combinations(found: Factors, record: Recorder) -> dict[int, _Exchange]:
    """Both layers give other factors of the same products."""
    mixes: dict[int, Tensor] = {}
    turns = _any_turns(int(found.parts.max()) + 1, found.depth)
    for (factor, part), turn in zip(found.sides(), (turns, torch.linalg.inv(turns).mT), strict=True):
        count = record.readers[factor.call].outputs
        mix = mixes.setdefault(factor.call, torch.eye(count, dtype=turn.dtype))
        for channels, number in zip(factor.channels, part, strict=True):
            mix[channels[:, None], channels] = turn[number]
    return {call: partial(_mixed, mix) for call, mix in mixes.items()}


def _mixed(mix: Tensor, values: Tensor) -> Tensor:
    given: Tensor = values @ mix.to(values)
    return given


def _shifted_seconds(found: Factors, record: Recorder) -> dict[int, _Exchange]:
    """Something is added to all rows of the second factor."""
    shift = torch.zeros(record.readers[found.second.call].outputs, dtype=torch.float64)
    shift[found.second.channels] = (
        torch.linspace(-1, 1, found.second.channels.numel()).double().view_as(found.second.channels)
    )
    return {found.second.call: lambda values: values + shift.to(values) * values.std()}


def _any_turns(count: int, depth: int) -> Tensor:
    """``(count, depth, depth)`` invertible matrices that stretch by a half to two."""
    chance = torch.Generator().manual_seed(0)
    given = torch.randn(count, depth, depth, generator=chance, dtype=torch.float64)
    left, _, right = torch.linalg.svd(given)
    turns: Tensor = left @ torch.linspace(0.5, 2.0, depth, dtype=torch.float64).diag() @ right
    return turns
