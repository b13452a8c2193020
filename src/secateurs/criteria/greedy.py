"""Importance from weights without the inputs that have left: Li et al.'s greedy selection."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from secateurs.criteria.protocol import Criterion, WeightFunction, resolve
from secateurs.errors import ScoreError
from secateurs.graph.copying import tensors_of
from secateurs.graph.groups import Graph, Group

RemovedUnits = Mapping[str, Sequence[int] | npt.NDArray[np.int64]]


def greedy(
    model: nn.Module, graph: Graph, criterion: str | Criterion | WeightFunction
) -> Callable[[Group, RemovedUnits], Tensor]:
    """A criterion on weights that leaves out the kernels on input maps that are gone, for `secateurs.plan`.

    Li et al. rank a layer's filters by ``sum |K|``. *Independently* of other layers all kernels of a filter
    count; *greedily* those on input maps that were removed in earlier layers do not, since they leave anyway.
    Here an earlier layer is a group whose units the forward pass reads before, and a kernel is whatever reads
    a unit: it counts as zero. So it fits every criterion on weights for which zeros add nothing.

    Args:
        model: The model.
        graph: Its graph.
        criterion: A name such as ``"l1"``, a `Criterion` or a function; one that needs no data.

    Returns:
        ``(group, units that have left by group name) -> importances``, to be passed to `secateurs.plan` as
        ``rescore``.

    Raises:
        ScoreError: The criterion needs data.

    Example:
        >>> import secateurs
        >>> net = nn.Sequential(nn.Linear(1, 2, bias=False), nn.Linear(2, 2, bias=False), nn.Linear(2, 1))
        >>> _ = net[0].weight.data.copy_(torch.tensor([[1.], [2.]]))
        >>> _ = net[1].weight.data.copy_(torch.tensor([[9., 1.], [0., 3.]]))
        >>> graph = secateurs.trace(net, torch.zeros(1, 1))
        >>> scores = secateurs.score(net, graph, "l1")
        >>> half = {"shares": {"*": 0.5}}
        >>> [cut.removed for cut in secateurs.plan(graph, scores, **half).groups]
        [(0,), (1,)]
        >>> rescore = greedy(net, graph, "l1")
        >>> [cut.removed for cut in secateurs.plan(graph, scores, rescore=rescore, **half).groups]
        [(0,), (0,)]

    References:
        Li et al., Pruning Filters for Efficient ConvNets, https://arxiv.org/abs/1608.08710
    """
    name, rule = resolve(criterion)
    if rule.needs_data:
        raise ScoreError(
            f"greedy selection ranks by weights alone, but {name} needs data",
            fix='a criterion such as "l1" or "l2", or selection="independent"',
        )
    weights = {key: tensor.detach() for key, tensor in tensors_of(model).items()}

    def importance(group: Group, removed: RemovedUnits) -> Tensor:
        return rule.importance(group, _without(weights, graph, removed))

    return importance


def _without(weights: dict[str, Tensor], graph: Graph, removed: RemovedUnits) -> dict[str, Tensor]:
    """The weights with zeros where they read units that have left."""
    changed = dict(weights)
    for name, units in removed.items():
        for part in graph.by_name[name].slices:
            if part.consumes:
                places = torch.from_numpy(part.indices[np.asarray(units, np.int64)].reshape(-1))
                tensor = changed[part.parameter]
                changed[part.parameter] = tensor.index_fill(part.dim, places.to(tensor.device), 0)
    return changed
