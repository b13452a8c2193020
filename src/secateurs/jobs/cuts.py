"""What a pruning job's settings come to for one cut, and for all of them."""

from __future__ import annotations

import glob
from collections.abc import Iterable
from dataclasses import asdict, replace
from typing import Any

import torch
from torch import Tensor, nn

from secateurs.criteria import Criterion, Random, names, normalization_names
from secateurs.criteria.protocol import resolve
from secateurs.criteria.scoring import AnyCriterion
from secateurs.criteria.unit_reads import unrankable
from secateurs.errors import BudgetError, PlanError, UnknownNameError, some
from secateurs.graph import Graph, Group
from secateurs.jobs.settings import PruneSettings
from secateurs.jobs.targets import as_share, limit_of
from secateurs.measure import file_bytes, latency_ms, latency_share
from secateurs.planning import Budget, Plan, Remove, plan
from secateurs.planning.limits import Limits, candidates, matching, still_there
from secateurs.planning.particles import FilterSettings
from secateurs.progress import Observer, derive_seed
from secateurs.pruning import Amounts, Selection, with_curves
from secateurs.sampling import Particles
from secateurs.surgery import apply

WHY_NOT = "their readers are not linear layers and convolutions alone"
PARTICLE_IMAGES = 500  # each of some three hundred masks is tried on them


def amounts_of(graph: Graph, settings: PruneSettings, units: int | None = None) -> Amounts:
    """What there is of each quantity that can be a target; `units` as `Amounts.of` takes them."""
    skip = still_there(graph, settings.skip)
    return Amounts.of(graph, kinds=settings.cut_kinds, skip=skip, units=units)


def check_reach(settings: PruneSettings, graph: Graph) -> Limits:
    """Refuse, before any work is done, what the job could not end with.

    Returns:
        What is asked of single groups, in units of the model to be pruned.

    Raises:
        UnknownNameError: There is no such criterion.
        BudgetError: The target is out of reach; the message says how far one can go.
        PlanError: No group is of the kinds that are to be cut.
    """
    if settings.usual_criterion not in names():
        raise UnknownNameError("criterion", settings.usual_criterion, names())
    if settings.normalization is not None and settings.normalization not in normalization_names():
        raise UnknownNameError("normalization", settings.normalization, normalization_names())
    limits = Limits.of(
        graph,
        shares=settings.shares,
        min_units=settings.min_units,
        kinds=settings.cut_kinds,
        skip=settings.skip,
    )
    budget = _whole_budget(settings)
    if budget is not None or settings.shares:
        _plan_alike(settings, graph, budget, shares=settings.shares)
    return limits


def settled(
    settings: PruneSettings, graph: Graph, model: nn.Module, images: Tensor, *, are_labelled: bool
) -> tuple[PruneSettings, Limits, list[str]]:
    """The settings with all defaults, checked against the model that is to be pruned.

    Reconstruction is the criterion that is taken where none is given, as long as what it can rank is enough
    to reach the target; of other networks Taylor expansion ranks every unit.

    Args:
        settings: What the job is asked to do.
        graph: The graph of the model.
        model: The model.
        images: Some of its images as one batch.
        are_labelled: Whether the images have labels.

    Returns:
        The settings, what is asked of single groups, and what there is to tell the user.

    Raises:
        UnknownNameError: There is no such criterion.
        BudgetError: The target is out of reach; the message says how far one can go.
        PlanError: No group is of the kinds that are to be cut.
    """
    asked, cost = settings.for_images(are_labelled=are_labelled), graph.cost()
    share = as_share(settings.target, asdict(cost), header=file_bytes(model) - cost.bytes)
    asked = replace(asked, target=share)
    try:
        spared = sparing(asked, graph, model, images)
        limits = check_reach(spared, graph)
    except (BudgetError, PlanError) as error:
        if settings.criterion == asked.criterion or settings.allocation == "error":
            raise
        asked = replace(asked, criterion="taylor", allocation="none", rank_images=settings.rank_images)
        return asked, check_reach(asked, graph), [f"ranked by taylor, not by reconstruction: {error.message}"]
    left = [group.name for group in cuttable(graph, asked) if matching(group.name, spared.skip)]
    note = f"not ranked by {with_curves(asked.usual_criterion)}, so left whole: {some(left)} ({WHY_NOT})"
    return asked, limits, [note] if left else []


def sparing(settings: PruneSettings, graph: Graph, model: nn.Module, images: Any) -> PruneSettings:
    """The same settings, where the groups that an elimination cannot rank are left alone.

    Raises:
        PlanError: A share is asked of such a group.
    """
    by_name = {name for name in names() if resolve(name)[1].has_curves}
    if settings.usual_criterion not in by_name and settings.usual_allocation != "error":
        return settings
    found = unrankable(model, graph, images)
    more = [name for name in found if not matching(name, settings.skip)]
    for name in more:
        if matching(name, settings.shares or ()):
            raise PlanError(found[name].message, where=found[name].where, fix=found[name].fix)
    return replace(settings, skip=(*settings.skip, *map(glob.escape, more)))


def check_latency(
    settings: PruneSettings, graph: Graph, limits: Limits, model: nn.Module, image: Tensor
) -> None:
    """Refuse a target in latency that the smallest network misses, where it is measured now.

    Raises:
        BudgetError: It is out of reach; the message says how far one can go.
    """
    target = settings.target
    if limit_of(target) is not None:
        target = as_share(target, {"latency_ms": latency_ms(model, image, repeats=None).median_ms})
    quantity, share = target or ("", 1.0)
    if quantity != "latency":
        return
    settings = sparing(settings, graph, model, image)
    kept = {
        group.name: limits.kept.get(group.name, limits.least[group.name])
        for group in cuttable(graph, settings)
    }
    least = latency_share(model, apply(model, _plan_alike(settings, graph, allocation=kept)), image)
    if least > share:
        raise BudgetError(
            f"latency={share:g} is out of reach: with every group at its smallest, {least:.4f} of the time "
            "of an image remains",
            fix="raise the target, lower --round-to, --min-units or --shares, or allow more --kinds",
        )


def _plan_alike(
    settings: PruneSettings, graph: Graph, budget: Budget | Remove | None = None, **given: Any
) -> Plan:
    """A plan for units that are worth as much as each other."""
    return plan(
        graph,
        {group.name: torch.zeros(group.size) for group in graph.groups},
        budget,
        round_to=settings.round_to,
        kinds=settings.cut_kinds,
        skip=settings.skip,
        min_units=settings.min_units,
        **given,
    )


def _whole_budget(settings: PruneSettings) -> Budget | Remove | None:
    """What all iterations together come to."""
    if settings.remove is not None:
        return Remove(settings.remove * settings.iterations)
    if settings.target is None:
        return None
    quantity, share = settings.target
    return None if quantity.startswith("latency") else Budget(**{quantity: share})


def criterion_for(settings: PruneSettings, stage: int) -> str | Criterion:
    """The criterion by name; random importance gets a seed for each iteration."""
    if settings.usual_criterion == "random":
        return Random(derive_seed(settings.seed, "rank", stage) % 2**31)
    return settings.usual_criterion


def selection_for(
    settings: PruneSettings, stage: int, batches: Iterable[Any], observer: Observer
) -> Selection:
    """Which units leave where the ranking has decided how many; `batches` are for particles alone."""
    if settings.selection != "particles":
        return "greedy" if settings.selection == "greedy" else "independent"
    seed = derive_seed(settings.seed, "particles", stage) % 2**31
    return Particles(batches=batches, settings=FilterSettings(seed=seed, evolve=True), observer=observer)


def curves_for(settings: PruneSettings) -> AnyCriterion | None:
    """The criterion by whose error curves the budget is spent; None where it is not."""
    return with_curves(settings.usual_criterion) if settings.usual_allocation == "error" else None


def layer_cuts(graph: Graph, decided: Plan, settings: PruneSettings) -> list[dict[str, Any]]:
    """How many units each group had and lost, in the order of the network."""
    lost = {cut.name: len(cut.removed) for cut in decided.groups}
    return [
        {"name": group.name, "size": group.size, "removed": lost.get(group.name, 0)}
        for group in cuttable(graph, settings)
    ]


def cuttable(graph: Graph, settings: PruneSettings) -> list[Group]:
    """The groups that the job may cut."""
    return candidates(graph, kinds=settings.cut_kinds, skip=still_there(graph, settings.skip))
