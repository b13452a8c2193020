"""Weights that a model computes from parameters in its forward pass, by whatever calls.

Standardized weights (arXiv 1903.10520), spectral norm (arXiv 1802.05957) and parametrizations of your own
have no simple inverse. But the calls that compute them read nothing but parameters, so a pass can write them
down and they can be run again, on other parameters and with gradients: `secateurs.recovery.attaining` finds
those that give a weight which is as good as it can be.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.nn.functional import normalize
from torch.utils._pytree import tree_map_only

from secateurs.graph.packed import results_of

_DOTS = frozenset(("dot", "vdot"))
_COPIES = frozenset(("clone", "detach"))
_ENTRIES, _TRIES = 3, 3  # of a weight, that are looked at to see where they come from


@dataclass(frozen=True, slots=True, eq=False)
class Call:
    """One torch function call that reads parameters, or what others have computed from them.

    Args:
        func: The function.
        args: Its positional arguments.
        kwargs: Its arguments by name.
        results: What it gave.
        number: Its number in the pass; None if it has none.
    """

    func: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    results: tuple[Tensor, ...]
    number: int | None

    @property
    def name(self) -> str:
        """Of the function."""
        return getattr(self.func, "__name__", "")

    def tensors(self) -> Iterator[Tensor]:
        """Those that it is given, by position or name, without those in lists."""
        yield from (each for each in (*self.args, *self.kwargs.values()) if isinstance(each, Tensor))


@dataclass(slots=True, eq=False)
class LargestValue:
    """A singular value ``u' M v`` whose vectors are buffers: the norm that a spectral norm divides by.

    Args:
        matrix: ``M``.
        buffers: ``u`` and ``v``.
        vectors: Those of the matrix that was looked at last.
    """

    matrix: Tensor
    buffers: tuple[Tensor, Tensor]
    vectors: tuple[Tensor, ...] = ()

    def of(self, matrix: Tensor) -> Tensor:
        """The largest singular value of a matrix; its gradient is ``u v'``."""
        wide = matrix.detach().double()
        wide = wide if len(wide) <= wide.shape[1] else wide.mT
        _, turns = torch.linalg.eigh(wide @ wide.mT)
        short, long = turns[:, -1], normalize(wide.mT @ turns[:, -1], dim=0)
        left, right = (short, long) if len(short) == len(matrix) else (long, short)
        sign = torch.sign(left @ self.buffers[0].to(left))  # as the buffers, which may point either way
        self.vectors = tuple(each * torch.where(sign == 0, 1.0, sign) for each in (left, right))
        left, right = (each.to(matrix) for each in self.vectors)
        value: Tensor = left @ (matrix @ right)
        return value


@dataclass(frozen=True, slots=True, eq=False)
class Computed:
    """A weight that calls compute from parameters.

    Args:
        weight: The weight.
        parameters: Those that it is computed from and nothing else is. The first has the weight's shape, and
            its values go where they are in the weight.
        calls: The calls, in their order; the last one gives the weight.
        largest: The largest singular values among what they compute, by the ``id`` of the result.

    Example:
        >>> from secateurs.recovery.recording import Recorder
        >>> net = torch.nn.utils.parametrizations.spectral_norm(torch.nn.Linear(3, 2)).eval()
        >>> record = Recorder(net, torch.randn(4, 3))
        >>> [reader] = record.readers.values()
        >>> made_of = record.made_of(reader.weight)
        >>> other = made_of.of([torch.tensor([[3.0, 0.0, 0.0], [0.0, 1.5, 0.0]])])
        >>> [round(value, 3) for value in other.flatten().tolist()]
        [1.0, 0.0, 0.0, 0.0, 0.5, 0.0]
    """

    weight: Tensor
    parameters: tuple[Tensor, ...]
    calls: tuple[Call, ...]
    largest: dict[int, LargestValue] = field(default_factory=dict)

    @property
    def number(self) -> int:
        """Of the last call."""
        return -2 if self.calls[-1].number is None else self.calls[-1].number

    def of(self, values: Sequence[Tensor]) -> Tensor:
        """The weight for other values of its parameters, in their precision, with gradients."""
        known = {id(parameter): value for parameter, value in zip(self.parameters, values, strict=True)}

        def taken(tensor: Tensor) -> Tensor:
            if id(tensor) in known:
                return known[id(tensor)]
            return tensor.detach().to(values[0].dtype) if tensor.is_floating_point() else tensor

        for call in self.calls:
            largest = self.largest.get(id(call.results[0]))
            if largest is not None:
                known[id(call.results[0])] = largest.of(taken(largest.matrix))
                continue
            args, kwargs = tree_map_only(Tensor, taken, (call.args, call.kwargs))
            given = results_of(call.func(*args, **kwargs))
            known |= {id(was): now for was, now in zip(call.results, given, strict=True)}
        return known[id(self.weight)]

    def take(self, values: Sequence[Tensor]) -> None:
        """Change the parameters, and the vectors of largest singular values with them."""
        self.of(values)
        for parameter, value in zip(self.parameters, values, strict=True):
            parameter.data.copy_(value)
        for largest in self.largest.values():
            for buffer, vector in zip(largest.buffers, largest.vectors, strict=True):
                buffer.data.copy_(vector)

    def is_in_place(self) -> bool:
        """Whether the values of the first parameter go where they are in the weight, seen at some entries.

        An entry follows its own value most; not with any values of the others, so several are tried.
        """
        others = [torch.where(each == 0, 1.0, each.detach()) for each in self.parameters[1:]]  # gains open
        first, chance = self.parameters[0].detach(), torch.Generator().manual_seed(0)
        entries = torch.randperm(first.numel(), generator=chance)[:_ENTRIES].tolist()
        slopes = torch.zeros(len(entries), first.numel(), device=first.device)
        with torch.enable_grad():
            for _ in range(_TRIES):
                mixed = first.flatten()[torch.randperm(first.numel(), generator=chance).to(first.device)]
                base = mixed.view_as(first).requires_grad_(True)
                weight = self.of([base, *others])
                if weight.shape != base.shape or not weight.requires_grad:
                    return False
                for place, entry in enumerate(entries):
                    (slope,) = torch.autograd.grad(weight.flatten()[entry], base, retain_graph=True)
                    slopes[place] += slope.flatten().abs()
        return bool(slopes.isfinite().all()) and slopes.argmax(1).tolist() == entries


class Tape:
    """What a pass computes from parameters alone."""

    def __init__(self) -> None:
        self._calls: dict[int, Call] = {}
        self._copies: dict[int, tuple[Tensor, Tensor]] = {}
        self._found: dict[int, Computed | None] = {}

    def __contains__(self, tensor: Tensor) -> bool:
        """Whether a tensor is kept because it was computed from parameters."""
        return id(tensor) in self._calls

    def note(self, call: Call, operands: Sequence[Tensor]) -> None:
        """A call was made that reads no data and changes nothing in place."""
        if any(result is each for result in call.results for each in operands):
            return
        if any(isinstance(each, Parameter) or id(each) in self._calls for each in operands):
            self._calls |= {id(result): call for result in call.results}
        elif call.name in _COPIES and len(operands) == 1:
            self._copies[id(call.results[0])] = call.results[0], operands[0]

    def calls_for(self, tensor: Tensor) -> tuple[Call, ...]:
        """The calls that a tensor was computed by, in their order."""
        found: list[Call] = []

        def visit(each: Tensor) -> None:
            call = self._calls.get(id(each))
            if call is not None and call not in found:
                for one in _tensors_of(call):
                    visit(one)
                found.append(call)

        visit(tensor)
        return tuple(found)

    def computed(self, weight: Tensor, is_own: Callable[[Tensor, Sequence[Call]], bool]) -> Computed | None:
        """What a weight is computed from; None for a parameter, or where values end in other places.

        Args:
            weight: The weight.
            is_own: Whether a parameter is used by no other calls than some.
        """
        if weight not in self:
            return None
        if id(weight) not in self._found:
            self._found[id(weight)] = self._computed(weight, is_own)
        return self._found[id(weight)]

    def _computed(self, weight: Tensor, is_own: Callable[[Tensor, Sequence[Call]], bool]) -> Computed | None:
        calls = self.calls_for(weight)
        inputs = {id(each): each for call in calls for each in _tensors_of(call)}
        parameters = [each for each in inputs.values() if isinstance(each, Parameter) and is_own(each, calls)]
        alike = [each for each in parameters if each.shape == weight.shape and each.dim() > 1]
        if len(alike) != 1 or calls[-1].number is None:
            return None
        others = [each for each in parameters if each is not alike[0]]
        found = Computed(weight, (*alike, *others), calls, self._largest(calls))
        try:
            return found if weight.is_floating_point() and found.is_in_place() else None
        except Exception:  # whatever the model's own calls raise when they are given other values
            return None

    def _largest(self, calls: Sequence[Call]) -> dict[int, LargestValue]:
        """Products ``u' (M v)`` with buffers ``u`` and ``v``."""
        found = {}
        for call in calls:
            sides = tuple(call.tensors())
            inner = [self._calls.get(id(each)) for each in sides] if call.name in _DOTS else []
            for place, product in enumerate(inner):
                if product is None or product.name != "mv" or len(inner) != 2:
                    continue
                matrix, right = product.tensors()
                left = sides[1 - place]
                if id(left) not in self._calls and id(right) not in self._calls:
                    found[id(call.results[0])] = LargestValue(
                        matrix, (self._source(left), self._source(right))
                    )
        return found

    def _source(self, tensor: Tensor) -> Tensor:
        """What a tensor is a copy of."""
        while id(tensor) in self._copies:
            tensor = self._copies[id(tensor)][1]
        return tensor


def _tensors_of(call: Call) -> list[Tensor]:
    found: list[Tensor] = []
    tree_map_only(Tensor, found.append, (call.args, call.kwargs))
    return found
