"""Pruning in steps: the caller's loop, the budgets on the way, and what counts between the steps."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import models
import secateurs
from models import build
from secateurs import Budget, Plan, Remove, Step
from secateurs.errors import BudgetError, PlanError, SecateursError, VerifyError
from toy import Toy

SHARES = ("macs", "params", "bytes", "units")


def data(model: Toy, count: int = 8) -> list[tuple[Tensor, Tensor]]:
    torch.manual_seed(1)
    return [(model.example(count), torch.randint(4, (count,))) for _ in range(2)]


def steps(model: Toy, **options: Any) -> Any:
    given = {"criterion": "l2", "budget": Budget(macs=0.25), "steps": 3, **options}
    return secateurs.prune_steps(model, model.example(), **given)


def units_left(step: Step, groups: set[str]) -> int:
    graph = secateurs.trace(step.model, build(type(step.model)).example())
    return sum(graph.by_name[name].size for name in groups)


ALL = [(toy, q) for toy in (models.PlainVgg, models.ResidualStream, models.DenseBlock) for q in SHARES]


@pytest.mark.parametrize(("toy", "quantity"), ALL)
def test_the_last_step_meets_the_budget_of_the_first_model(toy: type[Toy], quantity: str) -> None:
    model = build(toy)
    graph = secateurs.trace(model, model.example())
    total = sum(group.size for group in graph.groups)
    whole = {"units": total, **vars_of(graph.cost())}
    shares = []
    for step in steps(model, budget=Budget(**{quantity: 0.35})):
        assert step.verified.ok
        total -= len(step.plan)
        shares.append({"units": total, **vars_of(step.plan.after)}[quantity] / whole[quantity])
    assert len(shares) == 3
    assert shares[-1] <= 0.35 + 1e-9
    for number, share in enumerate(shares, start=1):  # spaced geometrically
        assert share == pytest.approx(0.35 ** (number / 3), abs=0.12)


def vars_of(cost: secateurs.Cost) -> dict[str, int]:
    return {"params": cost.params, "macs": cost.macs, "bytes": cost.bytes}


def test_each_step_says_what_it_did() -> None:
    model = build(models.PlainVgg)
    found = list(steps(model, criterion="taylor", data=data(model), loss_fn=F.cross_entropy))
    assert [step.number for step in found] == [1, 2, 3]
    previous: nn.Module = model
    for step in found:
        assert step.plan.fingerprint == step.graph.fingerprint
        assert step.scores.criterion == "taylor"
        assert list(step.scores) == [group.name for group in step.graph.groups]
        again = secateurs.apply(previous, step.plan)
        assert all(
            torch.equal(a, b) for a, b in zip(again.parameters(), step.model.parameters(), strict=True)
        )
        previous = step.model
    whole = found[0].plan.then(found[1].plan).then(found[2].plan)
    at_once = secateurs.apply(model, whole)
    assert all(torch.equal(a, b) for a, b in zip(at_once.parameters(), previous.parameters(), strict=True))


def test_a_number_of_units_leaves_in_each_step() -> None:
    model = build(models.PlainVgg)
    assert [len(step.plan) for step in steps(model, budget=Remove(5), steps=4)] == [5, 5, 5, 5]


def test_what_is_done_to_the_model_between_steps_counts() -> None:
    model = build(models.PlainVgg)
    generator = steps(model, steps=2, budget=Remove(4))
    first = next(generator)
    with torch.no_grad():
        first.model.conv2.weight[0] = 100
        first.model.conv2.weight[1] = 0
    second = next(generator)
    cut = {group.name: group.removed for group in second.plan.groups}
    assert 1 in cut["conv2"]
    assert 0 not in cut["conv2"]
    kept_first = second.model.conv2.weight[0]
    assert (kept_first == 100).all()


def train(model: nn.Module, batches: list[tuple[Tensor, Tensor]]) -> None:
    """What a caller does with a step: one epoch, and the model stays in training mode."""
    model.train()
    optimiser = torch.optim.Adam(model.parameters(), lr=3e-3)
    for inputs, targets in batches:
        optimiser.zero_grad()
        F.cross_entropy(model(inputs), targets).backward()
        optimiser.step()


def test_a_loop_that_trains_between_the_steps() -> None:
    model = build(models.PlainVgg)
    batches = data(model)
    numbers = []
    for step in steps(model, criterion="taylor", data=batches, loss_fn=F.cross_entropy):
        numbers.append(step.number)
        train(step.model, batches)
        assert step.model.training
    assert numbers == [1, 2, 3]


def test_a_loop_that_trains_and_goes_back_to_evaluation() -> None:
    model = build(models.PlainVgg)
    batches = data(model)
    for step in steps(model, criterion="taylor", data=batches, loss_fn=F.cross_entropy):
        train(step.model, batches)
        step.model.eval()
    assert step.number == 3
    assert step.model(batches[0][0]).isfinite().all()


def test_the_given_model_is_not_changed() -> None:
    model = build(models.ResidualStream).train()
    before = {name: t.clone() for name, t in model.state_dict().items()}
    for step in steps(model, steps=2):
        for parameter in step.model.parameters():
            parameter.data.zero_()
        break
    assert all(torch.equal(before[name], t) for name, t in model.state_dict().items())
    assert model.training


def test_one_step_is_plan_and_apply() -> None:
    model = build(models.DenseBlock)
    (step,) = steps(model, steps=1, budget=Budget(params=0.5), scope="local", round_to=2)
    graph = secateurs.trace(model, model.example())
    scores = secateurs.score(model, graph, "l2")
    assert step.plan == secateurs.plan(graph, scores, Budget(params=0.5), scope="local", round_to=2)


def test_a_share_of_units_in_steps_is_the_share_at_once_but_for_rounding() -> None:
    model = build(models.PlainVgg)
    goal: dict[str, Any] = {"budget": Budget(units=0.5), "scope": "local", "skip": ["fc1"]}
    (once,) = steps(model, steps=1, **goal)
    *_, last = steps(model, steps=2, **goal)
    difference = units_left(once, {"conv1", "conv2"}) - units_left(last, {"conv1", "conv2"})
    assert 0 <= difference <= 2  # each of the two groups is rounded down once more


def test_skipped_groups_stay_whole() -> None:
    model = build(models.PlainVgg)
    for step in steps(model, budget=Budget(macs=0.6), skip=["conv1"]):
        assert step.model.conv1.out_channels == 8


@pytest.mark.parametrize("number", [0, -2])
def test_no_steps_are_refused(number: int) -> None:
    with pytest.raises(BudgetError, match=f"steps >= 1 must hold, got steps={number}"):
        list(steps(build(models.PlainVgg), steps=number))


def test_a_budget_out_of_reach_is_said_when_it_is() -> None:
    done = []
    with pytest.raises(BudgetError, match="20 units cannot leave: at most 7 of"):
        for step in steps(build(models.PlainVgg), budget=Remove(20), steps=2):
            done.append(step.number)
    assert done == [1]


def test_a_model_with_nothing_to_cut_says_so() -> None:
    with pytest.raises(PlanError, match="no group is left to cut"):
        list(steps(build(models.PlainVgg), skip=["*"]))


def test_a_wrong_cut_stops_the_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    from secateurs import pruning

    def careless(model: nn.Module, plan: Plan, **options: Any) -> nn.Module:
        small = secateurs.apply(model, plan, **options)
        next(small.parameters()).data.neg_()
        return small

    monkeypatch.setattr(pruning, "apply", careless)
    with pytest.raises(VerifyError, match="verify failed"):
        list(steps(build(models.PlainVgg)))


def test_accuracy_survives_pruning_in_steps_on_a_task_that_is_easy() -> None:
    """The point of it all: a trained toy, cut to a third, trained a little, still knows its task."""
    torch.manual_seed(0)
    model = build(models.PlainVgg)
    targets = torch.arange(64) % 4
    inputs = 0.3 * torch.randn(64, 3, 8, 8)
    for place, target in enumerate(targets.tolist()):
        row, column = 4 * (target // 2), 4 * (target % 2)
        inputs[place, :, row : row + 4, column : column + 4] += 1  # the bright quarter is the class
    batches = [(inputs[i : i + 16], targets[i : i + 16]) for i in range(0, 64, 16)]
    for _ in range(10):
        train(model, batches)
    model.eval()
    options = {"data": batches, "loss_fn": F.cross_entropy, "budget": Budget(macs=0.33), "skip": ["fc1"]}
    for step in steps(model, criterion="taylor", **options):
        for _ in range(10):
            train(step.model, batches)
        step.model.eval()
    assert (model(inputs).argmax(1) == targets).float().mean() > 0.95
    assert (step.model(inputs).argmax(1) == targets).float().mean() > 0.95


@pytest.mark.parametrize("separate", [False, True], ids=["data", "repair_data"])
def test_steps_are_repaired_on_request(separate: bool) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 12), nn.Linear(12, 2))  # three inputs: twelve units are too many
    inputs = torch.randn(64, 3)
    plain, healed = (
        next(
            secateurs.prune_steps(
                net,
                inputs[:1],
                criterion="l2",
                budget=secateurs.Budget(units=0.5),
                repair=how,
                data=None if separate else [(inputs, None)],
                repair_data=[inputs] if separate else None,
            )
        )
        for how in ("none", "reconstruct")
    )
    assert plain.repaired is None and healed.repaired is not None and healed.repaired.images == 64
    errors = [(net(inputs) - step.model(inputs)).abs().max().item() for step in (plain, healed)]
    assert errors[1] < 0.05 * errors[0]


def test_a_repair_without_images_is_refused_at_once() -> None:
    net = nn.Sequential(nn.Linear(3, 12), nn.Linear(12, 2))
    with pytest.raises(SecateursError, match="repair='reconstruct' needs images"):
        next(
            secateurs.prune_steps(
                net,
                torch.zeros(1, 3),
                criterion="l2",
                budget=secateurs.Budget(units=0.5),
                repair="reconstruct",
            )
        )
