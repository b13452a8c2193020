"""Spending a budget by error curves, against trying everything."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from torch import nn

import secateurs
from secateurs import Budget, Remove
from secateurs.errors import PlanError, UnknownNameError
from secateurs.jobs.cuts import curves_for
from secateurs.jobs.settings import PruneSettings
from secateurs.planning.allocation import marginal_savings, spending_order


class Funnel(nn.Sequential):
    """Every layer's cost is the product of two widths that can change."""

    def __init__(self) -> None:
        super().__init__(
            nn.Linear(5, 6),
            nn.ReLU(),
            nn.Linear(6, 4),
            nn.ReLU(),
            nn.Linear(4, 7),
            nn.ReLU(),
            nn.Linear(7, 3),
        )


GRAPH = secateurs.trace(Funnel(), torch.zeros(1, 5))
SIZES = [group.size for group in GRAPH.groups]


def curves(seed: int, *, convex: bool) -> dict[str, torch.Tensor]:
    chance = np.random.default_rng(seed)
    found = {}
    for group in GRAPH.groups:
        rises = chance.exponential(size=group.size) * chance.exponential()
        rises[0] = 0
        found[group.name] = torch.from_numpy(np.cumsum(np.sort(rises) if convex else rises))
    return found


def cost(kept: tuple[int, ...], quantity: str) -> int:
    gone = {g.name: range(g.size - k) for g, k in zip(GRAPH.groups, kept, strict=True)}
    return int(getattr(GRAPH.cost({name: list(units) for name, units in gone.items()}), quantity))


@pytest.mark.parametrize("quantity", ["macs", "params", "bytes"])
def test_marginal_savings_are_differences_of_the_closed_form(quantity: str) -> None:
    savings = marginal_savings(GRAPH, quantity)
    for kept in [(6, 4, 7), (3, 4, 2), (2, 2, 5)]:
        wanted = [
            cost(kept, quantity) - cost((*kept[:g], kept[g] - 1, *kept[g + 1 :]), quantity) for g in range(3)
        ]
        assert savings(np.asarray(kept, float)).tolist() == wanted


@pytest.mark.parametrize("convex", [True, False])
def test_the_error_is_close_to_the_least_that_any_counts_give(convex: bool) -> None:
    everything = list(itertools.product(*[range(1, size + 1) for size in SIZES]))
    macs = {kept: cost(kept, "macs") for kept in everything}
    savings = marginal_savings(GRAPH, "macs")
    excess = []
    for seed in range(25):
        errors = curves(seed, convex=convex)
        order = spending_order(GRAPH, GRAPH.groups, errors, savings)

        def error(kept: tuple[int, ...], errors: dict[str, torch.Tensor] = errors) -> float:
            pairs = zip(GRAPH.groups, kept, strict=True)
            return sum(float(errors[group.name][group.size - count]) for group, count in pairs)

        for share in (0.7, 0.4):
            goal = share * macs[tuple(SIZES)]
            steps = (tuple(SIZES - np.bincount(order[:step], minlength=3)) for step in range(len(order) + 1))
            mine = next(kept for kept in steps if macs[kept] <= goal)
            best = min(error(kept) for kept in everything if macs[kept] <= goal)
            excess.append(error(mine) / best - 1)
    assert np.mean(excess) < 0.08  # what is left comes from widths of a few units
    assert np.median(excess) < 0.04


def test_all_units_but_one_of_each_group_leave_and_counts_are_multiples() -> None:
    order = spending_order(GRAPH, GRAPH.groups, curves(0, convex=False), marginal_savings(GRAPH, "macs"))
    assert np.bincount(order).tolist() == [5, 3, 6]
    pairs = spending_order(
        GRAPH, GRAPH.groups, curves(0, convex=True), marginal_savings(GRAPH, "macs"), multiples=[2, 2, 2]
    )
    assert np.bincount(pairs).tolist() == [5, 3, 6]
    ends = np.flatnonzero(np.diff(pairs)) + 1
    for end in ends:  # between two stretches every group has a multiple, or all, or is through
        kept = SIZES - np.bincount(pairs[:end], minlength=3)
        assert all(k % 2 == 0 or k in (1, size) for k, size in zip(kept, SIZES, strict=True)), kept


def test_a_dear_unit_does_not_hide_the_cheap_ones_behind_it() -> None:
    flat = {group.name: torch.arange(group.size, dtype=torch.float64) for group in GRAPH.groups}
    name = GRAPH.groups[2].name
    flat[name] = torch.tensor([0, 2, 2, 2, 2, 2, 2.0]).double()  # the first costs 2, five more come with it
    order = spending_order(GRAPH, GRAPH.groups, flat, np.ones_like)
    assert order[:6].tolist() == [2] * 6


def test_units_that_save_nothing_leave_last() -> None:
    def savings(kept: np.ndarray) -> np.ndarray:
        return np.array([0.0, 1.0, 1.0])

    order = spending_order(GRAPH, GRAPH.groups, curves(0, convex=True), savings)
    assert order[-5:].tolist() == [0] * 5


def test_what_is_refused() -> None:
    good, savings = curves(0, convex=True), marginal_savings(GRAPH, "macs")
    name = GRAPH.groups[1].name
    for bad, message in (
        ({key: value for key, value in good.items() if key != name}, f"no error curve for group '{name}'"),
        (
            {**good, name: good[name][:-1]},
            r"has 4 units, so its error curve has as many values, got .*\(3,\)",
        ),
        ({**good, name: good[name] * torch.nan}, f"curve of group '{name}' is not finite"),
    ):
        with pytest.raises(PlanError, match=message):
            spending_order(GRAPH, GRAPH.groups, bad, savings)


def scored(seed: int = 0) -> secateurs.Scores:
    chance = torch.Generator().manual_seed(seed)
    values = {group.name: torch.rand(group.size, generator=chance) for group in GRAPH.groups}
    return secateurs.Scores("mine", values, curves=curves(seed, convex=False))


BUDGETS = [Budget(macs=0.4), Budget(params=0.5), Budget(units=0.6), Remove(7)]


@pytest.mark.parametrize("budget", BUDGETS)
def test_a_plan_by_error_meets_its_budget_with_the_lowest_units_of_each_group(
    budget: Budget | Remove,
) -> None:
    scores = scored()
    decided = secateurs.plan(GRAPH, scores, budget, allocation="error")
    assert decided.source["allocation"] == "error"
    if isinstance(budget, Remove):
        assert len(decided) == budget.units
    elif budget.quantity == "units":
        assert len(decided) == round(0.4 * sum(SIZES) + 0.4999)
    else:
        left = getattr(decided.after, budget.quantity) / getattr(decided.before, budget.quantity)
        assert budget.share - 0.15 < left <= budget.share
    for cut in decided.groups:
        lowest = scores[cut.name].argsort()[: len(cut.removed)]
        assert cut.removed == tuple(sorted(lowest.tolist()))


def test_a_plan_by_error_costs_less_error_than_one_ranking_and_one_share() -> None:
    def error(decided: secateurs.Plan, scores: secateurs.Scores) -> float:
        assert scores.curves is not None
        return sum(float(scores.curves[cut.name][len(cut.removed)]) for cut in decided.groups)

    mine, ranking, share = 0.0, 0.0, 0.0
    for seed in range(8):
        scores, budget = scored(seed), Budget(macs=0.4)
        mine += error(secateurs.plan(GRAPH, scores, budget, allocation="error"), scores)
        ranking += error(secateurs.plan(GRAPH, scores, budget), scores)
        share += error(secateurs.plan(GRAPH, scores, budget, scope="local"), scores)
    assert mine < 0.9 * ranking
    assert mine < 0.9 * share


def test_the_curves_of_other_scores_and_numbers_of_some_groups() -> None:
    scores, others = scored(0), scored(1)
    plain = secateurs.Scores("plain", dict(scores))
    borrowed = secateurs.plan(GRAPH, plain, Budget(macs=0.4), allocation=others)
    assert kept(borrowed) == kept(secateurs.plan(GRAPH, others, Budget(macs=0.4), allocation="error"))
    name = GRAPH.groups[1].name
    some = secateurs.plan(GRAPH, plain, Budget(macs=0.4), allocation={name: 4}, curves=others.curves)
    assert kept(some)[name] == 4
    assert some.after.macs <= 0.4 * some.before.macs


def test_counts_are_rounded_and_the_least_is_kept() -> None:
    decided = secateurs.plan(
        GRAPH, scored(), Budget(macs=0.5), allocation="error", round_to=2, min_units={GRAPH.groups[0].name: 4}
    )
    assert all(
        count % 2 == 0 or count == size for count, size in zip(kept(decided).values(), SIZES, strict=True)
    )
    assert kept(decided)[GRAPH.groups[0].name] >= 4


def kept(decided: secateurs.Plan) -> dict[str, int]:
    found = {cut.name: cut.kept for cut in decided.groups}
    return {group.name: found.get(group.name, group.size) for group in GRAPH.groups}


def test_an_allocation_that_cannot_be_is_refused() -> None:
    plain = secateurs.Scores("l7", dict(scored()))
    with pytest.raises(PlanError, match="the scores of 'l7' have none"):
        secateurs.plan(GRAPH, plain, Budget(macs=0.4), allocation="error")
    with pytest.raises(UnknownNameError, match="unknown allocation 'eror'; did you mean 'error'"):
        secateurs.plan(GRAPH, scored(), Budget(macs=0.4), allocation="eror")  # type: ignore[arg-type]


def test_steps_spend_by_the_curves_of_the_criterion_or_of_reconstruction() -> None:
    torch.manual_seed(0)
    model, data = Funnel(), [torch.randn(40, 5)]
    budget = Budget(macs=0.4)
    for criterion in ("reconstruction", "l2"):
        *_, step = secateurs.prune_steps(
            model, data[0][:2], criterion=criterion, budget=budget, steps=2, data=data, allocation="error"
        )
        assert step.scores.criterion == criterion
        assert step.plan.source["allocation"] == "error"
        assert secateurs.trace(step.model, data[0][:2]).cost().macs <= 0.4 * GRAPH.cost().macs
    once = next(
        secateurs.prune_steps(
            model, data[0][:2], criterion="l2", budget=budget, data=data, allocation="error"
        )
    )
    curves_of = secateurs.score(model, GRAPH, "reconstruction", data=data)
    ranks = secateurs.score(model, GRAPH, "l2")
    assert kept(once.plan) == kept(secateurs.plan(GRAPH, ranks, budget, allocation=curves_of))
    with pytest.raises(UnknownNameError, match="unknown allocation 'eror'"):
        next(secateurs.prune_steps(model, data[0], budget=budget, allocation="eror"))  # type: ignore[arg-type]


def test_a_job_says_by_whose_curves_it_spends() -> None:
    def settings(**options: str) -> PruneSettings:
        return PruneSettings(source="run", target=("macs", 0.5), **options)  # type: ignore[arg-type]

    assert curves_for(settings()) is None
    assert curves_for(settings(allocation="error")) == "reconstruction"
    assert curves_for(settings(allocation="error", criterion="thinet")) == "thinet"
    with pytest.raises(UnknownNameError, match="unknown allocation 'errors'; did you mean 'error'"):
        settings(allocation="errors")
