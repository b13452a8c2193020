"""Running a model: on which inputs, in which mode, with which kernels, with or without data."""

from __future__ import annotations

import contextlib
import copy
import itertools
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import FrameType, ModuleType
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map, tree_map_only

from secateurs.graph.copying import (
    copy_model,
    drop_foreign_hooks,
    is_parameter,
    modules_of,
    registered_tensors,
    tensors_of,
)
from secateurs.graph.einsum import einsum
from secateurs.graph.exchange import write_out
from secateurs.graph.inference import as_normal
from secateurs.graph.opened import attention_opened
from secateurs.graph.operators import operator
from secateurs.graph.packed import call_tensors, tensors_in
from secateurs.graph.packing import ON_CPU, pack, pad
from secateurs.graph.recurrent import call_in_few_steps, steps_of
from secateurs.graph.values import (
    Answers,
    Recording,
    as_meta,
    compute,
    listed,
    one_hot,
    value_of,
    with_value,
    without_masks,
)

Inputs: TypeAlias = "Tensor | Sequence[Any] | Mapping[str, Any]"


def call_model(model: nn.Module, inputs: Inputs, more: Mapping[str, Any] | None = None) -> Any:
    """Call a model on a tensor, a sequence of positional or a mapping of keyword arguments.

    What a model changes in its arguments, such as a cache of keys and values, changes in a copy: the next
    call begins where this one did.

    Args:
        model: The model.
        inputs: Its inputs.
        more: Further keyword arguments, which win over those of `inputs` and are handed over as they are.
    """
    inputs = as_normal(inputs)
    if isinstance(inputs, Mapping):
        return model(**{**{name: _unspent(value) for name, value in inputs.items()}, **(more or {})})
    if isinstance(inputs, Tensor):
        return model(inputs, **(more or {}))
    return model(*(_unspent(value) for value in inputs), **(more or {}))


def _unspent(value: Any, tensor: Callable[[Tensor], Tensor] | None = None) -> Any:
    """The same value, its containers made anew and its objects copied; tensors outside of objects are not.

    Args:
        value: What to copy.
        tensor: What to put in the place of every tensor, inside of objects too.
    """
    return tree_map(lambda leaf: _copied(leaf, tensor), value)


def _copied(leaf: Any, tensor: Callable[[Tensor], Tensor] | None) -> Any:
    if isinstance(leaf, Tensor):
        return tensor(leaf) if tensor else leaf
    if isinstance(leaf, (nn.Module, type, ModuleType)):
        return leaf
    memo: dict[int, Any] = {}
    for held in tensors_in(leaf):
        if tensor or held.is_meta or held.requires_grad:
            memo[id(held)] = tensor(held) if tensor else held
    try:
        return copy.deepcopy(leaf, memo)
    except Exception:  # an object that holds what cannot be copied, such as a lock, is handed over itself
        return leaf


def empty_copy(model: nn.Module, shapes: Mapping[str, Sequence[int]] | None = None) -> nn.Module:
    """A copy of a model on the meta device, without data and the user's hooks, its attention in steps.

    Args:
        model: The model; it is read only.
        shapes: Other shapes for some parameters or buffers, by name.
    """
    empty: dict[str, Tensor] = {}
    held, registered = tensors_of(model), registered_tensors(model)
    for name, tensor in held.items():
        shape = (shapes or {}).get(name, tensor.shape)
        blank = torch.empty(shape, dtype=tensor.dtype, device="meta")
        if is_parameter(tensor):
            blank = nn.Parameter(blank, requires_grad=False)
        elif not (tensor.is_meta or (tensor.is_floating_point() and name in registered)):
            with_value(blank, tensor.detach().cpu().clone())
        empty[name] = blank
    duplicate = copy_model(model, empty, held=held)
    drop_foreign_hooks(duplicate)
    write_out(duplicate)
    return duplicate


def device_of(model: nn.Module) -> torch.device:
    """The device of a model's first tensor; the CPU where it has none, or none with data."""
    first = next(itertools.chain(model.parameters(), model.buffers()), None)
    device = torch.device("cpu") if first is None else first.device
    return torch.device("cpu") if device.type == "meta" else device


def has_values(model: nn.Module) -> bool:
    """Whether a model's weights have values; on the meta device they have shapes alone."""
    return not any(tensor.is_meta for tensor in itertools.chain(model.parameters(), model.buffers()))


class TracedCalls(TorchFunctionMode):
    """Functions of torch act as they did in the trace, for a model that is run without data again.

    Recurrent layers take few steps, and einsum goes by its letters. Tensors say that they are on the model's
    own device, so that code takes its usual path.

    Args:
        device: That device.
    """

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self._device = device

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        steps = steps_of(func, args)
        out = call_in_few_steps(func, args, steps) if steps else as_steps(func)(*args, **(kwargs or {}))
        if func == DEVICE and out.type == "meta":
            return torch.device("cpu") if hasattr(args[0], ON_CPU) else self._device
        return out


DEVICE = Tensor.device.__get__

_AS_STEPS: dict[Any, Callable[..., Any]] = {
    torch.einsum: einsum,
    Tensor.tolist: listed,
    functional.one_hot: one_hot,
    torch._pack_padded_sequence: pack,
    torch._pad_packed_sequence: pad,
}


def as_steps(function: Any) -> Callable[..., Any]:
    """What to call in the place of a torch function that hides its steps; mostly the function itself."""
    steps: Callable[..., Any] = _AS_STEPS.get(function, function)
    return steps


def recorded_values(model: nn.Module, inputs: Inputs) -> list[tuple[Any, Any]]:
    """What the model answers on the real example each time its code asks for the value of a tensor."""
    twin = copy_model(model, share=True).eval()
    drop_foreign_hooks(twin)
    write_out(twin)
    placed = tree_map_only(Tensor, lambda t: t.to(device_of(model)), inputs)
    with plain_kernels(), TracedCalls(device_of(model)), Recording() as recording:
        call_model(twin, placed)
    answers: list[tuple[Any, Any]] = recording.answers
    return answers


@contextlib.contextmanager
def modes_kept(*models: nn.Module) -> Iterator[None]:
    """Whatever mode (training or evaluation) each module is put in meanwhile, put it back afterwards."""
    modes = {module: module.training for model in models for module in model.modules()}
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode


@contextlib.contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """No parameter asks for a gradient meanwhile."""
    needed = {parameter: parameter.requires_grad for parameter in model.parameters()}
    try:
        for parameter in needed:
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter, flag in needed.items():
            parameter.requires_grad_(flag)


@contextlib.contextmanager
def attention_as_written() -> Iterator[None]:
    """Attention runs the operators as written: no fused fast path, and no function that hides its steps."""
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with attention_opened():
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)


@contextlib.contextmanager
def plain_kernels() -> Iterator[None]:
    """No gradients, attention as written, and nothing compiled: a compiled part shows no operators."""
    with attention_as_written(), _nothing_compiled(), torch.no_grad():
        yield


def _nothing_compiled() -> contextlib.AbstractContextManager[Any]:
    if _COMPILERS.isdisjoint(sys.modules):  # importing the compiler takes longer than most traces
        return contextlib.nullcontext()
    stance: contextlib.AbstractContextManager[Any] = torch.compiler.set_stance("force_eager")
    return stance


_COMPILERS = frozenset(("torch._dynamo", "torch.nn.attention.flex_attention"))


def to_meta(value: Any) -> Any:
    """The same structure with every tensor on the meta device."""
    return tree_map_only(Tensor, as_meta, value)


def without_data(inputs: Any) -> Any:
    """A model's inputs without data, the tensors inside of objects too; nothing of the user's is shared."""
    return _unspent(dict(inputs) if isinstance(inputs, Mapping) else inputs, as_meta)


def in_evaluation(model: nn.Module) -> nn.Module:
    """The model, put in evaluation mode where a part of it is not."""
    return model.eval() if any(module.training for _, module in modules_of(model)) else model


EDITED = " with attributes "  # in the name of a file of rewritten code: what follows tells apart
_EMPTY = torch.ops.aten.empty.memory_format


class MetaMode(TorchDispatchMode):
    """Keeps every operator on the meta device, whatever device the model's code asks for.

    Args:
        answers: What to say where the code asks for values.
    """

    supports_higher_order_operators = True

    def __init__(self, answers: Answers | None = None) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.answers = answers or Answers(None)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs) if kwargs else {}
        if func is _EMPTY and args[0] == [0]:  # torch's batch norm makes one at each call
            return torch.empty(0, dtype=kwargs.get("dtype"), device="meta")
        if kwargs.get("device") is not None:
            kwargs["device"] = torch.device("meta")
            kwargs.pop("pin_memory", None)
        for tensor in call_tensors(args, kwargs):
            if not tensor.is_meta:
                args, kwargs = to_meta(args), to_meta(kwargs)
                break
        return self.run(func, without_masks(func, args, self.answers.places), kwargs)

    def run(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Carry out one operator; subclasses add what they want to know."""
        return self.compute(func, args, kwargs)

    def compute(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The results of one operator, without data."""
        return compute(func, args, kwargs, self.answers)


def numbers_of(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[float, ...]:
    """The numbers that an operator computes with: floats, and where it works point by point integers too.

    Tensors of no dimensions whose value is known are numbers as well.
    """
    kinds = operator(func).numbers
    found: list[Any] = []
    for value in (*args, *kwargs.values()) if kwargs else args:
        if isinstance(value, Tensor):
            if value.dim() == 0 and (known := value_of(value)) is not None and not known.is_complex():
                found.append(float(known))
        elif isinstance(value, kinds) and not isinstance(value, bool):
            found.append(value)
    return tuple(found)


def source_line() -> str:
    """The innermost line of the user's model that is being run, as ``file.py:12 in forward``."""
    frame = model_frame()
    if frame is None:
        return ""
    module = frame.f_globals.get("__name__", "")
    short = module.replace(".", "/") + ".py" if module not in ("__main__", "") else frame.f_code.co_filename
    return f"{short.partition(EDITED)[0]}:{frame.f_lineno} in {frame.f_code.co_name}"


def model_frame() -> FrameType | None:
    """The innermost frame that runs the user's model, and not torch or this library."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        module = frame.f_globals.get("__name__", "")
        outside = module == "torch" or module.startswith(("torch.", "secateurs."))
        file = frame.f_code.co_filename
        if not outside and (not file.startswith("<") or file.startswith("<ipython")):
            return frame
        frame = frame.f_back
    return None
