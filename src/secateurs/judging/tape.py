"""The torch function calls of one forward pass: what each makes, what is needed later, what changes in place.

Every call of a torch function counts here, also a look at a shape: replaying a pass means to answer all of
them. The graph numbers fewer (see `secateurs.graph.calls.is_numbered`); `Tape.places` leads from one to the
other.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary

from secateurs.graph.calls import is_numbered
from secateurs.graph.packed import call_tensors, tensors_in


class OtherPathError(Exception):
    """A pass called other functions than the one that it is to follow."""


class CallMode(TorchFunctionMode):
    """Hands every torch function call, with its place in the pass, to `call`."""

    def __init__(self) -> None:
        super().__init__()
        self.place = 0

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        place = self.place
        self.place += 1
        return self.call(place, func, args, kwargs or {})

    def call(self, place: int, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Carry out one call; subclasses add what they want to know, or answer it themselves."""
        return func(*args, **kwargs)


@dataclass(frozen=True, kw_only=True)
class Tape:
    """What a forward pass called. Tensors have numbers, in the order in which calls returned them.

    Args:
        functions: The function of each call.
        made: Numbers of the tensors that each call returned.
        born: For each tensor the call that returned it first.
        last: For each tensor the last call that is given it; the number of calls if it is an output.
        bytes: For each tensor the size of its data.
        changes: Calls that change tensors in place, with all tensors that see it.
        foreign: A call that changes what no call made: an input, a parameter or a buffer.
    """

    functions: tuple[Any, ...]
    made: tuple[tuple[int, ...], ...]
    born: tuple[int, ...]
    last: tuple[int, ...]
    bytes: tuple[int, ...]
    changes: tuple[tuple[int, frozenset[int]], ...]
    foreign: int | None

    @cached_property
    def places(self) -> list[int]:
        """For each call that the graph numbers, its place among all calls."""
        return [place for place, func in enumerate(self.functions) if is_numbered(func)]

    def frontier(self, start: int) -> list[int]:
        """Tensors that were made before a call and are needed by it or later."""
        return [
            k for k, (born, last) in enumerate(zip(self.born, self.last, strict=True)) if born < start <= last
        ]

    def changing(self, start: int) -> set[int]:
        """Tensors that a call from `start` on changes in place."""
        return set[int]().union(*(seen for place, seen in self.changes if place >= start))

    def largest(self, start: int) -> int:
        """Bytes of the largest tensor that calls from `start` on make."""
        return max((n for n, born in zip(self.bytes, self.born, strict=True) if born >= start), default=1)

    def check(self, place: int, func: Any) -> None:
        """Make sure that a pass calls what this one did.

        Raises:
            OtherPathError: It does not.
        """
        if place >= len(self.functions) or self.functions[place] != func:
            raise OtherPathError(f"the model takes another path from call {place} on")


class Taping(CallMode):
    """Makes a tape of one pass.

    Args:
        foreign: Tensors that the pass is given: inputs, parameters and buffers.
    """

    def __init__(self, foreign: Iterable[Tensor]) -> None:
        super().__init__()
        self._foreign = {_storage(tensor) for tensor in foreign}
        self._numbers: Any = WeakIdKeyDictionary()
        self._functions: list[Any] = []
        self._made: list[tuple[int, ...]] = []
        self._born: list[int] = []
        self._last: list[int] = []
        self._bytes: list[int] = []
        self._changes: list[tuple[int, frozenset[int]]] = []
        self._touched: int | None = None

    def call(self, place: int, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Note what the call is given, and what it makes and changes."""
        operands = call_tensors(args, kwargs)
        self._use(operands, place)
        versions = [tensor._version for tensor in operands]
        out = func(*args, **kwargs)
        for tensor, version in zip(operands, versions, strict=True):
            if tensor._version != version:
                self._change(tensor, place)
        self._functions.append(func)
        self._made.append(tuple(self._number(tensor, place) for tensor in tensor_leaves(out)))
        return out

    def finish(self, outputs: Any) -> Tape:
        """The tape, once the pass has ended with these outputs."""
        self._use(tensors_in(outputs), len(self._functions))
        return Tape(
            functions=tuple(self._functions),
            made=tuple(self._made),
            born=tuple(self._born),
            last=tuple(self._last),
            bytes=tuple(self._bytes),
            changes=tuple(self._changes),
            foreign=self._touched,
        )

    def _use(self, tensors: Iterable[Tensor], place: int) -> None:
        for tensor in tensors:
            number = self._numbers.get(tensor)
            if number is not None:
                self._last[number] = place

    def _number(self, tensor: Tensor, place: int) -> int:
        number: int | None = self._numbers.get(tensor)
        if number is None:
            number = self._numbers[tensor] = len(self._born)
            self._born.append(place)
            self._last.append(-1)
            self._bytes.append(tensor.numel() * tensor.element_size())
        return number

    def _change(self, tensor: Tensor, place: int) -> None:
        storage = _storage(tensor)
        if storage in self._foreign and self._touched is None:
            self._touched = place
        seen = frozenset(k for other, k in self._numbers.items() if _storage(other) == storage)
        self._changes.append((place, seen))


def tensor_leaves(value: Any) -> list[Tensor]:
    """The tensors of a result, in the order of its leaves."""
    if isinstance(value, Tensor):
        return [value]
    return [leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor)]


def _storage(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)
