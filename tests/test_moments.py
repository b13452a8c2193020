"""Streamed normal equations, and what calls read: against lstsq, and against the calls themselves."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from secateurs.errors import TrainingError
from secateurs.recovery.moments import Moments, sampled, shrunk
from secateurs.recovery.moves import values_at
from secateurs.recovery.readers import reader_of
from secateurs.recovery.samples import Samples, are_few

CALLS: dict[str, tuple[Callable[..., Tensor], tuple[int, ...], tuple[int, ...], dict[str, Any]]] = {
    "linear": (functional.linear, (5, 7, 6), (4, 6), {}),
    "a vector": (functional.linear, (6,), (4, 6), {}),
    "x @ w": (torch.matmul, (5, 7, 6), (6, 4), {}),
    "conv1d": (functional.conv1d, (3, 4, 11), (6, 4, 3), {"stride": 2, "padding": 1}),
    "dilated": (
        functional.conv2d,
        (3, 4, 9, 12),
        (5, 4, 3, 2),
        {"stride": (2, 1), "padding": (1, 0), "dilation": (1, 2)},
    ),
    "grouped": (functional.conv2d, (3, 6, 8, 8), (9, 2, 3, 3), {"groups": 3, "padding": "same"}),
    "same, even": (functional.conv2d, (3, 2, 8, 8), (3, 2, 4, 2), {"padding": "same"}),
    "without a batch": (functional.conv2d, (4, 8, 8), (5, 4, 3, 3), {"padding": "valid"}),
    "conv3d": (functional.conv3d, (2, 3, 5, 6, 7), (4, 3, 2, 3, 2), {"stride": (1, 2, 1), "padding": 1}),
    "transposed": (
        functional.conv_transpose2d,
        (3, 4, 5, 6),
        (4, 3, 3, 4),
        {"stride": (2, 3), "padding": 1, "output_padding": (1, 0), "dilation": (1, 2)},
    ),
    "transposed, grouped": (functional.conv_transpose1d, (3, 4, 6), (4, 2, 3), {"groups": 2, "padding": 2}),
}


@pytest.mark.filterwarnings("ignore:Using padding='same'")  # torch warns of what is tested here
@pytest.mark.parametrize("name", CALLS)
def test_rows_times_matrix_is_what_the_call_gives(name: str) -> None:
    call, shape, size, options = CALLS[name]
    x, weight = torch.randn(shape), torch.randn(size)
    result = call(x, weight, **options)
    reader = reader_of(call, (x, weight), options)
    assert reader is not None
    assert (reader.outputs, reader.positions(result.shape)) == (
        result.shape[reader.channel],
        result.numel() // reader.outputs,
    )
    places = torch.randperm(reader.positions(result.shape))[:20]
    given = reader.rows(places) @ reader.matrix().mT  # (G, n, C)
    torch.testing.assert_close(given.movedim(0, 1).flatten(1), values_at(result, reader.channel, places))
    assert reader.matrix().shape[2] == reader.columns
    assert torch.equal(reader.unfolded(reader.matrix()), weight)


def test_a_call_by_name_and_one_that_is_no_reader() -> None:
    x, weight, bias = torch.randn(2, 3), torch.randn(3, 4), torch.randn(4)
    reader = reader_of(torch.addmm, (), {"input": bias, "mat1": x, "mat2": weight})
    assert reader is not None and reader.bias is bias and reader.turned
    assert reader_of(torch.addmm, (bias, x, weight), {"beta": 2}) is None
    assert reader_of(torch.relu, (x,), {}) is None
    assert reader_of(torch.matmul, (x, torch.randn(3)), {}) is None


def test_streamed_equations_agree_with_lstsq_on_stored_activations() -> None:
    rows, targets = torch.randn(200, 7).double() + 3, torch.randn(200, 4).double() - 1
    moments = Moments(7, 4)
    for part in range(0, 200, 64):
        moments.add(rows[part : part + 64], targets[part : part + 64])
    weights, bias = moments.solve()
    system = torch.cat([rows, torch.ones(200, 1)], 1).double()
    best = torch.linalg.lstsq(system, targets).solution
    torch.testing.assert_close(torch.cat([weights[0].T, bias]), best)
    apart = system @ best - targets
    torch.testing.assert_close(moments.error(weights, bias)[0], apart.square().mean(0))
    plain, none = moments.solve(intercept=False)
    torch.testing.assert_close(plain[0].T, torch.linalg.lstsq(rows, targets).solution)
    assert not none.any()


def test_a_ridge_is_the_solution_of_equations_with_more_rows() -> None:
    rows, targets = torch.randn(50, 6).double(), torch.randn(50, 2).double()
    moments = Moments(6, 2)
    moments.add(rows, targets)
    weights, _ = moments.solve(0.1, intercept=False)
    pull = 0.1 * rows.square().sum(0).mean()
    system = torch.cat([rows, pull.sqrt() * torch.eye(6)])
    best = torch.linalg.lstsq(system, torch.cat([targets, torch.zeros(6, 2)])).solution
    torch.testing.assert_close(weights[0].T, best)


def test_groups_are_equations_of_their_own() -> None:
    rows, targets = torch.randn(3, 40, 5), torch.randn(3, 40, 2)
    together = Moments(5, 2, groups=3)
    together.add(rows, targets)
    for group, (weights, bias) in enumerate(zip(*together.solve(0.01), strict=True)):
        alone = Moments(5, 2)
        alone.add(rows[group], targets[group])
        torch.testing.assert_close((weights[None], bias[None]), alone.solve(0.01))
    assert together.nbytes == 8 * 3 * (5 + 25 + 2 + 10 + 2)


def test_dead_and_doubled_columns_have_a_solution() -> None:
    rows = torch.randn(30, 3)
    moments = Moments(5, 1)
    moments.add(torch.cat([rows, rows[:, :1], torch.zeros(30, 1)], 1), rows.sum(1, keepdim=True))
    weights, bias = moments.solve()
    assert weights.isfinite().all()
    assert moments.error(weights, bias).max() < 1e-6
    with pytest.raises(TrainingError, match="gave no batch"):
        Moments(2, 1).solve()


@pytest.mark.parametrize("intercept", [True, False])
@pytest.mark.parametrize("columns", [9, 2300])  # fewer than rows, and more than are in float64 at once
def test_rows_and_products_of_columns_give_the_same(intercept: bool, columns: int) -> None:
    rows, targets = torch.randn(2, 60, columns).double() + 2, torch.randn(2, 60, 3).double() - 1
    samples, moments = Samples(columns, 3, groups=2), Moments(columns, 3, groups=2)
    for part in (slice(0, 25), slice(25, 60)):
        for each in (samples, moments):
            each.add(rows[:, part], targets[:, part])
    weights, bias = samples.solve(0.05, intercept=intercept)
    torch.testing.assert_close((weights, bias), moments.solve(0.05, intercept=intercept))
    torch.testing.assert_close(samples.error(weights, bias), moments.error(weights, bias))
    torch.testing.assert_close(samples.constants(weights), moments.constants(weights))
    few = slice(3, 8)
    torch.testing.assert_close(samples.given(weights[:, :, few], few), moments.given(weights[:, :, few], few))
    assert samples.count == moments.count == 60
    assert samples.nbytes == 8 * 2 * 60 * (columns + 3 + 2 * 60 + 3)


def test_a_ridge_on_few_rows_is_that_of_lstsq() -> None:
    rows, targets = torch.randn(20, 50) + 1, torch.randn(20, 2).double()
    samples = Samples(50, 2)
    samples.add(rows, targets)
    weights, bias = samples.solve(0.1)
    assert weights.dtype == torch.float32
    centred = rows.double() - rows.double().mean(0)
    pull = 0.1 * centred.square().sum(0).mean()
    system = torch.cat([centred, pull.sqrt() * torch.eye(50)])
    best = torch.linalg.lstsq(system, torch.cat([targets - targets.mean(0), torch.zeros(50, 2)])).solution
    torch.testing.assert_close(weights[0].T.double(), best, atol=1e-6, rtol=1e-5)
    apart = rows.double() @ weights[0].T.double() + bias - targets
    torch.testing.assert_close(samples.error(weights, bias)[0], apart.square().mean(0))
    torch.testing.assert_close(apart.mean(0), torch.zeros(2).double(), atol=1e-6, rtol=0)
    with pytest.raises(TrainingError, match="gave no batch"):
        Samples(2, 1).solve()


def test_rows_are_kept_where_they_take_less_than_products() -> None:
    assert are_few(rows=1 << 20, columns=8193) and not are_few(rows=1 << 20, columns=8192)
    assert are_few(rows=100, columns=200) and not are_few(rows=101, columns=200)


def test_positions_are_drawn_without_repetition() -> None:
    chance = torch.Generator().manual_seed(1)
    assert torch.equal(sampled(10, chance, rows=10), torch.arange(10))
    drawn = sampled(1000, chance, rows=100)
    assert len(set(drawn.tolist())) == 100


# -- a ridge by cross-validation ------------------------------------------------------------------


def noisy(count: int, columns: int, noise: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Rows with targets that follow them in part, and as many without noise to judge by."""
    chance = torch.Generator().manual_seed(0)
    scales = torch.logspace(0, -1, columns, dtype=torch.float64)
    rows = torch.randn(2, max(count, 500), columns, generator=chance, dtype=torch.float64) * scales + 1
    true = torch.randn(columns, 3, generator=chance, dtype=torch.float64) / columns**0.5
    targets = rows @ true
    seen = targets[0, :count] + noise * torch.randn(count, 3, generator=chance, dtype=torch.float64)
    return rows[0, :count], seen, rows[1], targets[1]


@pytest.mark.parametrize("noise", [0.0, 0.1, 1.0, 10.0])
@pytest.mark.parametrize(("count", "columns"), [(100, 80), (60, 200), (400, 100)])
def test_the_ridge_that_is_chosen_is_about_the_best_on_other_rows(
    count: int, columns: int, noise: float
) -> None:
    rows, targets, others, wanted = noisy(count, columns, noise)
    moments = Moments(columns, 3)
    moments.add(rows, targets)

    def missed(weights: Tensor, bias: Tensor) -> float:
        return float((others @ weights[0].mT + bias - wanted).square().mean())

    chosen = missed(*moments.solve(1e-3, is_least=True))
    at_all = [missed(*moments.solve(1e-3 * 10**power)) for power in (0, 1, 2, 3, 4, 5, 9)]
    if noise == 10.0:  # hundred times what is to be found: the best is none, and one draw says little more
        assert chosen < 0.05 * at_all[0]
    else:
        assert chosen <= 1.3 * min(at_all)


@pytest.mark.parametrize("intercept", [True, False])
@pytest.mark.parametrize("noise", [0.1, 10.0])
def test_rows_and_products_choose_the_same_ridge(noise: float, intercept: bool) -> None:
    rows, targets, *_ = noisy(60, 80, noise)
    found = []
    for kind in (Moments, Samples):
        sums = kind(80, 3)
        sums.add(rows, targets)
        found.append(sums.solve(1e-3, intercept=intercept, is_least=True))
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-8)


def test_each_group_has_a_ridge_of_its_own() -> None:
    (rows, targets, *_), (others, noise, *_) = noisy(60, 30, 0.0), noisy(60, 30, 10.0)
    both = Moments(30, 3, groups=2)
    both.add(torch.stack([rows, others]), torch.stack([targets, noise]))
    weights, _ = both.solve(1e-3, is_least=True)
    for place, (some, wanted) in enumerate(((rows, targets), (others, noise))):
        alone = Moments(30, 3)
        alone.add(some, wanted)
        torch.testing.assert_close(weights[place], alone.solve(1e-3, is_least=True)[0][0])


# -- covariances of few rows ----------------------------------------------------------------------


@pytest.mark.parametrize("count", [10, 40, 400])
def test_a_shrunk_covariance_is_nearer_to_that_of_all_rows(count: int) -> None:
    chance = torch.Generator().manual_seed(0)
    mix = torch.randn(40, 40, generator=chance, dtype=torch.float64) * torch.logspace(0, -1, 40)
    rows = torch.randn(count, 40, generator=chance, dtype=torch.float64) @ mix.mT
    seen, true = rows.mT @ rows / count, mix @ mix.mT
    drawn = shrunk(seen[None], count)[0]
    assert float((drawn - true).norm()) < float((seen - true).norm())
    assert float(drawn.trace()) == pytest.approx(float(seen.trace()))
    share = ((1 - 2 / 40) * seen.square().sum() + seen.trace() ** 2) / (
        (count + 1 - 2 / 40) * (seen.square().sum() - seen.trace() ** 2 / 40)
    )
    apart = ~torch.eye(40, dtype=torch.bool)
    torch.testing.assert_close(drawn[apart], (1 - min(float(share), 1.0)) * seen[apart])
