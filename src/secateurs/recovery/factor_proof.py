"""Proves that factors, or streams, may be exchanged: with others in their place the model gives the same."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from secateurs.graph.calls import is_numbered
from secateurs.graph.packed import tensors_in
from secateurs.graph.products import averaged_in, operands_of
from secateurs.graph.running import Inputs, call_model
from secateurs.recovery.computed import Computed
from secateurs.recovery.factors import Factors
from secateurs.recovery.passes import exchanged
from secateurs.recovery.readers import Reader, Watching, reader_of
from secateurs.recovery.recording import Recorder
from secateurs.recovery.written_out import WrittenOut

READ = 2  # the side of what a layer reads; 0 and 1 are factors, those behind it what may be averaged
_WIDE = (torch.float32, torch.float64)  # in which numbers of outputs are told apart
_SAME = 1e-4  # by which outputs may differ, as a share of the largest


class Exchanging(Watching):
    """A pass in which layers give or weigh something else, and which shows what is multiplied.

    Args:
        exchange: Gives what a layer gives in place of a result, or None; see `Watching`.
        meet: Called with the number of a call, a side and a factor: 0 and 1 are both sides of a product,
            those behind `READ` what may be averaged.
        columns: What the weights of some calls are multiplied by, ``(K, K)``.
        results: What is done to the results of calls, by number, whatever they call.
    """

    def __init__(
        self,
        exchange: Callable[[int, Reader, Tensor], Tensor | None] = lambda *_: None,
        *,
        meet: Callable[[int, int, Tensor], None] | None = None,
        columns: Mapping[int, Tensor] | None = None,
        results: Mapping[int, Sequence[Callable[[Tensor], Tensor]]] | None = None,
    ) -> None:
        super().__init__(exchange)
        self._meet, self._columns, self._results = meet, columns or {}, results or {}

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs, number = kwargs or {}, self.made
        if self._meet is not None and is_numbered(func):
            for side, factor in enumerate(operands_of(func, args, kwargs) or ()):
                self._meet(number, side, factor)
            for side, values in enumerate(averaged_in(func, args, kwargs), READ + 1):
                self._meet(number, side, values)
        mix = self._columns.get(number) if is_numbered(func) else None
        reader = None if mix is None else reader_of(func, args, kwargs)
        if reader is not None and mix is not None:
            weight = (reader.matrix().double() @ mix.to(reader.weight.device)).to(reader.weight.dtype)
            args, kwargs = exchanged(args, kwargs, {id(reader.weight): reader.unfolded(weight)})
        changes = self._results.get(number, ()) if is_numbered(func) else ()
        out = super().__torch_function__(func, types, args, kwargs)
        for change in changes:
            out = change(out)
        return out


@dataclass(frozen=True, slots=True)
class Change:
    """What layers give, or weigh, in place of what they did.

    Args:
        results: What is done to the results of calls, by number.
        columns: What a layer's weight, ``(C, K)``, is multiplied by, ``(K, K)``.
    """

    results: Mapping[int, Callable[[Tensor], Tensor]]
    columns: Mapping[int, Tensor]


_Found = TypeVar("_Found")


class Proof:
    """Whether the model's outputs stay as they are where layers give something else for some factors.

    Args:
        model: The model, in evaluation mode.
        inputs: A batch.
        record: One pass of the model on it, with recurrent layers written out.
        agree: Whether something holds in all processes, for what holds in this one.
    """

    def __init__(
        self, model: nn.Module, inputs: Inputs, record: Recorder, agree: Callable[[bool], bool]
    ) -> None:
        self._model, self._inputs, self._record, self._agree = model, inputs, record, agree
        self._wanted = tensors_in(call_model(model, inputs))

    def passed(self, found: list[_Found], change: Callable[[_Found, Recorder], Change]) -> list[_Found]:
        """Those for which they do; all are tried together, and halves where that is too many."""
        if not found or self._agree(self._is_the_same([change(each, self._record) for each in found])):
            return found
        half = len(found) // 2
        return [*self.passed(found[:half], change), *self.passed(found[half:], change)] if half else []

    def _is_the_same(self, changes: Sequence[Change]) -> bool:
        columns: dict[int, Tensor] = {}
        for change in changes:
            for call, mix in change.columns.items():
                columns[call] = columns[call] @ mix if call in columns else mix

        results: dict[int, list[Callable[[Tensor], Tensor]]] = {}
        for change in changes:
            for call, each in change.results.items():
                results.setdefault(call, []).append(each)
        with Exchanging(columns=columns, results=results), WrittenOut():
            given = tensors_in(call_model(self._model, self._inputs))
        if len(given) != len(self._wanted):
            return False
        pairs = [
            (one, other)
            for one, other in zip(given, self._wanted, strict=True)
            if other.is_floating_point() and other.numel()
        ]
        return bool(pairs) and all(  # a model that gives no such tensor proves nothing
            one.shape == other.shape and bool((one - other).abs().max() <= _SAME * other.abs().max())
            for one, other in pairs
        )


def other_combinations(found: Factors, record: Recorder) -> Change:
    """Other factors of the same products."""
    turns = any_turns(int(found.parts.max()) + 1, found.depth)
    outputs: dict[int, Tensor] = {}
    columns: dict[int, Tensor] = {}
    both = ((outputs, turns), (columns if found.is_read else outputs, torch.linalg.inv(turns).mT))
    for (factor, parts), (mixes, turn) in zip(found.sides(), both, strict=True):
        reader = record.readers[factor.call]
        count = reader.columns if mixes is columns else reader.outputs
        mix = mixes.setdefault(factor.call, torch.eye(count, dtype=turn.dtype))
        for channels, part in zip(factor.channels, parts, strict=True):
            mix[channels[:, None], channels] = turn[part]
    results = {call: mixed(mix, record.readers[call].channel) for call, mix in outputs.items()}
    return Change(results, columns)


def shifted_seconds(found: Factors, record: Recorder) -> Change:
    """Something is added to all rows of the second factor."""
    channels, reader = found.second.channels, record.readers[found.second.call]
    shift = torch.zeros(reader.outputs, dtype=torch.float64)
    shift[channels] = torch.linspace(-1, 1, channels.numel(), dtype=torch.float64).view_as(channels)

    def shifted(result: Tensor) -> Tensor:
        values = result.movedim(reader.channel, -1).double()
        return (values + shift.to(values) * values.std()).to(result.dtype).movedim(-1, reader.channel)

    return Change({found.second.call: shifted}, {})


def mixed(mix: Tensor, channel: int) -> Callable[[Tensor], Tensor]:
    """What gives combinations of a result's channels.

    Args:
        mix: ``(C, C)``, which their values, ``(..., C)``, are multiplied by.
        channel: The dimension of the channels.
    """

    def change(result: Tensor) -> Tensor:
        values = result.movedim(channel, -1).double()
        return (values @ mix.to(values)).to(result.dtype).movedim(-1, channel)

    return change


def own_layers(record: Recorder) -> dict[int, Reader]:
    """The calls of layers whose weights no other call uses, without groups, exact enough for a proof."""
    return {
        call: reader
        for call, reader in record.readers.items()
        if reader.groups == 1 and record.uses(reader.weight) == 1 and reader.weight.dtype in _WIDE
        if not isinstance(record.made_of(reader.weight), Computed)  # which cannot be just any
    }


def any_turns(count: int, depth: int) -> Tensor:
    """``(count, depth, depth)`` invertible matrices that stretch by a half to two."""
    chance = torch.Generator().manual_seed(0)
    given = torch.randn(count, depth, depth, generator=chance, dtype=torch.float64)
    left, _, right = torch.linalg.svd(given)
    turns: Tensor = left @ torch.linspace(0.5, 2.0, depth, dtype=torch.float64).diag() @ right
    return turns
