"""First-order Taylor expansion of the loss in what is read of a unit.

Removing a unit means that the weights behind it read zero instead of its activation ``z``. To first order
the loss then changes by ``-sum(z * dC/dz)``. Gradients are taken where consumers read, so that a unit with
several readers (a residual stream, a dense block) gets the sum over all of them, exactly.

Pooling between the activation and its reader changes nothing: max and average pooling keep
``sum(z * dC/dz)``. Only the number of positions ``M`` is that of the reader, a constant per layer,
which per-layer normalisation cancels.
"""

from __future__ import annotations

import torch
from torch import Tensor

from secateurs.criteria.protocol import Criterion, Reading, Weights, register
from secateurs.errors import ScoreError
from secateurs.graph.groups import Graph, Group


class _GatedProducts(Criterion):
    """Collects ``sum z * dC/dz`` for each example and unit of a batch."""

    needs_data = True
    normalization = "l2"

    def start(self, graph: Graph, device: torch.device) -> None:
        """Forget everything."""
        self._positions = torch.zeros(graph.units + 1, dtype=torch.float64, device=device)
        self._total = torch.zeros(graph.units + 1, dtype=torch.float64, device=device)
        self._batch: Tensor | None = None
        self._examples = 0
        self._batches = 0

    def observe(self, reading: Reading) -> None:
        """Add one reader's share of the products."""
        products = reading.per_example(reading.activation * reading.gradient)
        self._batch = products if self._batch is None else self._batch.add_(products)
        if not self._batches:
            self._positions = torch.maximum(self._positions, reading.positions())

    def end_batch(self, examples: int) -> None:
        """Fold the batch into the running sum."""
        if self._batch is None:
            return
        self._total += self._fold(self._batch / self._positions.clamp(min=1))
        self._batch = None
        self._examples += examples
        self._batches += 1

    def _fold(self, means: Tensor) -> Tensor:
        """Reduce ``(examples, units)`` products, averaged over positions, to ``(units,)``."""
        raise NotImplementedError

    def importance(self, group: Group, weights: Weights) -> Tensor:
        """The mean over all examples seen."""
        mine = slice(group.first, group.first + group.size)
        if not bool((self._positions[mine] > 0).all()):
            raise ScoreError(
                f"{self.name} needs activations that weights read, but group {group.name!r} has none",
                where=", ".join(part.parameter for part in group.slices),
                fix=f"plan with skip=[{group.name!r}], or use a criterion on weights such as 'l2'",
            )
        return self._total[mine].abs() / max(self._examples, 1)


@register
class Taylor(_GatedProducts):
    """The paper's criterion: ``mean over examples of | mean over space of z * dC/dz |``, per-layer l2.

    Mean over space, then absolute value, then mean over examples, with the gradient of each example's own
    loss. ``Theta / sqrt(sum Theta^2)`` per group makes layers comparable.

    References:
        Molchanov et al., Pruning Convolutional Neural Networks for Resource Efficient Inference,
        https://arxiv.org/abs/1611.06440
    """

    name = "taylor"

    def _fold(self, means: Tensor) -> Tensor:
        return means.abs().sum(0)


@register
class TaylorSigned(_GatedProducts):
    """The article's code: ``| sum over batches of the mean of z * dC/dz |``, per-layer l2.

    Contributions of opposite sign cancel over the data, which the paper's form avoids.

    References:
        Gildenblat, https://jacobgil.github.io/deeplearning/pruning-deep-learning
    """

    name = "taylor-signed"

    def _fold(self, means: Tensor) -> Tensor:
        return means.sum(0)
