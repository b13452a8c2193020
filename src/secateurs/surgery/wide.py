"""Running copies of a model in float64, all alike, so that two of them can be compared to rounding."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from secateurs.errors import VerifyError
from secateurs.graph.copying import copy_model, drop_foreign_hooks, tensors_of
from secateurs.graph.memos import memos_opened
from secateurs.graph.outputs import Returned
from secateurs.graph.running import Inputs, call_model, plain_kernels
from secateurs.surgery.decisions import Decisions

Forward: TypeAlias = Callable[[nn.Module, Inputs], Any]
_WIDER = {
    torch.float16: torch.float64,
    torch.bfloat16: torch.float64,
    torch.float32: torch.float64,
    torch.complex64: torch.complex128,
}


class WideMode(TorchDispatchMode):
    """Where a model asks for a narrow float it gets float64, so that nothing but rounding is lost."""

    supports_higher_order_operators = True

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        return self.run(func, args, widened(kwargs))

    def run(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Carry out one operator; subclasses do it in their own way."""
        return call_wide(func, args, kwargs)


def call_wide(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The result of an operator on wide floats, also where torch's own kernel takes only narrow ones."""
    if func is _GROUPED_PRODUCT and args[0].dtype == torch.float64:
        return _grouped_product(args[0], args[1], kwargs.get("offs", args[2] if len(args) > 2 else None))
    return func(*args, **kwargs)


_GROUPED_PRODUCT = getattr(getattr(torch.ops.aten, "_grouped_mm", None), "default", None)


def _grouped_product(a: Tensor, b: Tensor, ends: Tensor | None) -> Tensor:
    """Each run of rows of `a`, up to its end, times the matrix of its group in `b`; ``(groups, k, n)``."""
    if ends is None or a.dim() != 2 or b.dim() != 3:
        raise NotImplementedError("a grouped product of this form has no kernel for float64")
    out = a.new_zeros(a.shape[0], b.shape[2])
    start = 0
    for group, end in enumerate(ends.tolist()):
        out[start:end] = a[start:end] @ b[group]
        start = end
    return out


def widened(kwargs: Mapping[str, Any] | None) -> dict[str, Any]:
    """The keyword arguments of an operator call, with a wide dtype where a narrow one is asked for."""
    wide = dict(kwargs or {})
    if wide.get("dtype") in _WIDER:
        wide["dtype"] = _WIDER[wide["dtype"]]
    return wide


def in_wide(tensor: Tensor) -> Tensor:
    """Floats as float64, complex numbers as complex128, others as they are."""
    if tensor.is_complex():
        return tensor.to(torch.complex128)
    return tensor.double() if tensor.is_floating_point() else tensor


class _Deciding(WideMode):
    """Notes what operators decide by value, or decides as was noted before."""

    def __init__(self, decisions: Decisions, *, is_first: bool) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._decisions, self._is_first = decisions, is_first

    def run(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if self._is_first:
            return self._decisions.note(func, args, kwargs, call_wide(func, args, kwargs))
        return self._decisions.again(func, args, kwargs, lambda: call_wide(func, args, kwargs))


def plainly(model: nn.Module, inputs: Inputs) -> Any:
    """Call the model with every operator as it is."""
    with plain_kernels(), memos_opened(model), WideMode():  # type: ignore[no-untyped-call]
        return call_model(model, inputs)


def deciding(decisions: Decisions, *, is_first: bool) -> Forward:
    """A way to call two models alike: the second decides by value as the first did, where values agree."""

    def forward(model: nn.Module, inputs: Inputs) -> Any:
        with plain_kernels(), memos_opened(model), _Deciding(decisions, is_first=is_first):
            return call_model(model, inputs)

    return forward


def run_wide(
    model: nn.Module,
    inputs: Inputs,
    which: str,
    *,
    exchanged: Mapping[str, Tensor] | None = None,
    forward: Forward = plainly,
) -> list[Tensor]:
    """The outputs of a copy of a model in float64 and evaluation mode, with the same random numbers always.

    State that the model returns for itself is not among them.

    Args:
        model: The model; it is left as it is.
        inputs: Inputs with values; moved to the model's device.
        which: What to call the model in an error.
        exchanged: Other values for some of its tensors, by name.
        forward: How the copy is called.

    Raises:
        VerifyError: The model could not be run.
    """
    device = next((tensor.device for tensor in tensors_of(model).values()), torch.device("cpu"))
    duplicate = _double(model, exchanged or {})
    wide: Any = tree_map_only(
        Tensor,
        lambda t: in_wide(t.detach().to(device, copy=True)),
        dict(inputs) if isinstance(inputs, Mapping) else inputs,
    )
    try:
        with same_numbers(), _default_dtype(torch.float64), sdpa_kernel(SDPBackend.MATH):
            outputs = forward(duplicate, wide)
    except VerifyError:
        raise
    except Exception as error:
        raise VerifyError(f"{which} could not be run: {type(error).__name__}: {error}") from error
    return list(Returned.by(duplicate, outputs).tensors)


def _double(model: nn.Module, exchanged: Mapping[str, Tensor]) -> nn.Module:
    """A copy in evaluation mode and with wide tensors, without the user's hooks."""
    tensors = {name: exchanged.get(name, tensor).detach() for name, tensor in tensors_of(model).items()}
    duplicate = copy_model(model, {name: in_wide(tensor) for name, tensor in tensors.items()})
    drop_foreign_hooks(duplicate)
    return duplicate.eval()


@contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@contextmanager
def same_numbers() -> Iterator[None]:
    """The same random numbers in every run, and the state of the generators as before afterwards."""
    devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()
    with torch.random.fork_rng(devices=list(devices)):
        torch.manual_seed(0)
        yield
