"""How much a unit's activation tells of the class."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from secateurs.criteria.observed import Batch, Reading
from secateurs.criteria.processes import add_up, largest
from secateurs.criteria.protocol import Weights, register
from secateurs.criteria.taylor import GateCriterion
from secateurs.errors import ScoreError
from secateurs.graph.groups import Graph, Group

_LOWEST, _HIGHEST = -16, 7  # half octaves: from 2^-8 to 2^3.5
_LEVELS = _HIGHEST - _LOWEST + 1
BINS = 2 * _LEVELS + 1  # negative, zero, positive


@register
class MutualInformation(GateCriterion):
    """The mutual information of a unit's mean activation and the class, ``H(a) + H(y) - H(a, y)`` in nats.

    The mean over space of what weights read of the unit, one number an example, is quantised by its sign and
    half octave (a factor of 1.41), so that the bins need not be fitted and histograms of several processes
    add up. The targets are numbers of classes. The estimate counts what is in the bins and is not corrected
    for few examples; the histograms take ``units x 49 x classes`` numbers. Per-layer l2.

    Example:
        >>> import secateurs
        >>> from torch import nn
        >>> net = nn.Sequential(nn.Linear(2, 2, bias=False), nn.ReLU(), nn.Linear(2, 2))
        >>> _ = net[0].weight.data.copy_(torch.eye(2))
        >>> inputs = torch.tensor([[1.0, 1.0], [1.0, 2.0], [2.0, 1.0], [2.0, 2.0]])
        >>> classes = torch.tensor([0, 0, 1, 1])
        >>> graph, told = secateurs.trace(net, inputs), "mutual-information"  # the first unit tells the class
        >>> scores = secateurs.score(net, graph, told, data=[(inputs, classes)], normalization="none")
        >>> [round(nats, 4) for nats in scores["0"].tolist()]
        [0.6931, 0.0]

    References:
        Molchanov et al., https://arxiv.org/abs/1611.06440, name the criterion; the quantisation is ours
    """

    name = "mutual-information"
    readings = "activations"

    def start(self, graph: Graph, device: torch.device) -> None:
        """Forget everything."""
        super().start(graph, device)
        self._counts = torch.zeros(graph.units, BINS, 0, device=device)

    def begin_batch(self, batch: Batch) -> None:
        """Note the classes."""
        targets = batch.targets
        known = isinstance(targets, Tensor) and not targets.is_floating_point()
        if not known or targets.numel() != batch.examples:
            got = tuple(targets.shape) if isinstance(targets, Tensor) else type(targets).__name__
            raise ScoreError(
                f"{self.name} needs the number of a class for each of {batch.examples} examples, got {got}",
                fix="pass a loader that yields (inputs, labels), or use another criterion",
            )
        self._classes = targets.reshape(-1).long()
        self._grow(int(self._classes.max()) + 1)

    def share(self, reading: Reading) -> Tensor:
        """``sum z`` for each example and index."""
        return reading.by_example(reading.activation)

    def fold(self, sums: Tensor, positions: Tensor) -> Tensor:
        """Count the quantised means."""
        codes = quantised(sums / positions)[:, :-1]  # (N, units)
        units = torch.arange(codes.shape[1], device=codes.device)
        classes = self._counts.shape[2]
        flat = (units * BINS + codes) * classes + self._classes[:, None]
        ones = torch.ones((), device=codes.device).expand(flat.numel())
        self._counts.view(-1).index_add_(0, flat.view(-1), ones)
        return torch.zeros_like(self._total)

    def sums(self) -> Sequence[Tensor]:
        """Those of every criterion on gates, and the histograms."""
        return *super().sums(), self._counts

    def combine(self) -> None:
        """All processes count the same classes."""
        self._grow(largest(self._counts.shape[2], self._counts.device))
        for tensor in self.sums():
            add_up(tensor)

    def _grow(self, classes: int) -> None:
        missing = classes - self._counts.shape[2]
        if missing > 0:
            self._counts = torch.nn.functional.pad(self._counts, (0, missing))

    def importance(self, group: Group, weights: Weights) -> Tensor:
        """From the histograms of all examples."""
        self.mean(group)  # that there is something to count
        counts = self._counts[group.first : group.first + group.size].double()
        joint = counts / counts.sum((1, 2), keepdim=True)
        apart = joint.sum(1, keepdim=True) * joint.sum(2, keepdim=True)
        return torch.xlogy(joint, joint / apart.clamp(min=1e-300)).sum((1, 2)).clamp(min=0)


def quantised(values: Tensor) -> Tensor:
    """The bin of each value: by sign, and by half octave of its size; zero has a bin of its own."""
    levels = (2 * values.abs().log2()).round().clamp(_LOWEST, _HIGHEST).nan_to_num() - _LOWEST + 1
    return (torch.where(values == 0, 0, levels) * values.sign()).long() + _LEVELS
