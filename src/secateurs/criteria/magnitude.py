"""Importance from weights alone."""

from __future__ import annotations

import torch
from torch import Tensor

from secateurs.criteria.protocol import (
    Criterion,
    Weights,
    producers,
    register,
    unit_rows,
    unit_sums,
    weights_of_unit,
)
from secateurs.errors import UnrankedError
from secateurs.graph.groups import Group, Slice


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
    normalization = "kind"

    def importance(self, group: Group, weights: Weights) -> Tensor:
        """``sum |w|`` over the producers' weights of each unit."""
        sums = [unit_sums(weights[part.parameter], part, 1) for part in producers(group, self.name)]
        return torch.stack(sums).sum(0)


@register
class L2(Criterion):
    """The Euclidean norm of a filter's weights, over all producers of the group together."""

    name = "l2"
    normalization = "kind"

    def importance(self, group: Group, weights: Weights) -> Tensor:
        """``sqrt(sum w^2)`` over the producers' weights of each unit."""
        sums = [unit_sums(weights[part.parameter], part, 2) for part in producers(group, self.name)]
        return torch.stack(sums).sum(0).sqrt()


@register
class MeanWeight(Criterion):
    """The mean of absolute weights of a filter, ``mean |w|``: the article's wording.

    Inside a layer it ranks as `L1` does. Across layers it does not favour large filters.

    Example:
        >>> import secateurs
        >>> from torch import nn
        >>> net = nn.Sequential(nn.Linear(2, 2, bias=False), nn.Linear(2, 1))
        >>> _ = net[0].weight.data.copy_(torch.tensor([[1., -2.], [0., 3.]]))
        >>> secateurs.score(net, secateurs.trace(net, torch.zeros(1, 2)), "mean-weight")["0"].tolist()
        [1.5, 1.5]

    References:
        Gildenblat, https://jacobgil.github.io/deeplearning/pruning-deep-learning
    """

    name = "mean-weight"
    normalization = "kind"

    def importance(self, group: Group, weights: Weights) -> Tensor:
        """``sum |w|`` over the producers' weights of each unit, divided by their number."""
        parts = producers(group, self.name)
        sums = [unit_sums(weights[part.parameter], part, 1) for part in parts]
        return torch.stack(sums).sum(0) / sum(
            weights_of_unit(weights[part.parameter], part) for part in parts
        )


@register
class BnScale(Criterion):
    """The size of a unit's scale in the batch norm behind it: network slimming.

    A unit with several scales (a residual stream, a dense block) has their mean. The scales say nothing
    unless training pulled them down, as `secateurs.recovery.sparsify.Slimming` does. All layers are compared
    as they
    are: the paper's one global threshold.

    Example:
        >>> import secateurs
        >>> from torch import nn
        >>> net = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3), nn.Linear(3, 1))
        >>> _ = net[1].weight.data.copy_(torch.tensor([.5, -2., 1.]))
        >>> secateurs.score(net, secateurs.trace(net, torch.zeros(2, 2)), "bn-scale")["0"].tolist()
        [0.5, 2.0, 1.0]

    References:
        Liu et al., Learning Efficient Convolutional Networks through Network Slimming,
        https://arxiv.org/abs/1708.06519
    """

    name = "bn-scale"

    def importance(self, group: Group, weights: Weights) -> Tensor:
        """The mean of ``|gamma|`` over all batch norms that a unit passes."""
        scales = [part for part in group.slices if _is_scale(part, weights)]
        if not scales:
            raise UnrankedError(
                f"{self.name} reads the scales of batch norms, but group {group.name!r} has none",
                where=", ".join(part.parameter for part in group.slices),
                fix=f"plan with skip=[{group.name!r}], or use another criterion such as 'l2'",
            )
        sums = [unit_sums(weights[part.parameter], part, 1) for part in scales]
        return torch.stack(sums).sum(0) / int(sum(part.indices.shape[1] for part in scales))


def _is_scale(part: Slice, weights: Weights) -> bool:
    """Whether a slice is the weight of a batch norm, known by its running variance."""
    module, _, leaf = part.parameter.rpartition(".")
    return leaf == "weight" and part.role == "carrier" and f"{module}.running_var" in weights


@register
class Fpgm(Criterion):
    """How far a filter is from the others, ``sum over j of ||F_i - F_j||_2``.

    What the others can replace leaves first. Distances are taken inside a group, over all producers of a unit
    together. They cost a product of all pairs.

    Example:
        >>> import secateurs
        >>> from torch import nn
        >>> net = nn.Sequential(nn.Linear(1, 3, bias=False), nn.Linear(3, 1))
        >>> _ = net[0].weight.data.copy_(torch.tensor([[1.], [2.], [5.]]))
        >>> secateurs.score(net, secateurs.trace(net, torch.zeros(1, 1)), "fpgm")["0"].tolist()
        [5.0, 4.0, 7.0]

    References:
        He et al., Filter Pruning via Geometric Median for Deep Convolutional Neural Networks Acceleration,
        https://arxiv.org/abs/1811.00250
    """

    name = "fpgm"
    normalization = "kind"

    def importance(self, group: Group, weights: Weights) -> Tensor:
        """The sum of each unit's distances to all others."""
        parts = producers(group, self.name)
        filters = torch.cat([unit_rows(weights[part.parameter], part) for part in parts], 1)
        filters = filters.to(torch.promote_types(filters.dtype, torch.float32))
        filters -= filters.mean(0)  # distances stay, and lose fewer digits
        return torch.cdist(filters, filters).sum(1)


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
