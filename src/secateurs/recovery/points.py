"""Where the outputs of layers matter: after the batch norm and the residual sum that take them, if any do.

What a refitted layer is to give is decided where the network goes on from it. From the call of a layer one
follows its result as long as a single call reads it and works channel by channel: a batch norm, a scale, a
sum with whatever else, and what only moves values, such as a permutation. The last such result is the
*point*. There the smaller network is compared with the original, so that the layer also makes up for what the
other side of a sum lacks.
"""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import Tensor

from secateurs.recovery.chains import Chain, Norm, Step
from secateurs.recovery.moves import channel_of, numbered
from secateurs.recovery.recording import Recorder

_ACTIVATIONS = frozenset(
    ("relu", "relu6", "leaky_relu", "elu", "silu", "gelu", "hardswish", "hardtanh", "sigmoid", "tanh", "mish")
)


def chain_of(record: Recorder, call: int, *, alone: bool = False) -> Chain:
    """Follow the result of a reader to the point where it matters.

    Args:
        record: The pass.
        call: Number of the reader's call.
        alone: Stay at the call's own result.
    """
    reader = record.readers[call]
    way = [] if alone else _steps_from(record, call)
    steps = [step for _, step, _ in way]
    tip, channel = (way[-1][0], way[-1][2]) if way else (call, reader.channel)
    onward = torch.ones(reader.outputs, dtype=torch.float64, device=reader.weight.device)
    homes: list[tuple[Tensor, Tensor]] = []
    behind = onward
    for place, step in reversed(list(enumerate(steps))):
        behind = onward if place == 0 else behind
        homes = [*_homes_of(record, step, onward), *homes]
        onward = onward * step.scale
    norm = steps[0].norm if steps else None
    is_fitted = norm is not None and norm.is_affine and is_own(record, norm)
    if reader.bias is not None and record.uses(reader.bias) == 1:
        homes.insert(len(_homes_of(record, steps[0], onward)) if norm else 0, (reader.bias, onward))
    return Chain(
        call=call,
        point=tip,
        channel=channel,
        moves=tuple(number for number, step, _ in way if step.move is not None),
        scale=onward,
        norm=norm if is_fitted else None,
        onward=behind,
        homes=tuple(homes),
    )


def way_of(record: Recorder, call: int) -> list[tuple[int, int]]:
    """The calls from a reader to its point, and through the activations behind that; dropouts are none.

    Args:
        record: The pass.
        call: Number of the reader's call.

    Returns:
        Numbers of calls, the reader's first, each with the dimension of its result that holds the
        reader's outputs, counted from the end.
    """
    reader = record.readers[call]
    found = [(call, reader.channel), *((tip, channel) for tip, _, channel in _steps_from(record, call))]
    while len(readers := record.read_by.get(found[-1][0], [])) == 1:
        number = readers[0]
        if number < 0 or record.names[number].rstrip("_") not in _ACTIVATIONS:
            break
        found.append((number, found[-1][1]))
    return [(number, channel) for number, channel in found if "dropout" not in record.names[number]]


def next_reader(record: Recorder, call: int) -> int | None:
    """The first reader of what comes of a call's result, as long as a single call reads it on the way."""
    while len(readers := record.read_by.get(call, [])) == 1 and readers[0] >= 0:
        call = readers[0]
        if call in record.readers:
            return call
    return None


def _steps_from(record: Recorder, call: int) -> list[tuple[int, Step, int]]:
    """The steps from a reader to its point: the call, and the dimension of the channels behind it."""
    reader = record.readers[call]
    way: list[tuple[int, Step, int]] = []
    tip, channel, numbers = call, reader.channel, None
    while len(readers := record.read_by.get(tip, [])) == 1:
        step = record.steps.get((readers[0], tip))
        if step is None or not step.fits(channel, reader.outputs):
            break
        if step.move is not None:
            numbers = step.move(numbered(record.shapes[call], channel) if numbers is None else numbers)
            found = channel_of(numbers, reader.outputs)
            if found is None:
                break
            channel = found
        tip = readers[0]
        way.append((tip, step, channel))
    while way and way[-1][1].is_plain:
        way.pop()
    return way


def calls_behind(record: Recorder, names: Collection[str]) -> set[int]:
    """The calls that are given other values where the calls with these parameters give others."""
    changed: set[int] = set()
    found = set()
    for number, makers in enumerate(record.makers):
        if not changed.isdisjoint(makers):
            found.add(number)
        if number in found or not record.named[number].isdisjoint(names):
            changed.add(number)
    return found


def feeds(record: Recorder, earlier: int, later: int) -> bool:
    """Whether the result of a call goes into what a later one is given."""
    changed = {earlier}
    for number in range(earlier + 1, later + 1):
        if not changed.isdisjoint(record.makers[number]):
            changed.add(number)
    return later in changed


def norms_behind(record: Recorder, names: Collection[str]) -> list[Tensor]:
    """The running means of the batch norms that see other values where these parameters change."""
    behind = calls_behind(record, names)
    return [norm.mean for number, norm in record.norms.items() if number in behind]


def is_own(record: Recorder, norm: Norm) -> bool:
    """Whether no other call uses a norm's tensors."""
    tensors = (norm.mean, norm.var, norm.weight, norm.bias)
    return all(record.uses(tensor) == 1 for tensor in tensors if tensor is not None)


def _homes_of(record: Recorder, step: Step, onward: Tensor) -> list[tuple[Tensor, Tensor]]:
    """A norm's running mean comes first, which a pass in training mode would find there as well."""
    if step.norm is not None and is_own(record, step.norm):
        through = (step.norm.mean, -step.norm.scale * onward)
        return [through] if step.norm.bias is None else [through, (step.norm.bias, onward)]
    if step.shift is not None and record.uses(step.shift) == 1:
        return [(step.shift, onward)]
    return []
