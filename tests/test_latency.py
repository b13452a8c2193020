"""Budgets in time: the work of each call against a second trace, known times, cuts that are measured."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pytest
import torch
from torch import nn

import secateurs
from machines import BLOCK, MAC, known_machine, known_times
from models import TOYS, build
from secateurs import AtMost, Budget, Plan
from secateurs.aiming import Trial, aim
from secateurs.errors import BudgetError
from secateurs.graph.cost import kept_lengths
from secateurs.measure.calls import call_ms
from secateurs.planning.allocation import product_savings
from secateurs.planning.latency import products
from toy import Toy


class Wide(nn.Sequential):
    """Convolutions whose widths are no multiples of a block, and a head."""

    def __init__(self) -> None:
        super().__init__(
            nn.Conv2d(3, 72, 3),
            nn.BatchNorm2d(72),
            nn.ReLU(),
            nn.Conv2d(72, 100, 3),
            nn.ReLU(),
            nn.Conv2d(100, 12, 3),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(12 * 4, 5),
        )


IMAGE = torch.zeros(2, 3, 8, 8)


def halved(graph: secateurs.Graph) -> Plan:
    """About half of the units of each group that may be cut at once."""
    scores = {group.name: torch.arange(group.size).float() for group in graph.groups}
    kinds = {"position"} if {group.kind for group in graph.groups} == {"position"} else None
    return secateurs.plan(graph, scores, Budget(units=0.5), scope="local", kinds=kinds)


def per_call(graph: secateurs.Graph, gone: Any) -> list[tuple[str, float, float]]:
    kept = kept_lengths(graph.work.lengths, gone)
    return [(call.name, products(call.values, kept), products(call.macs, kept)) for call in graph.work.calls]


def test_work_after_a_cut_is_that_of_the_smaller_network() -> None:
    compared = 0
    for toy in TOYS:
        model = build(toy)
        graph = secateurs.trace(model, model.example())
        if not graph.groups:
            continue
        plan = halved(graph)
        small = secateurs.trace(secateurs.apply(model, plan), model.example())
        gone = graph.mask({cut.name: cut.removed for cut in plan.groups})
        forecast, found = per_call(graph, gone), per_call(small, small.mask({}))
        assert [name for name, *_ in forecast] == [name for name, *_ in found], toy.__name__
        assert np.allclose([w[1:] for w in forecast], [w[1:] for w in found]), toy.__name__
        whole = sum(macs for *_, macs in per_call(graph, graph.mask({})))
        assert whole == pytest.approx(graph.cost().macs * _batch(model), abs=_batch(model)), toy.__name__
        compared += 1
    assert compared > 40


def _batch(model: Toy) -> int:
    from secateurs.graph import batch_size

    return batch_size(model.example())


def test_the_calls_of_a_trace_are_those_that_are_timed() -> None:
    for toy in TOYS:
        model = build(toy)
        graph = secateurs.trace(model, model.example())
        (timed,) = call_ms([model], model.example(), warmup=0, repeats=1)
        assert len(timed.ms) == len(graph.work.calls), toy.__name__
        assert (timed.ms > 0).all() and timed.rest_ms >= 0


def test_timing_leaves_no_trace() -> None:
    model = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True).train()
    (plain,) = call_ms([model], torch.zeros(1, 4, 16), repeats=1)
    model.register_forward_hook(lambda module, inputs, output: output.abs().mean())  # counts as no call
    kinds = [type(module) for module in model.modules()]
    (timed,) = call_ms([model], torch.zeros(1, 4, 16), repeats=1)
    assert timed.ms.shape == plain.ms.shape
    assert model.training and [type(module) for module in model.modules()] == kinds
    assert len(model._forward_hooks) == 1


@pytest.mark.parametrize("block", [1, 16, 32])
def test_times_that_follow_the_rule_are_found(block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    known_machine(monkeypatch, block)
    model = Wide().eval()
    graph = secateurs.trace(model, IMAGE)
    found = secateurs.latency_model(model, graph, IMAGE, samples=24)
    wanted = known_times(graph, block)
    assert found.error < 1e-6
    assert found.rest_ms == 0.5 and found.device == "cpu" and found.threads == torch.get_num_threads()
    plan = halved(graph)
    removed = {cut.name: cut.removed for cut in plan.groups}
    assert found.ms() == pytest.approx(wanted.ms(), rel=1e-6)
    assert found.ms(removed) == pytest.approx(wanted.ms(removed), rel=1e-6)
    convolutions = [call for call in found.calls if call.name == "conv2d"]
    assert {call.block for call in convolutions} == {block}
    found_macs = [call.mac_ms for call in convolutions[1:]]  # the first one reads three channels in any cut
    assert found_macs == pytest.approx([MAC] * 2, rel=1e-6)
    assert found.blocks == {"0": block, "3": block, "5": block if block < 12 else 1}


def test_savings_are_differences_of_the_forecast() -> None:
    graph = secateurs.trace(Wide().eval(), IMAGE)
    times = known_times(graph, block=1)
    savings = product_savings(graph, graph.work.lengths, times.terms())
    for kept in [(72, 100, 12), (30, 41, 5)]:
        gone = [{g.name: range(k, g.size) for g, k in zip(graph.groups, kept, strict=True)}]
        for place in range(3):
            fewer = [k - (each == place) for each, k in enumerate(kept)]
            gone.append({g.name: range(k, g.size) for g, k in zip(graph.groups, fewer, strict=True)})
        ms = [times.ms(each) for each in gone]
        assert savings(np.array(kept, float)) == pytest.approx([ms[0] - each for each in ms[1:]], rel=1e-9)


@pytest.mark.parametrize("scope", ["global", "local"])
@pytest.mark.parametrize("share", [0.75, 0.5, 0.3])
def test_a_budget_in_time_is_met_in_whole_blocks(scope: Any, share: float) -> None:
    graph = secateurs.trace(Wide().eval(), IMAGE)
    times = known_times(graph)
    scores = {group.name: torch.rand(group.size) for group in graph.groups}
    plan = secateurs.plan(graph, scores, Budget(latency=share), scope=scope, latency=times)
    removed = {cut.name: cut.removed for cut in plan.groups}
    assert times.ms(removed) <= share * times.ms()
    for cut in plan.groups:
        assert cut.kept % BLOCK == 0 or cut.size <= BLOCK
    assert Plan.from_json(plan.to_json()) == plan
    larger = secateurs.plan(graph, scores, Budget(latency=min(share + 0.2, 1)), scope=scope, latency=times)
    assert len(larger) <= len(plan)


def test_milliseconds_are_met_by_the_forecast_or_as_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    model = Wide().eval()
    graph = secateurs.trace(model, IMAGE)
    times, scores = known_times(graph), {group.name: torch.rand(group.size) for group in graph.groups}
    limit = AtMost(latency_ms=0.7 * times.ms())
    plan = secateurs.plan(graph, scores, limit, latency=times)
    assert times.ms({cut.name: cut.removed for cut in plan.groups}) <= 0.7 * times.ms()
    with pytest.raises(BudgetError, match="needs a latency model"):
        secateurs.plan(graph, scores, limit)
    known_machine(monkeypatch)
    (step,) = secateurs.prune_steps(model, IMAGE, criterion="l2", budget=limit)
    assert 0.6 <= step.plan.source["latency"]["measured"] <= 0.7 * 1.02


def test_blocks_and_a_multiple_that_is_asked_for_are_both_kept() -> None:
    graph = secateurs.trace(Wide().eval(), IMAGE)
    scores = {group.name: torch.rand(group.size) for group in graph.groups}
    plan = secateurs.plan(graph, scores, Budget(latency=0.6), latency=known_times(graph), round_to=24)
    assert all(cut.kept % 48 == 0 for cut in plan.groups if cut.size > BLOCK)


def test_time_is_spent_where_the_error_is_least_for_it() -> None:
    """Two layers of one curve: the one whose units take more time loses more of them."""
    model = nn.Sequential(nn.Linear(8, 64), nn.Linear(64, 8), nn.Linear(8, 64), nn.Linear(64, 512)).eval()
    graph = secateurs.trace(model, torch.zeros(1, 8))
    curve = {group.name: torch.arange(group.size).float() for group in graph.groups}
    scores = {group.name: torch.arange(group.size).float() for group in graph.groups}
    times = known_times(graph, block=1)
    plan = secateurs.plan(graph, scores, Budget(latency=0.9), curves=curve, latency=times, skip=["1"])
    assert {cut.name for cut in plan.groups} == {"2"}


def test_what_a_budget_in_time_needs_is_said() -> None:
    model = Wide().eval()
    graph = secateurs.trace(model, IMAGE)
    scores = {group.name: torch.rand(group.size) for group in graph.groups}
    with pytest.raises(BudgetError, match=r"latency=0.5 needs a latency model"):
        secateurs.plan(graph, scores, Budget(latency=0.5))
    with pytest.raises(BudgetError, match=r"latency=0.01 is out of reach"):
        secateurs.plan(graph, scores, Budget(latency=0.01), latency=known_times(graph))
    with pytest.raises(BudgetError, match=r"0 < latency <= 1 must hold, got latency=50"):
        Budget(latency=50)
    with pytest.raises(BudgetError, match="meta device"):
        secateurs.latency_model(Wide().to("meta"), graph, IMAGE)
    other = nn.Sequential(*Wide(), nn.Softmax(1)).eval()
    with pytest.raises(BudgetError, match=r"makes 11 calls of torch functions on these inputs and 10 in its"):
        secateurs.latency_model(other, graph, IMAGE, samples=1)


# -- aiming -------------------------------------------------------------------------------------

PLAN = halved(secateurs.trace(Wide().eval(), IMAGE))


def attempts(true: Callable[[float], float], goal: float, reach: float = 0.0) -> tuple[Trial, list[float]]:
    """Aim on a machine where a forecast share takes the share that `true` says."""
    asked: list[float] = []

    def cut(share: float) -> tuple[Plan, nn.Module]:
        if share < reach:
            raise BudgetError(f"latency={share:g} is out of reach")
        asked.append(share)
        one = replace(PLAN.groups[0], removed=(len(asked),))  # another plan each time
        return replace(PLAN, groups=(one,)), nn.Identity()

    found = aim(cut, lambda *_: true(asked[-1]), goal)
    return found, asked


def test_a_right_forecast_is_taken_at_once() -> None:
    found, asked = attempts(lambda share: share, 0.5)
    assert asked == [0.5] and found.measured == 0.5


@pytest.mark.parametrize("goal", [0.7, 0.5, 0.35])
def test_wrong_forecasts_are_corrected(goal: float) -> None:
    for true in (lambda f: 0.3 + 0.7 * f, lambda f: f**2, lambda f: f**0.5):
        found, asked = attempts(true, goal)
        assert goal * 0.93 <= found.measured <= goal * 1.02
        assert found.measured == true(found.forecast) and len(asked) <= 6


def test_between_two_steps_the_faster_counts() -> None:
    found, asked = attempts(lambda f: 0.8 if f > 0.4 else 0.3, 0.5)
    assert found.measured == 0.3 and 1 < len(asked) <= 6


def test_the_same_plan_again_ends_the_trials() -> None:
    calls: list[float] = []

    def cut(share: float) -> tuple[Plan, nn.Module]:
        calls.append(share)
        return PLAN, nn.Identity()

    assert aim(cut, lambda *_: 0.2, 0.5).measured == 0.2
    assert len(calls) == 2


def test_where_forecasts_give_the_same_cut_a_smaller_one_is_tried() -> None:
    """Steps of a tenth, and times that are longer than the forecast."""

    def cut(share: float) -> tuple[Plan, nn.Module]:
        step = int(share * 10)
        return replace(PLAN, groups=(replace(PLAN.groups[0], removed=(step,)),)), nn.Linear(1, step + 1)

    found = aim(cut, lambda model, _: 0.1 + 0.08 * model.out_features, 0.5)
    assert found.measured == pytest.approx(0.5)


def test_what_lies_just_above_the_reach_of_forecasts_is_found() -> None:
    found, asked = attempts(lambda f: 1.4 * f, 0.5, reach=0.352)
    assert found.measured <= 0.51 and len(asked) <= 6


def test_a_share_that_cannot_be_measured_is_refused() -> None:
    with pytest.raises(BudgetError, match=r"latency=0.3 is out of reach: the fastest cut .* takes 0\.6"):
        attempts(lambda f: 0.6 + 0.1 * f, 0.3)
    with pytest.raises(BudgetError, match=r"latency=0.3 is out of reach: the fastest cut .* takes 0\.6"):
        attempts(lambda f: 0.6 + 0.1 * f, 0.3, reach=0.2)
    with pytest.raises(BudgetError, match=r"^latency=0.3 is out of reach$"):
        attempts(lambda f: f, 0.3, reach=0.4)


# -- steps --------------------------------------------------------------------------------------


Made = TypeVar("Made")


def in_real_time(work: Callable[[], Made]) -> Made:
    """What depends on this machine's time, up to three times: its other work can make it miss a goal."""
    for _ in range(2):
        with contextlib.suppress(BudgetError):
            return work()
    return work()


def test_steps_reach_a_share_of_the_time() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(512, 2048), nn.ReLU(), nn.Linear(2048, 2048), nn.ReLU(), nn.Linear(2048, 64)
    )
    inputs, goals = torch.randn(32, 512), []
    steps = in_real_time(
        lambda: list(
            secateurs.prune_steps(model, inputs, criterion="l2", budget=Budget(latency=0.5), steps=2)
        )
    )
    for step in steps:
        facts = step.plan.source["latency"]
        goals.append(facts["goal"])
        assert facts["measured"] <= facts["goal"] * 1.02
        assert step.verified.raise_if_failed()
    assert goals == pytest.approx([0.5**0.5, 0.5])
    assert secateurs.trace(step.model, inputs).cost().macs < 0.6 * secateurs.trace(model, inputs).cost().macs
    assert step.plan.source["budget"] == {"latency": pytest.approx(facts["forecast"], abs=1e-4)}


def test_another_choice_of_units_takes_the_same_time() -> None:
    """What is timed is what a greedy or a custom selection gives, whose counts are the same."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 512), nn.ReLU(), nn.Linear(512, 512), nn.ReLU(), nn.Linear(512, 8))
    inputs = torch.randn(64, 64)
    chosen: list[Plan] = []

    def others(network: nn.Module, graph: secateurs.Graph, plan: Plan) -> Plan:
        chosen.append(plan)
        removed = {cut.name: range(len(cut.removed)) for cut in plan.groups}
        return Plan.of(graph, {name: list(units) for name, units in removed.items()}, plan.source)

    (step,) = secateurs.prune_steps(
        model, inputs, criterion="l2", budget=Budget(latency=0.6), selection=others
    )
    assert len(chosen) == 1 and len(chosen[0]) == len(step.plan)
    assert "latency" in step.plan.source


def test_the_guide_runs() -> None:
    """The programs of docs/latency.md, on smaller images."""
    text = (Path(__file__).parents[1] / "docs" / "latency.md").read_text()
    programs = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    assert len(programs) == 2
    known: dict[str, Any] = {}
    for program in programs:
        code = compile(program.replace("224", "64"), "docs/latency.md", "exec")
        in_real_time(lambda code=code: exec(code, known))
    assert known["small"] is not known["model"]
