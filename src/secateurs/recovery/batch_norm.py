"""Batch-norm re-estimation: the statistics of the layers behind a cut, taken anew from unlabelled data."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from secateurs.errors import TrainingError
from secateurs.graph.copying import modules_of
from secateurs.graph.running import Inputs, call_model, modes_kept

if TYPE_CHECKING:
    from accelerate import Accelerator


def norms_of(model: nn.Module, means: Iterable[Tensor]) -> dict[str, _BatchNorm]:
    """The batch norms of a model, of any variant, that hold one of these running means; by name."""
    wanted = {id(mean) for mean in means}
    return {
        name: module
        for name, module in modules_of(model)
        if isinstance(module, _BatchNorm) and id(module.running_mean) in wanted
    }


def reestimate(
    model: nn.Module,
    norms: Iterable[_BatchNorm],
    batches: Iterable[Inputs],
    accelerator: Accelerator | None = None,
) -> None:
    """Give batch norms the mean and variance of what they see, as cumulative averages over all batches.

    They normalise by each batch meanwhile, as in training; everything else evaluates.

    Args:
        model: The model.
        norms: Those of its batch norms that are to change.
        batches: Inputs, where the model is.
        accelerator: Its processes share their averages.

    Raises:
        TrainingError: A batch is too small to have a variance.

    Example:
        >>> norm = nn.BatchNorm1d(1)
        >>> reestimate(norm, [norm], [torch.tensor([[1.0], [3.0]]), torch.tensor([[5.0], [7.0]])])
        >>> norm.running_mean.item(), norm.running_var.item(), norm.momentum
        (4.0, 2.0, 0.1)
    """
    chosen = list(norms)
    with modes_kept(model), torch.no_grad(), _cumulative(chosen):
        model.eval()
        for norm in chosen:
            norm.train()
        count = 0
        for inputs in batches:
            try:
                call_model(model, inputs)
            except ValueError as error:
                if "more than 1 value per channel" not in str(error):
                    raise
                raise TrainingError(
                    "a batch of one value for each channel has no variance", fix="pass larger batches"
                ) from error
            count += 1
        if accelerator is not None and accelerator.num_processes > 1:
            _share(chosen, count, accelerator)


@contextlib.contextmanager
def _cumulative(norms: list[_BatchNorm]) -> Iterator[None]:
    """Averages over all batches alike instead of the last ones; momentum and count are put back."""
    kept = [(norm.momentum, norm.num_batches_tracked) for norm in norms]
    zero = torch.zeros((), dtype=torch.long)
    try:
        for norm in norms:
            norm.momentum = None
            norm.num_batches_tracked = zero.clone()
        yield
    finally:
        for norm, (momentum, counted) in zip(norms, kept, strict=True):
            norm.momentum, norm.num_batches_tracked = momentum, counted


def _share(norms: list[_BatchNorm], count: int, accelerator: Accelerator) -> None:
    """The averages over the batches of all processes."""
    for norm in norms:
        for average in (norm.running_mean, norm.running_var):
            assert average is not None
            both = torch.cat([average.double() * count, average.new_tensor([count]).double()])
            both = accelerator.reduce(both, "sum")
            average.copy_(both[:-1] / both[-1])
