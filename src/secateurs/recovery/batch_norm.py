"""Batch-norm re-estimation: the statistics of the layers behind a cut, taken anew from unlabelled data."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from secateurs.errors import TrainingError
from secateurs.graph.running import Inputs, call_model, modes_kept

if TYPE_CHECKING:
    from accelerate import Accelerator

_OPTIONS = ("training", "momentum", "eps")
_ARGUMENTS = {
    functional.batch_norm: ("input", "running_mean", "running_var", "weight", "bias", *_OPTIONS),
    torch.batch_norm: ("input", "weight", "bias", "running_mean", "running_var", *_OPTIONS),
}


def reestimate(
    model: nn.Module,
    means: Iterable[Tensor],
    batches: Iterable[Inputs],
    accelerator: Accelerator | None = None,
) -> list[Tensor]:
    """Give batch norms the mean and variance of what they see, as cumulative averages over all batches.

    They normalise by each batch meanwhile, as in training; everything else evaluates. Any module counts that
    calls ``torch.nn.functional.batch_norm``, torch's own or another.

    Args:
        model: The model.
        means: The running means of the batch norms that are to change; other tensors do no harm.
        batches: Inputs, where the model is.
        accelerator: Its processes share their averages.

    Returns:
        Those of the means that were changed, in the order in which the forward pass uses them.

    Raises:
        TrainingError: A batch is too small to have a variance.

    Example:
        >>> norm = nn.BatchNorm1d(1)
        >>> batches = [torch.tensor([[1.0], [3.0]]), torch.tensor([[5.0], [7.0]])]
        >>> _ = reestimate(norm, norm.buffers(), batches)
        >>> norm.running_mean.item(), norm.running_var.item()
        (4.0, 2.0)
    """
    seen = _Statistics(means)
    with modes_kept(model), torch.no_grad():
        model.eval()
        for inputs in batches:
            with seen:
                call_model(model, inputs)
    for average in seen.averages.values():
        average.write(accelerator)
    return [average.mean for average in seen.averages.values()]


class _Average:
    """The statistics of one batch norm: sums over its calls of the mean and the variance of each."""

    def __init__(self, mean: Tensor, var: Tensor) -> None:
        self.mean, self.var, self.calls = mean, var, 0
        self.sums = torch.zeros(2, len(mean), dtype=torch.float64, device=mean.device)

    def normalise(self, values: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
        """What a call gives in training, ``(N, C, ...)``; its mean and variance are taken in."""
        if values.numel() == len(self.mean):
            raise TrainingError(
                "a batch of one value for each channel has no variance", fix="pass larger batches"
            )
        mean, var = torch.zeros_like(self.mean), torch.zeros_like(self.var)
        out = functional.batch_norm(values, mean, var, weight, bias, training=True, momentum=1.0, eps=eps)
        self.sums += torch.stack([mean, var])
        self.calls += 1
        return out

    def write(self, accelerator: Accelerator | None) -> None:
        """Set the running statistics to the averages over all calls, of all processes."""
        both = torch.cat([self.sums.flatten(), self.sums.new_tensor([self.calls])])
        if accelerator is not None and accelerator.num_processes > 1:
            both = accelerator.reduce(both, "sum")
        mean, var = (both[:-1] / both[-1]).view(2, -1)
        self.mean.copy_(mean)
        self.var.copy_(var)


class _Statistics(TorchFunctionMode):
    """Meanwhile batch norms with some running means normalise by what they see, and it is averaged."""

    def __init__(self, means: Iterable[Tensor]) -> None:
        super().__init__()
        self._wanted = {id(mean): mean for mean in means}  # kept, so that no other tensor gets their ids
        self.averages: dict[int, _Average] = {}

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        given = kwargs or {}
        names = _ARGUMENTS.get(func)
        if names is None:
            return func(*args, **given)
        call = {"eps": 1e-5} | dict(zip(names, args, strict=False)) | given
        mean = call.get("running_mean")
        if mean is None or id(mean) not in self._wanted:
            return func(*args, **given)
        average = self.averages.setdefault(id(mean), _Average(mean, call["running_var"]))
        return average.normalise(call["input"], call.get("weight"), call.get("bias"), call["eps"])
