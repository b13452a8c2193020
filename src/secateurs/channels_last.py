"""Images with channels last in memory, the layout in which processors compute convolutions faster."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from secateurs.graph.running import call_model, modes_kept

_LAST = torch.channels_last


class ChannelsLast:
    """Lays out the kernels of two-dimensional convolutions channels last; what they give follows.

    Values are the same to rounding. A model that looks at the layout, as ``x.view(len(x), -1)`` of a map
    does, cannot run so: a pass of the first batch finds out, and such a model stays as it is. Leaving the
    context lays everything out as it was.

    Args:
        device: Where the models run.
        wanted: ``True`` or ``False`` to say so; ``None`` for where it is faster: on a CPU, and on a GPU in
            mixed precision.
        autocast: Gives the context in which they run.

    Example:
        >>> net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU())
        >>> images = torch.randn(2, 3, 8, 8)
        >>> with ChannelsLast(images.device) as layout:
        ...     layout.choose(images, net)
        ...     layout.is_on, net(images).is_contiguous(memory_format=torch.channels_last)
        (True, True)
        >>> net(images).is_contiguous()
        True
    """

    def __init__(
        self,
        device: torch.device,
        wanted: bool | None = None,
        autocast: Callable[[], contextlib.AbstractContextManager[Any]] = contextlib.nullcontext,
    ) -> None:
        self.is_on = False  # the models lie channels last
        self._device, self._autocast = device, autocast
        self.is_open = self._is_faster() if wanted is None else wanted  # there is something to choose
        self._changed: list[tuple[nn.Parameter, Tensor]] = []  # kernels, and the memory that they had

    def choose(
        self, inputs: Any, *models: nn.Module, trained: Iterable[nn.Parameter] = ()
    ) -> Exception | None:
        """On the first batch: lay out the models, if all of them run so.

        Args:
            inputs: What they are called with; of a tensor two examples are tried.
            models: The models, the one that trains first.
            trained: The parameters that it takes gradients of.

        Returns:
            What kept them from it, if anything did.
        """
        if not self.is_open:
            return None
        self.is_open = False
        kernels = [kernel for model in models for kernel in _kernels(model)]
        if not kernels:
            return None
        self._changed = [(kernel, kernel.data) for kernel in kernels]
        self._put_on()
        try:
            for model in models:
                self._try(model, inputs, list(trained) if model is models[0] else [])
        except Exception as error:
            self._take_off()
            self._changed = []
            return error
        self.is_on = True
        return None

    def like_kernels(self, tensors: dict[str, Any]) -> dict[str, Any]:
        """Tensors that belong to kernels, such as momenta, in the layout that these have now."""
        return {
            name: value.contiguous(memory_format=_LAST)
            if self.is_on and isinstance(value, Tensor) and value.dim() == 4
            else value
            for name, value in tensors.items()
        }

    def _is_faster(self) -> bool:
        with self._autocast():
            return self._device.type == "cpu" or (
                self._device.type == "cuda" and torch.is_autocast_enabled("cuda")
            )

    def _try(self, model: nn.Module, inputs: Any, trained: list[nn.Parameter]) -> None:
        """A pass forwards, and backwards to what is trained, which changes nothing."""
        some = inputs[:2] if isinstance(inputs, Tensor) else inputs
        devices = [self._device] if self._device.type == "cuda" else []
        with modes_kept(model), torch.random.fork_rng(devices=devices), self._autocast():
            model.eval()
            with torch.set_grad_enabled(bool(trained)):
                outputs = call_model(model, some)
            leaves = [
                each for each in tree_leaves(outputs) if isinstance(each, Tensor) and each.requires_grad
            ]
            if leaves:  # `grad` adds nothing to the parameters' own gradients
                total = torch.stack([leaf.float().sum() for leaf in leaves]).sum()
                torch.autograd.grad(total, trained, allow_unused=True)

    def __enter__(self) -> ChannelsLast:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._take_off()
        self._changed, self.is_on = [], False

    @contextlib.contextmanager
    def suspended(self) -> Iterator[None]:
        """Meanwhile everything lies as it did, with the values that it has now."""
        self._take_off()
        try:
            yield
        finally:
            self._put_on()

    def _put_on(self) -> None:
        for kernel, memory in self._changed:
            kernel.data = memory.contiguous(memory_format=_LAST)

    def _take_off(self) -> None:
        for kernel, memory in self._changed:
            if not torch.equal(memory, kernel.data):  # else nothing is written where it may not be
                memory.copy_(kernel.data)
            kernel.data = memory


def _kernels(model: nn.Module) -> list[nn.Parameter]:
    """The kernels of two-dimensional convolutions that do not lie so already and have memory of their own."""
    modules = list(model.modules())
    if any(hasattr(each, "_orig_mod") or each._compiled_call_impl is not None for each in modules):
        return []  # a compiled model would be compiled anew
    users = Counter(_memory(tensor) for tensor in (*model.parameters(), *model.buffers()))
    convolutions = (each for each in modules if isinstance(each, (nn.Conv2d, nn.ConvTranspose2d)))
    kernels = dict.fromkeys(each._parameters.get("weight") for each in convolutions)
    return [
        kernel
        for kernel in kernels
        if type(kernel) is nn.Parameter
        and not kernel.is_inference()
        and kernel.is_contiguous()
        and not kernel.is_contiguous(memory_format=_LAST)
        and users[_memory(kernel)] == 1
        and kernel.untyped_storage().nbytes() == kernel.nbytes
        and not (kernel.device.type == "cpu" and kernel.is_shared())  # other processes write there
    ]


def _memory(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr() if type(tensor) in (Tensor, nn.Parameter) else id(tensor)
