"""Spending a budget by error curves, against trying everything."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from torch import nn

import secateurs
from secateurs.errors import PlanError
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


@pytest.mark.parametrize("quantity", ["macs", "params"])
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
