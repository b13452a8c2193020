"""From importances to a plan: which units leave so that a budget is met."""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict
from typing import Literal, TypeAlias

import numpy as np
import numpy.typing as npt
import torch

from secateurs.errors import BudgetError, PlanError
from secateurs.graph.groups import Graph, Group
from secateurs.planning.budgets import Budget, Remove
from secateurs.planning.plan import Plan

Scope: TypeAlias = Literal["global", "local"]
Counts: TypeAlias = dict[str, int]
Orders: TypeAlias = Mapping[str, npt.NDArray[np.int64]]


def plan(
    graph: Graph,
    scores: Mapping[str, torch.Tensor],
    budget: Budget | Remove,
    *,
    scope: Scope = "global",
    round_to: int = 1,
    kinds: Collection[str] | None = None,
    skip: Sequence[str] = (),
) -> Plan:
    """Choose the units that leave: the least important ones, until the budget is met.

    With ``scope="global"`` all units stand in one ranking and the lowest leave; with ``"local"`` every group
    keeps the same share of its units. Every group keeps at least one unit. Where the model's own code derives
    one size from others (``C // self.num_heads``), the groups concerned shrink together, so that it stays
    right. Of groups that cut the same dimensions in two directions (heads and head dimensions, convolution
    groups and the channels in them) only the one with more units is cut, unless `kinds` names them.

    Args:
        graph: What can be cut.
        scores: For each group name one importance a unit, larger means keep; shape ``(units,)``.
        budget: The share that remains, or the number of units to remove.
        scope: One ranking over all groups, or one share for each.
        round_to: The number of units that a group keeps is a multiple of this (or all of them); heads and
            whole convolution groups are not rounded.
        kinds: Kinds of groups to cut, such as ``{"channel"}``; every kind if None.
        skip: Glob patterns of group names to leave alone.

    Returns:
        The plan, with the forecast of its cost.

    Raises:
        BudgetError: The budget is out of reach; the message says how far one can go.
        PlanError: Scores are missing, of the wrong length or not finite, or nothing can be cut.
    """
    if scope not in ("global", "local"):
        raise PlanError(f"scope is 'global' or 'local', got {scope!r}")
    if round_to < 1:
        raise PlanError(f"round_to >= 1 must hold, got round_to={round_to}")
    groups = candidates(graph, kinds=kinds, skip=skip)
    order = {group.name: _ascending(group, scores) for group in groups}
    counts = _search(graph, groups, order, scores, budget, scope, round_to)
    removed = {name: order[name][:count] for name, count in counts.items() if count}
    source = {
        "criterion": getattr(scores, "criterion", None),
        "budget": {key: value for key, value in asdict(budget).items() if value is not None},
        "remove": isinstance(budget, Remove),
        "scope": scope,
        "round_to": round_to,
    }
    return Plan.of(graph, removed, source)


def candidates(
    graph: Graph, *, kinds: Collection[str] | None = None, skip: Sequence[str] = ()
) -> list[Group]:
    """The groups that a plan may cut.

    Raises:
        PlanError: None is left.
    """
    chosen = [
        group
        for group in graph.groups
        if (kinds is None or group.kind in kinds)
        and not any(fnmatch.fnmatch(group.name, glob) for glob in skip)
    ]
    names = {group.name for group in chosen}
    if kinds is None:
        chosen = [group for group in chosen if not _yields(graph, group, names)]
    if not chosen:
        have = sorted({group.kind for group in graph.groups})
        raise PlanError(
            f"no group is left to cut: kinds={kinds}, skip={list(skip)}, "
            f"the graph has {len(graph.groups)} groups of {have}",
            fix="call secateurs inspect to see what is locked and why",
        )
    return chosen


def _yields(graph: Graph, group: Group, names: Collection[str]) -> bool:
    rivals = [graph.by_name[name] for name in group.crosses if name in names]
    return any((rival.size, -rival.first) > (group.size, -group.first) for rival in rivals)


def _ascending(group: Group, scores: Mapping[str, torch.Tensor]) -> npt.NDArray[np.int64]:
    if group.name not in scores:
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
    graph: Graph,
    groups: Sequence[Group],
    order: Orders,
    scores: Mapping[str, torch.Tensor],
    budget: Budget | Remove,
    scope: Scope,
    round_to: int,
) -> Counts:
    """The smallest cut that meets the budget, by bisection: removing more never costs more."""
    fit = _Fit(graph, groups, round_to)
    cut, steps = _cuts(groups, order, scores, scope, fit)
    most = cut(steps)
    if isinstance(budget, Remove):
        able, have = sum(most.values()), sum(group.size for group in groups)
        if budget.units > able:
            raise BudgetError(
                f"{budget.units} units cannot leave: at most {able} of {have} can",
                fix=f"Remove({able})",
            )
        return _last(steps, lambda step: sum(cut(step).values()) <= budget.units, cut)
    if scope == "local" and budget.units is not None:
        return fit([group.size - int(group.size * budget.units + 1e-9) for group in groups])

    def remaining(counts: Counts) -> float:
        if budget.units is not None:
            return 1 - sum(counts.values()) / sum(group.size for group in groups)
        after = graph.cost({name: order[name][:count] for name, count in counts.items()})
        return after.share_of(graph.cost())[0 if budget.params is not None else 1]

    if remaining(most) > budget.share + 1e-12:
        raise BudgetError(
            f"{budget.quantity}={budget.share:g} is out of reach: with every group at its smallest, "
            f"{budget.quantity}={remaining(most):.4f} remains",
            fix="raise the budget, lower round_to, or allow more kinds of groups",
        )
    return _first(steps, lambda step: remaining(cut(step)) <= budget.share + 1e-12, cut)


def _cuts(
    groups: Sequence[Group], order: Orders, scores: Mapping[str, torch.Tensor], scope: Scope, fit: _Fit
) -> tuple[Callable[[int], Counts], int]:
    """A family of cuts, each a superset of the one before, and the number of the largest."""
    if scope == "local":
        steps = max(1000, *(group.size for group in groups))
        return (lambda step: fit([int(np.ceil(g.size * step / steps - 1e-9)) for g in groups])), steps
    ranked = _ranked(groups, order, scores)
    return (lambda step: fit(np.bincount(ranked[:step], minlength=len(groups)).tolist())), len(ranked)


def _first(steps: int, holds: Callable[[int], bool], cut: Callable[[int], Counts]) -> Counts:
    """The first cut for which a condition holds that stays true once it is."""
    low, high = 0, steps
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if holds(middle) else (middle + 1, high)
    return cut(low)


def _last(steps: int, holds: Callable[[int], bool], cut: Callable[[int], Counts]) -> Counts:
    """The last cut for which a condition holds that stays false once it is not."""
    low, high = 0, steps
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if holds(middle) else (low, middle - 1)
    return cut(low)


def _ranked(
    groups: Sequence[Group], order: Orders, scores: Mapping[str, torch.Tensor]
) -> npt.NDArray[np.int64]:
    """The group of each unit in ascending order of importance, the best unit of each group left out."""
    values, owners = [], []
    for place, group in enumerate(groups):
        mine = np.asarray(torch.as_tensor(scores[group.name]).detach().cpu(), np.float64)[order[group.name]]
        values.append(mine[:-1])
        owners.append(np.full(group.size - 1, place, np.int64))
    ranked: npt.NDArray[np.int64] = np.concatenate(owners)[np.argsort(np.concatenate(values), kind="stable")]
    return ranked


class _Fit:
    """Turns wanted cuts into ones that are possible: rounded, at least one unit left, tied counts agreeing.

    Args:
        graph: The graph.
        groups: Those of its groups that may be cut.
        round_to: What a group's count is a multiple of; heads and whole convolution groups are not rounded,
            since they are not the width of anything.
    """

    def __init__(self, graph: Graph, groups: Sequence[Group], round_to: int) -> None:
        self._graph, self._groups = graph, groups
        self._multiples = {g.name: 1 if g.kind in ("head", "conv_group") else round_to for g in groups}
        self._free = [group.name in self._multiples for group in graph.groups]
        self._known: dict[tuple[int, ...], Counts] = {}

    def __call__(self, wanted: Sequence[int]) -> Counts:
        """The number of units that leave, by group, for the numbers that are to leave."""
        key = tuple(int(count) for count in wanted)
        if key not in self._known:
            self._known[key] = self._settled(key)
        return self._known[key]

    def _settled(self, wanted: Sequence[int]) -> Counts:
        counts = {}
        for group, count in zip(self._groups, wanted, strict=True):
            multiple = self._multiples[group.name]
            kept = -(-max(group.size - count, 1) // multiple) * multiple
            counts[group.name] = group.size - min(kept, group.size)
        if not (self._graph.constraints or self._graph.conditions):
            return counts
        kept_all = [group.size - counts.get(group.name, 0) for group in self._graph.groups]
        multiples = [self._multiples.get(group.name, 1) for group in self._graph.groups]
        settled = self._graph.counts.settle(kept_all, self._free, multiples)
        found = {g.name: g.size - kept for g, kept in zip(self._graph.groups, settled, strict=True)}
        return {name: found[name] for name in counts}
