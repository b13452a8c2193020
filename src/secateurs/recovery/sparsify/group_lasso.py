"""Group lasso on coupled units: all that would leave together is pulled to zero together."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from typing import Any, ClassVar

from torch import nn

from secateurs.graph.groups import Graph
from secateurs.recovery.sparsify.base import (
    Sparsifier,
    check_positive,
    pull,
    trained_parameters,
    unit_norms,
    unit_size,
)


class GroupLasso(Sparsifier):
    """Pulls whole units to zero: ``loss + strength * sum over units u of sqrt(p_u) * ||w_u||_2``.

    ``w_u`` holds all trained weights of the unit, ``p_u`` of them: the filters that make it, its biases and
    norms, and the weights that read it, in every branch of a residual sum. So it works on any model, with
    or without batch norm, and a unit that has faded is gone from both sides. The gradient is
    ``strength * sqrt(p_u) * w_u / ||w_u||``, and zero at zero; the root makes units of different size fade
    at one pace, that of the root mean square of their weights.

    Args:
        graph: The graph of the model that is trained.
        strength: How hard; a weight of usual size loses about ``lr * strength`` in each step.
        kinds: Kinds of groups to act on; see :func:`secateurs.plan`.
        skip: Glob patterns of groups to leave alone.

    Raises:
        TrainingError: The strength is not positive.

    Example:
        >>> import secateurs, torch
        >>> from secateurs.recovery import Recipe, finetune
        >>> _ = torch.manual_seed(0)
        >>> net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> method = GroupLasso(secateurs.trace(net, torch.zeros(2, 4)), strength=0.2)
        >>> batch = (torch.randn(16, 4), torch.arange(16) % 2)
        >>> before = net[2].weight.detach().norm()
        >>> _ = finetune(net, [batch], recipe=Recipe(epochs=60, lr=0.1), regularizer=method)
        >>> bool(net[2].weight.norm() < 0.5 * before)
        True

    References:
        Fang et al., DepGraph, https://arxiv.org/abs/2301.12900, train for sparsity over coupled parameters
        too, with another penalty. This is the plain group lasso on our units.
    """

    name: ClassVar[str] = "group-lasso"
    criterion: ClassVar[str] = "mean-weight"  # as the pull, it does not favour units of many weights

    def __init__(
        self,
        graph: Graph,
        *,
        strength: float = 1e-4,
        kinds: Collection[str] | None = None,
        skip: Sequence[str] = (),
    ) -> None:
        super().__init__(graph, kinds=kinds, skip=skip)
        check_positive("strength", strength)
        self.strength = strength

    def after_backward(self, model: nn.Module, epochs_done: float) -> None:
        """``strength * sqrt(p_u) * w_u / ||w_u||``."""
        parameters = trained_parameters(model)
        pulls = []  # all norms are taken before any gradient is touched
        for group in self.groups:
            norms = unit_norms(group, parameters)
            root = math.sqrt(unit_size(group, parameters))
            pulls.append((norms > 0) * self.strength * root / norms.clamp(min=1e-30))
        for group, factors in zip(self.groups, pulls, strict=True):
            pull(group, parameters, factors)

    def facts(self, model: nn.Module) -> Mapping[str, Any]:
        """The value of the penalty."""
        parameters = trained_parameters(model)
        total = sum(
            math.sqrt(unit_size(group, parameters)) * unit_norms(group, parameters).sum().item()
            for group in self.groups
        )
        return {"penalty": self.strength * total}
