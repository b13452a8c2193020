"""Growing regularisation: the units that are to leave are decided first, and fade while training goes on."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import nn

from secateurs.criteria.scoring import score
from secateurs.graph.groups import Graph
from secateurs.planning.budgets import Budget
from secateurs.planning.families import Scope
from secateurs.planning.plan import Plan
from secateurs.planning.ranking import plan
from secateurs.progress import State
from secateurs.recovery.sparsify.base import (
    Sparsifier,
    check_positive,
    check_share,
    pull,
    trained_parameters,
    unit_norms,
)


class Growing(Sparsifier):
    """Decides at the start which units leave, and penalises them more and more while training goes on.

    The penalty is ``strength * t / (2 T) * ||w_u||^2``, where ``w_u`` holds all trained weights of a unit
    that is to leave, ``t`` the epochs done and ``T`` all of them. The other units learn to do without,
    while the pull, slow at first, takes these to zero. With plain SGD a weight shrinks by the factor
    ``1 - lr * strength * t / T`` in each step, so ``lr * strength`` should stay well below 1.

    Args:
        graph: The graph of the model that is trained.
        epochs: ``T``; the number of epochs that it trains for.
        rate: The share of the units of every group that is to leave, those of least ``l2`` norm.
        leaving: A plan of the same graph to use instead of ``rate``: any criterion, any budget.
        strength: The penalty at the end.
        kinds: Kinds of groups to act on; see :func:`secateurs.plan`.
        skip: Glob patterns of groups to leave alone.

    Raises:
        TrainingError: A number is out of range.

    Example:
        >>> import secateurs
        >>> from secateurs.recovery import Recipe, finetune
        >>> _ = torch.manual_seed(0)
        >>> net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> graph = secateurs.trace(net, torch.zeros(2, 4))
        >>> cut = secateurs.Plan.of(graph, {"0": [0, 1, 2]})
        >>> method = Growing(graph, epochs=100, leaving=cut)
        >>> batch = (torch.randn(16, 4), torch.arange(16) % 2)
        >>> _ = finetune(net, [batch], recipe=Recipe(epochs=100, lr=0.1), regularizer=method)
        >>> bool(net[0].weight[:3].abs().max() < 1e-2)
        True

    References:
        Wang et al., Neural Pruning via Growing Regularization (GReg), https://arxiv.org/abs/2012.09243.
        This is our reading of it: the pull grows with the epochs and acts on the whole unit, also on the
        weights that read it, since a batch norm would undo a shrinking of its filters alone.
    """

    name: ClassVar[str] = "growing"
    scope: ClassVar[Scope] = "local"

    def __init__(
        self,
        graph: Graph,
        *,
        epochs: float,
        rate: float = 0.5,
        leaving: Plan | None = None,
        strength: float = 1.0,
        kinds: Collection[str] | None = None,
        skip: Sequence[str] = (),
    ) -> None:
        super().__init__(graph, kinds=kinds, skip=skip)
        check_positive("epochs", epochs)
        check_share("rate", rate)
        check_positive("strength", strength)
        self.epochs, self.strength = epochs, strength
        self.rate: float = rate
        self._given = leaving
        self._leaving: dict[str, list[int]] = {}
        self._penalty = 0.0

    def start(self, model: nn.Module) -> None:
        """Decide which units leave."""
        super().start(model)
        decided = self._given
        if decided is None:
            budget = Budget(units=1 - self.rate)
            scores = score(model, self.graph, self.criterion)
            decided = plan(self.graph, scores, budget, scope=self.scope, kinds=self.kinds, skip=self.skip)
        self._leaving = {cut.name: list(cut.removed) for cut in decided.groups}

    def after_backward(self, model: nn.Module, epochs_done: float) -> None:
        """``strength * t / T * w_u`` for the units that leave."""
        parameters = trained_parameters(model)
        self._penalty = self.strength * min(epochs_done / self.epochs, 1.0)
        for name, units in self._leaving.items():
            group = self.graph.by_name[name]
            factors = torch.zeros(group.size, dtype=torch.float64)
            factors[units] = self._penalty
            pull(group, parameters, factors)

    def facts(self, model: nn.Module) -> Mapping[str, Any]:
        """The value of the penalty."""
        parameters = trained_parameters(model)
        squares = sum(
            unit_norms(self.graph.by_name[name], parameters)[units].square().sum().item()
            for name, units in self._leaving.items()
        )
        return {"penalty": self._penalty / 2 * squares}

    def state(self) -> State:
        """Which units leave."""
        return State({"leaving": self._leaving}, {})

    def load_state(self, state: State) -> None:
        """Go on with the units that were decided at the start."""
        self._leaving = {name: list(units) for name, units in state.facts["leaving"].items()}
