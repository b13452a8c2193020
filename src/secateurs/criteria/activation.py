"""Importance from activations alone: a forward pass over unlabelled data will do.

The activation of a unit is what weights read of it: after the nonlinearity, and after pooling where the
reader comes behind one. A unit that is read in several places (a residual stream, a dense block) has all
values of all places.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from secateurs.criteria.observed import Reading
from secateurs.criteria.protocol import Criterion, Weights, register
from secateurs.criteria.taylor import GateCriterion
from secateurs.errors import UnrankedError
from secateurs.graph.groups import Graph, Group


class ActivationCriterion(Criterion):
    """Collects sums over all values of a unit, whatever example and place they come from."""

    needs_data = True
    readings = "activations"
    normalization = "l2"

    def start(self, graph: Graph, device: torch.device) -> None:
        """Forget everything."""
        self._count = torch.zeros(graph.units + 1, dtype=torch.float64, device=device)
        self._total = torch.zeros_like(self._count)
        self._examples = torch.zeros((), dtype=torch.float64, device=device)

    def observe(self, reading: Reading) -> None:
        """Add one reader's share."""
        self._count += reading.positions() * reading.examples
        reading.index.add(self._total[None], reading.by_index(self.share(reading.activation))[None])

    def share(self, activation: Tensor) -> Tensor:
        """What is to be summed, in the activation's shape."""
        return activation

    def end_batch(self, examples: int) -> None:
        """Count the examples."""
        self._examples += examples

    def sums(self) -> Sequence[Tensor]:
        """Number of values, their total, number of examples."""
        return self._count, self._total, self._examples

    def of(self, group: Group, values: Tensor) -> Tensor:
        """The part of a tensor over all units that is the group's.

        Raises:
            UnrankedError: No weight reads the group's units.
        """
        mine = slice(group.first, group.first + group.size)
        if not bool((self._count[mine] > 0).all()):
            raise UnrankedError(
                f"{self.name} needs activations that weights read, but group {group.name!r} has none",
                where=", ".join(part.parameter for part in group.slices),
                fix=f"plan with skip=[{group.name!r}], or use a criterion on weights such as 'l2'",
            )
        return values[mine]

    def importance(self, group: Group, weights: Weights) -> Tensor:
        """The mean over all values."""
        return self.of(group, self._total) / self.of(group, self._count)


@register
class MeanActivation(ActivationCriterion):
    """The mean activation ``1/|a| sum a``, with its sign; per-layer l2.

    After a ReLU no value is negative. Where what is read can be, units of negative mean leave first;
    `Activation` takes sizes instead.

    Example:
        >>> import torch, secateurs
        >>> from torch import nn
        >>> net = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 2))
        >>> _ = net[0].weight.data.copy_(torch.tensor([[1., 0.], [0., 2.], [-1., 0.]]))
        >>> _ = net[0].bias.data.zero_()
        >>> graph, data = secateurs.trace(net, torch.zeros(1, 2)), [torch.tensor([[1., 1.], [3., 1.]])]
        >>> secateurs.score(net, graph, "mean-activation", data=data, normalization="none")["0"].tolist()
        [2.0, 2.0, 0.0]

    References:
        Molchanov et al., Pruning Convolutional Neural Networks for Resource Efficient Inference,
        https://arxiv.org/abs/1611.06440
    """

    name = "mean-activation"


@register
class StdActivation(ActivationCriterion):
    """The standard deviation of the activation over all examples and places; per-layer l2.

    Each batch gives its mean and its squared deviations from it, and these are added up in double precision:
    sums of large squares in single precision would lose small deviations.

    References:
        Molchanov et al., https://arxiv.org/abs/1611.06440
    """

    name = "std-activation"

    def start(self, graph: Graph, device: torch.device) -> None:
        """Forget everything."""
        super().start(graph, device)
        self._squares = torch.zeros_like(self._count)

    def observe(self, reading: Reading) -> None:
        """Add one reader's share."""
        self._count += reading.positions() * reading.examples
        values = reading.activation.to(torch.promote_types(reading.activation.dtype, torch.float32))
        rows = values.movedim(reading.dim, 0).flatten(1) if values.dim() > 1 else values[:, None]
        variance, mean = (each.double() for each in torch.var_mean(rows, 1, correction=0))
        reading.index.add(self._total[None], mean[None] * rows.shape[1])
        reading.index.add(self._squares[None], (variance + mean.square())[None] * rows.shape[1])

    def sums(self) -> Sequence[Tensor]:
        """Number of values, their total, number of examples, their squares."""
        return *super().sums(), self._squares

    def importance(self, group: Group, weights: Weights) -> Tensor:
        """``sqrt(E a^2 - (E a)^2)``."""
        mean = super().importance(group, weights)
        square = self.of(group, self._squares) / self.of(group, self._count)
        return (square - mean.square()).clamp(min=0).sqrt()


@register
class Apoz(ActivationCriterion):
    """One minus the average percentage of zeros: units that are mostly silent leave first; per-layer l2.

    ``APoZ = sum over examples and places of [a = 0] / their number``, of what is read: behind a max pooling a
    value is zero where the whole window is.

    Example:
        >>> import torch, secateurs
        >>> from torch import nn
        >>> net = nn.Sequential(nn.Linear(1, 2), nn.ReLU(), nn.Linear(2, 2))
        >>> _ = net[0].weight.data.copy_(torch.tensor([[1.], [-1.]])), net[0].bias.data.zero_()
        >>> graph, data = secateurs.trace(net, torch.zeros(1, 1)), [torch.tensor([[1.], [2.], [3.], [-1.]])]
        >>> secateurs.score(net, graph, "apoz", data=data, normalization="none")["0"].tolist()
        [0.75, 0.25]

    References:
        Hu et al., Network Trimming, https://arxiv.org/abs/1607.03250
    """

    name = "apoz"

    def share(self, activation: Tensor) -> Tensor:
        """One where a value is not zero."""
        return (activation != 0).float()


@register
class NonzeroCount(Apoz):
    """How many values of a unit are not zero in an example, on average: `Apoz` times the size of the map.

    Inside a layer both rank alike; across layers this one favours large maps.
    """

    name = "nonzero-count"
    normalization = "none"

    def importance(self, group: Group, weights: Weights) -> Tensor:
        """Values that are not zero, an example."""
        return self.of(group, self._total) / self._examples.clamp(min=1)


@register
class Activation(GateCriterion):
    """The Taylor criterion without its gradient: ``mean over examples of | mean over space of z |``.

    Per-layer l2. The article remarks that activations and gradients each make sense as a ranking, and
    multiplies them. This is the first factor alone; `Gradient` is the second. Where values of both signs are
    read it differs from `MeanActivation`, in which examples cancel.

    References:
        Gildenblat, https://jacobgil.github.io/deeplearning/pruning-deep-learning
    """

    name = "activation"
    readings = "activations"

    def share(self, reading: Reading) -> Tensor:
        """``sum z`` for each example and index."""
        return reading.by_example(reading.activation)
