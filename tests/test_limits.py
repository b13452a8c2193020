"""What is asked of single groups: shares, least numbers, allocations, greedy selection, contradictions."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import models
import secateurs
from models import TOYS, build
from secateurs import Budget, Plan, Remove
from secateurs.criteria import greedy
from secateurs.errors import BudgetError, PlanError, ScoreError
from secateurs.planning.limits import Limits
from test_plan import prepared, removed
from toy import Toy


def kept(graph: secateurs.Graph, plan: Plan) -> dict[str, int]:
    gone = removed(plan)
    return {group.name: group.size - len(gone.get(group.name, ())) for group in graph.groups}


# -- shares ---------------------------------------------------------------------------------------


def test_shares_alone_cut_the_groups_they_name_and_no_others() -> None:
    _, graph, scores = prepared(models.PlainVgg)
    plan = secateurs.plan(graph, scores, shares={"conv*": 0.5, "conv2": 0.3})
    assert kept(graph, plan) == {"conv1": 4, "conv2": 3, "fc1": 10}
    assert plan.source["kept"] == {"conv1": 4, "conv2": 3}
    for name, gone in removed(plan).items():
        assert set(gone) == set(sorted(range(len(scores[name])), key=scores[name].__getitem__)[: len(gone)])


@pytest.mark.parametrize("scope", ["global", "local"])
@pytest.mark.parametrize("budget", [Budget(macs=0.4), Budget(params=0.5), Budget(units=0.6), Remove(14)])
def test_a_budget_is_met_by_the_others_where_shares_are_given(scope: Any, budget: Budget | Remove) -> None:
    _, graph, scores = prepared(models.PlainVgg)
    plan = secateurs.plan(graph, scores, budget, scope=scope, shares={"conv2": 0.75})
    assert kept(graph, plan)["conv2"] == 9
    if isinstance(budget, Remove):
        assert len(plan) <= 14 and (scope == "local" or len(plan) == 14)
        return
    params, macs = plan.after.share_of(plan.before)
    share = {"macs": macs, "params": params, "units": 1 - len(plan) / 30}[budget.quantity]
    assert budget.share - 0.15 < share <= budget.share + 1e-9


def test_a_share_is_rounded_up_to_the_multiple() -> None:
    _, graph, scores = prepared(models.TwelveChannels)
    plan = secateurs.plan(graph, scores, shares={"first": 0.5, "second": 0.5}, round_to=4)
    assert kept(graph, plan) == {"first": 8, "second": 12}


# -- allocation -----------------------------------------------------------------------------------


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 8), st.integers(1, 12), st.integers(0, 3))
def test_an_allocation_is_kept_to_the_unit(one: int, other: int, seed: int) -> None:
    _, graph, scores = prepared(models.PlainVgg, seed)
    plan = secateurs.plan(graph, scores, allocation={"conv1": one, "conv2": other})
    assert kept(graph, plan) == {"conv1": one, "conv2": other, "fc1": 10}
    ranked = torch.sort(scores["conv2"]).indices.tolist()
    assert set(removed(plan).get("conv2", ())) == set(ranked[: 12 - other])


@pytest.mark.parametrize("toy", [toy for toy in TOYS if toy.TIED])
def test_tied_counts_go_up_to_what_fits_and_keep_the_least(toy: type[Toy]) -> None:
    model, graph, scores = prepared(toy)
    first = next(group for group in graph.groups if graph.tied(group))
    for options in ({"allocation": {first.name: 1}}, {"shares": {"*": 0.05}, "min_units": 0.4}):
        plan = secateurs.plan(graph, scores, kinds={group.kind for group in graph.groups}, **options)
        counts = kept(graph, plan)
        least = options.get("min_units", 0)
        assert all(counts[group.name] >= max(1, group.size * least) for group in graph.groups)
        assert all(rule.holds_for([counts[g.name] for g in graph.groups]) for rule in graph.constraints)
        small = secateurs.apply(model, plan)
        secateurs.verify(model, small, plan, model.example()).raise_if_failed()


# -- least numbers --------------------------------------------------------------------------------


@pytest.mark.parametrize("scope", ["global", "local"])
@pytest.mark.parametrize(
    ("least", "expected"),
    [
        (3, {"conv1": 3, "conv2": 3, "fc1": 3}),
        (0.3, {"conv1": 3, "conv2": 4, "fc1": 3}),
        ({"conv*": 2, "conv1": 0.5}, {"conv1": 4, "conv2": 2, "fc1": 1}),
    ],
)
def test_no_group_dies(scope: Any, least: Any, expected: dict[str, int]) -> None:
    _, graph, scores = prepared(models.PlainVgg)
    scores["conv1"] = scores["conv1"] - 100  # all of it would leave first
    most = sum(group.size for group in graph.groups) - sum(expected.values())
    plan = secateurs.plan(graph, scores, Remove(most), scope=scope, min_units=least)
    if scope == "global":
        assert kept(graph, plan) == expected
    assert all(count >= expected[name] for name, count in kept(graph, plan).items())
    with pytest.raises(BudgetError, match=f"at most {most} of 30 can"):
        secateurs.plan(graph, scores, Remove(most + 1), scope=scope, min_units=least)


# -- contradictions -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"shares": {"conv*": 0.5}, "skip": ["conv1"]}, "'conv1' is given a share by 'conv.' and left alone"),
        ({"shares": {"convo1": 0.5}}, r"shares 'convo1' matches no group; did you mean 'conv1'\?"),
        ({"shares": {"bn1": 0.5}}, "shares 'bn1' matches no group"),
        ({"skip": ["layer9.*"]}, r"skip 'layer9\.\*' matches no group"),
        ({"min_units": {"fx1": 2}}, r"min_units 'fx1' matches no group; did you mean 'fc1'\?"),
        ({"min_units": 9}, "min_units=9 is more than the 8 units of group 'conv1'"),
        ({"min_units": 0}, "a number of units, or a share in .0, 1. of each group's; got 0"),
        ({"min_units": 1.5}, "got 1.5"),
        ({"shares": {"conv1": 0.0}}, "0 < share <= 1 must hold.*got 0.0 for group 'conv1'"),
        ({"allocation": {"conv3": 2}}, r"names 'conv3', which is no group.*; did you mean 'conv"),
        ({"allocation": {"conv1": 9}}, "'conv1' keeps between 1 and 8 units, got 9"),
        ({"allocation": {"conv1": 2}, "min_units": 3}, "'conv1' keeps between 3 and 8 units, got 2"),
        ({"allocation": {"conv1": 2}, "shares": {"conv1": 0.5}}, "both a share and a number of units"),
    ],
)
def test_contradictions_are_one_clear_sentence(options: dict[str, Any], words: str) -> None:
    _, graph, scores = prepared(models.PlainVgg)
    with pytest.raises(PlanError, match=words) as caught:
        secateurs.plan(graph, scores, Budget(macs=0.9), **options)
    assert "\n" not in caught.value.message and caught.value.message.count(". ") == 0


def test_how_much_has_to_be_said() -> None:
    _, graph, scores = prepared(models.PlainVgg)
    with pytest.raises(BudgetError, match="say how much is to leave"):
        secateurs.plan(graph, scores)
    with pytest.raises(BudgetError, match=r"2 units are to leave, but the shares given .* remove 6"):
        secateurs.plan(graph, scores, Remove(2), shares={"conv2": 0.5})


def test_a_layer_whose_units_belong_to_another_group_is_told_where_they_are() -> None:
    _, graph, scores = prepared(models.ResidualStream)
    stream = next(group for group in graph.groups if len(group.by_role("producer")) > 1)
    other = stream.by_role("producer")[-1].parameter.rpartition(".")[0]
    with pytest.raises(PlanError, match=f"the units of '{other}.weight' are those of group '{stream.name}'"):
        secateurs.plan(graph, scores, shares={other: 0.5})


def test_a_locked_layer_may_be_skipped() -> None:
    _, graph, scores = prepared(models.PlainVgg)
    assert "fc2" in {lock.name for lock in graph.locked}
    secateurs.plan(graph, scores, Budget(macs=0.9), skip=["fc2"])


# -- on the way there -----------------------------------------------------------------------------


def test_limits_of_a_model_that_was_cut_before() -> None:
    _, graph, scores = prepared(models.PlainVgg)
    limits = Limits.of(graph, shares={"conv2": 0.25}, min_units=0.5)
    assert limits.kept == {"conv2": 6}  # the least wins over a smaller share
    free = Limits.of(graph, shares={"conv2": 0.25})
    assert [free.after(part)["conv2"] for part in (0, 0.5, 1)] == [12, 6, 3]
    model = secateurs.apply(build(models.PlainVgg), secateurs.plan(graph, scores, allocation={"conv2": 5}))
    later = secateurs.trace(model, model.example())
    assert free.within(later.groups, 0.5) == ({"conv2": 5}, {"conv1": 1, "conv2": 1, "fc1": 1})


# -- greedy ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("toy", [models.PlainVgg, models.ResidualStream, models.DepthwiseConv])
@pytest.mark.parametrize("criterion", ["l1", "l2"])
def test_greedy_is_ranking_what_is_left_after_each_physical_cut(toy: type[Toy], criterion: str) -> None:
    model = build(toy)
    graph = secateurs.trace(model, model.example())
    scores = secateurs.score(model, graph, criterion)
    rescore = greedy(model, graph, criterion)
    plan = secateurs.plan(graph, scores, shares={"*": 0.5}, rescore=rescore)
    assert plan.source["selection"] == "greedy"
    gone: dict[str, list[int]] = {}
    for name in sorted(graph.by_name, key=lambda name: first_read(graph, name)):
        small = secateurs.apply(model, Plan.of(graph, gone)) if gone else model
        again = secateurs.score(small, secateurs.trace(small, model.example()), criterion)[name]
        gone[name] = torch.argsort(again, stable=True)[: graph.by_name[name].size // 2].tolist()
    assert {name: tuple(sorted(units)) for name, units in gone.items()} == removed(plan)


def first_read(graph: secateurs.Graph, name: str) -> int:
    mine = graph.by_name[name]
    units = set(range(mine.first, mine.first + mine.size))
    return min(read.call for read in graph.reads if units & set(read.units.tolist()))


def test_greedy_changes_who_leaves_and_not_how_many() -> None:
    model = build(models.PlainVgg)
    graph = secateurs.trace(model, model.example())
    scores = secateurs.score(model, graph, "l1")
    with torch.no_grad():  # conv2's best filter lives off an input that leaves
        lowest = int(scores["conv1"].argmin())
        model.conv2.weight[3, lowest] += 100.0
    scores = secateurs.score(model, graph, "l1")
    alone = secateurs.plan(graph, scores, Budget(macs=0.5), scope="local")
    together = secateurs.plan(
        graph, scores, Budget(macs=0.5), scope="local", rescore=greedy(model, graph, "l1")
    )
    assert kept(graph, alone) == kept(graph, together)
    assert 3 not in removed(alone)["conv2"]
    assert removed(alone)["conv1"] == removed(together)["conv1"]


def test_greedy_needs_weights_alone() -> None:
    model = build(models.PlainVgg)
    graph = secateurs.trace(model, model.example())
    with pytest.raises(ScoreError, match="greedy selection ranks by weights alone, but taylor needs data"):
        greedy(model, graph, "taylor")


# -- positions ------------------------------------------------------------------------------------


class Registers(nn.Module):
    """Attention over the inputs and some learned tokens, which are dropped behind it."""

    def __init__(self) -> None:
        super().__init__()
        self.registers = nn.Parameter(torch.randn(1, 6, 8))
        self.make, self.qkv = nn.Linear(5, 8), nn.Linear(8, 24)
        self.read = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        tokens = torch.cat([self.registers.expand(len(x), -1, -1), self.make(x)], 1)
        query, key, value = self.qkv(tokens).chunk(3, -1)
        mixed = (query @ key.transpose(1, 2)).softmax(-1) @ value
        return self.read(mixed[:, self.registers.shape[1] :])


def test_learned_tokens_leave_only_where_they_are_asked_for() -> None:
    model, x = Registers().eval(), torch.randn(2, 4, 5)
    graph = secateurs.trace(model, x)
    assert graph.by_name["registers"].kind == "position" and graph.by_name["registers"].size == 6
    scores = secateurs.score(model, graph, "l2")
    for scope in ("global", "local"):
        plan = secateurs.plan(graph, scores, Budget(macs=0.5), scope=scope)
        assert kept(graph, plan)["registers"] == 6 and len(plan) > 0
    with pytest.raises(PlanError, match="of kind 'position', which is left out"):
        secateurs.plan(graph, scores, allocation={"registers": 3})
    with pytest.raises(PlanError, match="of kind 'position' alone, which are left out"):
        secateurs.plan(graph, scores, shares={"registers": 0.5})
    plan = secateurs.plan(graph, scores, allocation={"registers": 3}, kinds={"position"})
    small = secateurs.apply(model, plan)
    assert small.registers.shape == (1, 3, 8) and small(x).shape == (2, 4, 3)
    secateurs.verify(model, small, plan, x).raise_if_failed()
