"""Calls on the way from a layer to its point that only move values: views, permutations, rolls and slices.

Window attention and channels-last networks turn what a layer gives before a residual sum takes it. What a
move does is seen by doing it to numbers: each value of the layer's result is given the number of its
position and its channel, and where these end up says which position of the point is which of the layer's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, TypeAlias

import torch
from torch import Tensor

Move: TypeAlias = Callable[[Tensor], Tensor]

_VIEWS = ("view", "reshape", "flatten", "unflatten", "squeeze", "unsqueeze", "ravel")
_TURNS = ("permute", "transpose", "swapaxes", "swapdims", "movedim", "moveaxis", "adjoint", "t")
_SHIFTS = ("roll", "flip", "fliplr", "flipud", "rot90", "narrow", "select", "__getitem__")
_MOVES = frozenset((*_VIEWS, *_TURNS, *_SHIFTS))


def move_of(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], moved: Tensor) -> Move | None:
    """The call as a function of the tensor that it moves, or None if it is no such call.

    It does not keep the tensor.

    Args:
        func: The function that is called.
        args: Its positional arguments.
        kwargs: Its arguments by name.
        moved: The only tensor among them.
    """
    name = getattr(func, "__name__", "")
    if name not in _MOVES or any(isinstance(each, torch.dtype) for each in (*args, *kwargs.values())):
        return None
    called: Any = torch.Tensor.reshape if name == "view" and not kwargs else func  # whatever the strides
    places = [place for place, each in enumerate(args) if each is moved]
    names = [name for name, each in kwargs.items() if each is moved]
    if len(places) + len(names) != 1:
        return None
    few = tuple(None if each is moved else each for each in args)
    named = {name: each for name, each in kwargs.items() if each is not moved}

    def move(tensor: Tensor) -> Tensor:
        if names:
            out: Tensor = called(*few, **named, **{names[0]: tensor})
        else:
            out = called(*few[: places[0]], tensor, *few[places[0] + 1 :], **named)
        return out

    return move


def numbered(shape: torch.Size, channel: int) -> Tensor:
    """``position * C + channel`` for each value of a tensor of a shape.

    Args:
        shape: The shape.
        channel: The dimension of the channels, counted from the end.
    """
    count = int(shape[channel])
    kind = torch.int32 if shape.numel() < 1 << 31 else torch.int64  # as many as there are values
    numbers = torch.arange(shape.numel(), dtype=kind)
    return numbers.view(*_without(shape, channel), count).movedim(-1, channel)


def channel_of(numbers: Tensor, count: int) -> int | None:
    """The dimension, counted from the end, in which all channels lie in their order; None if there is none.

    Args:
        numbers: What moves made of `numbered`.
        count: The number of channels.
    """
    if not numbers.numel():
        return None
    for axis in range(-1, -1 - numbers.dim(), -1):
        if numbers.shape[axis] == count:
            each = numbers.movedim(axis, -1)
            first = each[..., :1]
            if bool((first % count == 0).all()) and bool((each - first == torch.arange(count)).all()):
                return axis
    return None


def origins(shape: torch.Size, channel: int, moves: Iterable[Move]) -> Tensor:
    """For each position of the point the layer's position that it comes from.

    Args:
        shape: The shape of the layer's result.
        channel: The dimension of its channels, counted from the end.
        moves: The moves from there on; they keep the channels together.

    Example:
        >>> origins(torch.Size((2, 3, 5)), -1, [lambda rows: rows.permute(2, 1, 0)])
        tensor([0, 3, 1, 4, 2, 5])
    """
    count = int(shape[channel])
    numbers = numbered(shape, channel)
    for move in moves:
        numbers = move(numbers)
    axis = channel_of(numbers, count)
    assert axis is not None, "the moves of a chain keep the channels together"
    return numbers.select(axis, 0).flatten().long() // count


def values_at(result: Tensor, channel: int, positions: Tensor) -> Tensor:
    """The values of a tensor at some positions; ``(n, channels)``.

    Args:
        result: The tensor.
        channel: The dimension of its channels, counted from the end.
        positions: Numbers of positions, counted over all dimensions but the channels.
    """
    result = result.movedim(channel, -1)
    if result.dim() == 1:
        return result[None]
    return result[torch.unravel_index(positions.to(result.device), result.shape[:-1])]


def positions_of(shape: torch.Size, channel: int) -> int:
    """How many positions a tensor of a shape has.

    Args:
        shape: The shape.
        channel: The dimension of its channels, counted from the end.
    """
    return shape.numel() // max(int(shape[channel]), 1)


def _without(shape: torch.Size, channel: int) -> list[int]:
    sizes = list(shape)
    sizes.pop(channel)
    return sizes
