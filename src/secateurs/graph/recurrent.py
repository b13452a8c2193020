"""Recurrent layers in few steps: every step does the same to labels, and to lengths.

A layer of torch's own runs as one function that is taken apart into several operators a step. On tensors
without data two steps tell all that a hundred would: after the second, the state has met itself.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

_LAYERS = frozenset((torch.lstm, torch.gru, torch.rnn_tanh, torch.rnn_relu))
_STEPS = 2
_BATCH_FIRST = 8  # the place of this argument; a packed sequence has another one


def steps_of(func: Any, args: tuple[Any, ...]) -> int:
    """The steps of a call of a recurrent layer on tensors without data; 0 where it is no such call."""
    if func not in _LAYERS or len(args) <= _BATCH_FIRST or not args[0].is_meta:
        return 0
    is_packed = isinstance(args[1], Tensor) and args[1].dim() == 1
    return 0 if is_packed else int(args[0].shape[_axis(args)])


def share_of_steps(steps: int) -> float:
    """How many steps of the layer stand for one that is run."""
    return max(steps / _STEPS, 1.0)


def call_in_few_steps(func: Any, args: tuple[Any, ...], steps: int) -> Any:
    """What a call of a recurrent layer returns, its later steps left out."""
    if steps <= _STEPS:
        return func(*args)
    axis = _axis(args)
    short = torch.stack([args[0].select(axis, step) for step in range(_STEPS)], axis)
    outputs, *states = func(short, *args[1:])
    last = outputs.select(axis, _STEPS - 1)
    return torch.stack([last] * steps, axis), *states


def _axis(args: tuple[Any, ...]) -> int:
    return 1 if args[_BATCH_FIRST] else 0
