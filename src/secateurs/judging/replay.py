"""A forward pass run again from one of its calls on, with units silenced; a record answers all before it.

`Recording` is a pass over the whole batch that keeps what later passes need. `Replay` is such a pass: up to
its first changed call it computes nothing and hands out what was recorded; from there on it runs the model's
own code. Under `torch.vmap` one replay carries many units at once: the model's code sees the batch that it
would see alone, and only what follows a silenced unit is computed once for each.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_map, tree_map_only, tree_unflatten

from secateurs.graph.groups import NO_UNIT, Indices
from secateurs.judging.tape import CallMode, OtherPathError, Tape, tensor_leaves

Reads: TypeAlias = Mapping[int, Sequence[tuple[int, int, Indices]]]
Keeps: TypeAlias = Mapping[int, Sequence[tuple[int, int, Tensor]]]


class SharedMemoryError(Exception):
    """Tensors that later calls change in place share memory, so that copies of them would not."""


@dataclass(frozen=True, slots=True)
class Kept:
    """Stands in a recorded result for the tensor of that number."""

    number: int


@dataclass(frozen=True, kw_only=True)
class Record:
    """What a clean pass over one batch leaves for the replays.

    Args:
        results: What each call returned, with tensors replaced by their numbers.
        snapshots: For each call at which a replay may start, the tensors that it needs, as they were then.
        loud: For each unit of the graph whether its readers see anything but zeros in this batch.
    """

    results: list[Any] = field(default_factory=list)
    snapshots: dict[int, dict[int, Tensor]] = field(default_factory=dict)
    loud: Tensor


class Recording(CallMode):
    """Runs every call, and keeps what replays from each of `starts` need.

    Args:
        tape: The tape of the same model on inputs of this kind.
        starts: Calls at which replays will start.
        reads: For calls that read units: argument, dimension, and the unit at each of its indices.
        record: Where everything is kept.
    """

    def __init__(self, tape: Tape, starts: Sequence[int], reads: Reads, record: Record) -> None:
        super().__init__()
        self._tape, self._reads, self._record = tape, reads, record
        self._needed = {start: tape.frontier(start) for start in starts}
        self._wanted = {number for numbers in self._needed.values() for number in numbers}
        self._alive: dict[int, Tensor] = {}

    def call(self, place: int, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run the call as it is."""
        self._tape.check(place, func)
        if place in self._needed:
            self._record.snapshots[place] = self._snapshot(place)
        for argument, dim, units in self._reads.get(place, ()):
            self._listen(_tensor(args, kwargs, argument), dim, units)
        out = func(*args, **kwargs)
        self._keep(place, out)
        return out

    def _snapshot(self, start: int) -> dict[int, Tensor]:
        """What is needed from here on; what the pass itself will change in place is copied."""
        changing = self._tape.changing(start)
        tensors = {number: self._alive[number] for number in self._needed[start]}
        memory = [tensors[k].untyped_storage()._cdata for k in tensors]
        for number in tensors.keys() & changing:
            if memory.count(tensors[number].untyped_storage()._cdata) > 1:
                raise SharedMemoryError(f"a view is changed in place after call {start}")
            tensors[number] = tensors[number].clone()
        return tensors

    def _listen(self, tensor: Tensor, dim: int, units: Indices) -> None:
        if tensor.dim() <= dim or tensor.shape[dim] != len(units):
            raise OtherPathError("a tensor has another shape than in the trace")
        heard = tensor.ne(0).movedim(dim, 0).flatten(1).any(1)
        self._record.loud[torch.from_numpy(units).to(heard.device)[heard]] = True

    def _keep(self, place: int, out: Any) -> None:
        numbers = iter(self._tape.made[place])
        tensors = tensor_leaves(out)
        if len(tensors) != len(self._tape.made[place]):
            raise OtherPathError(f"call {place} returns another number of tensors")
        for tensor, number in zip(tensors, self._tape.made[place], strict=True):
            if number in self._wanted:
                self._alive[number] = tensor
        stood_in = tree_map(lambda leaf: Kept(next(numbers)) if isinstance(leaf, Tensor) else leaf, out)
        self._record.results.append(stood_in)


class Replay(CallMode):
    """Answers all calls before `start` from a record and runs the others, some of their arguments silenced.

    Args:
        tape: The tape of the pass.
        record: What a clean pass over the same batch left.
        start: The first call that is run.
        keeps: For calls that read units: argument, dimension, and at each of its indices whether it is kept.
    """

    def __init__(self, tape: Tape, record: Record, start: int, keeps: Keeps) -> None:
        super().__init__()
        self._tape, self._results, self._start, self._keeps = tape, record.results, start, keeps
        changing = tape.changing(start)
        self._tensors = {
            number: tensor.clone() if number in changing else tensor
            for number, tensor in record.snapshots[start].items()
        }
        self._blank = record.loud.new_empty(0)  # stands for tensors that nothing looks at any more

    def call(self, place: int, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Answer or run the call."""
        self._tape.check(place, func)
        if place < self._start:
            return self._recorded(self._results[place])
        for argument, dim, keep in self._keeps.get(place, ()):
            args, kwargs = _silenced(args, kwargs, argument, dim, keep)
        return func(*args, **kwargs)

    def _recorded(self, result: Any) -> Any:
        if isinstance(result, Kept):
            return self._tensors.get(result.number, self._blank)
        return tree_map_only(Kept, lambda kept: self._tensors.get(kept.number, self._blank), result)


def _tensor(args: tuple[Any, ...], kwargs: dict[str, Any], argument: int) -> Tensor:
    """The tensor at a position among the tensors of a call."""
    tensors = tensor_leaves((args, kwargs))
    if argument >= len(tensors):
        raise OtherPathError("a call is given fewer tensors than in the trace")
    return tensors[argument]


def _silenced(
    args: tuple[Any, ...], kwargs: dict[str, Any], argument: int, dim: int, keep: Tensor
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments of a call with one tensor zero where it is not kept."""
    value = _tensor(args, kwargs, argument)
    shape = [1] * value.dim()
    shape[dim] = -1
    leaves, structure = tree_flatten((args, kwargs))
    places = [place for place, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]
    leaves[places[argument]] = torch.where(keep.view(shape), value, value.new_zeros(()))
    silenced: tuple[tuple[Any, ...], dict[str, Any]] = tree_unflatten(leaves, structure)
    return silenced


def kept_places(units: Indices, chosen: Tensor) -> Tensor:
    """For each chosen unit which indices of a dimension stay; ``(chosen, length)``.

    Example:
        >>> import numpy as np
        >>> kept_places(np.array([4, 5, NO_UNIT, 4]), torch.tensor([4, 5])).int().tolist()
        [[0, 1, 1, 0], [1, 0, 1, 1]]
    """
    places = torch.from_numpy(units).to(chosen.device)
    return places.ne(chosen[:, None]) | places.eq(NO_UNIT)
