"""What makes importances of different groups comparable."""

from __future__ import annotations

from collections.abc import Callable, Mapping
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
        known = [*NORMALIZATIONS, "kind"]
        if self.base is not None and self.base not in known:
            raise UnknownNameError("normalization", self.base, known)

    def costs(self, graph: Graph) -> dict[str, float]:
        """What a unit of each group costs: the MACs that it saves, over the mean of all units."""
        macs = {group.name: graph.group_cost(group).macs for group in graph.groups}
        total = sum(macs[group.name] * group.size for group in graph.groups)
        mean = max(total / max(graph.units, 1), _TINY)
        return {name: cost / mean for name, cost in macs.items()}


Normalization: TypeAlias = str | FlopsPenalty | None


def by_kind(values: Mapping[str, Tensor], graph: Graph) -> dict[str, Tensor]:
    """Importances divided by the mean over all units of the same kind; as they are where there is one kind.

    Sizes of weights of different kinds say nothing of each other: a channel of a transformer's stream is made
    by dozens of matrices, a neuron by one row, and by size alone no channel would ever leave.

    Example:
        >>> import secateurs
        >>> from torch import nn
        >>> net = nn.Sequential(nn.Conv2d(1, 2, 2), nn.Flatten(), nn.Linear(2, 2), nn.Linear(2, 1))
        >>> graph = secateurs.trace(net, torch.zeros(1, 1, 2, 2))
        >>> values = by_kind({"0": torch.tensor([10., 30.]), "2": torch.tensor([1., 2.])}, graph)
        >>> values["0"].tolist(), [round(value, 2) for value in values["2"].tolist()]
        ([0.5, 1.5], [0.67, 1.33])
    """
    kinds: dict[str, list[Tensor]] = {}
    for name, each in values.items():
        kinds.setdefault(graph.by_name[name].kind, []).append(each)
    if len(kinds) < 2:
        return dict(values)
    means = {kind: torch.cat(found).abs().mean().clamp(min=_TINY) for kind, found in kinds.items()}
    return {name: each / means[graph.by_name[name].kind] for name, each in values.items()}


def normalization_names() -> list[str]:
    """Every name that ``score(normalization=...)`` takes."""
    return sorted([*NORMALIZATIONS, "kind", "flops"])


def normalized(
    values: Mapping[str, Tensor], normalization: Normalization, criterion: Criterion, graph: Graph
) -> dict[str, Tensor]:
    """Importances by group name, made comparable.

    Args:
        values: As the criterion gives them.
        normalization: A name, a penalty, or None for the criterion's own.
        criterion: The criterion.
        graph: The graph, for kind and cost of its units.
    """
    if isinstance(normalization, FlopsPenalty) or normalization == "flops":
        penalty = normalization if isinstance(normalization, FlopsPenalty) else FlopsPenalty()
        costs = penalty.costs(graph)
        before = normalized(values, penalty.base, criterion, graph)
        return {name: each - penalty.strength * costs[name] for name, each in before.items()}
    name = normalization or criterion.normalization
    if name == "kind":
        return by_kind(values, graph)
    return {group: NORMALIZATIONS[name](each) for group, each in values.items()}


def check_normalization(normalization: Normalization) -> None:
    """Refuse a normalisation that is not known.

    Raises:
        UnknownNameError: There is none of this name.
    """
    if isinstance(normalization, str) and normalization not in normalization_names():
        raise UnknownNameError("normalization", normalization, normalization_names())
