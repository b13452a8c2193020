"""Recurrent layers in few steps: every step does the same to labels, and to lengths.

A layer of torch's own runs as one function that is taken apart into several operators a step. On tensors
without data two steps tell all that a hundred would: after the second, the state has met itself.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

LAYERS = frozenset((torch.lstm, torch.gru, torch.rnn_tanh, torch.rnn_relu))
ARGUMENTS = 9  # of each of them, as torch's own modules call it
_STEPS = 2
_BATCH_FIRST = 8  # the place of this argument; a packed sequence has another one there


def steps_of(func: Any, args: tuple[Any, ...]) -> float:
    """The steps of a call of a recurrent layer on tensors without data; 0 where it is no such call.

    Of sequences of several lengths it is the mean length.
    """
    if func not in LAYERS or len(args) < ARGUMENTS or not args[0].is_meta:
        return 0
    return len(args[0]) / _sequences(args) if is_packed(args) else int(args[0].shape[_axis(args)])


def share_of_steps(steps: float) -> float:
    """How many steps of the layer stand for one that is run."""
    return max(steps / _STEPS, 1.0)


def call_in_few_steps(func: Any, args: tuple[Any, ...], steps: float) -> Any:
    """What a call of a recurrent layer returns, its later steps left out."""
    if is_packed(args):
        return _packed_in_few_steps(func, args)
    if steps <= _STEPS:
        return func(*args)
    axis = _axis(args)
    short = torch.stack([args[0].select(axis, step) for step in range(_STEPS)], axis)
    outputs, *states = func(short, *args[1:])
    last = outputs.select(axis, _STEPS - 1)
    return torch.stack([last] * int(steps), axis), *states


def _packed_in_few_steps(func: Any, args: tuple[Any, ...]) -> Any:
    """The same for packed sequences: all of them take two steps, as if they were of one length."""
    data, _, hidden, *rest = args
    sequences = _sequences(args)
    outputs, *states = func(torch.stack([data[:sequences]] * _STEPS), hidden, *rest, False)
    return outputs[-1][torch.arange(len(data), device=data.device) % sequences], *states


def is_packed(args: tuple[Any, ...]) -> bool:
    """Whether a call of a recurrent layer is given packed sequences."""
    return isinstance(args[1], Tensor) and args[1].dim() == 1


def _sequences(args: tuple[Any, ...]) -> int:
    """How many sequences there are, by the state that they begin with."""
    state = args[2] if isinstance(args[2], Tensor) else args[2][0]
    return int(state.shape[1])


def _axis(args: tuple[Any, ...]) -> int:
    return 1 if args[_BATCH_FIRST] else 0
