"""Importance by what the consumers of units can still give without them.

Both criteria look at the outputs of all that reads a group's units: the next layer, or all layers behind a
residual stream. `Reconstruction` lets the readers' weights make up for what has left, as
`secateurs.recovery.repair` does afterwards; `ThiNet` leaves them as they are.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from secateurs.criteria.consumers import Consumers
from secateurs.criteria.elimination import Elimination, Regression, drop, eliminate
from secateurs.criteria.observed import Batch
from secateurs.criteria.protocol import Criterion, Weights, register
from secateurs.graph.groups import Graph, Group


class _Elimination(Criterion):
    """One unit after the other leaves; importance is the error once a unit and all before it are gone."""

    needs_data = True
    readings = "none"
    has_curves = True
    _at_points: bool
    _centred: bool

    def __init__(self, *, seed: int = 0) -> None:
        self._seed = seed

    def start(self, graph: Graph, device: torch.device) -> None:
        """Forget everything."""
        self._consumers = Consumers(graph, device, at_points=self._at_points, seed=self._seed)
        self._found: dict[str, Elimination] = {}

    def begin_batch(self, batch: Batch) -> None:
        """A forward pass of its own."""
        self._consumers.read(batch)

    def combine(self) -> None:
        """Add up what several processes have seen."""
        self._consumers.combine()

    def importance(self, group: Group, weights: Weights) -> Tensor:
        """The error once a unit and all that leave before it are gone; ``(units,)``, rising in that order."""
        return self._eliminated(group).importance()

    def curve(self, group: Group) -> Tensor:
        """The error after 0, 1, ... units have left; ``(units,)``."""
        return self._eliminated(group).errors[:-1]

    def _eliminated(self, group: Group) -> Elimination:
        if group.name not in self._found:
            problems = self._consumers.regressions(group, centred=self._centred)
            self._found[group.name] = self._order(problems, group.size)
        return self._found[group.name]

    def _order(self, problems: Sequence[Regression], size: int) -> Elimination:
        raise NotImplementedError


@register
class Reconstruction(_Elimination):
    """Backward elimination: the unit leaves whose absence the other units can make up for best.

    Of all that reads the units, the best weights and bias for what is left follow from the covariance of what
    is read (see `secateurs.criteria.elimination`). The error counts where the network goes on from it: after
    the batch norm and the residual sum that take a reader's output, as a share of the variance of the value
    there. So errors of all groups are in one measure, which `plan(..., allocation="error")` spends a budget
    by; no labels and no gradients are needed. Errors of several readers add up. Where activations are
    multiplied, as queries with keys, it is the share of the products' variance that is missed, times the
    share of the stream's variance that comes of them. Where a repair would exchange units for combinations
    of them, as those of heads, it is what the best combinations miss. Covariances of fewer than two positions
    a column are shrunk (`secateurs.recovery.moments.shrunk`).

    The errors are those of one group alone, with all others whole. Of a weight that is used twice both uses
    are refitted apart. What mixes units before a reader, such as a layer norm, is taken as it is.

    Args:
        ridge: Added to each covariance, as a share of its mean diagonal.
        seed: Which positions of large maps are read.

    Example:
        >>> from torch import nn
        >>> import secateurs
        >>> net = nn.Sequential(nn.Linear(3, 8), nn.Linear(8, 2))  # two outputs: six units are too many
        >>> graph = secateurs.trace(net, torch.zeros(1, 3))
        >>> scores = secateurs.score(net, graph, "reconstruction", data=[torch.randn(64, 3)])
        >>> (scores.curves["0"] < 1e-3).tolist()
        [True, True, True, True, True, True, True, False]
    """

    name = "reconstruction"
    _at_points, _centred = True, True

    def __init__(self, *, ridge: float = 1e-6, seed: int = 0) -> None:
        super().__init__(seed=seed)
        self._ridge = ridge

    def _order(self, problems: Sequence[Regression], size: int) -> Elimination:
        return eliminate(problems, size, ridge=self._ridge)


@register
class ThiNet(_Elimination):
    """The unit leaves whose contribution to its readers' outputs is missed least; weights stay as they are.

    Greedily, the set of units that have left is to have the least mean square of ``sum_u W_u x_u``, as a
    share of that of all units; over all outputs, and all positions that are sampled. It is of the kind of
    ThiNet (ICCV 2017), and no re-implementation: the choice of samples and the refit that follow
    there are not part of it.

    Example:
        >>> from torch import nn
        >>> import secateurs
        >>> net = nn.Sequential(nn.Linear(2, 3, bias=False), nn.Linear(3, 1))
        >>> with torch.no_grad():
        ...     _ = net[0].weight.copy_(torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, 0.0]]))
        ...     _ = net[1].weight.copy_(torch.tensor([[1.0, 2.0, 3.0]]))
        >>> graph = secateurs.trace(net, torch.zeros(1, 2))
        >>> data = [torch.tensor([[1.0, 1.0], [1.0, -1.0]])]
        >>> secateurs.score(net, graph, "thinet", data=data).curves["0"].round(decimals=6).tolist()
        [0.0, 0.0, 0.2]
    """

    name = "thinet"
    _at_points, _centred = False, False

    def _order(self, problems: Sequence[Regression], size: int) -> Elimination:
        return drop(problems, size)
