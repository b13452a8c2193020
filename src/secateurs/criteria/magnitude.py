"""Importance from weights alone."""

from __future__ import annotations

import torch
from torch import Tensor

from secateurs.criteria.protocol import Criterion, Weights, producers, register, unit_sums
from secateurs.graph.groups import Group


@register
class L1(Criterion):
    """The sum of absolute weights of a filter: ``s_j = sum_l sum |K_l|``.

    In a group with several producers (the convolutions of a residual stream) the sums are added.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> import secateurs
        >>> net = nn.Sequential(nn.Linear(2, 3, bias=False), nn.Linear(3, 1))
        >>> _ = net[0].weight.data.copy_(torch.tensor([[1., -1.], [0., 3.], [.5, 0.]]))
        >>> graph = secateurs.trace(net, torch.zeros(1, 2))
        >>> secateurs.score(net, graph, "l1")["0"].tolist()
        [2.0, 3.0, 0.5]

    References:
        Li et al., Pruning Filters for Efficient ConvNets, https://arxiv.org/abs/1608.08710
    """

    name = "l1"

    def importance(self, group: Group, weights: Weights) -> Tensor:
        """``sum |w|`` over the producers' weights of each unit."""
        sums = [unit_sums(weights[part.parameter], part, 1) for part in producers(group, self.name)]
        return torch.stack(sums).sum(0)


@register
class L2(Criterion):
    """The Euclidean norm of a filter's weights, over all producers of the group together."""

    name = "l2"

    def importance(self, group: Group, weights: Weights) -> Tensor:
        """``sqrt(sum w^2)`` over the producers' weights of each unit."""
        sums = [unit_sums(weights[part.parameter], part, 2) for part in producers(group, self.name)]
        return torch.stack(sums).sum(0).sqrt()


@register
class Random(Criterion):
    """Uniformly random importance: the baseline that every criterion must beat.

    Args:
        seed: The same seed gives the same importances, whatever the global random state.
    """

    name = "random"

    def __init__(self, seed: int = 0) -> None:
        self._seed = seed

    def importance(self, group: Group, weights: Weights) -> Tensor:
        """Independent draws from [0, 1)."""
        generator = torch.Generator().manual_seed(self._seed * 1_000_003 + group.first)
        return torch.rand(group.size, generator=generator, dtype=torch.float64)
