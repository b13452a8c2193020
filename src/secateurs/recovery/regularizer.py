"""What acts on the weights during training beside the loss: the hook for training towards sparsity."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from secateurs.progress import State


class Regularizer:
    """Pulls at the weights while :func:`~secateurs.recovery.finetune` trains; subclass it.

    Every method does nothing by default. What one changes must follow from the model, from ``epochs_done``
    and from what :meth:`state` holds, so that a resumed run ends with the same bits, and all processes of one
    training with the same weights.

    Example:
        >>> import torch
        >>> from secateurs.recovery import Recipe, finetune
        >>> class PullToZero(Regularizer):
        ...     def after_backward(self, model, epochs_done):
        ...         for parameter in model.parameters():
        ...             parameter.grad += 10 * parameter.detach()
        >>> net, batch = nn.Linear(4, 2), (torch.randn(8, 4), torch.arange(8) % 2)
        >>> before = net.weight.detach().norm()
        >>> _ = finetune(net, [batch], recipe=Recipe(epochs=20, lr=0.01), regularizer=PullToZero())
        >>> bool(net.weight.norm() < 0.5 * before)
        True
    """

    def start(self, model: nn.Module) -> None:
        """Training begins; a resumed run calls this before it takes up weights and :meth:`load_state`."""

    def after_backward(self, model: nn.Module, epochs_done: float) -> None:
        """The gradients of the loss are complete and clipped; add the penalty's to them.

        Args:
            model: The model, not wrapped; a parameter that the loss does not reach has no gradient.
            epochs_done: Where training is, as :meth:`Recipe.lr_at` takes it.
        """

    def after_step(self, model: nn.Module) -> None:
        """The optimizer has moved the weights."""

    def after_epoch(self, model: nn.Module, epoch: int) -> None:
        """An epoch, counted from 1, is over; the validation and the checkpoint see what this leaves."""

    def facts(self, model: nn.Module) -> Mapping[str, Any]:
        """What to tell of an epoch, such as the value of the penalty; goes into its event."""
        return {}

    def state(self) -> State:
        """What :meth:`load_state` needs beside the weights."""
        return State({}, {})

    def load_state(self, state: State) -> None:
        """Go on from what :meth:`state` gave."""
