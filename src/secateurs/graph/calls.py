"""The calls of torch functions that a tracer sees, each around the operators that it consists of."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from secateurs.graph.memos import memos_opened
from secateurs.graph.packing import ON_CPU
from secateurs.graph.recurrent import steps_of
from secateurs.graph.running import DEVICE, as_steps, plain_kernels

if TYPE_CHECKING:
    from secateurs.graph.tracing import Tracer

_SHAPE = Tensor.shape.__get__  # type: ignore[attr-defined]
_LIKE = {  # a tensor that stands for its shape
    Tensor.view_as: Tensor.view,
    Tensor.reshape_as: Tensor.reshape,
    Tensor.expand_as: Tensor.expand,
}


def is_numbered(func: Any) -> bool:
    """Whether a torch function call counts as one of a forward pass.

    Attributes of tensors do not: a recurrent layer whose weights were exchanged, as in the trace, looks at
    their data types once more than the model itself will.
    """
    return getattr(func, "__name__", "") != "__get__"


@contextlib.contextmanager
def watched(tracer: Tracer, model: nn.Module) -> Iterator[None]:
    """Let a tracer see every torch function and every operator that a model calls meanwhile."""
    with plain_kernels(), memos_opened(model), _Calls(tracer), tracer:
        yield


class _Calls(TorchFunctionMode):
    """Tells the tracer which torch function the operators belong to."""

    def __init__(self, tracer: Tracer) -> None:
        super().__init__()
        self._tracer = tracer

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if is_numbered(func):
            self._tracer.sign_call(func, args, kwargs)
        if func in _LIKE and isinstance(other := args[1] if len(args) > 1 else kwargs.get("other"), Tensor):
            func, args, kwargs = _LIKE[func], (args[0], self._tracer.lengths(other, other.shape)), {}
        self._tracer.enter_call(func, args, kwargs)
        steps = steps_of(func, args)
        called = as_steps(func)
        self._tracer.acts_on_calls |= called is not func
        out = self._tracer.recur(func, args, steps) if steps else called(*args, **kwargs)
        self._tracer.leave_call(func, args, kwargs, out)
        if func in (Tensor.numel, torch.numel, Tensor.nelement):
            return self._tracer.count(args[0] if args else kwargs["input"])
        if func == DEVICE and out.type == "meta":
            self._tracer.acts_on_calls = True
            return torch.device("cpu") if hasattr(args[0], ON_CPU) else self._tracer.device
        if func == _SHAPE:
            return self._tracer.lengths(args[0], out)
        if func is Tensor.size:
            return self._tracer.lengths(args[0], out, args[1] if len(args) > 1 else kwargs.get("dim"))
        return out
