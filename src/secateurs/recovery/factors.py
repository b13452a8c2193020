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
from dataclasses import dataclass
from typing import Any

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
_TO_SOFTMAX = frozenset(
    (
        *("mul", "mul_", "__mul__", "__rmul__", "div", "div_", "__truediv__", "add", "add_", "__add__"),
        *("__radd__", "__iadd__", "sub", "__sub__", "masked_fill", "masked_fill_", "where", "to", "float"),
        *("dropout", "contiguous"),
    )
)
_WIDE = (torch.float32, torch.float64)  # in which the numbers of all outputs are told apart
_NEAR = 0.05  # by which a number that was moved and scaled may miss a whole one
_EVEN = 1e-4  # by which what should be one number for all may differ, as a share of it
_SAME = 1e-3  # by which outputs may differ, as a share of the largest


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
        is_softened: Whether a softmax takes the results, which leaves out what a row has in common.
    """

    call: int
    first: Factor
    second: Factor
    heads: Tensor
    is_softened: bool

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
    Three passes, and one for each product where they are not all of this kind.

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
        found = _on_their_own(_located(model, inputs, usable, record))
        if not found or agree(_are_free(model, inputs, record, found)):
            return tuple(found)
        return tuple(each for each in found if agree(_are_free(model, inputs, record, [each])))


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
    if min(first.dim(), second.dim()) < 3:
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


def _located(
    model: nn.Module, inputs: Inputs, usable: Mapping[int, Reader], record: Recorder
) -> list[Factors]:
    """The products both of whose factors are outputs of these layers, moved and scaled."""
    starts, total = {}, 0
    for call, reader in usable.items():
        starts[call], total = total, total + reader.outputs
    calls = torch.tensor(list(usable))
    first_numbers = torch.tensor(list(starts.values()))
    scales: dict[tuple[int, int], float] = {}
    found: list[Factors] = []

    def ones(call: int, reader: Reader, result: Tensor) -> Tensor | None:
        return torch.ones_like(result) if call in usable else None

    def numbers(call: int, reader: Reader, result: Tensor) -> Tensor | None:
        if call not in usable:
            return None
        each = torch.arange(starts[call] + 1, starts[call] + 1 + reader.outputs).to(result)
        return each.view(-1, *[1] * (-1 - reader.channel)).expand_as(result)

    def scaled(call: int, *factors: Tensor) -> None:
        for side, factor in enumerate(factors):
            one = float(factor.flatten()[0])
            if one and bool(((factor - one).abs() <= _EVEN * abs(one)).all()):
                scales[call, side] = one

    def met(call: int, *factors: Tensor) -> None:
        if (call, 0) not in scales or (call, 1) not in scales:
            return
        sides, entries = [], []
        for side, factor in enumerate(factors):
            seen = factor.double() / scales[call, side]  # (..., n, d)
            whole = seen.round()
            is_even = bool((whole == whole[..., :1, :]).all())
            if not is_even or float((seen - whole).abs().max()) > _NEAR or not _within(whole, total):
                return
            rows = whole[..., 0, :].long().cpu() - 1  # (..., d)
            heads, entry = rows.flatten(0, -2).unique(dim=0, return_inverse=True)
            layer = torch.searchsorted(first_numbers, heads, right=True) - 1
            if bool((layer != layer[0, 0]).any()):
                return
            sides.append(Factor(int(calls[layer[0, 0]]), heads - first_numbers[layer[0, 0]]))
            entries.append(entry)
        pairs = torch.stack(entries, 1).unique(dim=0)
        if len(pairs) not in (len(sides[0].channels), len(sides[1].channels)):
            return
        found.append(
            Factors(
                call=call,
                first=sides[0],
                second=sides[1],
                heads=pairs,
                is_softened=_is_softened(record, call),
            )
        )

    for exchange, meet in ((ones, scaled), (numbers, met)):
        with _Exchanging(exchange, meet), RecurrenceWrittenOut():
            call_model(model, inputs)
    return found


def _within(numbers: Tensor, total: int) -> bool:
    return bool((numbers >= 1).all()) and bool((numbers <= total).all())


def _is_softened(record: Recorder, call: int) -> bool:
    """Whether a softmax takes the results; they may be scaled, masked, and have something added."""
    while record.names[call] != "scaled_dot_product_attention":
        readers = record.read_by.get(call, [])
        if len(readers) != 1 or readers[0] < 0:
            return False
        (call,) = readers
        if record.names[call] == "softmax":
            return True
        if record.names[call] not in _TO_SOFTMAX:
            return False
    return True


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


def _are_free(model: nn.Module, inputs: Inputs, record: Recorder, found: Sequence[Factors]) -> bool:
    """Whether the outputs stay as they are where other combinations are multiplied that give the same."""
    mixes: dict[int, Tensor] = {}
    for each in found:
        turns = _any_turns(int(each.parts.max()) + 1, each.depth)
        for (factor, part), turn in zip(each.sides(), (turns, torch.linalg.inv(turns).mT), strict=True):
            count = record.readers[factor.call].outputs
            mix = mixes.setdefault(factor.call, torch.eye(count, dtype=turn.dtype))
            for channels, number in zip(factor.channels, part, strict=True):
                mix[channels[:, None], channels] = turn[number]

    def exchange(call: int, reader: Reader, result: Tensor) -> Tensor | None:
        if call not in mixes:
            return None
        values = result.movedim(reader.channel, -1).double()
        given: Tensor = values @ mixes[call].to(values)
        return given.to(result.dtype).movedim(-1, reader.channel)

    plain = tensors_in(call_model(model, inputs))
    with _Exchanging(exchange), RecurrenceWrittenOut():
        other = tensors_in(call_model(model, inputs))
    return len(plain) == len(other) and all(
        one.shape == two.shape and bool((one - two).abs().max() <= _SAME * one.abs().max())
        for one, two in zip(plain, other, strict=True)
        if one.is_floating_point() and one.numel()
    )


def _any_turns(count: int, depth: int) -> Tensor:
    """``(count, depth, depth)`` invertible matrices that stretch by a half to two."""
    chance = torch.Generator().manual_seed(0)
    given = torch.randn(count, depth, depth, generator=chance, dtype=torch.float64)
    left, _, right = torch.linalg.svd(given)
    turns: Tensor = left @ torch.linspace(0.5, 2.0, depth, dtype=torch.float64).diag() @ right
    return turns
