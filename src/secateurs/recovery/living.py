"""How much memory a forward pass holds after each of its calls, and what changes that was read before."""

from __future__ import annotations

import weakref
from collections.abc import Collection, Iterable

from torch import Tensor


class Living:
    """The bytes that results of calls take, and what becomes of the tensors that some calls read.

    Args:
        parameters: Where parameters and buffers lie, which count for nothing; see `storage_of`.

    Attributes:
        held: The bytes that results took after each call.
        overwritten: The readers whose source was changed in place after they read it.

    Example:
        >>> import torch
        >>> living, kept = Living([]), torch.zeros(2)
        >>> living.read(0, kept)
        >>> living.note(0, [kept, kept[:1], torch.zeros(3)])
        >>> living.held_at(0, [0])  # the view takes nothing, and the last is a third tensor
        20
    """

    def __init__(self, parameters: Collection[int]) -> None:
        self.held: list[int] = []
        self.overwritten: set[int] = set()
        self._parameters = parameters
        self._sources: dict[int, _Source] = {}

    def read(self, call: int, source: Tensor) -> None:
        """A call read a tensor, which is to be followed."""
        self._sources[call] = _Source(source if source._base is None else source._base, call)

    def changed(self, tensors: Iterable[Tensor]) -> None:
        """A call changed tensors in place."""
        places = {storage_of(tensor) for tensor in tensors}
        for call, source in self._sources.items() if places else ():
            if source.storage in places and source.tensor() is not None:
                self.overwritten.add(call)

    def note(self, call: int, results: Iterable[Tensor]) -> None:
        """The results of calls that are still there after a call."""
        storages = {storage_of(each): each.untyped_storage().nbytes() for each in results}
        self.held.append(sum(size for place, size in storages.items() if place not in self._parameters))
        for source in self._sources.values():
            if source.last == call - 1 and source.tensor() is not None:
                source.last = call

    def held_at(self, call: int, kept: Iterable[int]) -> int:
        """The bytes that a pass holds that waits behind a call.

        Args:
            call: Number of the call.
            kept: Readers of which what they read is kept until later.
        """
        gone = {
            number if number in self.overwritten else source.storage: source.nbytes
            for number in kept
            if (source := self._sources.get(number)) is not None
            if number in self.overwritten or source.last < call
        }
        return self.held[call] + sum(gone.values())


class _Source:
    """What a reader read: where it lies, and after which call it was seen last.

    Args:
        tensor: The tensor, or the one that it is a view of.
        call: Number of the call that read it.
    """

    __slots__ = ("last", "nbytes", "storage", "tensor")

    def __init__(self, tensor: Tensor, call: int) -> None:
        self.tensor, self.storage = weakref.ref(tensor), storage_of(tensor)
        self.nbytes, self.last = tensor.untyped_storage().nbytes(), call - 1


def storage_of(tensor: Tensor) -> int:
    """Where a tensor's values lie, with those of all its views."""
    return tensor.untyped_storage().data_ptr()
