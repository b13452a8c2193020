"""Proves that factors, or streams, may be exchanged: with others in their place the model gives the same."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from secateurs.graph.calls import is_numbered
from secateurs.graph.packed import tensors_in
from secateurs.graph.products import averaged_in, operands_of
from secateurs.graph.running import Inputs, call_model
from secateurs.recovery.factors import Factors
from secateurs.recovery.passes import exchanged
from secateurs.recovery.readers import Reader, Watching, reader_of
from secateurs.recovery.recording import Recorder
from secateurs.recovery.recurrence import RecurrenceWrittenOut

READ = 2  # the side of what a layer reads; 0 and 1 are factors, those behind it what may be averaged
_SAME = 1e-4  # by which outputs may differ, as a share of the largest


class Exchanging(Watching):
    """A pass in which layers give or weigh something else, and which shows what is multiplied.

    Args:
        exchange: Gives what a layer gives in place of a result, or None; see `Watching`.
        meet: Called with the number of a call, a side and a factor: 0 and 1 are both sides of a product,
            those behind `READ` what may be averaged.
        columns: What the weights of some calls are multiplied by, ``(K, K)``.
        later: Gives what is to take the place of a call's result, of any call, by its number.
    """

    def __init__(
        self,
        exchange: Callable[[int, Reader, Tensor], Tensor | None],
        *,
        meet: Callable[[int, int, Tensor], None] | None = None,
        columns: Mapping[int, Tensor] | None = None,
        later: Mapping[int, Callable[[Tensor], Tensor]] | None = None,
    ) -> None:
        super().__init__(exchange)
        self._meet, self._columns, self._later = meet, columns or {}, later or {}

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if self._meet is not None and is_numbered(func):
            for side, factor in enumerate(operands_of(func, args, kwargs) or ()):
                self._meet(self._call, side, factor)
            for side, values in enumerate(averaged_in(func, args, kwargs), READ + 1):
                self._meet(self._call, side, values)
        mix = self._columns.get(self._call) if is_numbered(func) else None
        reader = None if mix is None else reader_of(func, args, kwargs)
        if reader is not None and mix is not None:
            weight = (reader.matrix().double() @ mix.to(reader.weight.device)).to(reader.weight.dtype)
            args, kwargs = exchanged(args, kwargs, {id(reader.weight): reader.unfolded(weight)})
        later = self._later.get(self._call) if is_numbered(func) else None
        out = super().__torch_function__(func, types, args, kwargs)
        return out if later is None else later(out)


@dataclass(frozen=True, slots=True)
class Change:
    """What layers give, or weigh, in place of what they did.

    Args:
        outputs: What is done to a layer's outputs, ``(..., C)``, by its call.
        columns: What a layer's weight, ``(C, K)``, is multiplied by, ``(K, K)``.
        later: What is done to the result of any call, by its number.
    """

    outputs: Mapping[int, Callable[[Tensor], Tensor]]
    columns: Mapping[int, Tensor]
    later: Mapping[int, Callable[[Tensor], Tensor]] = field(default_factory=dict)


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

        def exchange(call: int, reader: Reader, result: Tensor) -> Tensor | None:
            own = [change.outputs[call] for change in changes if call in change.outputs]
            values = result.movedim(reader.channel, -1).double()
            for each in own:
                values = each(values)
            return values.to(result.dtype).movedim(-1, reader.channel) if own else None

        later = {call: each for change in changes for call, each in change.later.items()}
        with Exchanging(exchange, columns=columns, later=later), RecurrenceWrittenOut():
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
    return Change({call: partial(_mixed, mix) for call, mix in outputs.items()}, columns)


def _mixed(mix: Tensor, values: Tensor) -> Tensor:
    given: Tensor = values @ mix.to(values)
    return given


def shifted_seconds(found: Factors, record: Recorder) -> Change:
    """Something is added to all rows of the second factor."""
    channels = found.second.channels
    shift = torch.zeros(record.readers[found.second.call].outputs, dtype=torch.float64)
    shift[channels] = torch.linspace(-1, 1, channels.numel(), dtype=torch.float64).view_as(channels)
    return Change({found.second.call: lambda values: values + shift.to(values) * values.std()}, {})


def any_turns(count: int, depth: int) -> Tensor:
    """``(count, depth, depth)`` invertible matrices that stretch by a half to two."""
    chance = torch.Generator().manual_seed(0)
    given = torch.randn(count, depth, depth, generator=chance, dtype=torch.float64)
    left, _, right = torch.linalg.svd(given)
    turns: Tensor = left @ torch.linspace(0.5, 2.0, depth, dtype=torch.float64).diag() @ right
    return turns
