"""First-order Taylor expansion of the loss in what is read of a unit.

Removing a unit means that the weights behind it read zero instead of its activation ``z``. To first order
the loss then changes by ``-sum(z * dC/dz)``. Gradients are taken where consumers read, so that a unit with
several readers (a residual stream, a dense block) gets the sum over all of them, exactly.

Pooling between the activation and its reader changes nothing: max and average pooling keep
``sum(z * dC/dz)``. Only the number of positions ``M`` is that of the reader, a constant per layer,
which per-layer normalisation cancels.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from secateurs.criteria.observed import Reading
from secateurs.criteria.protocol import Criterion, Weights, register
from secateurs.errors import UnrankedError
from secateurs.graph.groups import Graph, Group


class GateCriterion(Criterion):
    """Collects one number for each example and unit of a batch, a sum over all readers."""

    needs_data = True
    normalization = "l2"

    def start(self, graph: Graph, device: torch.device) -> None:
        """Forget everything."""
        self._total = torch.zeros(graph.units + 1, dtype=torch.float64, device=device)
        self._read = torch.zeros_like(self._total)
        self._examples = torch.zeros((), dtype=torch.float64, device=device)
        self._batch: Tensor | None = None

    def observe(self, reading: Reading) -> None:
        """Add one reader's share."""
        if self._batch is None:
            self._batch = self._total.new_zeros(reading.examples, len(self._total))
            self._positions = torch.zeros_like(self._total)
        reading.index.add(self._batch, self.share(reading))
        torch.maximum(self._positions, reading.positions(), out=self._positions)

    def share(self, reading: Reading) -> Tensor:
        """What a reading gives for each example and index, ``(examples, length)``: ``sum z * dC/dz``."""
        return reading.products()

    def end_batch(self, examples: int) -> None:
        """Fold the batch into the running sum."""
        self._examples += examples
        if self._batch is not None:
            self._total += self.fold(self._batch, self._positions.clamp(min=1))
            self._read += self._positions
            self._batch = None

    def fold(self, sums: Tensor, positions: Tensor) -> Tensor:
        """Reduce ``(examples, units)`` sums over positions to ``(units,)``."""
        return (sums / positions).abs().sum(0)

    def sums(self) -> Sequence[Tensor]:
        """Total, places read and number of examples."""
        return self._total, self._read, self._examples

    def mean(self, group: Group) -> Tensor:
        """The mean over all examples seen, for the units of a group.

        Raises:
            UnrankedError: No weight reads them.
        """
        mine = slice(group.first, group.first + group.size)
        if not bool((self._read[mine] > 0).all()):
            raise UnrankedError(
                f"{self.name} needs activations that weights read, but group {group.name!r} has none",
                where=", ".join(part.parameter for part in group.slices),
                fix=f"plan with skip=[{group.name!r}], or use a criterion on weights such as 'l2'",
            )
        return self._total[mine] / self._examples.clamp(min=1)

    def importance(self, group: Group, weights: Weights) -> Tensor:
        """The size of the mean over all examples."""
        return self.mean(group).abs()


@register
class Taylor(GateCriterion):
    """The paper's criterion: ``mean over examples of | mean over space of z * dC/dz |``, per-layer l2.

    Mean over space, then absolute value, then mean over examples, with the gradient of each example's own
    loss. ``Theta / sqrt(sum Theta^2)`` per group makes layers comparable.

    References:
        Molchanov et al., Pruning Convolutional Neural Networks for Resource Efficient Inference,
        https://arxiv.org/abs/1611.06440
    """

    name = "taylor"


@register
class TaylorElementwise(GateCriterion):
    """Sizes before any mean: ``mean over examples and space of | z * dC/dz |``, per-layer l2.

    What code of the paper's authors calls its first criterion. Unlike the other forms it depends on where a
    unit is read: with several readers their sums of sizes are added.

    References:
        https://github.com/NVlabs/Taylor_pruning
    """

    name = "taylor-elementwise"

    def share(self, reading: Reading) -> Tensor:
        """``sum |z * dC/dz|`` for each example and index."""
        wide = torch.promote_types(reading.activation.dtype, torch.float32)
        return reading.by_example((reading.activation.to(wide) * reading.slope).abs_())


@register
class TaylorSigned(GateCriterion):
    """The article's code: ``| sum over batches of the mean of z * dC/dz |``, per-layer l2.

    Contributions of opposite sign cancel over the data, which the paper's form avoids.

    References:
        Gildenblat, https://jacobgil.github.io/deeplearning/pruning-deep-learning
    """

    name = "taylor-signed"

    def fold(self, sums: Tensor, positions: Tensor) -> Tensor:
        """Sums with their signs."""
        return (sums / positions).sum(0)


@register
class Gradient(GateCriterion):
    """The Taylor criterion without its activation: ``mean over examples of | mean over space of dC/dz |``.

    Per-layer l2. The second of the two factors that the article remarks on; `Activation` is the first.

    References:
        Gildenblat, https://jacobgil.github.io/deeplearning/pruning-deep-learning
    """

    name = "gradient"

    def share(self, reading: Reading) -> Tensor:
        """``sum dC/dz`` for each example and index."""
        return reading.by_example(reading.slope)
