"""Training images with channels last, the memory layout in which processors compute convolutions faster."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from secateurs.errors import TrainingError
from secateurs.graph.running import call_model, modes_kept

if TYPE_CHECKING:
    from accelerate import Accelerator

_PLAIN, _LAST = torch.contiguous_format, torch.channels_last
_REFUSED = "view size is not compatible"  # torch's words for `view` on a layout that it does not fit


class ChannelsLast:
    """Lays out the kernels of two-dimensional convolutions channels last; what they give follows.

    Values are the same to rounding. A model that looks at the layout, as ``x.view(len(x), -1)`` of a map
    does, cannot run so: a pass of the first batch finds out, and such a model stays as it is.

    Args:
        wanted: ``True`` or ``False`` to say so; ``None`` for where it is faster: on a CPU, and on a GPU in
            mixed precision.
        engine: Says where and in which precision models run.
    """

    def __init__(self, wanted: bool | None, engine: Accelerator) -> None:
        here = engine.device.type
        usual = here == "cpu" or (here == "cuda" and engine.mixed_precision in ("bf16", "fp16"))
        self.is_on = False
        self._wanted, self._engine = wanted, engine
        self._is_open = usual if wanted is None else wanted
        self._changed: list[nn.Parameter] = []

    def choose(
        self, inputs: Any, model: nn.Module, teacher: nn.Module | None, optimizer: torch.optim.Optimizer
    ) -> None:
        """On the first batch: lay out the model that trains and its teacher, if both run so.

        Raises:
            TrainingError: It was asked for, and a model does not.
        """
        if not self._is_open:
            return
        self._is_open = False
        self._changed = [kernel for each in (model, teacher) if each for kernel in _kernels(each)]
        if not self._changed:
            return
        _lay_out(self._changed, _LAST)
        try:
            self._try(model, inputs, trained=[each for each in model.parameters() if each.requires_grad])
            if teacher is not None:
                self._try(teacher, inputs, trained=[])
        except RuntimeError as error:
            self.undo()
            if self._wanted:
                raise TrainingError(
                    f"the model does not run with channels last: {error}", fix="Recipe(channels_last=False)"
                ) from error
            return
        self.is_on = True
        for kept in optimizer.state.values():
            kept |= {
                key: value.contiguous(memory_format=_LAST)
                for key, value in kept.items()
                if isinstance(value, Tensor) and value.dim() == 4
            }

    def _try(self, model: nn.Module, inputs: Any, trained: list[nn.Parameter]) -> None:
        """A pass forwards, and backwards to what is trained, which changes nothing."""
        some = inputs[:2] if isinstance(inputs, Tensor) else inputs
        devices = [self._engine.device] if self._engine.device.type == "cuda" else []
        with modes_kept(model), torch.random.fork_rng(devices=devices), self._engine.autocast():
            model.eval()
            with torch.set_grad_enabled(bool(trained)):
                outputs = call_model(model, some)
            leaves = [
                each for each in tree_leaves(outputs) if isinstance(each, Tensor) and each.requires_grad
            ]
            if leaves:  # `grad` adds nothing to the parameters' own gradients
                torch.autograd.grad(
                    torch.stack([leaf.float().sum() for leaf in leaves]).sum(), trained, allow_unused=True
                )

    @contextlib.contextmanager
    def blamed(self) -> Iterator[None]:
        """An error that says what to do where a step, and not the trial, finds that a model does not run so.

        Raises:
            TrainingError: It does not.
        """
        try:
            yield
        except RuntimeError as error:
            if not (self.is_on and _REFUSED in str(error)):
                raise
            raise TrainingError(
                f"in training mode the model does not run with channels last: {error}",
                fix="Recipe(channels_last=False)",
            ) from error

    def undo(self) -> None:
        """Lay the models out as they were."""
        _lay_out(self._changed, _PLAIN)
        self._changed, self.is_on = [], False


def _kernels(model: nn.Module) -> list[nn.Parameter]:
    """The kernels of two-dimensional convolutions that do not lie so already."""
    convolutions = (each for each in model.modules() if isinstance(each, (nn.Conv2d, nn.ConvTranspose2d)))
    kernels = (each._parameters.get("weight") for each in convolutions)
    return [each for each in kernels if each is not None and not each.is_contiguous(memory_format=_LAST)]


def _lay_out(kernels: list[nn.Parameter], layout: torch.memory_format) -> None:
    for kernel in kernels:
        kernel.data = kernel.data.contiguous(memory_format=layout)
