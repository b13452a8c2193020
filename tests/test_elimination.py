"""Backward elimination against solving every least-squares problem anew, and against its own promises."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from secateurs.criteria import elimination
from secateurs.criteria.elimination import Regression, drop, eliminate
from secateurs.errors import ScoreError

UNITS = 6


def regression(count: int, outputs: int, *, units: int = UNITS, others: int = 2, seed: int = 0) -> Regression:
    """A problem with correlated columns, in no order, and some that belong to no unit."""
    chance = torch.Generator().manual_seed(seed)
    width = units * count + others
    mixing = torch.randn(width, width, generator=chance, dtype=torch.float64)
    x = torch.randn(300, width, generator=chance, dtype=torch.float64) @ mixing
    return Regression(
        moments=x.T @ x / len(x),
        weight=torch.randn(outputs, width, generator=chance),
        units=torch.arange(units),
        columns=torch.randperm(width, generator=chance)[: units * count].view(units, count),
    )


def solved(one: Regression, gone: list[int], ridge: float) -> float:
    """The error of the best weights without some units, from the normal equations."""
    pull = ridge * one.moments.diagonal().mean() * torch.eye(len(one.moments), dtype=torch.float64)
    moments, weight = one.moments + pull, one.weight.double()
    kept = torch.ones(len(moments), dtype=torch.bool)
    kept[one.columns[torch.isin(one.units, torch.tensor(gone))].flatten()] = False
    best = torch.zeros_like(weight)
    best[:, kept] = torch.linalg.solve(moments[kept][:, kept], moments[kept] @ weight.T).T
    return float((((weight - best) @ moments) * (weight - best)).sum())


def unread(one: Regression, gone: list[int]) -> float:
    """The mean square of what some units contributed to the outputs."""
    columns = one.columns[torch.isin(one.units, torch.tensor(gone))].flatten()
    lost = torch.zeros_like(one.weight, dtype=torch.float64)
    lost[:, columns] = one.weight.double()[:, columns]
    return float(((lost @ one.moments) * lost).sum())


SEVERAL = [
    [regression(3, 4)],
    [regression(3, 40, others=0)],  # more outputs than columns: only their products count
    [regression(3, 4), regression(1, 30, seed=1)],
    [regression(2, 4), regression(1, 5, units=3, seed=2)],  # the second reads three of the six units
]


@pytest.mark.parametrize("lazy", [1, 7, 1000])
@pytest.mark.parametrize("problems", SEVERAL)
def test_each_removal_is_the_best_one_and_its_error_that_of_solving_anew(
    problems: list[Regression], lazy: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(elimination, "_LAZY", lazy)
    found = eliminate(problems, UNITS, ridge=1e-5)
    gone: list[int] = []
    for place, unit in enumerate(found.order.tolist()):
        errors = {
            other: sum(solved(one, [*gone, other], 1e-5) for one in problems)
            for other in range(UNITS)
            if other not in gone
        }
        assert errors[unit] <= min(errors.values()) * (1 + 1e-9)
        assert float(found.errors[place + 1]) == pytest.approx(errors[unit], rel=1e-8)
        gone.append(unit)
    assert bool((found.errors.diff() >= 0).all())


@pytest.mark.parametrize("problems", SEVERAL)
def test_dropping_takes_the_least_contribution_each_time(problems: list[Regression]) -> None:
    found = drop(problems, UNITS)
    gone: list[int] = []
    for place, unit in enumerate(found.order.tolist()):
        errors = {
            other: sum(unread(one, [*gone, other]) for one in problems)
            for other in range(UNITS)
            if other not in gone
        }
        assert errors[unit] <= min(errors.values()) * (1 + 1e-9)
        assert float(found.errors[place + 1]) == pytest.approx(errors[unit], rel=1e-8)
        gone.append(unit)


@pytest.mark.parametrize("method", [eliminate, drop])
def test_permuting_units_permutes_the_order(method: object) -> None:
    one, shuffled = regression(3, 4), torch.tensor([4, 2, 0, 5, 3, 1])
    other = Regression(moments=one.moments, weight=one.weight, units=one.units, columns=one.columns[shuffled])
    first, second = (method([each], UNITS) for each in (one, other))  # type: ignore[operator]
    assert torch.equal(shuffled[second.order], first.order)
    torch.testing.assert_close(first.errors, second.errors)


def test_a_copy_leaves_first_and_only_one_of_the_two() -> None:
    x = torch.randn(200, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    x[:, 3] = x[:, 1]
    one = Regression(
        moments=x.T @ x / len(x),
        weight=torch.tensor([[1.0, 2.0, 0.5, 1.0]]),
        units=torch.arange(4),
        columns=torch.arange(4)[:, None],
    )
    found = eliminate([one], 4)
    assert found.order[0] in (1, 3)
    assert found.errors[1] < 1e-4 < found.errors[2]
    one.weight[0, 3] = -1.9
    cancelled = drop([one], 4)  # the copies' weights nearly cancel: the second mends what the first broke
    assert cancelled.errors[4] < cancelled.errors[3]


def test_importances_sort_into_the_order_even_where_errors_are_equal_or_fall() -> None:
    order = torch.tensor([2, 0, 3, 1])
    found = elimination.Elimination(order=order, errors=torch.tensor([0.0, 0.0, 0.0, 3.0, 2.0]).double())
    importance = found.importance()
    assert torch.equal(importance.argsort(), order)
    torch.testing.assert_close(importance[order], torch.tensor([0.0, 0.0, 3.0, 3.0]).double())


def test_units_that_nothing_reads_leave_first_at_no_cost() -> None:
    found = eliminate([regression(2, 4)], UNITS + 2)
    assert {*found.order[:2].tolist()} == {UNITS, UNITS + 1}
    assert found.errors[2] == 0 < found.errors[3]


def test_what_is_refused() -> None:
    one = regression(1, 2)
    with pytest.raises(ScoreError, match="`0 < ridge` must hold, got ridge=0"):
        eliminate([one], UNITS, ridge=0)
    with pytest.raises(ScoreError, match=r"do not fit together: .*'weight': \(2, 5\)"):
        Regression(moments=one.moments, weight=one.weight[:, :5], units=one.units, columns=one.columns)
    broken: Tensor = one.moments.clone()
    broken[0, 0] = torch.nan
    with pytest.raises(ScoreError, match="moments that are not finite"):
        Regression(moments=broken, weight=one.weight, units=one.units, columns=one.columns)
