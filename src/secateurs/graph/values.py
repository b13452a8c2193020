"""Values on the meta device: what `forward` reads of tensors that have none.

Some code reads the values of tensors: whether a mask is full, how many boxes are left, which expert is asked.
Tensors that are computed from the inputs, from buffers and from constants alone keep their values beside
their shapes, as long as they are small. Where code asks for a value that depends on weights, the model is run
once on the real example, and what it answered there is answered again on the meta device.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from secateurs.graph.operators import Operator, operator
from secateurs.graph.shapes import compute as compute_shape

_VALUE = "_secateurs_value"
_LARGEST = 1 << 20
_aten = torch.ops.aten


class UnknownValueError(Exception):
    """The code asks for a value that depends on weights; it must be run with data first."""


def value_of(tensor: Tensor) -> Tensor | None:
    """The value of a tensor on the meta device, a CPU tensor, where it is known."""
    return getattr(tensor, _VALUE, None)


def with_value(tensor: Tensor, value: Tensor | None) -> Tensor:
    """Give a meta tensor a value, unless it is large or of another shape."""
    if value is not None and value.numel() <= _LARGEST and value.shape == tensor.shape:
        setattr(tensor, _VALUE, value)
    return tensor


def as_meta(tensor: Tensor) -> Tensor:
    """A tensor on the meta device that remembers the value of the given one, if that is small."""
    if tensor.is_meta:
        return tensor
    blank = torch.empty_like(tensor, device="meta")
    if tensor.numel() > _LARGEST or type(tensor) not in (Tensor, torch.nn.Parameter):
        return blank
    return with_value(blank, tensor.detach().cpu().clone())


def listed(tensor: Tensor) -> Any:
    """What ``tensor.tolist()`` returns, asked for one by one: torch itself reads behind all operators."""
    if tensor.dim() == 0:
        return tensor.item()
    return [listed(each) for each in tensor.unbind(0)]


def one_hot(tensor: Tensor, num_classes: int = -1) -> Tensor:
    """``torch.nn.functional.one_hot``, which looks at the values of tensors with data alone."""
    count = num_classes if num_classes >= 0 else int(tensor.max().item()) + 1
    return (tensor[..., None] == torch.arange(count, device=tensor.device)).to(torch.int64)


class Answers:
    """What the real model answered each time its code asked for a value, to be given again in that order.

    Args:
        given: The answers of a `Recording`, each with its operator; None where none was made, so that an
            unknown value is an error.
    """

    def __init__(self, given: Sequence[tuple[Any, Any]] | None) -> None:
        self._given: dict[Any, list[Any]] | None = None if given is None else {}
        for func, answer in given or ():
            assert self._given is not None
            self._given.setdefault(func, []).append(answer)
        self._next: dict[Any, int] = {}

    def answer(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The result of an operator whose result depends on values: known ones, else the recorded."""
        place = self._next.get(func, 0)
        self._next[func] = place + 1
        if self._given is not None and place < len(self._given.get(func, ())):
            return _as_result(self._given[func][place])
        known = _known((args, kwargs))
        if known is None:
            raise UnknownValueError(f"{func} depends on the values of tensors")
        return _as_result(func(*known[0], **known[1]))

    def places(self, mask: Tensor) -> Tensor:
        """The places where a mask is true; ``(places, dimensions)``."""
        found: Tensor = self.answer(_aten.nonzero.default, (mask,), {})
        return found


class Everything(Answers):
    """Answers as if all were chosen that may be: every place of a mask is true, and every question.

    So code runs that the example passes over, such as an expert of a mixture to which no row goes. What
    cannot be answered so, such as a number that depends on weights, is an error.

    Example:
        >>> mask = torch.empty(3, dtype=torch.bool, device="meta")
        >>> tuple(Everything().places(mask).shape)
        (3, 1)
    """

    def __init__(self) -> None:
        super().__init__(None)

    def answer(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The result of an operator whose result depends on values."""
        tensor = next(iter(_tensors(args)), None)
        if tensor is not None and value_of(tensor) is None:
            if func is _aten.nonzero.default and tensor.numel() <= _LARGEST:
                return _as_result(torch.ones(tensor.shape, dtype=torch.bool).nonzero())
            if func is _aten._local_scalar_dense.default and tensor.dtype == torch.bool:
                return True
        return super().answer(func, args, kwargs)


def compute(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], answers: Answers) -> Any:
    """Carry out one operator on meta tensors, and on their values where all are known."""
    if asks(func, args):
        return answers.answer(func, args, kwargs)
    about = operator(func)
    known = None if _leads_with_unknown(args) else _known_call(about, args, kwargs)
    out = compute_shape(func, args, kwargs)
    if known is not None:
        for result, value in zip(_tensors(out), _tensors(func(*known[0], **known[1])), strict=True):
            if getattr(result, _VALUE, None) is not value:
                with_value(result, value)
    elif about.is_mutable:
        for tensor in _tensors(out):
            if value_of(tensor) is not None:
                delattr(tensor, _VALUE)
    return out


def _leads_with_unknown(args: tuple[Any, ...]) -> bool:
    """Whether the first argument is a tensor without a value, as it is for nearly every operator."""
    return bool(args) and isinstance(args[0], Tensor) and not hasattr(args[0], _VALUE)


def asks(func: Any, args: tuple[Any, ...]) -> bool:
    """Whether an operator's result depends on values, so that its shape alone does not tell."""
    if not operator(func).asks:
        return False
    if func is _aten.index.Tensor:
        return any(_is_mask(each) for each in args[1])
    return True


def _is_mask(index: Any) -> bool:
    return isinstance(index, Tensor) and index.dtype in (torch.bool, torch.uint8)


def without_masks(
    func: Any, args: tuple[Any, ...], places: Callable[[Tensor], Tensor] = torch.nonzero
) -> tuple[Any, ...]:
    """The arguments of a call that picks by masks, each exchanged for the places where it is true.

    Args:
        func: The operator.
        args: Its arguments.
        places: Finds the places of a mask, as `torch.nonzero` does.
    """
    if func is not _aten.index.Tensor or not asks(func, args):
        return args
    found: list[Any] = []
    for index in args[1]:
        if _is_mask(index):
            found += places(index).unbind(1)
        else:
            found.append(index)
    return args[0], found


def _known_call(about: Operator, args: Any, kwargs: dict[str, Any]) -> tuple[Any, Any] | None:
    """The arguments of a call with values in place of meta tensors; None where one is not known."""
    if about.draws:
        return None
    if about.makes and not _tensors((args, kwargs)):
        return args, {**kwargs, "device": torch.device("cpu")}
    return _known((args, kwargs)) if about.takes_tensors else None


def _known(call: tuple[Any, dict[str, Any]]) -> tuple[Any, Any] | None:
    tensors = _tensors(call)
    if not tensors or any(getattr(tensor, _VALUE, None) is None for tensor in tensors):
        return None
    args, kwargs = tree_map(lambda leaf: getattr(leaf, _VALUE) if isinstance(leaf, Tensor) else leaf, call)
    if kwargs.get("device") is not None:
        kwargs["device"] = torch.device("cpu")
    return args, kwargs


def _tensors(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    return [leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor)]


def _as_result(answer: Any) -> Any:
    return tree_map(lambda leaf: as_meta(leaf) if isinstance(leaf, Tensor) else leaf, answer)


class Recording(TorchDispatchMode):
    """Notes what a model with data answers each time its code asks for a value."""

    supports_higher_order_operators = True

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.answers: list[tuple[Any, Any]] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        if asks(func, args):
            if func is _aten.index.Tensor:
                self.answers += [
                    (_aten.nonzero.default, index.nonzero()) for index in args[1] if _is_mask(index)
                ]
            else:
                kept = tree_map(lambda leaf: leaf.detach().clone() if isinstance(leaf, Tensor) else leaf, out)
                self.answers.append((func, kept))
        return out
