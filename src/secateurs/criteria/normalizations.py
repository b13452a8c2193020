"""What makes importances of different groups comparable."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor

from secateurs.criteria.protocol import Criterion
from secateurs.errors import ScoreError, UnknownNameError
from secateurs.graph.groups import Graph

_TINY = torch.finfo(torch.float64).tiny

NORMALIZATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "none": lambda values: values,
    "l2": lambda values: values / values.norm().clamp(min=_TINY),
    "l1": lambda values: values / values.abs().sum().clamp(min=_TINY),
    "max": lambda values: values / values.abs().max().clamp(min=_TINY),
    "mean": lambda values: values / values.abs().mean().clamp(min=_TINY),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class FlopsPenalty:
    """``importance - strength * cost of the unit``: of two units of one importance the dearer one leaves.

    The paper states ``Theta - lambda * Theta_flops`` with ``lambda = 1e-3``. Here the second term is what
    removing the unit alone saves, in multiply-accumulates, divided by the mean of that over all units of the
    model. So it has no dimension: a unit of average cost loses `strength`, whatever the size of the model.

    Args:
        strength: The paper's lambda, 0 or more.
        base: The normalisation before it; the criterion's own if None.

    Example:
        >>> import torch, secateurs
        >>> from torch import nn
        >>> net = nn.Sequential(nn.Conv2d(1, 2, 3), nn.Conv2d(2, 6, 3), nn.Flatten(), nn.Linear(6 * 16, 2))
        >>> graph = secateurs.trace(net, torch.zeros(1, 1, 8, 8))
        >>> penalty = FlopsPenalty(strength=0.1)
        >>> [round(share, 2) for share in penalty.costs(graph).values()]
        [2.21, 0.6]
        >>> plain = secateurs.score(net, graph, "l2")
        >>> dearer = secateurs.score(net, graph, "l2", normalization=penalty)
        >>> round((plain["0"] - dearer["0"]).mean().item(), 3)
        0.221

    References:
        Molchanov et al., Pruning Convolutional Neural Networks for Resource Efficient Inference,
        https://arxiv.org/abs/1611.06440
    """

    strength: float = 1e-3
    base: str | None = None

    def __post_init__(self) -> None:
        if not self.strength >= 0:
            raise ScoreError(f"strength >= 0 must hold, got strength={self.strength}")
        if self.base is not None and self.base not in NORMALIZATIONS:
            raise UnknownNameError("normalization", self.base, NORMALIZATIONS)

    def costs(self, graph: Graph) -> dict[str, float]:
        """What a unit of each group costs: the MACs that it saves, over the mean of all units."""
        macs = {group.name: graph.group_cost(group).macs for group in graph.groups}
        total = sum(macs[group.name] * group.size for group in graph.groups)
        mean = max(total / max(graph.units, 1), _TINY)
        return {name: cost / mean for name, cost in macs.items()}


Normalization: TypeAlias = str | FlopsPenalty | None


def normalization_names() -> list[str]:
    """Every name that ``score(normalization=...)`` takes."""
    return sorted([*NORMALIZATIONS, "flops"])


def normalizer(
    normalization: Normalization, criterion: Criterion, graph: Graph
) -> Callable[[str, Tensor], Tensor]:
    """A function ``(group name, importances) -> importances``.

    Args:
        normalization: A name, a penalty, or None for the criterion's own.
        criterion: The criterion.
        graph: The graph, for the cost of its units.

    Raises:
        UnknownNameError: There is no such normalisation.
    """
    if normalization == "flops":
        normalization = FlopsPenalty()
    if isinstance(normalization, FlopsPenalty):
        divide = NORMALIZATIONS[normalization.base or criterion.normalization]
        strength, costs = normalization.strength, normalization.costs(graph)
        return lambda name, values: divide(values) - strength * costs[name]
    name = normalization or criterion.normalization
    if name not in NORMALIZATIONS:
        raise UnknownNameError("normalization", name, normalization_names())
    divide = NORMALIZATIONS[name]
    return lambda _, values: divide(values)
