"""A running average of the weights, which is often better than the weights themselves."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from torch import nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from secateurs.recovery.surroundings import weights_of


class Average:
    """An exponential moving average of a model's weights and statistics.

    The decay grows from 0.1 to its full value, ``min(decay, (1 + n) / (10 + n))`` after ``n`` steps, so that
    a short training is averaged over its own length and not over the weights that it began with.

    Args:
        model: The model at the start.
        decay: How much of the average stays at each step, in (0, 1).

    Example:
        >>> import torch
        >>> net = nn.Linear(1, 1, bias=False)
        >>> average = Average(net, decay=0.5)
        >>> _ = torch.nn.init.zeros_(net.weight)
        >>> average.update(net)
        >>> with average.worn(net):
        ...     bool(net.weight.abs() > 0)
        True
        >>> net.weight.item()
        0.0
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay, self.updates = decay, 0
        self.tensors = weights_of(model)

    def update(self, model: nn.Module) -> None:
        """Take in the weights after a step of the optimizer."""
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        now = model.state_dict()
        averaged = [name for name, tensor in now.items() if tensor.is_floating_point()]
        blend = get_ema_multi_avg_fn(decay)
        blend([self.tensors[name] for name in averaged], [now[name] for name in averaged], self.updates)
        for name in now.keys() - set(averaged):
            self.tensors[name].copy_(now[name])
        self.updates += 1

    @contextlib.contextmanager
    def worn(self, model: nn.Module) -> Iterator[None]:
        """The model with the averaged weights, and afterwards with its own."""
        own = weights_of(model)
        model.load_state_dict(self.tensors)
        try:
            yield
        finally:
            model.load_state_dict(own)
