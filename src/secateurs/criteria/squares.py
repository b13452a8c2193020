"""Squares of first-order terms: the two forms of 2019, and the Fisher information of a gate.

A gate is a factor of 1 on all that is read of a unit. Its gradient is ``sum z * dC/dz``, and it is the same
before and behind a ReLU and pooling, so that a gate behind the batch norm needs no place of its own.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from secateurs.criteria.observed import Batch
from secateurs.criteria.protocol import Criterion, Weights, producers, register, unit_sums
from secateurs.criteria.taylor import GateCriterion
from secateurs.graph.groups import Graph, Group


@register
class Taylor2019(Criterion):
    """The weight form of 2019: ``sum over the filter's weights of (dC/dw * w)^2``, mean over batches.

    The gradient is that of a batch's mean loss, so the size of the batches matters. Layers are compared as
    they are. In a group with several producers their sums are added. The paper smooths over training batches
    with a momentum of 0.9; here all batches of one pass count alike.

    Example:
        >>> import secateurs
        >>> from torch import nn
        >>> net = nn.Sequential(nn.Linear(1, 2, bias=False), nn.Linear(2, 1, bias=False))
        >>> for layer in net:
        ...     _ = layer.weight.data.copy_(torch.tensor([1., 2.]).view_as(layer.weight))
        >>> graph, data = secateurs.trace(net, torch.zeros(1, 1)), [(torch.ones(1, 1), None)]
        >>> scores = secateurs.score(net, graph, "taylor-2019", data=data, loss_fn=lambda out, _: out.sum())
        >>> scores["0"].tolist()
        [1.0, 16.0]

    References:
        Molchanov et al., Importance Estimation for Neural Network Pruning, https://arxiv.org/abs/1906.10771
    """

    name = "taylor-2019"
    needs_data = True
    readings = "none"
    weight_gradients = True

    def start(self, graph: Graph, device: torch.device) -> None:
        """Forget everything."""
        self._graph = graph
        self._total = torch.zeros(graph.units, dtype=torch.float64, device=device)
        self._batches = torch.zeros((), dtype=torch.float64, device=device)

    def observe_gradients(self, gradients: Weights, weights: Weights, batch: Batch) -> None:
        """Add the squared products of one batch."""
        squares: dict[str, Tensor] = {}
        for group in self._graph.groups:
            mine = self._total[group.first : group.first + group.size]
            for part in producers(group, self.name):
                name = part.parameter
                if name in gradients:  # a buffer has none, and no effect that training could change
                    if name not in squares:
                        squares[name] = gradients[name] * weights[name].detach()
                    mine += unit_sums(squares[name], part, 2)
        self._batches += 1

    def sums(self) -> Sequence[Tensor]:
        """Total and number of batches."""
        return self._total, self._batches

    def importance(self, group: Group, weights: Weights) -> Tensor:
        """The mean over all batches."""
        return self._total[group.first : group.first + group.size] / self._batches.clamp(min=1)


@register
class Taylor2019Gate(GateCriterion):
    """The gate form of 2019: the squared gradient of a gate behind the batch norm, mean over batches.

    ``(dC/dg)^2`` of a batch's mean loss, with ``dC/dg = sum z * dC/dz``; for a batch norm's output that is
    ``g_gamma gamma + g_beta beta``. Layers are compared as they are. In a residual stream gradients of all
    blocks add up in the gate that they share, and the paper divides by the number of blocks: so do we, taking
    all producers but one, which begins the stream, for blocks.

    References:
        Molchanov et al., Importance Estimation for Neural Network Pruning, https://arxiv.org/abs/1906.10771
    """

    name = "taylor-2019-gate"
    normalization = "none"

    def start(self, graph: Graph, device: torch.device) -> None:
        """Forget everything."""
        super().start(graph, device)
        self._batches = torch.zeros_like(self._examples)

    def fold(self, sums: Tensor, positions: Tensor) -> Tensor:
        """The squared gradient of the batch's mean loss."""
        self._batches += 1
        return sums.mean(0).square()

    def sums(self) -> Sequence[Tensor]:
        """Those of every criterion on gates, and the number of batches."""
        return *super().sums(), self._batches

    def importance(self, group: Group, weights: Weights) -> Tensor:
        """The mean over all batches, shared among the blocks of a stream."""
        blocks = max(len(group.by_role("producer")) - 1, 1)
        return self.mean(group) * self._examples / self._batches.clamp(min=1) / blocks


@register
class Fisher(GateCriterion):
    """The Fisher information of a gate: ``1/2 mean over examples of (sum z * dC/dz)^2``.

    At a minimum of the loss it stands for the second derivative of the loss in the gate, so it forecasts what
    removing the unit costs to second order. It is the form of 2019 with the gradient of each example.

    References:
        LeCun et al., Optimal Brain Damage, for the second-order forecast; Molchanov et al.,
        https://arxiv.org/abs/1906.10771, for the squared gradients of single examples
    """

    name = "fisher"
    normalization = "none"

    def fold(self, sums: Tensor, positions: Tensor) -> Tensor:
        """Squares, example by example."""
        return sums.square().sum(0) / 2
