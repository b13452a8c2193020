"""Decisions: budgets and their limits, rounding, scope, kinds, plans as data, composition."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import models
import secateurs
from models import TOYS, build
from secateurs import AtMost, Budget, Graph, Plan, Remove
from secateurs.errors import ApplyError, BudgetError, PlanError
from toy import Toy

CNNS = (models.PlainVgg, models.ResidualStream, models.DenseBlock, models.DepthwiseConv, models.SqueezeExcite)


def prepared(toy: type[Toy], seed: int = 0) -> tuple[Toy, Graph, dict[str, torch.Tensor]]:
    model = build(toy)
    graph = secateurs.trace(model, model.example())
    generator = torch.Generator().manual_seed(seed)
    scores = {g.name: torch.rand(g.size, generator=generator, dtype=torch.float64) for g in graph.groups}
    return model, graph, scores


def removed(plan: Plan) -> dict[str, tuple[int, ...]]:
    return {group.name: group.removed for group in plan.groups}


# -- budgets --------------------------------------------------------------------------------------


@pytest.mark.parametrize("toy", CNNS)
@pytest.mark.parametrize("scope", ["global", "local"])
@pytest.mark.parametrize(
    "budget", [Budget(macs=0.5), Budget(params=0.4), Budget(units=0.6), Budget(macs=0.9)]
)
def test_a_budget_is_met_and_not_by_far(toy: type[Toy], scope: Any, budget: Budget) -> None:
    _, graph, scores = prepared(toy)
    plan = secateurs.plan(graph, scores, budget, scope=scope)
    whole = sum(group.size for group in graph.groups)
    params, macs = plan.after.share_of(plan.before)
    share = {"macs": macs, "params": params, "units": 1 - len(plan) / whole}[budget.quantity]
    assert share <= budget.share + 1e-9
    if scope == "global":  # one unit fewer would have missed it
        least = max(
            ((scores[name][i], name, i) for name, gone in removed(plan).items() for i in gone),
            key=lambda item: item[0],
        )
        fewer = {name: [i for i in gone if (name, i) != least[1:]] for name, gone in removed(plan).items()}
        spared = Plan.of(graph, fewer)
        params, macs = spared.after.share_of(spared.before)
        share = {"macs": macs, "params": params, "units": 1 - len(spared) / whole}[budget.quantity]
        assert share > budget.share


@settings(max_examples=25, deadline=None)
@given(
    st.sampled_from(["units", "params", "macs", "bytes"]),
    st.sampled_from(["global", "local"]),
    st.integers(1, 4),
    st.floats(0.3, 1.0),
    st.floats(0.3, 1.0),
    st.integers(0, 3),
)
def test_a_smaller_budget_never_costs_more(
    quantity: str, scope: Any, round_to: int, one: float, other: float, seed: int
) -> None:
    _, graph, scores = prepared(models.ResidualStream, seed)
    plans = []
    for share in sorted((one, other)):
        try:
            budget = Budget(**{quantity: share})
            plans.append(secateurs.plan(graph, scores, budget, scope=scope, round_to=round_to))
        except BudgetError:
            plans.append(None)
    small, large = plans
    if small is None:
        return
    assert large is not None
    assert small.after.macs <= large.after.macs
    assert small.after.params <= large.after.params
    assert all(set(gone) <= set(removed(small).get(name, ())) for name, gone in removed(large).items())


def test_the_whole_budget_is_the_identity() -> None:
    model, graph, scores = prepared(models.PlainVgg)
    for budget in (Budget(macs=1.0), Budget(params=1.0), Budget(units=1.0), Remove(0)):
        plan = secateurs.plan(graph, scores, budget)
        assert len(plan) == 0
        assert plan.before == plan.after
        same = secateurs.apply(model, plan)
        x = model.example()
        assert torch.equal(model(x), same(x))


def test_local_keeps_the_share_of_every_group() -> None:
    _, graph, scores = prepared(models.PlainVgg)
    plan = secateurs.plan(graph, scores, Budget(units=0.5), scope="local")
    assert {group.name: group.kept for group in plan.groups} == {"conv1": 4, "conv2": 6, "fc1": 5}


def test_the_lowest_leave() -> None:
    _, graph, scores = prepared(models.PlainVgg)
    plan = secateurs.plan(graph, scores, Remove(9))
    everything = sorted(
        (float(value), group.name, unit)
        for group in graph.groups
        for unit, value in enumerate(scores[group.name])
    )
    assert {(n, u) for n, gone in removed(plan).items() for u in gone} == {e[1:] for e in everything[:9]}
    local = secateurs.plan(graph, scores, Budget(units=0.5), scope="local")
    for name, gone in removed(local).items():
        assert set(gone) == set(scores[name].argsort()[: len(gone)].tolist())


def test_every_group_keeps_a_unit_and_it_is_the_best() -> None:
    _, graph, scores = prepared(models.PlainVgg)
    scores["conv1"] = scores["conv1"] - 100
    most = sum(group.size for group in graph.groups) - len(graph.groups)
    plan = secateurs.plan(graph, scores, Remove(most))
    for group in plan.groups:
        assert group.kept == 1
        assert int(scores[group.name].argmax()) not in group.removed


@pytest.mark.parametrize(
    ("budget", "words"),
    [
        (Budget(macs=0.0001), r"macs=0.0001 is out of reach.*macs=0\.\d+ remains"),
        (Budget(params=0.0001), r"params=0.0001 is out of reach"),
        (Budget(units=0.01), r"units=0.01 is out of reach"),
        (Remove(1000), r"1000 units cannot leave: at most 27 of 30 can"),
    ],
)
def test_a_budget_out_of_reach_says_how_far_one_can_go(budget: Budget | Remove, words: str) -> None:
    _, graph, scores = prepared(models.PlainVgg)
    with pytest.raises(BudgetError, match=words):
        secateurs.plan(graph, scores, budget)


def test_the_limit_that_an_error_states_can_be_reached() -> None:
    _, graph, scores = prepared(models.PlainVgg)
    with pytest.raises(BudgetError, match="at most 27") as caught:
        secateurs.plan(graph, scores, Remove(28))
    assert caught.value.fix == "Remove(27)"
    assert len(secateurs.plan(graph, scores, Remove(27))) == 27


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({}, "exactly one of units, params, macs"),
        ({"macs": 0.5, "params": 0.5}, "exactly one"),
        ({"macs": 50}, r"0 < macs <= 1 must hold, got macs=50"),
        ({"units": 0.0}, r"0 < units <= 1 must hold, got units=0.0"),
        ({"params": -0.1}, r"0 < params <= 1 must hold"),
        ({"params": float("nan")}, r"0 < params <= 1 must hold"),
    ],
)
def test_a_budget_checks_itself(arguments: dict[str, float], words: str) -> None:
    with pytest.raises(BudgetError, match=words):
        Budget(**arguments)


def test_a_negative_number_of_units_is_refused() -> None:
    with pytest.raises(BudgetError, match="units >= 0 must hold, got units=-1"):
        Remove(-1)


# -- constraints ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["params", "macs", "bytes"])
@pytest.mark.parametrize("scope", ["global", "local"])
def test_what_there_may_be_at_most_is_met(name: str, scope: Any) -> None:
    _, graph, scores = prepared(models.PlainVgg)
    whole = getattr(graph.cost(), name)
    limit = round(0.55 * whole)
    plan = secateurs.plan(graph, scores, AtMost(**{name: limit}), scope=scope)
    assert 0.3 * limit < getattr(plan.after, name) <= limit
    assert removed(plan) == removed(
        secateurs.plan(graph, scores, Budget(**{name: limit / whole}), scope=scope)
    )
    assert plan.source["at_most"] == {name: limit} and Plan.from_json(plan.to_json()) == plan
    assert not len(secateurs.plan(graph, scores, AtMost(**{name: whole}), scope=scope))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "a limit is on exactly one of params, macs, bytes, latency_ms"),
        ({"macs": 3e8, "params": 1e6}, "exactly one"),
        ({"bytes": 0}, "bytes > 0 must hold, got bytes=0"),
        ({"latency_ms": float("nan")}, "latency_ms > 0 must hold"),
    ],
)
def test_limits_that_are_none_are_refused(arguments: dict[str, float], message: str) -> None:
    with pytest.raises(BudgetError, match=message):
        AtMost(**arguments)


def test_a_share_above_one_is_told_how_a_number_is_written() -> None:
    with pytest.raises(BudgetError, match=r"AtMost\(latency_ms=20\) for a number"):
        Budget(latency=20)


@pytest.mark.parametrize("scope", ["global", "local"])
@pytest.mark.parametrize("round_to", [2, 4, 8])
@pytest.mark.parametrize("budget", [Budget(units=0.5), Budget(macs=0.6), Remove(9)])
def test_round_to_keeps_multiples(scope: Any, round_to: int, budget: Budget | Remove) -> None:
    _, graph, scores = prepared(models.TwelveChannels)
    try:
        plan = secateurs.plan(graph, scores, budget, scope=scope, round_to=round_to)
    except BudgetError:
        assert round_to == 8
        return
    for group in graph.groups:
        kept = group.size - len(removed(plan).get(group.name, ()))
        assert kept % round_to == 0 or kept == group.size


def test_twelve_channels_rounded_to_eight_keep_eight_at_half() -> None:
    _, graph, scores = prepared(models.TwelveChannels)
    plan = secateurs.plan(graph, scores, Budget(units=0.5), scope="local", round_to=8)
    assert {group.name: group.kept for group in plan.groups} == {"first": 8, "second": 16}


def test_skip_and_kinds_leave_groups_alone() -> None:
    _, graph, scores = prepared(models.PlainVgg)
    assert set(removed(secateurs.plan(graph, scores, Budget(macs=0.6), skip=["fc*"]))) <= {"conv1", "conv2"}
    assert set(removed(secateurs.plan(graph, scores, Remove(3), kinds={"neuron"}))) == {"fc1"}
    del scores["fc1"]
    secateurs.plan(graph, scores, Remove(3), skip=["fc1"])
    secateurs.plan(graph, scores, Remove(3), kinds={"channel"})


def test_groups_that_cross_are_not_both_cut_unless_asked() -> None:
    model, graph, scores = prepared(models.GroupedConv)
    by_size = {group.size: group for group in graph.groups}
    assert by_size[2].name in by_size[4].crosses
    plan = secateurs.plan(graph, scores, Budget(units=0.5), scope="local")
    assert set(removed(plan)) == {by_size[4].name}
    both = secateurs.plan(
        graph, scores, Budget(units=0.5), scope="local", kinds={group.kind for group in graph.groups}
    )
    assert len(both.groups) == 3
    small = secateurs.apply(model, both)
    secateurs.verify(model, small, both, model.example()).raise_if_failed()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"scope": "glob"}, "scope is 'global' or 'local', got 'glob'"),
        ({"round_to": 0}, "round_to >= 1 must hold, got round_to=0"),
        ({"skip": ["*"]}, "no group is left to cut"),
        ({"kinds": {"head"}}, "no group is left to cut"),
    ],
)
def test_bad_options_are_refused_in_words(options: dict[str, Any], words: str) -> None:
    _, graph, scores = prepared(models.PlainVgg)
    with pytest.raises(PlanError, match=words):
        secateurs.plan(graph, scores, Budget(macs=0.5), **options)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda scores: scores.pop("conv2"), "no score for group 'conv2'"),
        (lambda scores: scores.update(conv1=torch.zeros(7)), r"'conv1' has 8 units.*\(7,\)"),
        (lambda scores: scores["fc1"].fill_(float("nan")), "10 scores of group 'fc1' are not finite"),
        (lambda scores: scores["fc1"][:2].fill_(float("inf")), "2 scores of group 'fc1' are not finite"),
    ],
)
def test_bad_scores_are_refused_in_words(change: Any, words: str) -> None:
    _, graph, scores = prepared(models.PlainVgg)
    change(scores)
    with pytest.raises(PlanError, match=words):
        secateurs.plan(graph, scores, Budget(macs=0.5))


def test_ties_are_broken_the_same_way_each_time() -> None:
    _, graph, _ = prepared(models.ResidualStream)
    flat = {group.name: torch.ones(group.size) for group in graph.groups}
    first = secateurs.plan(graph, flat, Remove(5))
    assert first == secateurs.plan(graph, dict(reversed(flat.items())), Remove(5))


# -- plans as data --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("cut", "words"),
    [
        ({"conv9": [0]}, "no group 'conv9'"),
        ({"conv1": [8]}, "'conv1' has units 0 to 7, got 8 to 8"),
        ({"conv1": [-1]}, "'conv1' has units 0 to 7, got -1 to -1"),
        ({"conv1": range(8)}, "'conv1' would lose all of its 8 units"),
    ],
)
def test_a_plan_by_hand_is_checked(cut: Any, words: str) -> None:
    _, graph, _ = prepared(models.PlainVgg)
    with pytest.raises(PlanError, match=words):
        Plan.of(graph, cut)


def test_a_plan_says_what_each_dimension_loses() -> None:
    _, graph, _ = prepared(models.PlainVgg)
    plan = Plan.of(graph, {"conv2": [3, 0, 3]})
    axes = {(axis.parameter, axis.dim): axis for axis in plan.axes}
    assert set(axes) == {("conv2.weight", 0), ("conv2.bias", 0), ("fc1.weight", 1)}
    assert axes["conv2.weight", 0].removed == (0, 3)
    assert axes["fc1.weight", 1].removed == (0, 1, 2, 3, 12, 13, 14, 15)
    assert len(plan) == 2
    assert repr(plan).startswith("Plan(2 units leave; params ")


@pytest.mark.parametrize("toy", TOYS)
def test_a_plan_survives_json(toy: type[Toy], tmp_path: Path) -> None:
    model, graph, scores = prepared(toy)
    kinds = {group.kind for group in graph.groups}
    plan = secateurs.plan(graph, scores, Budget(units=0.6), kinds=kinds)
    again = Plan.from_json(plan.to_json())
    assert again == plan
    plan.save(tmp_path / "plan.json")
    assert Plan.load(tmp_path / "plan.json") == plan
    assert [path.name for path in tmp_path.iterdir()] == ["plan.json"]
    one, other = secateurs.apply(model, plan), secateurs.apply(model, again)
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))


def test_a_plan_remembers_where_it_came_from() -> None:
    model, graph, _ = prepared(models.PlainVgg)
    scores = secateurs.score(model, graph, "l2")
    plan = secateurs.plan(graph, scores, Budget(macs=0.5), scope="local", round_to=2)
    assert plan.source["criterion"] == "l2"
    assert plan.source["budget"] == {"macs": 0.5}
    assert (plan.source["scope"], plan.source["round_to"]) == ("local", 2)
    assert plan.fingerprint == graph.fingerprint


@pytest.mark.parametrize("text", ["", "[]", "{}", "null", '{"format": 99}', '{"format": 1}', "not json"])
def test_what_is_not_a_plan_is_refused(text: str) -> None:
    with pytest.raises(PlanError, match="not a plan of format"):
        Plan.from_json(text)


def test_a_plan_with_a_strange_field_is_refused() -> None:
    _, graph, scores = prepared(models.PlainVgg)
    data = json.loads(secateurs.plan(graph, scores, Budget(macs=0.5)).to_json())
    data["groups"][0]["colour"] = "red"
    with pytest.raises(PlanError, match="not a plan of format"):
        Plan.from_json(json.dumps(data))


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(PlanError, match=r"cannot read a plan from .*none\.json"):
        Plan.load(tmp_path / "none.json")


def test_a_plan_that_cannot_be_written_leaves_no_litter(tmp_path: Path) -> None:
    _, graph, scores = prepared(models.PlainVgg)
    plan = secateurs.plan(graph, scores, Budget(macs=0.5))
    bad = replace(plan, source={"what": object()})
    with pytest.raises(TypeError):
        bad.save(tmp_path / "plan.json")
    assert not list(tmp_path.iterdir())


# -- one cut after the other ----------------------------------------------------------------------


@pytest.mark.parametrize("toy", TOYS)
def test_two_cuts_composed_are_the_two_cuts(toy: type[Toy]) -> None:
    model, graph, scores = prepared(toy)
    inputs = model.example()
    kinds = {group.kind for group in graph.groups}
    first = secateurs.plan(graph, scores, Budget(units=0.75), kinds=kinds)
    middle = secateurs.apply(model, first)
    graph2 = secateurs.trace(middle, inputs)
    if not graph2.groups:
        return
    scores2 = secateurs.score(middle, graph2, "random")
    second = secateurs.plan(graph2, scores2, Budget(units=0.7), kinds=kinds)
    last = secateurs.apply(middle, second)
    whole = first.then(second)
    at_once = secateurs.apply(model, whole)
    assert [(n, tuple(t.shape)) for n, t in at_once.state_dict().items()] == [
        (n, tuple(t.shape)) for n, t in last.state_dict().items()
    ]
    assert all(torch.equal(a, b) for a, b in zip(at_once.parameters(), last.parameters(), strict=True))
    assert repr(at_once) == repr(last)
    assert (whole.before, whole.after, whole.fingerprint) == (first.before, second.after, first.fingerprint)
    assert len(whole) == len(first) + len(second)
    assert Plan.from_json(whole.to_json()) == whole
    secateurs.verify(model, at_once, whole, inputs).raise_if_failed()


def test_three_cuts_compose_in_any_order_of_brackets() -> None:
    model, _, _ = prepared(models.ResidualStream)
    plans, current = [], model
    for seed in range(3):
        graph = secateurs.trace(current, model.example())
        torch.manual_seed(seed)
        scores = {group.name: torch.rand(group.size) for group in graph.groups}
        plans.append(secateurs.plan(graph, scores, Remove(3)))
        current = secateurs.apply(current, plans[-1])
    a, b, c = plans
    assert a.then(b).then(c) == a.then(b.then(c))


def test_plans_that_do_not_follow_each_other_are_refused() -> None:
    _, graph, scores = prepared(models.PlainVgg)
    plan = secateurs.plan(graph, scores, Budget(macs=0.5))
    with pytest.raises(PlanError, match="the second plan expects length"):
        plan.then(plan)


def test_a_plan_does_not_fit_its_own_result() -> None:
    model, graph, scores = prepared(models.PlainVgg)
    plan = secateurs.plan(graph, scores, Budget(macs=0.5))
    small = secateurs.apply(model, plan)
    with pytest.raises(ApplyError, match=r"from length \d+, but its shape here is"):
        secateurs.apply(small, plan)


def test_cuts_compose_where_a_group_is_down_to_its_last_unit() -> None:
    model, graph, _ = prepared(models.GroupedConv)
    whole, inner = (next(g for g in graph.groups if g.size == size) for size in (4, 2))
    first = Plan.of(graph, {whole.name: [0, 1, 3]})
    middle = secateurs.apply(model, first)
    graph2 = secateurs.trace(middle, model.example())
    rest, _ = graph2.groups  # numbered names move up: what was "stem#2" may be "stem" now
    assert rest.size == inner.size
    both = first.then(Plan.of(graph2, {rest.name: [0]}))
    secateurs.verify(model, secateurs.apply(model, both), both, model.example()).raise_if_failed()
