"""Soft filter pruning: after every epoch the least filters are set to zero, and may grow again."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from secateurs.criteria.magnitude import L2
from secateurs.criteria.protocol import Weights, producers, unit_sums
from secateurs.criteria.scoring import score
from secateurs.graph.copying import tensors_of
from secateurs.graph.groups import Graph, Group, Slice
from secateurs.planning.budgets import Budget
from secateurs.planning.families import Scope
from secateurs.planning.plan import Plan
from secateurs.planning.ranking import plan
from secateurs.progress import State
from secateurs.recovery.sparsify.base import Sparsifier, check_share, trained_parameters


class SoftPruning(Sparsifier):
    """Sets the filters of least norm to zero after every epoch, in every group, and goes on training all.

    What turns out to be needed grows again in the next epoch; what does not is zero at the end, and
    ``plan(graph, scores, Budget(units=1 - rate), scope="local")`` with ``l2`` scores cuts exactly it.

    Only the weights that *make* a unit are set to zero, not its bias or the norm behind: with the norm's
    scale at zero too, no gradient would ever reach the filter. Even so a zeroed filter gives a constant, that
    bias, and where an activation such as a ReLU is flat there, it gets no gradient and stays zero. Epoch
    events say under ``regrown`` how many of the last epoch's zeros came back.

    A batch norm in training mode multiplies the gradient of a filter of zeros by about ``1 / sqrt(eps)``, 316
    with torch's default. One such step, carried on by momentum, makes filters that mean nothing longer than
    trained ones, which are then the next to go. So a filter that was set to zero gets no longer gradient
    than the others of its layer get on average; ``bounded=False`` leaves it as the paper does.

    The running statistics are of the filters before they were zero: re-estimate batch norms before an
    accuracy after the last epoch is believed.

    Args:
        graph: The graph of the model that is trained.
        rate: The share of the units of every group that is set to zero, at least; rounded up to whole units.
        bounded: Whether the gradients of filters that were set to zero are bounded.
        kinds: Kinds of groups to act on; see :func:`secateurs.plan`.
        skip: Glob patterns of groups to leave alone.

    Raises:
        TrainingError: The rate is not inside (0, 1).

    Example:
        >>> import secateurs
        >>> from secateurs.recovery import Recipe, finetune
        >>> net = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 2))
        >>> method = SoftPruning(secateurs.trace(net, torch.zeros(2, 4)), rate=0.5)
        >>> batch = (torch.randn(16, 4), torch.arange(16) % 2)
        >>> _ = finetune(net, [batch], recipe=Recipe(epochs=3, lr=0.1), regularizer=method)
        >>> int((net[0].weight == 0).all(1).sum())
        4

    References:
        He et al., Soft Filter Pruning for Accelerating Deep Convolutional Neural Networks,
        https://arxiv.org/abs/1808.06866. It goes layer by layer; we go group by group, so that layers which a
        residual sum ties together lose the same filters. The bound is ours.
    """

    name: ClassVar[str] = "sfp"
    scope: ClassVar[Scope] = "local"

    def __init__(
        self,
        graph: Graph,
        *,
        rate: float = 0.3,
        bounded: bool = True,
        kinds: Collection[str] | None = None,
        skip: Sequence[str] = (),
    ) -> None:
        super().__init__(graph, kinds=kinds, skip=skip)
        check_share("rate", rate)
        self.rate: float = rate
        self.bounded = bounded
        self._zeroed: dict[str, list[int]] = {}
        self._regrown = 0

    def importance(self, group: Group, weights: Weights) -> Tensor:
        """What decides which filters are the least; ``(units,)``."""
        return L2().importance(group, weights)

    def least(self, model: nn.Module) -> Plan:
        """The units that would be set to zero now, as a plan."""
        scores = score(model, self.graph, self.importance)
        budget = Budget(units=1 - self.rate)
        return plan(self.graph, scores, budget, scope=self.scope, kinds=self.kinds, skip=self.skip)

    def start(self, model: nn.Module) -> None:
        """Nothing is zero yet."""
        super().start(model)
        self._zeroed, self._regrown = {}, 0

    def after_backward(self, model: nn.Module, epochs_done: float) -> None:
        """Bound the gradients of the filters that were set to zero last."""
        if not self.bounded:
            return
        parameters = trained_parameters(model)
        for name, units in self._zeroed.items():
            for part in producers(self.graph.by_name[name], self.name):
                weight = parameters.get(part.parameter)
                if weight is not None and weight.grad is not None:
                    bound(weight.grad, part, units)

    @torch.no_grad()
    def after_epoch(self, model: nn.Module, epoch: int) -> None:
        """Set the least filters to zero."""
        weights, decided = tensors_of(model), self.least(model)
        self._regrown = sum(
            int(L2().importance(self.graph.by_name[name], weights)[units].count_nonzero())
            for name, units in self._zeroed.items()
        )
        self._zeroed = {cut.name: list(cut.removed) for cut in decided.groups}
        for name, units in self._zeroed.items():
            for part in producers(self.graph.by_name[name], self.name):
                weight = weights[part.parameter]
                weight.index_fill_(part.dim, places_of(part, units).to(weight.device), 0)

    def facts(self, model: nn.Module) -> Mapping[str, Any]:
        """How many units are zero, and how many of those before had grown again."""
        return {"zeroed": sum(map(len, self._zeroed.values())), "regrown": self._regrown}

    def state(self) -> State:
        """Which units are zero."""
        return State({"zeroed": self._zeroed}, {})

    def load_state(self, state: State) -> None:
        """Go on from there."""
        self._zeroed = {name: list(units) for name, units in state.facts["zeroed"].items()}


def places_of(part: Slice, units: list[int]) -> Tensor:
    """Where units lie along the dimension of a slice, one after another."""
    return torch.from_numpy(part.indices[units].reshape(-1))


@torch.no_grad()
def bound(gradient: Tensor, part: Slice, units: list[int]) -> None:
    """Shorten the gradients of units, in place, to the mean length of those of the other units.

    Where the others have no gradient, nothing is known about its usual length, and nothing is changed.
    """
    lengths = unit_sums(gradient, part, 2).sqrt()
    others = torch.ones_like(lengths, dtype=torch.bool)
    others[units] = False
    longest = lengths[others].mean()
    if not longest > 0:
        return
    factors = (longest / lengths[units].clamp(min=1e-30)).clamp(max=1).to(gradient.dtype)
    shape = [-1 if dim == part.dim else 1 for dim in range(gradient.dim())]
    places = places_of(part, units).to(gradient.device)
    shorter = factors.repeat_interleave(part.indices.shape[1]).view(shape)
    gradient.index_copy_(part.dim, places, gradient.index_select(part.dim, places) * shorter)
