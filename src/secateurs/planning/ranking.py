"""From importances to a plan: which units leave so that a budget is met."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from typing import TypeAlias

import numpy as np
import numpy.typing as npt
import torch

from secateurs.errors import BudgetError, PlanError
from secateurs.graph.groups import Graph, Group
from secateurs.planning.allocation import (
    Allocation,
    Savings,
    counts_and_curves,
    marginal_savings,
    product_savings,
)
from secateurs.planning.budgets import AtMost, Budget, Remove, nothing_said
from secateurs.planning.families import (
    Curves,
    Family,
    Orders,
    Scope,
    first_cut,
    last_cut,
    ranked_cuts,
    spent_cuts,
)
from secateurs.planning.fit import Counts, Fit
from secateurs.planning.latency import LatencyModel
from secateurs.planning.limits import Least, Limits, candidates, check_skip
from secateurs.planning.plan import Plan

RemovedUnits: TypeAlias = dict[str, npt.NDArray[np.int64]]
Rescore: TypeAlias = Callable[[Group, Mapping[str, npt.NDArray[np.int64]]], torch.Tensor]


def plan(
    graph: Graph,
    scores: Mapping[str, torch.Tensor],
    budget: Budget | AtMost | Remove | None = None,
    *,
    scope: Scope = "global",
    round_to: int = 1,
    kinds: Collection[str] | None = None,
    skip: Sequence[str] = (),
    shares: Mapping[str, float] | None = None,
    min_units: Least = 1,
    allocation: Allocation | None = None,
    curves: Curves | None = None,
    rescore: Rescore | None = None,
    latency: LatencyModel | None = None,
) -> Plan:
    """Choose the units that leave: the least important ones, until the budget is met.

    With ``scope="global"`` all units stand in one ranking and the lowest leave; with ``"local"`` every group
    keeps the same share of its units. Every group keeps at least `min_units`. Groups that `shares` or
    `allocation` name keep what these say, and the others are cut until the budget is met by all together;
    without a budget the others stay whole. Where the model's own code derives one size from others
    (``C // self.num_heads``), the groups concerned shrink together, so that it stays right: numbers that are
    asked for go up to the next that fit. Of groups that cut the same dimensions in two directions (heads and
    head dimensions, convolution groups and the channels in them) only the one with more units is cut, unless
    `kinds` names them.

    Args:
        graph: What can be cut.
        scores: For each group name one importance a unit, larger means keep; shape ``(units,)``.
        budget: The share that remains, what there may be at most, or the number of units to remove; may be
            None where `shares` or `allocation` say it.
        scope: One ranking over all groups, or one share for each.
        round_to: The number of units that a group keeps is a multiple of this (or all of them); heads and
            whole convolution groups are not rounded.
        kinds: Kinds of groups to cut, such as ``{"channel"}``; every kind but ``"position"`` if None.
        skip: Glob patterns of group names to leave alone.
        shares: For glob patterns of group names the share of its units that such a group keeps, in (0, 1];
            the last pattern that matches counts.
        min_units: What a group keeps at least: a number of units, or a share in (0, 1) of its units, rounded
            up; or these by glob pattern.
        allocation: The number of units that a group keeps, by group name. Or ``"error"``: the budget is
            spent where the error is least for what that saves, by the error curves of `scores`; or by those
            of other scores, which are given here. See `secateurs.planning.allocation`.
        curves: The same error curves, by group name, where `allocation` holds numbers for some groups.
        rescore: Called for one group after another, in the order in which the forward pass reads their units,
            with the units that leave the groups before; gives the importances that decide which units of
            this group leave. How many is decided by `scores`. See `secateurs.criteria.greedy`.
        latency: Forecasts the time for a budget in latency; groups keep multiples of the blocks that kernels
            compute in.

    Returns:
        The plan, with the forecast of its cost.

    Raises:
        BudgetError: The budget is out of reach; the message says how far one can go.
        PlanError: Scores are missing, of the wrong length or not finite, nothing can be cut, or what is asked
            of single groups contradicts itself.

    Example:
        >>> from torch import nn
        >>> import secateurs
        >>> net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 2))
        >>> graph = secateurs.trace(net, torch.zeros(1, 4))
        >>> scores = secateurs.score(net, graph, "l1")
        >>> {cut.name: cut.kept for cut in plan(graph, scores, shares={"0": 0.25}).groups}
        {'0': 2}
        >>> {cut.name: cut.kept for cut in plan(graph, scores, Remove(9), shares={"0": 0.25}).groups}
        {'0': 2, '2': 3}
        >>> {cut.name: cut.kept for cut in plan(graph, scores, allocation={"0": 5, "2": 4}).groups}
        {'0': 5, '2': 4}
    """
    if scope not in ("global", "local"):
        raise PlanError(f"scope is 'global' or 'local', got {scope!r}")
    if round_to < 1:
        raise PlanError(f"round_to >= 1 must hold, got round_to={round_to}")
    if budget is None and shares is None and allocation is None:
        raise nothing_said()
    limit = budget if isinstance(budget, AtMost) else None
    budget = _as_share(budget, graph, latency)
    check_skip(graph, skip)
    groups = candidates(graph, kinds=kinds, skip=skip)
    numbers, found = counts_and_curves(allocation, scores)
    limits = Limits.of(graph, shares=shares, min_units=min_units, allocation=numbers, kinds=kinds, skip=skip)
    curves = curves if found is None else found
    order = {group.name: _ascending(group, scores) for group in groups}
    timed = latency if isinstance(budget, Budget) and budget.latency is not None else None
    fit = Fit(graph, groups, round_to, limits.least, None if timed is None else timed.blocks)
    if curves is None:
        family = ranked_cuts(groups, order, scores, scope, fit, limits.kept)
    else:
        scope, savings = "global", _savings(graph, budget, timed)
        family = spent_cuts(graph, groups, curves, savings, fit, limits.kept)
    if scope == "local" and isinstance(budget, Budget) and budget.units is not None and not limits.kept:
        counts = fit([group.size - int(group.size * budget.units + 1e-9) for group in groups])
    else:
        counts = _search(groups, budget, family, partial(_remaining, graph, groups, order, budget, timed))
    if rescore is None:
        removed = {name: order[name][:count] for name, count in counts.items() if count}
    else:
        removed = _rechosen(graph, groups, counts, rescore)
    source = {
        "criterion": getattr(scores, "criterion", None),
        "budget": {k: v for k, v in asdict(budget).items() if v is not None} if budget is not None else {},
        "remove": isinstance(budget, Remove),
        **({"at_most": {limit.limited: limit.amount}} if limit is not None else {}),
        "scope": scope,
        "round_to": round_to,
        **({"kept": dict(limits.kept)} if limits.kept else {}),
        **({"selection": "greedy"} if rescore is not None else {}),
        **({"allocation": "error"} if curves is not None else {}),
    }
    return Plan.of(graph, removed, source)


def _as_share(
    budget: Budget | AtMost | Remove | None, graph: Graph, latency: LatencyModel | None
) -> Budget | Remove | None:
    """The budget, with what there may be at most as a share of what there is."""
    for name in ("latency", "latency_ms"):
        amount = getattr(budget, name, None)
        if amount is not None and latency is None:
            raise BudgetError(
                f"{name}={amount:g} needs a latency model, which forecasts the time of a cut",
                fix="plan(..., latency=secateurs.latency_model(model, graph, inputs))",
            )
    if not isinstance(budget, AtMost):
        return budget
    if budget.latency_ms is not None and latency is not None:
        return budget.of(latency.ms())
    return budget.of(getattr(graph.cost(), budget.limited))


def _rechosen(graph: Graph, groups: Sequence[Group], counts: Counts, rescore: Rescore) -> RemovedUnits:
    """Which units leave where each group is ranked after those before it have been cut."""
    removed: RemovedUnits = {}
    for group in _as_read(graph, groups):
        if counts[group.name]:
            order = _ascending(group, {group.name: rescore(group, removed)})
            removed[group.name] = order[: counts[group.name]]
    return removed


def _as_read(graph: Graph, groups: Sequence[Group]) -> list[Group]:
    """The groups in the order in which the forward pass first reads their units; those never read last."""
    first = np.full(graph.units + 1, np.iinfo(np.int64).max)
    for read in graph.reads:
        np.minimum.at(first, read.units, read.call)
    return sorted(groups, key=lambda group: int(first[group.first : group.first + group.size].min()))


def _ascending(group: Group, scores: Mapping[str, torch.Tensor]) -> npt.NDArray[np.int64]:
    if group.name not in scores:
        reason = getattr(scores, "missing", {}).get(group.name)
        if reason is not None:
            raise PlanError(reason.message, where=reason.where, fix=reason.fix)
        raise PlanError(
            f"there is no score for group {group.name!r}", fix="score the same graph that you plan with"
        )
    values = np.asarray(torch.as_tensor(scores[group.name]).detach().cpu(), np.float64)
    if values.shape != (group.size,):
        raise PlanError(f"group {group.name!r} has {group.size} units, its scores have shape {values.shape}")
    if not np.isfinite(values).all():
        raise PlanError(f"{int((~np.isfinite(values)).sum())} scores of group {group.name!r} are not finite")
    return np.argsort(values, kind="stable")


def _search(
    groups: Sequence[Group],
    budget: Budget | Remove | None,
    family: Family,
    remaining: Callable[[Counts], float],
) -> Counts:
    """The smallest cut that meets the budget, by bisection: removing more never costs more."""
    cut, steps = family
    if budget is None:
        return cut(0)
    most = cut(steps)
    if isinstance(budget, Remove):
        able, have = sum(most.values()), sum(group.size for group in groups)
        if budget.units > able:
            raise BudgetError(
                f"{budget.units} units cannot leave: at most {able} of {have} can",
                fix=f"Remove({able})",
            )
        if budget.units < (given := sum(cut(0).values())):
            raise BudgetError(
                f"{budget.units} units are to leave, but the shares given to single groups remove {given}",
                fix=f"Remove({given}), or larger shares",
            )
        return last_cut(steps, lambda step: sum(cut(step).values()) <= budget.units, cut)
    if remaining(most) > budget.share + 1e-12:
        raise BudgetError(
            f"{budget.quantity}={budget.share:g} is out of reach: with every group at its smallest, "
            f"{budget.quantity}={remaining(most):.4f} remains",
            fix="raise the budget, lower round_to, min_units or shares, or allow more kinds of groups",
        )
    return first_cut(steps, lambda step: remaining(cut(step)) <= budget.share + 1e-12, cut)


def _remaining(
    graph: Graph,
    groups: Sequence[Group],
    order: Orders,
    budget: Budget | Remove | None,
    latency: LatencyModel | None,
    counts: Counts,
) -> float:
    """The share of what is budgeted that remains after so many units of each group have left."""
    if not isinstance(budget, Budget) or budget.units is not None:
        return 1 - sum(counts.values()) / sum(group.size for group in groups)
    removed = {name: order[name][:count] for name, count in counts.items()}
    if latency is not None:
        return latency.ms(removed) / latency.ms()
    after, whole = (getattr(cost, budget.quantity) for cost in (graph.cost(removed), graph.cost()))
    return float(after / max(whole, 1))


def _savings(graph: Graph, budget: Budget | Remove | None, latency: LatencyModel | None) -> Savings:
    """What a unit saves of what is budgeted."""
    if latency is not None:
        return product_savings(graph, graph.work.lengths, latency.terms())
    return marginal_savings(graph, budget.quantity if isinstance(budget, Budget) else "units")
