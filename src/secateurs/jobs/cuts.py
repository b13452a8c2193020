"""What a pruning job's settings come to for one cut, and for all of them."""

from __future__ import annotations

from typing import Any

import torch

from secateurs.criteria import Criterion, Random, names
from secateurs.errors import UnknownNameError
from secateurs.graph import Graph
from secateurs.jobs.settings import PruneSettings
from secateurs.planning import Budget, Plan, Remove, plan
from secateurs.planning.limits import candidates
from secateurs.progress import derive_seed
from secateurs.pruning import Amounts


def amounts_of(graph: Graph, settings: PruneSettings, units: int | None = None) -> Amounts:
    """What there is of each quantity that can be a target; `units` as `Amounts.of` takes them."""
    return Amounts.of(graph, kinds=settings.cut_kinds, skip=settings.skip, units=units)


def check_reach(settings: PruneSettings, graph: Graph) -> None:
    """Refuse, before any work is done, what the job could not end with.

    Raises:
        UnknownNameError: There is no such criterion.
        BudgetError: The target is out of reach; the message says how far one can go.
        PlanError: No group is of the kinds that are to be cut.
    """
    if settings.criterion not in names():
        raise UnknownNameError("criterion", settings.criterion, names())
    alike = {group.name: torch.zeros(group.size) for group in graph.groups}
    plan(
        graph,
        alike,
        _whole_budget(settings),
        round_to=settings.round_to,
        kinds=settings.cut_kinds,
        skip=settings.skip,
    )


def _whole_budget(settings: PruneSettings) -> Budget | Remove:
    """What all iterations together come to."""
    if settings.remove is not None:
        return Remove(settings.remove * settings.iterations)
    quantity, share = settings.target or ("macs", 1.0)
    return Budget(**{quantity: share})


def criterion_for(settings: PruneSettings, stage: int) -> str | Criterion:
    """The criterion by name; random importance gets a seed for each iteration."""
    if settings.criterion == "random":
        return Random(derive_seed(settings.seed, "rank", stage) % 2**31)
    return settings.criterion


def layer_cuts(graph: Graph, decided: Plan, settings: PruneSettings) -> list[dict[str, Any]]:
    """How many units each group had and lost, in the order of the network."""
    lost = {cut.name: len(cut.removed) for cut in decided.groups}
    return [
        {"name": group.name, "size": group.size, "removed": lost.get(group.name, 0)}
        for group in candidates(graph, kinds=settings.cut_kinds, skip=settings.skip)
    ]
