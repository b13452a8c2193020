"""What single calls do to values on the way from a layer to its point: norms, scales, sums, copies, moves."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from secateurs.recovery.chains import Norm, Step
from secateurs.recovery.moves import move_of

_SUMS = frozenset(("add", "add_", "__add__", "__radd__", "__iadd__"))
_SCALES = frozenset(("mul", "mul_", "__mul__", "__rmul__", "__imul__", "multiply"))
_DROPOUTS = frozenset(("dropout", "dropout_", "dropout1d", "dropout2d", "dropout3d"))
_COPIES = frozenset(("contiguous", "clone"))


def steps_of(
    func: Any,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    operands: list[Tensor],
    makers: list[int],
    is_data: Callable[[list[Tensor]], bool],
) -> Iterator[tuple[int, tuple[Step, torch.Size]]]:
    """What a call does to each argument that a call has made: the maker, the step, and the argument's shape.

    Args:
        func: The torch function.
        args: Its positional arguments.
        kwargs: Its arguments by name.
        operands: The tensors among them.
        makers: The call that made each of these; negative for none.
        is_data: Whether any of some tensors depends on the inputs.
    """
    if not operands:
        return
    name, one = getattr(func, "__name__", str(func)), operands[0].new_ones(1, dtype=torch.float64)
    if name == "batch_norm" and makers[0] >= 0:
        norm = _norm_of(func, args, kwargs)
        if norm is not None:
            yield makers[0], (Step(norm.scale, 1 - operands[0].dim(), norm), operands[0].shape)
    elif name in _COPIES or (name in _DROPOUTS and not _is_training(args, kwargs)):
        yield makers[0], (Step(one, is_plain=True), operands[0].shape)
    elif len(operands) == 1 and (move := move_of(func, args, kwargs, operands[0])) is not None:
        yield makers[0], (Step(one, move=move, is_plain=True), operands[0].shape)
    elif name in _SUMS and kwargs.get("alpha", 1) == 1:
        for maker, tensor in zip(makers, operands, strict=True):
            if maker >= 0:
                yield maker, (_sum_with(tensor, operands), tensor.shape)
    elif name in _SCALES:
        yield from _scaled(args, operands, makers, is_data)


def _sum_with(tensor: Tensor, operands: list[Tensor]) -> Step:
    one = tensor.new_ones(1, dtype=torch.float64)
    others = [each for each in operands if each is not tensor]
    if len(others) == 1 and isinstance(others[0], nn.Parameter):
        channel = _channel_of(others[0])
        if channel is not None:
            return Step(one, channel, shift=others[0])
    return Step(one, is_sum=True)


def _scaled(
    args: tuple[Any, ...],
    operands: list[Tensor],
    makers: list[int],
    is_data: Callable[[list[Tensor]], bool],
) -> Iterator[tuple[int, tuple[Step, torch.Size]]]:
    if len(operands) == 1:
        factor = next((each for each in args if isinstance(each, (int, float))), None)
        if factor is not None:
            scale = operands[0].new_full((1,), float(factor), dtype=torch.float64)
            yield makers[0], (Step(scale), operands[0].shape)
        return
    for place, maker in enumerate(makers):
        other = operands[1 - place]
        channel = _channel_of(other)
        if maker >= 0 and channel is not None and not is_data([other]):
            yield maker, (Step(other.detach().double().flatten(), channel), operands[place].shape)


def _norm_of(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Norm | None:
    names = ["input", "running_mean", "running_var", "weight", "bias", "training", "momentum", "eps"]
    if func is torch.batch_norm:
        names[1:5] = ["weight", "bias", "running_mean", "running_var"]
    found = {"training": False, "eps": 1e-5} | dict(zip(names, args, strict=False)) | kwargs
    if found["training"] or found.get("running_mean") is None or found.get("running_var") is None:
        return None
    return Norm(
        mean=found["running_mean"], var=found["running_var"], eps=float(found["eps"]),
        weight=found.get("weight"), bias=found.get("bias"),
    )  # fmt: skip


def _is_training(args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Of a call of a dropout: ``(input, p, training)``."""
    return bool(kwargs.get("training", args[2] if len(args) > 2 else True))


def _channel_of(tensor: Tensor) -> int | None:
    """The only dimension of a tensor that has a length, counted from the end."""
    long = [axis - tensor.dim() for axis, size in enumerate(tensor.shape) if size > 1]
    return long[0] if len(long) == 1 else None
