"""The calls that a forward pass makes, to number those of another pass alike.

What is known of a pass goes by the numbers of its calls. Where a network chooses by its activations, as a
mixture does that passes over experts without a token, another batch may leave some calls out or make more.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from difflib import SequenceMatcher
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from secateurs.graph.calls import is_numbered
from secateurs.graph.copying import tensors_of
from secateurs.graph.packed import call_tensors
from secateurs.graph.running import Inputs, call_model

NOWHERE = -1  # the number of a call that the other pass does not make

Signature = tuple[Any, ...]  # the name of a call, and which parameters it is given


class Signatures:
    """Tells the calls of one model's passes apart, as far as names and parameters do.

    Args:
        model: The model.
    """

    def __init__(self, model: nn.Module) -> None:
        self._storages = {_memory(tensor): name for name, tensor in tensors_of(model).items()}

    def of(self, func: Any, operands: Sequence[Tensor]) -> Signature:
        """The signature of a call that is given some tensors."""
        names = ((each, self._storages.get(_memory(each))) for each in operands)
        places = ((name, each.storage_offset()) for each, name in names if name is not None)
        return getattr(func, "__name__", str(func)), *places


class CallPath(TorchFunctionMode):
    """The signatures of all numbered calls of one pass.

    Args:
        model: The model, in evaluation mode.
        inputs: What it is called with.
        mode: What sees the calls first, such as a mode in which some consist of several.

    Attributes:
        calls: Their signatures, in their order.
    """

    def __init__(
        self, model: nn.Module, inputs: Inputs, mode: AbstractContextManager[Any] | None = None
    ) -> None:
        super().__init__()
        self.calls: list[Signature] = []
        self._signatures = Signatures(model)
        with torch.no_grad(), self, mode or nullcontext():
            call_model(model, inputs)

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if is_numbered(func):
            self.calls.append(self._signatures.of(func, call_tensors(args, kwargs)))
        return func(*args, **kwargs)


def numbers_along(calls: Sequence[Signature], known: Sequence[Signature]) -> list[int] | None:
    """For each call of a pass the number of the same call in a known one; None where both are the same.

    Args:
        calls: The signatures of the pass.
        known: Those of the known one.

    Example:
        >>> known = [("any",), ("linear", ("a", 0)), ("any",), ("linear", ("b", 0)), ("add",)]
        >>> numbers_along(known[:1] + known[2:], known)  # expert "a" has no token
        [0, 2, 3, 4]
        >>> numbers_along([*known, ("mul",)], known)
        [0, 1, 2, 3, 4, -1]
    """
    if list(calls) == list(known):
        return None
    numbers = [NOWHERE] * len(calls)
    for own, other, count in SequenceMatcher(None, calls, known, autojunk=False).get_matching_blocks():
        numbers[own : own + count] = range(other, other + count)
    return numbers


def _memory(tensor: Tensor) -> int | None:
    """Where a tensor and all its views lie, on the meta device too; None for one inside of `torch.vmap`."""
    try:
        return int(tensor.untyped_storage()._cdata)
    except NotImplementedError:
        return None
