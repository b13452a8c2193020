"""Particles: budgets held exactly, resampling, the filter, granularities against what they stand for."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

import models
import secateurs
from models import build
from secateurs import Budget, Remove
from secateurs.errors import BudgetError, PlanError
from secateurs.lowered import lowering
from secateurs.masks import FeatureMaps, Kernels, Strided, positions
from secateurs.measure import accuracy
from secateurs.planning.exact import ExactCost, ExactCounts, Stratum
from secateurs.planning.particles import FilterSettings, effective_size, run_filter, systematic
from secateurs.sampling import Particles, mask_budget, particle_filter
from test_sensitivity import labelled


def chance(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


# -- budgets --------------------------------------------------------------------------------------


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(1, 9), min_size=1, max_size=5), st.integers(0, 10**6), st.data())
def test_a_count_is_exact_whatever_is_mended(sizes: list[int], seed: int, data: Any) -> None:
    owners = np.repeat(np.arange(len(sizes)), sizes)
    least = [data.draw(st.integers(1, size)) for size in sizes]
    kept = data.draw(st.integers(sum(least), len(owners)))
    budget = ExactCounts(owners, least, [Stratum(np.arange(len(owners)), kept)])
    random = chance(seed)
    for mask in (budget.draw(random), budget.mend(random.random(len(owners)) < random.random(), random)):
        assert mask.sum() == kept
        assert (np.bincount(owners[mask], minlength=len(sizes)) >= least).all()
        assert np.array_equal(budget.mend(mask, random), mask)  # nothing to mend, nothing changed


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(2, 9), min_size=2, max_size=5), st.integers(0, 10**6), st.floats(0.2, 1.0))
def test_a_cost_is_met_within_one_unit(sizes: list[int], seed: int, share: float) -> None:
    owners = np.repeat(np.arange(len(sizes)), sizes)

    def cost(mask: np.ndarray) -> float:  # a chain of layers: products of neighbours' widths
        widths = np.bincount(owners[mask], minlength=len(sizes))
        return float(3 * widths[0] + (widths[:-1] * widths[1:]).sum())

    limit = share * cost(np.ones(len(owners), np.bool_))
    try:
        budget = ExactCost(owners, [1] * len(sizes), cost, limit)
    except BudgetError:
        smallest = np.isin(np.arange(len(owners)), np.unique(owners, return_index=True)[1])
        assert cost(smallest) > limit
        return
    random = chance(seed)
    for mask in (budget.draw(random), budget.mend(random.random(len(owners)) < 0.3, random)):
        assert cost(mask) <= limit
        assert (np.bincount(owners[mask], minlength=len(sizes)) >= 1).all()
        more = [cost(mask | (np.arange(len(owners)) == unit)) for unit in np.flatnonzero(~mask)]
        assert not more or max(more) > limit


def test_units_with_the_lowest_values_leave() -> None:
    owners, values = np.array([0, 0, 0, 1, 1, 1]), np.array([0.1, 0.2, 0.3, 0.9, 0.8, 0.05])
    both = ExactCounts(owners, [2, 1], [Stratum(np.arange(6), 3)])
    assert both.lowest_leave(values).tolist() == [False, True, True, True, False, False]
    cost = ExactCost(owners, [1, 1], lambda mask: float(mask.sum()), 4.5)
    assert cost.lowest_leave(values).tolist() == [False, True, True, True, True, False]


@pytest.mark.parametrize("kept", [1, 7])
def test_a_count_out_of_reach_is_refused(kept: int) -> None:
    with pytest.raises(BudgetError, match=f"between 2 and all can be kept, not {kept}"):
        ExactCounts(np.array([0, 0, 0, 1, 1, 1]), [1, 1], [Stratum(np.arange(6), kept)])


# -- resampling -----------------------------------------------------------------------------------


@settings(max_examples=200, deadline=None)
@given(st.lists(st.floats(0, 1), min_size=1, max_size=12), st.integers(1, 60), st.integers(0, 10**6))
def test_systematic_resampling_is_within_one_of_the_weights(raw: list[float], count: int, seed: int) -> None:
    if not sum(raw) > 1e-3:
        return
    weights = np.array(raw) / sum(raw)
    places = systematic(weights, count, chance(seed))
    assert len(places) == count
    times = np.bincount(places, minlength=len(weights))
    assert (np.abs(times - count * weights) < 1 + 1e-6).all()
    assert not times[weights == 0].any()


def test_systematic_resampling_is_unbiased() -> None:
    weights = np.array([0.07, 0.43, 0.2, 0.3])
    random = chance()
    times = sum(np.bincount(systematic(weights, 5, random), minlength=4) for _ in range(4000)) / 4000
    assert times == pytest.approx(5 * weights, abs=0.03)


def test_the_effective_number_goes_from_one_to_all() -> None:
    assert effective_size(np.full(8, 1 / 8)) == pytest.approx(8)
    assert effective_size(np.eye(8)[3]) == 1
    weights = chance().random(8)
    weights /= weights.sum()
    assert effective_size(weights) == pytest.approx(1 / sum(float(w) ** 2 for w in weights))


# -- the filter -----------------------------------------------------------------------------------


def hidden_truth(size: int, kept: int, seed: int = 7) -> Any:
    """An error that counts the units that should have been kept and are not."""
    truth = np.zeros(size, np.bool_)
    truth[chance(seed).permutation(size)[:kept]] = True
    return truth, lambda mask: float((truth & ~mask).sum() / kept)


@pytest.mark.parametrize("evolve", [False, True])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_it_beats_the_best_of_as_many_random_masks(evolve: bool, seed: int) -> None:
    truth, error = hidden_truth(60, 30)
    budget = ExactCounts(np.zeros(60, np.int64), [1], [Stratum(np.arange(60), 30)])
    options = FilterSettings(
        particles=24, generations=20, noise=0.02, temperature=0.02, evolve=evolve, seed=seed
    )
    found = run_filter(error, budget, options)
    random = chance(seed)
    other = min(error(budget.draw(random)) for _ in range(found.tried))
    assert found.error < other
    assert found.error == error(found.best)
    assert all(mask.sum() == 30 for mask in found.masks)
    assert found.weights.sum() == pytest.approx(1)
    assert any(each.resampled for each in found.history)
    assert [each.best for each in found.history] == sorted((g.best for g in found.history), reverse=True)
    assert found.marginal()[truth].mean() > found.marginal()[~truth].mean() + 0.2


def test_it_is_deterministic_by_seed_and_begins_where_it_is_told() -> None:
    truth, error = hidden_truth(30, 15)
    budget = ExactCounts(np.zeros(30, np.int64), [1], [Stratum(np.arange(30), 15)])
    one, same, other = (
        run_filter(error, budget, FilterSettings(particles=6, generations=3, seed=seed)) for seed in (1, 1, 2)
    )
    assert np.array_equal(one.masks, same.masks) and one.history == same.history
    assert not np.array_equal(one.masks, other.masks)
    begun = run_filter(error, budget, FilterSettings(particles=4, generations=0), start=truth)
    assert begun.error == 0 and np.array_equal(begun.best, truth)


def test_weights_are_the_likelihood_and_alike_where_all_is_wrong() -> None:
    budget = ExactCounts(np.zeros(6, np.int64), [1], [Stratum(np.arange(6), 3)])
    options = FilterSettings(particles=5, generations=0, temperature=None)
    found = run_filter(lambda mask: float(mask[:3].mean()), budget, options)
    right = np.array([1 - mask[:3].mean() for mask in found.masks])
    assert found.weights == pytest.approx(right / right.sum())
    hopeless = run_filter(lambda mask: 1.0, budget, options)
    assert hopeless.weights.tolist() == [0.2] * 5


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"particles": 1}, "particles >= 2"),
        ({"generations": -1}, "generations >= 0"),
        ({"noise": 1.5}, "0 <= noise <= 1` must hold, got noise=1.5"),
        ({"temperature": 0.0}, "temperature > 0"),
    ],
)
def test_settings_check_themselves(options: dict[str, Any], words: str) -> None:
    with pytest.raises(PlanError, match=words):
        FilterSettings(**options)


# -- feature maps ---------------------------------------------------------------------------------


@pytest.mark.parametrize("toy", [models.PlainVgg, models.ResidualStream, models.GroupNormNet])
def test_a_mask_of_feature_maps_is_the_cut(toy: Any) -> None:
    model = build(toy)
    inputs = model.example(16)
    maps = FeatureMaps(secateurs.trace(model, inputs))
    mask = mask_budget(maps, Budget(units=0.6)).draw(chance())
    plan = maps.plan(mask)
    assert len(plan) == len(mask) - int(len(mask) * 0.6 + 1e-9)
    small = secateurs.apply(model, plan)
    with torch.no_grad():
        assert torch.allclose(maps.masked(model, mask)(inputs), small(inputs), atol=1e-5)
    assert maps.macs(mask) == secateurs.trace(small, inputs).cost().macs
    assert np.array_equal(maps.mask_of(plan), mask)


@pytest.mark.parametrize("budget", [Remove(9), Budget(units=0.7), Budget(macs=0.6)])
def test_the_filter_on_a_network_holds_the_budget_and_beats_random_masks(budget: Any) -> None:
    model = build(models.PlainVgg)
    batches = labelled(model, 160)
    maps = FeatureMaps(secateurs.trace(model, model.example()))
    found = particle_filter(
        model, maps, batches, budget, settings=FilterSettings(particles=10, generations=6, noise=0.05)
    )
    exact, random = mask_budget(maps, budget), chance(5)
    tried = [exact.draw(random) for _ in range(found.posterior.tried)]
    assert found.accuracy >= max(accuracy(maps.masked(model, mask), batches).top1 for mask in tried)
    plan = found.plan()
    assert accuracy(secateurs.apply(model, plan), batches).top1 == found.accuracy
    assert plan.source["selection"] == "particles"
    if isinstance(budget, Budget) and budget.macs:
        assert plan.after.macs <= 0.6 * plan.before.macs
        more = [maps.macs(found.mask | (np.arange(30) == unit)) for unit in np.flatnonzero(~found.mask)]
        assert max(more) > 0.6 * plan.before.macs
    else:
        assert len(plan) == 9


def test_as_a_selection_it_keeps_the_counts_and_never_does_worse_on_its_images() -> None:
    model = build(models.ResidualStream)
    batches = labelled(model, 128)
    options: dict[str, Any] = {"criterion": "l1", "budget": Budget(macs=0.5), "scope": "local"}
    alone = next(secateurs.prune_steps(model, model.example(), **options))
    choose = Particles(batches=batches, settings=FilterSettings(particles=6, generations=3))
    chosen = next(secateurs.prune_steps(model, model.example(), **options, selection=choose))
    assert [(g.name, g.kept) for g in alone.plan.groups] == [(g.name, g.kept) for g in chosen.plan.groups]
    assert chosen.plan.after == alone.plan.after
    assert chosen.plan.source["budget"] == {"macs": 0.5}
    assert accuracy(chosen.model, batches).top1 >= accuracy(alone.model, batches).top1


def test_what_cannot_be_chosen_is_said() -> None:
    model = build(models.PlainVgg)
    maps = FeatureMaps(secateurs.trace(model, model.example()))
    with pytest.raises(BudgetError, match=r"units or macs, not of params"):
        mask_budget(maps, Budget(params=0.5))
    with pytest.raises(BudgetError, match=r"a number for every group is needed.*\['conv1', 'conv2', 'fc1'\]"):
        mask_budget(maps, {})
    with pytest.raises(BudgetError, match=r"out of reach"):
        mask_budget(maps, Budget(macs=1e-6))
    kernels = Kernels(model, model.example())
    found = particle_filter(
        model, kernels, labelled(model), Remove(5), settings=FilterSettings(particles=2, generations=0)
    )
    with pytest.raises(PlanError, match="Kernels cannot be cut"):
        found.plan()
    with pytest.raises(PlanError, match="no convolutions"):
        Kernels(nn.Linear(2, 3), torch.zeros(1, 2))
    with pytest.raises(PlanError, match="stride >= 2"):
        Strided(model, model.example(), stride=1)


# -- kernels and strided kernels ------------------------------------------------------------------


class OddConvolutions(nn.Module):
    """Grouped, strided, one-dimensional and 1x1 convolutions, one of them used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3, padding=1)
        self.grouped = nn.Conv2d(8, 8, (3, 2), stride=2, groups=2)
        self.point = nn.Conv2d(8, 8, 1)
        self.line = nn.Conv1d(8, 4, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.point(self.point(F.relu(self.grouped(F.relu(self.first(x))))))
        return self.line(x.flatten(2)).mean(2)


def odd() -> tuple[OddConvolutions, torch.Tensor]:
    torch.manual_seed(0)
    return OddConvolutions().eval(), torch.randn(2, 3, 8, 8)


@pytest.mark.parametrize("granularity", [Kernels, Strided])
def test_a_silent_unit_is_exactly_the_weights_it_stands_for(granularity: Any) -> None:
    model, x = odd()
    masks = granularity(model, x)
    layers = dict(model.named_modules())
    for number, name in enumerate(masks.names):
        weight = layers[name].weight
        places = masks.of_group(number)
        groups, width = layers[name].groups, weight.shape[1]
        flat = weight.detach().flatten(2)
        if granularity is Kernels:
            assert len(places) == weight.shape[0] * width
        for which, place in enumerate(places):
            mask = np.ones(len(masks.owners), np.bool_)
            mask[place] = False
            expected = flat.clone()
            if granularity is Kernels:
                expected[which // width, which % width] = 0
            else:
                phases = len(places) // layers[name].in_channels
                source, phase = divmod(which, phases)
                outputs = weight.shape[0] // groups
                block = source // width
                expected[block * outputs : (block + 1) * outputs, source % width, phase::phases] = 0
            got = dict(masks.masked(model, mask).named_modules())[name].weight
            assert torch.equal(got.flatten(2), expected)


def test_positions_are_counted_over_all_calls() -> None:
    model, x = odd()
    assert positions(model, x) == {"first": 64, "grouped": 12, "point": 24, "line": 8}


@pytest.mark.parametrize("granularity", [Kernels, Strided])
@pytest.mark.parametrize("kept", [1.0, 0.5, 0.15])
def test_lowering_counts_what_smaller_matrices_really_multiply(granularity: Any, kept: float) -> None:
    model, x = odd()
    masks = granularity(model, x)
    mask = chance(3).random(len(masks.owners)) < kept
    weights = masks.weights_kept(mask)
    for line in lowering(model, weights, x):
        if line.name not in ("first", "grouped"):
            continue
        layer = dict(model.named_modules())[line.name]
        given = torch.randn(1, layer.in_channels, 8, 8)
        silent = layer.weight.detach() * weights[line.name]
        truth = F.conv2d(given, silent, None, layer.stride, layer.padding, 1, layer.groups)
        patches = F.unfold(given, layer.kernel_size, 1, layer.padding, layer.stride)[0]
        made, macs, rows = torch.zeros(layer.out_channels, patches.shape[1]), 0, 0
        per_in, per_out = patches.shape[0] // layer.groups, layer.out_channels // layer.groups
        for group in range(layer.groups):
            matrix = silent[group * per_out : (group + 1) * per_out].flatten(1)
            alive = weights[line.name][group * per_out : (group + 1) * per_out].flatten(1)
            reading, making = alive.any(0), alive.any(1)
            small = matrix[making][:, reading]
            part = patches[group * per_in : (group + 1) * per_in][reading]
            made[group * per_out : (group + 1) * per_out][making] = small @ part
            macs, rows = macs + small.numel() * part.shape[1], rows + len(part)
        assert torch.allclose(made, truth[0].flatten(1), atol=1e-5)
        assert (line.macs_kept, line.rows_kept) == (macs, rows)
        assert (
            line.macs_nonzero
            == int(weights[line.name].sum()) * patches.shape[1]
            <= line.macs_kept
            <= line.macs
        )
    total = sum(line.macs_nonzero for line in lowering(model, weights, x))
    assert masks.macs(mask) == total


def test_strided_units_leave_whole_rows_and_scattered_kernels_do_not() -> None:
    model, x = odd()
    lines = {}
    for granularity in (Strided, Kernels):
        masks = granularity(model, x)
        mask = mask_budget(masks, Budget(units=0.7)).draw(chance(1))
        lines[granularity] = lowering(model, masks.weights_kept(mask), x)[0]
    strided, kernels = lines[Strided], lines[Kernels]
    assert strided.rows_kept < strided.rows
    assert strided.macs_kept == strided.macs_nonzero  # lowering saves all that was masked
    assert kernels.rows_kept == kernels.rows
    assert kernels.macs_kept > kernels.macs_nonzero


@pytest.mark.parametrize("kept", [{"fc": torch.ones(2, 2)}, {"first": torch.ones(1, 1, 3, 3)}])
def test_lowering_refuses_what_is_no_mask_of_a_convolution(kept: dict[str, torch.Tensor]) -> None:
    model, x = odd()
    with pytest.raises(PlanError, match="is no convolution with a weight of shape"):
        lowering(model, kept, x)


def test_the_best_of_all_masks_is_found_where_all_can_be_tried() -> None:
    model = build(models.FlattenHead)
    batches = labelled(model, 200)
    maps = FeatureMaps(secateurs.trace(model, model.example()))
    size = len(maps.owners)
    every = [np.isin(np.arange(size), kept) for kept in itertools.combinations(range(size), 3)]
    best = max(accuracy(maps.masked(model, mask), batches).top1 for mask in every)
    options = FilterSettings(particles=16, generations=10, noise=0.1)
    assert particle_filter(model, maps, batches, Remove(size - 3), settings=options).accuracy == best
