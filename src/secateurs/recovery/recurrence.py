"""Recurrent layers with their products as calls of their own, so that these can be refitted like any other.

Torch's recurrent layers run as one function that holds several products. Of an LSTM, a GRU or a plain RNN the
product with the inputs does not wait for the state: all steps are one linear layer, whose results the layer
then adds as they are. The product with the state reads what the layer itself gives one step earlier, so it is
shown beside the layer: as a linear layer whose result nobody reads, before the layer runs with its weights.
There it can be given other states, such as those of the network before a cut.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear
from torch.overrides import handle_torch_function, has_torch_function

from secateurs.graph.recurrent import ARGUMENTS, LAYERS, is_packed

_CELLS = frozenset((torch.lstm_cell, torch.gru_cell, torch.rnn_tanh_cell, torch.rnn_relu_cell))
RECURRENT = LAYERS | _CELLS


def product_with_state(before: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """What a recurrent layer adds to the product with its inputs; a call that modes see by this name.

    Args:
        before: The state that each step begins with, ``(..., H)``.
        weight: ``(C, H)``.
        bias: ``(C,)``.
    """
    operands = (before, weight) if bias is None else (before, weight, bias)
    if has_torch_function(operands):
        result: Tensor = handle_torch_function(product_with_state, operands, before, weight, bias)
        return result
    return linear(before, weight, bias)


def steps_of(func: Any, args: tuple[Any, ...]) -> Callable[[], Any] | None:
    """What runs a call of a recurrent layer or cell in steps; None where that drops out in between.

    Args:
        func: The function, one of `RECURRENT`.
        args: Its arguments; torch's own modules give none by name.
    """
    if func in _CELLS and len(args) in (4, 6):
        return partial(_run_cell, func, *args)
    if func in LAYERS and len(args) == ARGUMENTS:
        layer = _Layer.of(func, args)
        return None if layer.drops_out else layer.run
    return None


def _run_cell(
    func: Any, x: Tensor, state: Any, inward: Tensor, across: Tensor, *biases: Tensor | None
) -> Any:
    """One step of a cell, of which the state is one tensor, or two for an LSTM."""
    bias, other = biases or (None, None)
    given = linear(x, inward, bias)
    product_with_state((state if isinstance(state, Tensor) else state[0]).clone(), across, other)
    taken = torch.eye(given.shape[-1], dtype=given.dtype, device=given.device)
    nothing = None if bias is None else torch.zeros(given.shape[-1], dtype=given.dtype, device=given.device)
    return func(given, state, taken, across, nothing, other)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Layer:
    """A call of a recurrent layer.

    Args:
        func: What is called.
        x: Its inputs: ``(T, B, K)``, ``(B, T, K)``, or ``(rows, K)`` where sequences are packed.
        sizes: For packed sequences how many of them have each step.
        states: The state before the first step, ``(levels * directions, B, H)``; two of them for an LSTM.
        weights: Those of all levels and directions, one after another.
        biased: Whether there are biases.
        levels: How many layers lie on each other.
        directions: 1, or 2 where the steps are gone through backwards as well.
        axis: The dimension of the steps.
        drops_out: Whether anything is dropped between the levels.
    """

    func: Any
    x: Tensor
    sizes: Tensor | None
    states: tuple[Tensor, ...]
    weights: Sequence[Tensor]
    biased: bool
    levels: int
    directions: int
    axis: int
    drops_out: bool

    @classmethod
    def of(cls, func: Any, args: tuple[Any, ...]) -> _Layer:
        """The call as torch's own modules make it, of plain or of packed sequences."""
        x, sizes, rest = (args[0], args[1], args[2:]) if is_packed(args) else (args[0], None, args[1:])
        states, weights, biased, levels, dropout, training, both_ways, *batch_first = rest
        return cls(
            func=func, x=x, sizes=sizes, weights=weights, biased=biased, levels=levels,
            states=(states,) if isinstance(states, Tensor) else tuple(states),
            directions=2 if both_ways else 1, axis=1 if batch_first and batch_first[0] else 0,
            drops_out=bool(dropout and training and levels > 1),
        )  # fmt: skip

    def run(self) -> tuple[Tensor, ...]:
        """What the call gives: the outputs, and the state after the last step."""
        x, ends = self.x, []
        a_cell = len(self.weights) // (self.levels * self.directions)
        cells = [self.weights[start : start + a_cell] for start in range(0, len(self.weights), a_cell)]
        for level in range(self.levels):
            places = slice(level * self.directions, (level + 1) * self.directions)
            x, *end = self._level(x, cells[places], tuple(state[places] for state in self.states))
            ends.append(end)
        return x, *(torch.cat(each) for each in zip(*ends, strict=True))

    def _level(
        self, x: Tensor, cells: Sequence[Sequence[Tensor]], states: tuple[Tensor, ...]
    ) -> tuple[Tensor, ...]:
        """One level in all directions."""
        given = [linear(x, cell[0], cell[2] if self.biased else None) for cell in cells]
        outputs = self._call(given, cells, states)[0]
        for direction, (cell, own) in enumerate(zip(cells, outputs.chunk(self.directions, -1), strict=True)):
            before = self._before(own, states[0][direction], backwards=direction == 1)
            product_with_state(before, cell[1], cell[3] if self.biased else None)
        return self._call(given, cells, states)

    def _call(
        self, given: list[Tensor], cells: Sequence[Sequence[Tensor]], states: tuple[Tensor, ...]
    ) -> tuple[Tensor, ...]:
        """The layer itself, which takes over what the products with its inputs gave."""
        each, x = given[0].shape[-1], torch.cat(given, -1) if len(given) > 1 else given[0]
        taken = torch.eye(each * len(given), dtype=x.dtype, device=x.device).split(each)
        nothing = torch.zeros(each, dtype=x.dtype, device=x.device)
        weights: list[Tensor] = []
        for cell, own in zip(cells, taken, strict=True):
            biases = [nothing, *cell[3:]] if self.biased else cell[2:]
            weights += [own, cell[1], *biases]
        before = states if len(states) > 1 else states[0]
        sizes, order = ([], [self.axis == 1]) if self.sizes is None else ([self.sizes], [])
        found: tuple[Tensor, ...] = self.func(
            x, *sizes, before, weights, self.biased, 1, 0.0, False, self.directions == 2, *order
        )
        return found

    def _before(self, outputs: Tensor, start: Tensor, *, backwards: bool) -> Tensor:
        """The state that each step begins with, from what all steps give and the state before the first."""
        if self.sizes is not None:
            rows = _rows_before(self.sizes, backwards=backwards).to(outputs.device)
            return torch.cat([outputs, start])[rows]
        first, steps = start.unsqueeze(self.axis), outputs.shape[self.axis]
        if backwards:
            return torch.cat([outputs.narrow(self.axis, 1, steps - 1), first], self.axis)
        return torch.cat([first, outputs.narrow(self.axis, 0, steps - 1)], self.axis)


def _rows_before(sizes: Tensor, *, backwards: bool) -> Tensor:
    """For each row of packed sequences the row of the step before it; the first steps come behind all rows.

    Args:
        sizes: How many sequences have each step, the longest first.
        backwards: Whether the last step comes first.

    Example:
        >>> _rows_before(torch.tensor([2, 2, 1]), backwards=False)  # two sequences of three and two steps
        tensor([5, 6, 0, 1, 2])
        >>> _rows_before(torch.tensor([2, 2, 1]), backwards=True)
        tensor([2, 3, 4, 6, 5])
    """
    steps = torch.repeat_interleave(torch.arange(len(sizes)), sizes)
    starts = sizes.cumsum(0) - sizes
    sequence = torch.arange(len(steps)) - starts[steps]
    other = steps + (1 if backwards else -1)
    inside = other.clamp(0, len(sizes) - 1)
    is_there = (other == inside) & (sequence < sizes[inside])
    return torch.where(is_there, starts[inside] + sequence, len(steps) + sequence)
