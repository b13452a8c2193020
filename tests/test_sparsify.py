"""Training for sparsity: pulls against autograd of the written formula, zeros against a naive loop."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import secateurs
from secateurs.errors import SecateursError, TrainingError, UnknownNameError
from secateurs.graph.groups import Graph
from secateurs.recovery import Recipe, finetune
from secateurs.recovery.sparsify import (
    METHODS,
    GeometricMedian,
    GroupLasso,
    Growing,
    Slimming,
    SoftPruning,
    Sparsifier,
    sparsifier,
)
from test_finetune import Memory, assert_same, state_of

IMAGES = torch.randn(12, 3, 8, 8, generator=torch.Generator().manual_seed(0))
BATCHES = [(IMAGES[start : start + 4], torch.arange(4)) for start in (0, 4, 8)]


class TwoFlattenedColumns(nn.Module):
    """A unit has a filter, a norm, and four columns of a linear layer behind a flatten."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 6, 3, stride=4), nn.BatchNorm2d(6)
        self.fc = nn.Linear(6 * 4, 4)

    def forward(self, x: Tensor) -> Tensor:
        scores: Tensor = self.fc(self.norm(self.conv(x)).relu().flatten(1))
        return scores


class ResidualStream(nn.Module):
    """Two convolutions write into one stream, so that one unit has two filters, two norms and two readers."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.stem_norm = nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.inner, self.inner_norm = nn.Conv2d(8, 5, 3, padding=1, bias=False), nn.BatchNorm2d(5)
        self.outer, self.outer_norm = nn.Conv2d(5, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.fc = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem_norm(self.stem(x)).relu()
        x = x + self.outer_norm(self.outer(self.inner_norm(self.inner(x)).relu()))
        scores: Tensor = self.fc(x.mean((2, 3)))
        return scores


class NoNorm(nn.Module):
    """Nothing normalises: a zeroed filter with a negative bias is dead."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.fc = nn.Conv2d(3, 6, 3), nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        scores: Tensor = self.fc(self.conv(x).relu().mean((2, 3)))
        return scores


MODELS = [TwoFlattenedColumns, ResidualStream]


def made(kind: Callable[[], nn.Module], seed: int = 0) -> tuple[nn.Module, Graph]:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = kind()
        for parameter in model.parameters():  # no weight is at its even start
            parameter.data += 0.1 * torch.randn_like(parameter)
    return model, secateurs.trace(model, IMAGES[:2])


def method_for(name: str, graph: Graph) -> Sparsifier:
    options: dict[str, dict[str, Any]] = {
        "slimming": {"strength": 0.05},
        "group-lasso": {"strength": 0.02},
        "growing": {"rate": 0.4, "epochs": 4, "strength": 2.0},
        "sfp": {"rate": 0.4},
        "fpgm": {"rate_dist": 0.3, "rate_norm": 0.9},
    }
    return sparsifier(name, graph, **options[name])


def pulled(method: Sparsifier, model: nn.Module, epochs_done: float = 0.0) -> dict[str, Tensor]:
    """The gradients that a method gives where the loss gives none."""
    method.start(model)
    method.after_backward(model, epochs_done)
    return {
        name: torch.zeros_like(weight) if weight.grad is None else weight.grad
        for name, weight in model.named_parameters()
    }


def of_formula(model: nn.Module, penalty: Tensor) -> dict[str, Tensor]:
    """Autograd's gradient of a penalty."""
    model.zero_grad()
    names, weights = zip(*model.named_parameters(), strict=True)
    found = torch.autograd.grad(penalty, weights, allow_unused=True)
    return {
        name: torch.zeros_like(weight) if gradient is None else gradient
        for name, weight, gradient in zip(names, weights, found, strict=True)
    }


def weights_of_unit(model: nn.Module, graph: Graph, name: str, unit: int) -> list[Tensor]:
    """By hand: every place of a unit, one index at a time."""
    parameters, group = dict(model.named_parameters()), graph.by_name[name]
    return [
        parameters[part.parameter].select(part.dim, int(index)).reshape(-1)
        for part in group.slices
        if part.parameter in parameters
        for index in part.indices[unit]
    ]


def assert_close(left: dict[str, Tensor], right: dict[str, Tensor]) -> None:
    assert left.keys() == right.keys()
    for name in left:
        torch.testing.assert_close(left[name], right[name], rtol=1e-5, atol=1e-7, msg=name)


@pytest.mark.parametrize("kind", MODELS)
def test_slimming_is_the_subgradient_of_the_absolute_scales(kind: Callable[[], nn.Module]) -> None:
    model, graph = made(kind)
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    for norm in norms:
        norm.weight.data[::2] *= -1
    found = pulled(Slimming(graph, strength=0.3), model)
    assert_close(found, of_formula(model, 0.3 * sum(norm.weight.abs().sum() for norm in norms)))


def test_scales_of_groups_that_are_skipped_are_not_pulled() -> None:
    model, graph = made(ResidualStream)
    found = pulled(Slimming(graph, skip=["inner"]), model)
    assert found["outer_norm.weight"].all()
    assert not found["inner_norm.weight"].any()


@pytest.mark.parametrize("kind", [*MODELS, NoNorm])
def test_group_lasso_is_the_gradient_of_the_norms_of_whole_units(kind: Callable[[], nn.Module]) -> None:
    model, graph = made(kind)
    method = GroupLasso(graph, strength=0.3)
    found = pulled(method, model)
    penalty = torch.zeros(())
    for group in graph.groups:
        for unit in range(group.size):
            weights = torch.cat(weights_of_unit(model, graph, group.name, unit))
            penalty = penalty + 0.3 * math.sqrt(len(weights)) * weights.norm()
    assert_close(found, of_formula(model, penalty))
    assert method.facts(model)["penalty"] == pytest.approx(penalty.item(), rel=1e-5)


def test_group_lasso_leaves_a_unit_of_zeros_alone() -> None:
    model, graph = made(NoNorm)
    for weight in weights_of_unit(model, graph, "conv", 2):
        weight.detach().zero_()
    model.conv.weight.data[2], model.conv.bias.data[2], model.fc.weight.data[:, 2] = 0, 0, 0  # type: ignore[union-attr, operator, index]
    found = pulled(GroupLasso(graph, strength=0.3), model)
    assert all(bool(torch.isfinite(gradient).all()) for gradient in found.values())
    assert not found["conv.weight"][2].any() and found["conv.weight"][1].all()


@pytest.mark.parametrize("kind", MODELS)
def test_growing_is_the_gradient_of_squares_that_count_more_as_time_goes(
    kind: Callable[[], nn.Module],
) -> None:
    model, graph = made(kind)
    leaving = {group.name: [0, group.size - 1] for group in graph.groups}
    method = Growing(graph, epochs=8, strength=3.0, leaving=secateurs.Plan.of(graph, leaving))
    found = pulled(method, model, epochs_done=2.0)
    penalty = torch.zeros(())
    for name, units in leaving.items():
        for unit in units:
            weights = torch.cat(weights_of_unit(model, graph, name, unit))
            penalty = penalty + 3.0 * 2.0 / 8 / 2 * weights.square().sum()
    assert_close(found, of_formula(model, penalty))
    assert method.facts(model)["penalty"] == pytest.approx(penalty.item(), rel=1e-5)


def test_growing_takes_the_filters_of_least_norm_to_zero() -> None:
    model, graph = made(ResidualStream)
    norms = model.inner.weight.detach().flatten(1).norm(dim=1)  # type: ignore[union-attr, operator]
    least = norms.argsort()[:2].tolist()
    method = Growing(graph, epochs=60, rate=0.4)
    finetune(model, BATCHES, recipe=Recipe(epochs=60, lr=0.05), regularizer=method)
    after = model.inner.weight.detach().flatten(1).norm(dim=1)  # type: ignore[union-attr, operator]
    others = [unit for unit in range(5) if unit not in least]
    assert after[least].max() < 1e-3 < 0.1 < after[others].min()
    cut = secateurs.plan(
        graph, secateurs.score(model, graph, "l2"), secateurs.Budget(units=0.6), scope="local"
    )
    assert {group.name: list(group.removed) for group in cut.groups}["inner"] == sorted(least)
    smaller = secateurs.apply(model, cut)
    assert (model.eval()(IMAGES) - smaller.eval()(IMAGES)).abs().max() < 0.01


@pytest.mark.parametrize("kind", [*MODELS, NoNorm])
@pytest.mark.parametrize("rate", [0.2, 0.5, 0.75])
def test_soft_pruning_zeroes_exactly_the_least_filters(kind: Callable[[], nn.Module], rate: float) -> None:
    model, graph = made(kind)
    before, weights = state_of(model), dict(model.named_parameters())
    SoftPruning(graph, rate=rate).after_epoch(model, 1)
    expected = dict(before)
    for group in graph.groups:
        makers = [part.parameter for part in group.slices if part.role == "producer"]
        norms = [
            sum(before[name][unit].square().sum().item() for name in makers) for unit in range(group.size)
        ]
        count = group.size - math.floor(group.size * (1 - rate) + 1e-9)
        for unit in sorted(range(group.size), key=norms.__getitem__)[:count]:
            for name in makers:
                expected[name] = expected[name].clone()
                expected[name][unit] = 0
    assert_same(state_of(model), expected)
    assert all(weight.requires_grad for weight in weights.values())


@pytest.mark.parametrize(("rate_dist", "rate_norm"), [(0.4, 1.0), (0.25, 0.75)])
def test_the_geometric_median_zeroes_what_the_others_replace(rate_dist: float, rate_norm: float) -> None:
    model, graph = made(ResidualStream)
    before = state_of(model)
    GeometricMedian(graph, rate_dist=rate_dist, rate_norm=rate_norm).after_epoch(model, 1)
    stream = next(group for group in graph.groups if group.size == 8)
    makers = ["stem.weight", "outer.weight"]
    assert {part.parameter for part in stream.slices if part.role == "producer"} == set(makers)
    filters = [torch.cat([before[name][unit].flatten() for name in makers]) for unit in range(8)]
    by_norm = sorted(range(8), key=lambda unit: filters[unit].norm().item())
    small = by_norm[: math.floor(8 * (1 - rate_norm))]
    rest = [unit for unit in range(8) if unit not in small]
    far = {unit: sum((filters[unit] - filters[other]).norm().item() for other in rest) for unit in rest}
    count = math.ceil(8 * (1 - rate_norm + rate_dist) - 1e-9) - len(small)
    expected = {*small, *sorted(rest, key=far.__getitem__)[:count]}
    for name in makers:
        zero = (state_of(model)[name].flatten(1) == 0).all(1)
        assert {unit for unit in range(8) if zero[unit]} == expected


def test_by_distance_alone_it_ranks_as_the_criterion_does() -> None:
    model, graph = made(ResidualStream)
    expected = secateurs.score(model, graph, "fpgm")
    found = secateurs.score(model, graph, GeometricMedian(graph).importance)
    for group in graph.groups:
        torch.testing.assert_close(found[group.name], expected[group.name], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", sorted(METHODS))
def test_the_ranking_that_fits_exists(name: str) -> None:
    model, graph = made(ResidualStream)
    scores = secateurs.score(model, graph, METHODS[name].criterion)
    assert len(secateurs.plan(graph, scores, secateurs.Budget(units=0.5), scope=METHODS[name].scope))


def test_the_cut_after_soft_pruning_takes_what_is_zero() -> None:
    for name in ("sfp", "fpgm"):
        model, graph = made(ResidualStream)
        method = method_for(name, graph)
        finetune(model, BATCHES, recipe=Recipe(epochs=2, lr=0.05), regularizer=method)
        budget = secateurs.Budget(units=0.6)
        cut = secateurs.plan(
            graph, secateurs.score(model, graph, method.criterion), budget, scope=method.scope
        )
        for group in cut.groups:
            makers = [part for part in graph.by_name[group.name].slices if part.role == "producer"]
            for part in makers:
                weight = model.get_parameter(part.parameter)
                assert not weight[list(group.removed)].any()
                assert (weight.flatten(1) == 0).all(1).sum() == len(group.removed)


@pytest.mark.parametrize(
    ("kind", "holder", "settings", "learns"),
    [
        (TwoFlattenedColumns, "norm", {"bias": 0.1}, True),
        (TwoFlattenedColumns, "norm", {"bias": -0.1}, False),
        (TwoFlattenedColumns, "norm", {"bias": 0.1, "weight": 0.0}, False),
        (NoNorm, "conv", {"bias": 0.1}, True),
        (NoNorm, "conv", {"bias": -0.1}, False),
    ],
    ids=["bias up", "bias down", "scale zero too", "no norm, bias up", "no norm, bias down"],
)
def test_a_zeroed_filter_lives_by_the_bias_that_it_leaves(
    kind: Callable[[], nn.Module], holder: str, settings: dict[str, float], learns: bool
) -> None:
    """The pitfall: a zeroed filter gives a constant, and a ReLU that is flat there passes no gradient."""
    model, graph = made(kind)
    method = SoftPruning(graph, rate=0.5)
    method.start(model)
    method.after_epoch(model, 1)
    filters = model.get_parameter("conv.weight")
    zero = (filters == 0).flatten(1).all(1)
    assert zero.sum() == 3
    for leaf, value in settings.items():
        model.get_parameter(f"{holder}.{leaf}").data[zero] = value
    nn.functional.cross_entropy(model.train()(BATCHES[0][0]), BATCHES[0][1]).backward()
    assert filters.grad is not None
    assert bool(filters.grad[zero].flatten(1).any(1).all()) == learns
    filters.data -= 0.01 * filters.grad
    method.after_epoch(model, 2)
    assert method.facts(model) == {"zeroed": 3, "regrown": 3 if learns else 0}


@pytest.mark.parametrize("kind", [*MODELS, NoNorm])
def test_filters_of_zeros_get_no_longer_gradient_than_the_others(kind: Callable[[], nn.Module]) -> None:
    """Behind a batch norm theirs is some hundred times longer, and momentum carries it on."""
    model, graph = made(kind)
    method = SoftPruning(graph, rate=0.5)
    method.start(model)
    method.after_epoch(model, 1)
    nn.functional.cross_entropy(model.train()(BATCHES[0][0]), BATCHES[0][1]).backward()
    before = {
        name: tensor.grad.clone() for name, tensor in model.named_parameters() if tensor.grad is not None
    }
    method.after_backward(model, 1.0)
    expected = {name: gradient.clone() for name, gradient in before.items()}
    for group in graph.groups:
        for name in (part.parameter for part in group.slices if part.role == "producer"):
            zero = [unit for unit in range(group.size) if not model.get_parameter(name)[unit].any()]
            lengths = [gradient.norm().item() for gradient in before[name]]
            others = [length for unit, length in enumerate(lengths) if unit not in zero]
            longest = sum(others) / len(others)
            for unit in zero:
                expected[name][unit] *= min(1.0, longest / max(lengths[unit], 1e-30))
            if kind is not NoNorm:
                assert max(lengths[unit] for unit in zero) > 20 * longest
    found = {name: weight.grad for name, weight in model.named_parameters() if weight.grad is not None}
    assert_close(found, expected)


def test_unbounded_soft_pruning_leaves_gradients_alone() -> None:
    model, graph = made(ResidualStream)
    method = SoftPruning(graph, bounded=False)
    nn.functional.cross_entropy(model.train()(BATCHES[0][0]), BATCHES[0][1]).backward()
    before = {
        name: weight.grad.clone() for name, weight in model.named_parameters() if weight.grad is not None
    }
    method.after_epoch(model, 1)
    method.after_backward(model, 1.0)
    found = {name: weight.grad for name, weight in model.named_parameters() if weight.grad is not None}
    assert_close(found, before)


@pytest.mark.parametrize("name", sorted(METHODS))
def test_permuting_units_permutes_what_a_method_does(name: str) -> None:
    """The units of a hidden layer have no order of their own."""
    order = torch.tensor([3, 0, 4, 1, 2])
    results = []
    for permuted in (False, True):
        model, graph = made(ResidualStream)
        if permuted:
            state = state_of(model)
            for key in ("inner.weight", *(f"inner_norm.{leaf}" for leaf in ("weight", "bias"))):
                state[key] = state[key][order]
            state["outer.weight"] = state["outer.weight"][:, order]
            model.load_state_dict(state)
        finetune(model, BATCHES, recipe=Recipe(epochs=2, lr=0.05), regularizer=method_for(name, graph))
        results.append(model)
    plain, permuted_model = (model.get_parameter("inner.weight").detach() for model in results)
    torch.testing.assert_close(plain[order], permuted_model, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", sorted(METHODS))
def test_a_resumed_training_ends_with_the_same_bits(name: str) -> None:
    recipe, whole = Recipe(epochs=4, lr=0.05), Memory()
    model, graph = made(ResidualStream)
    finetune(model, BATCHES, recipe=recipe, regularizer=method_for(name, graph), checkpoint=whole)
    for state in whole.states:
        again, _ = made(ResidualStream, seed=7)
        finetune(again, BATCHES, recipe=recipe, regularizer=method_for(name, graph), checkpoint=Memory(state))
        assert_same(state_of(again), state_of(model))


@pytest.mark.parametrize("name", sorted(METHODS))
def test_a_method_changes_what_training_leaves(name: str) -> None:
    """A method that did nothing would pass many tests."""
    results = []
    for regularised in (False, True):
        model, graph = made(ResidualStream)
        method = method_for(name, graph) if regularised else None
        finetune(model, BATCHES, recipe=Recipe(epochs=3, lr=0.05), regularizer=method)
        scores = secateurs.score(model, graph, "l2")["inner"]
        results.append((scores.min() / scores.max()).item())
    plain, sparse = results
    if name == "slimming":  # it empties scales, not filters
        return
    assert sparse < plain


def test_slimming_can_start_from_scales_of_a_half() -> None:
    model, graph = made(TwoFlattenedColumns)
    Slimming(graph, initial_scale=0.5).start(model)
    assert torch.equal(model.get_parameter("norm.weight"), torch.full((6,), 0.5))


def test_frozen_parameters_are_left_alone() -> None:
    model, graph = made(ResidualStream)
    for parameter in (*model.stem.parameters(), *model.stem_norm.parameters()):  # type: ignore[union-attr]
        parameter.requires_grad_(False)
    for name in ("slimming", "group-lasso", "growing"):
        pulled(method_for(name, graph), model, 1.0)
        assert model.get_parameter("stem.weight").grad is None
        assert model.get_parameter("stem_norm.weight").grad is None


@pytest.mark.parametrize(
    ("make", "error", "words"),
    [
        (lambda graph: sparsifier("slim", graph), UnknownNameError, "did you mean 'slimming'"),
        (
            lambda graph: sparsifier("slimming", graph, rate=0.3),
            TrainingError,
            "no option rate, got rate=0.3",
        ),
        (lambda graph: Slimming(graph, strength=-1), TrainingError, "must hold, got strength=-1"),
        (lambda graph: GroupLasso(graph, strength=math.nan), TrainingError, "got strength=nan"),
        (lambda graph: SoftPruning(graph, rate=1.0), TrainingError, "`0 < rate < 1` must hold, got rate=1.0"),
        (lambda graph: GeometricMedian(graph, rate_norm=0), TrainingError, "got rate_norm=0"),
        (
            lambda graph: GeometricMedian(graph, rate_dist=0.4, rate_norm=0.3),
            TrainingError,
            "no unit is left; got rate_dist=0.4 and rate_norm=0.3",
        ),
        (lambda graph: Growing(graph, epochs=0), TrainingError, "got epochs=0"),
        (lambda graph: SoftPruning(graph, skip=["*"]), SecateursError, "no group is left to cut"),
    ],
)
def test_mistakes_are_named(make: Any, error: type[Exception], words: str) -> None:
    _, graph = made(NoNorm)
    with pytest.raises(error, match=words):
        make(graph)


def test_a_model_without_batch_norms_is_no_case_for_slimming() -> None:
    model, graph = made(NoNorm)
    before = state_of(model)
    with pytest.raises(TrainingError, match=r"no unit of this NoNorm has one"):
        finetune(model, BATCHES, recipe=Recipe(epochs=1), regularizer=Slimming(graph))
    assert_same(state_of(model), before)


@pytest.mark.parametrize("name", sorted(METHODS))
def test_the_graph_of_another_model_is_refused(name: str) -> None:
    _, graph = made(ResidualStream)
    other, _ = made(TwoFlattenedColumns)
    with pytest.raises(TrainingError, match="was given the graph of another model"):
        finetune(other, BATCHES, recipe=Recipe(epochs=1), regularizer=method_for(name, graph))


def test_the_program_of_the_guide_runs() -> None:
    text = (Path(__file__).parents[1] / "docs" / "sparsity.md").read_text()
    (program,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    known: dict[str, Any] = {}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        exec(compile(program, "docs/sparsity.md", "exec"), known)
    assert known["net"][0].weight.shape == (16, 4)
    for name, method in METHODS.items():
        row = next(line for line in text.splitlines() if line.startswith(f"| `{name}` | "))
        assert f"| `{method.criterion}`, {method.scope} |" in row
