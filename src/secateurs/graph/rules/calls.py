"""Torch functions that check or decide something by lengths before any operator runs."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from secateurs.graph.expressions import Constant, Length, Operation
from secateurs.graph.integers import Traced
from secateurs.graph.rules.registry import call_rule
from secateurs.graph.tracing import Tracer

_MANY = 4  # so many that half of them are still several


@call_rule(functional.rms_norm)
@call_rule(torch.rms_norm)
def rms_norm(t: Tracer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """The stated shape is compared with the weight's."""
    named = {**dict(zip(("input", "normalized_shape"), args, strict=False)), **kwargs}
    shape = list(named["normalized_shape"])
    for value, dim in zip(shape, t.dims(named["input"])[-len(shape) :], strict=True):
        if type(value) is Traced and dim.factors:
            t.state(value.expression, dim)


@call_rule(torch.unflatten)
@call_rule(Tensor.unflatten)
def unflatten(t: Tracer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """The stated lengths must multiply up to the dimension's, so those that nothing can change stay."""
    named = {**dict(zip(("input", "dim", "sizes"), args, strict=False)), **kwargs}
    dim = t.dims(named["input"])[named["dim"]]
    sizes = list(named["sizes"])
    known = torch.Size([size for size in sizes if size != -1]).numel()
    if not dim.factors or not known:
        return
    parts = t.labels.split(dim, [dim.size // known if size == -1 else int(size) for size in sizes])
    for place, (size, part) in enumerate(zip(sizes, parts, strict=True)):
        if size != -1 and type(size) is not Traced and not t.written(part, place, of=len(sizes)):
            t.lock(part, f"unflatten is given the fixed length {size}")


@call_rule(torch.chunk)
@call_rule(Tensor.chunk)
def chunk(t: Tracer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """All pieces but the last are as long as the dimension over their number, rounded up."""
    named = {"dim": 0, **dict(zip(("input", "chunks", "dim"), args, strict=False)), **kwargs}
    dim, number = t.dims(named["input"])[named["dim"]], int(named["chunks"])
    length = -(-dim.size // number)
    if not dim.factors or dim.size % number == 0:  # equal pieces stay equal
        return
    starts = range(0, dim.size, length)
    if len(starts) < number:
        t.lock(dim, f"it is cut into {number} pieces, of which the last are empty")
        return
    rounded_up = Operation("add", Length(dim), Constant(number - 1))
    pieces = [t.labels.take(dim, slice(start, start + length)) for start in starts]
    for piece in pieces[:-1]:
        t.state(Operation("floordiv", rounded_up, Constant(number)), piece)


@call_rule(torch.lstm)
def lstm(t: Tracer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """That outputs are projected is told by their length, so the cell must stay the longer of the two."""
    states = next((value for value in args[1:3] if isinstance(value, (tuple, list))), ())
    if len(states) == 2 and states[0].shape[-1] != states[1].shape[-1]:
        t.lock(t.dims(states[1])[-1], "an LSTM that projects its outputs is told by this length")


@call_rule(functional.scaled_dot_product_attention)
def attention(t: Tracer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Without a stated scale the kernel derives one from the head dimension.

    Where several query heads share a key head, whether they do is told by the two lengths: where it is few
    that share one, their number stays, and key heads go with all that share them.
    """
    named = {**dict(zip(("query", "key"), args, strict=False)), **kwargs}
    query, key = named["query"], named["key"]
    if kwargs.get("scale") is None:
        others = [value for name, value in kwargs.items() if name not in ("query", "key")]
        t.derive_scale(query, key, [*args[2:], *others])
    if kwargs.get("enable_gqa"):
        heads, keys = t.dims(query)[-3], int(key.shape[-3])
        shared = heads.size // keys
        if heads.factors and 1 < shared < _MANY:
            _, sharing = t.labels.split(heads, [keys, shared])
            t.lock(sharing, "few query heads share a key head")
