"""Masks sampled by a particle filter: which units, kernels or parts of kernels of a network to keep."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from torch import nn

from secateurs.errors import BudgetError, PlanError
from secateurs.graph.groups import Graph
from secateurs.masks import FeatureMaps, Granularity
from secateurs.measure.accuracy import accuracy
from secateurs.planning.budgets import Budget, Remove
from secateurs.planning.exact import ExactCost, ExactCounts, Mask, MaskBudget, Stratum
from secateurs.planning.particles import FilterSettings, Posterior, run_filter
from secateurs.planning.plan import Plan
from secateurs.progress import Observer, ignore


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Sampled:
    """What the particle filter chose.

    Args:
        mask: True where a unit is kept: the better of the most likely mask and of the one that keeps the
            units with the highest probability of being kept.
        estimate: Which of the two it is: ``map`` or ``marginal``.
        accuracy: Top-1 with it on the images that were used; it was chosen on them, so others tell more.
        baseline: Top-1 of the whole model on them.
        posterior: The particles.
        granularity: What the units are.
    """

    mask: Mask
    estimate: str
    accuracy: float
    baseline: float
    posterior: Posterior
    granularity: Granularity

    def plan(self, source: Mapping[str, Any] | None = None) -> Plan:
        """The physical cut.

        Raises:
            PlanError: The units are no feature maps.
        """
        if not isinstance(self.granularity, FeatureMaps):
            raise PlanError(
                f"{type(self.granularity).__name__} cannot be cut: convolutions compute all of their kernels",
                fix="FeatureMaps(graph), or secateurs.lowering for what another implementation saves",
            )
        facts = {"selection": "particles", "estimate": self.estimate, "seen": self.accuracy}
        return self.granularity.plan(self.mask, {**(source or {}), **facts})


def particle_filter(
    model: nn.Module,
    granularity: Granularity,
    batches: Iterable[Any],
    budget: Budget | Remove | Mapping[str, int],
    *,
    settings: FilterSettings | None = None,
    start: Mask | None = None,
    observer: Observer = ignore,
) -> Sampled:
    """Search masks at an exact budget for the one with which the fewest images are misclassified.

    Masks are evaluated by silencing, not by surgery, on all batches each: a few hundred images are enough.

    Args:
        model: A classifier; it is not changed.
        granularity: What a mask is made of: `FeatureMaps`, `Kernels` or `Strided`.
        batches: Pairs ``(inputs, labels)``, validation images; gone through once for each mask.
        budget: The units that are kept: an exact number of all, ``Budget(macs=...)`` (met so closely that one
            unit more would break it), or a number for every group by name.
        settings: How the filter runs.
        start: A mask to begin near to, such as a criterion's choice; random masks without.
        observer: Told of each round.

    Returns:
        The mask, and the particles.

    Raises:
        BudgetError: The budget cannot be met.
        DataError: There are no images.

    Example:
        >>> import torch
        >>> import secateurs
        >>> _ = torch.manual_seed(0)
        >>> net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
        >>> x = torch.randn(100, 4)
        >>> maps = FeatureMaps(secateurs.trace(net, x))
        >>> found = particle_filter(net, maps, [(x, net(x).argmax(1))], Remove(3))
        >>> len(found.plan()), found.accuracy > 0.8
        (3, True)

    References:
        In the spirit of Anwar, Hwang, Sung, https://arxiv.org/abs/1512.08571.
    """
    exact = mask_budget(granularity, budget)

    def error(mask: Mask) -> float:
        return 1 - accuracy(granularity.masked(model, mask), batches).top1

    baseline = accuracy(model, batches).top1
    posterior = run_filter(error, exact, settings or FilterSettings(), start=start, observer=observer)
    likely = exact.lowest_leave(posterior.marginal())
    other = error(likely)
    better = other < posterior.error
    return Sampled(
        mask=likely if better else posterior.best,
        estimate="marginal" if better else "map",
        accuracy=1 - min(other, posterior.error),
        baseline=baseline,
        posterior=posterior,
        granularity=granularity,
    )


def mask_budget(granularity: Granularity, budget: Budget | Remove | Mapping[str, int]) -> MaskBudget:
    """What every mask has to meet.

    Raises:
        BudgetError: It cannot be met, or is of another quantity.
    """
    owners, least = granularity.owners, granularity.least
    everything = np.arange(len(owners))
    if isinstance(budget, Mapping):
        if set(budget) != set(granularity.names):
            wrong = sorted(set(budget) ^ set(granularity.names))
            raise BudgetError(f"a number for every group is needed; missing or unknown: {wrong}")
        places = enumerate(granularity.names)
        strata = [Stratum(granularity.of_group(number), budget[name]) for number, name in places]
        return ExactCounts(owners, least, strata)
    if isinstance(budget, Remove):
        return ExactCounts(owners, least, [Stratum(everything, len(owners) - budget.units)])
    if budget.units is not None:
        return ExactCounts(owners, least, [Stratum(everything, int(len(owners) * budget.units + 1e-9))])
    if budget.macs is None:
        raise BudgetError(
            f"masks meet a budget of units or macs, not of {budget.quantity}", fix="Budget(macs=0.5)"
        )
    whole = granularity.macs(np.ones(len(owners), np.bool_))
    return ExactCost(owners, least, granularity.macs, budget.macs * whole)


@dataclass(frozen=True, slots=True, kw_only=True)
class Particles:
    """A selection for `secateurs.prune_steps`: a ranking says how many of each group leave, particles which.

    It begins at the ranking's own choice, so what it ends with misclassifies no more of the images.

    Args:
        batches: Validation images, a few hundred.
        settings: How the filter runs; its seed is the first step's.
        observer: Told of each round.

    Example:
        >>> import torch
        >>> import secateurs
        >>> _ = torch.manual_seed(0)
        >>> net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
        >>> x = torch.randn(100, 4)
        >>> choose = Particles(batches=[(x, net(x).argmax(1))])
        >>> step = next(secateurs.prune_steps(net, x, criterion="l1", budget=Remove(4), selection=choose))
        >>> step.plan.source["selection"], len(step.plan)
        ('particles', 4)
    """

    batches: Iterable[Any]
    settings: FilterSettings = field(default_factory=FilterSettings)
    observer: Observer = ignore

    def __call__(self, model: nn.Module, graph: Graph, plan: Plan) -> Plan:
        """A plan with the same counts."""
        kept = {cut.name: cut.kept for cut in plan.groups}
        if not kept:
            return plan
        maps = FeatureMaps(
            graph,
            kinds={group.kind for group in graph.groups},
            skip=[group.name for group in graph.groups if group.name not in kept],
            allocation=kept,
        )
        found = particle_filter(
            model,
            maps,
            self.batches,
            kept,
            settings=self.settings,
            start=maps.mask_of(plan),
            observer=self.observer,
        )
        return replace(found.plan(plan.source))
