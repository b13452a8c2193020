"""Filter pruning via the geometric median, as a soft loop: the most replaceable filters are set to zero."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import ClassVar

import torch
from torch import Tensor

from secateurs.criteria.protocol import Weights, producers, unit_rows
from secateurs.errors import TrainingError
from secateurs.graph.groups import Graph, Group
from secateurs.recovery.sparsify.base import check_share
from secateurs.recovery.sparsify.soft import SoftPruning


class GeometricMedian(SoftPruning):
    """Soft filter pruning of what the other filters can replace: least ``sum over j of ||F_i - F_j||_2``.

    First ``1 - rate_norm`` of the filters go by their norm, as in :class:`SoftPruning`; then ``rate_dist`` of
    all go by their distance to those that are left. With the default ``rate_norm=1`` distance alone decides.
    Filters of zero lie close together, so what is zero tends to stay it; rank by ``l2`` at the end.

    Args:
        graph: The graph of the model that is trained.
        rate_dist: The share of the units of every group that goes by distance.
        rate_norm: The share of the units that stays when norm decides, in (0, 1].
        bounded: See :class:`SoftPruning`.
        kinds: Kinds of groups to act on; see :func:`secateurs.plan`.
        skip: Glob patterns of groups to leave alone.

    Raises:
        TrainingError: A rate is out of range, or both together leave no unit.

    Example:
        >>> import secateurs
        >>> from torch import nn
        >>> net = nn.Sequential(nn.Linear(1, 4, bias=False), nn.Linear(4, 1))
        >>> _ = net[0].weight.data.copy_(torch.tensor([[0.1], [4.9], [5.0], [9.0]]))
        >>> graph = secateurs.trace(net, torch.zeros(2, 1))
        >>> GeometricMedian(graph, rate_dist=0.5).least(net).groups[0].removed  # not the smallest
        (1, 2)

    References:
        He et al., Filter Pruning via Geometric Median for Deep Convolutional Neural Networks Acceleration,
        https://arxiv.org/abs/1811.00250. Units with several producers are compared over all of them.
    """

    name: ClassVar[str] = "fpgm"

    def __init__(
        self,
        graph: Graph,
        *,
        rate_dist: float = 0.4,
        rate_norm: float = 1.0,
        bounded: bool = True,
        kinds: Collection[str] | None = None,
        skip: Sequence[str] = (),
    ) -> None:
        check_share("rate_dist", rate_dist)
        if not 0 < rate_norm <= 1:
            raise TrainingError(f"`0 < rate_norm <= 1` must hold, got rate_norm={rate_norm}")
        together = rate_dist + 1 - rate_norm
        if together >= 1:
            raise TrainingError(
                f"`rate_dist < rate_norm` must hold, or no unit is left; got rate_dist={rate_dist} and "
                f"rate_norm={rate_norm}"
            )
        super().__init__(graph, rate=together, bounded=bounded, kinds=kinds, skip=skip)
        self.rate_dist, self.rate_norm = rate_dist, rate_norm

    def importance(self, group: Group, weights: Weights) -> Tensor:
        """Distance sums among the filters that norm leaves; below all of them, those that norm takes."""
        rows = [unit_rows(weights[part.parameter], part) for part in producers(group, self.name)]
        filters = torch.cat(rows, 1).double()  # (units, weights of one)
        norms = torch.linalg.vector_norm(filters, dim=1)
        first = int(group.size * (1 - self.rate_norm) + 1e-9)
        left = norms.argsort(stable=True)[first:]
        values: Tensor = norms - norms.max() - 1  # negative
        values[left] = torch.cdist(filters[left], filters[left]).sum(1)
        return values
