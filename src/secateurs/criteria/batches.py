"""What one batch of data is, and what a loss of it must be."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map_only

from secateurs.errors import ScoreError

LossFunction: TypeAlias = Callable[[Any, Any], Tensor]


def batch_on(batch: Any, device: torch.device, *, labelled: bool = True) -> tuple[Any, Any, int]:
    """A batch as inputs and targets on a device, with its number of examples.

    Args:
        batch: A pair of inputs and targets.
        device: Where its tensors are wanted.
        labelled: Whether it has to be a pair; otherwise what is neither tuple nor list is taken for inputs.

    Raises:
        ScoreError: It is no pair, or its inputs hold no tensor, or no example.

    Example:
        >>> inputs, targets, examples = batch_on([torch.zeros(3, 2), torch.ones(3)], torch.device("cpu"))
        >>> tuple(inputs.shape), examples
        ((3, 2), 3)
    """
    inputs, targets = tree_map_only(Tensor, lambda t: t.to(device), _pair(batch, labelled))
    first = next((leaf for leaf in tree_leaves(inputs) if isinstance(leaf, Tensor)), None)
    if first is None or first.dim() == 0:
        raise ScoreError(
            "the inputs of a batch hold no tensor whose first dimension counts examples",
            fix="pass a loader that yields (inputs, targets)",
        )
    if not len(first):
        raise ScoreError("a batch holds no example", fix="pass a loader that yields (inputs, targets)")
    return inputs, targets, len(first)


def loss_of(loss_fn: LossFunction, outputs: Any, targets: Any, examples: int) -> Tensor:
    """The loss of a batch: one finite number.

    Raises:
        ScoreError: It is something else.
    """
    loss = loss_fn(outputs, targets)
    if not isinstance(loss, Tensor) or loss.numel() != 1:
        shape = tuple(loss.shape) if isinstance(loss, Tensor) else type(loss).__name__
        raise ScoreError(
            f"loss_fn must give one number, the mean over the batch; got {shape}", fix="loss.mean()"
        )
    if not bool(torch.isfinite(loss)):
        raise ScoreError(
            f"the loss is {loss.item()} on a batch of {examples} examples", fix="check data and weights"
        )
    return loss


def _pair(batch: Any, labelled: bool) -> tuple[Any, Any]:
    if isinstance(batch, (tuple, list)) and len(batch) == 2:
        return batch[0], batch[1]
    if not labelled and not isinstance(batch, (tuple, list)):
        return batch, None
    raise ScoreError(
        f"each batch is a pair (inputs, targets), got {type(batch).__name__}"
        + (f" of {len(batch)}" if isinstance(batch, (tuple, list)) else ""),
        fix="wrap your loader: ((b['image'], b['label']) for b in loader)",
    )
