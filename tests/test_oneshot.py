"""`secateurs.prune`: one cut and its repair, which need no label, no epoch and no setting."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

import secateurs
from secateurs import pruning
from secateurs.errors import BudgetError, ScoreError
from secateurs.recovery import repair
from tiny_net import RowsNet, TinyNet


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(0)
    return TinyNet().eval()


def batches(count: int, seed: int = 1) -> list[Tensor]:
    return list(torch.randn(8 * count, 3, 8, 8, generator=torch.Generator().manual_seed(seed)).split(8))


def missed(model: nn.Module, small: nn.Module) -> float:
    """Mean squared difference of the outputs on inputs that the repair has not seen."""
    with torch.no_grad():
        return float(sum((model(x) - small(x)).square().mean() for x in batches(4, seed=2)))


def test_it_is_the_ranking_the_shares_the_cut_and_the_repair_in_one(model: nn.Module) -> None:
    data, goal = batches(6), secateurs.Budget(macs=0.5)
    step = secateurs.prune(model, data, goal)
    graph = secateurs.trace(model, data[0][:2])
    scores = secateurs.score(model, graph, "reconstruction", data=data)
    plan = secateurs.plan(graph, scores, goal, allocation="error")
    cut = secateurs.apply(model, plan)
    healed = secateurs.apply(model, plan)
    repair(model, healed, plan, data)
    assert [(cut.name, cut.removed) for cut in step.plan.groups] == [
        (cut.name, cut.removed) for cut in plan.groups
    ]
    assert step.verified.max_error < 1e-9 < step.verified.effect
    for one, other in zip(step.model.state_dict().values(), healed.state_dict().values(), strict=True):
        torch.testing.assert_close(one, other)
    assert step.repaired is not None and step.repaired.images == 48
    assert missed(model, step.model) < 0.5 * missed(model, cut)


def test_labels_are_not_read_and_the_model_stays_as_it_is(model: nn.Module) -> None:
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    labelled = [(x, "no label at all") for x in batches(3)]
    one = secateurs.prune(model, labelled, secateurs.Budget(params=0.5))
    other = secateurs.prune(model, batches(3), secateurs.Budget(params=0.5))
    for left, right in zip(one.model.state_dict().values(), other.model.state_dict().values(), strict=True):
        assert torch.equal(left, right)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_no_more_batches_are_drawn_than_are_asked_for(model: nn.Module) -> None:
    drawn = 0

    def endless() -> Iterator[Tensor]:
        nonlocal drawn
        for x in batches(50):
            drawn += 1
            yield x

    step = secateurs.prune(model, endless(), secateurs.Budget(macs=0.6), images=20)
    assert drawn == 3
    assert step.repaired is not None and step.repaired.images == 24


def test_what_cannot_be_ranked_stays_whole_and_is_named() -> None:
    torch.manual_seed(0)
    model = RowsNet().eval()
    step = secateurs.prune(model, batches(4), secateurs.Budget(macs=0.5))
    assert set(step.scores.missing) == {"rows", "marks"}
    assert (step.model.rows.out_features, step.model.marks.out_features) == (10, 12)
    assert step.plan.after.macs <= 0.5 * step.plan.before.macs


class TwoInputs(nn.Module):
    """Gates what it reads by a second input; both have a first dimension of examples."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.gate, self.last = nn.Linear(4, 16), nn.Linear(3, 16), nn.Linear(16, 2)

    def forward(self, x: Tensor, gate: Tensor, scale: float = 1.0) -> Tensor:
        result: Tensor = self.last(torch.relu(self.first(x)) * torch.sigmoid(self.gate(gate))) * scale
        return result


def test_inputs_by_name_and_shares_in_place_of_a_budget() -> None:
    torch.manual_seed(0)
    data = [{"x": torch.randn(16, 4), "gate": torch.randn(16, 3), "scale": 2.0} for _ in range(3)]
    step = secateurs.prune(TwoInputs(), data, shares={"*": 0.5})
    assert (step.model.first.out_features, step.model.gate.out_features) == (8, 8)
    assert step.repaired is not None and not step.repaired.left


class Placed(nn.Module):
    """Adds what belongs to each step of a sequence; the first dimension counts steps."""

    def __init__(self) -> None:
        super().__init__()
        self.places = nn.Parameter(torch.randn(6, 1, 5))
        self.first, self.last = nn.Linear(5, 12), nn.Linear(12, 3)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.last(torch.relu(self.first(x + self.places)))
        return result


def test_a_model_that_takes_no_fewer_is_traced_on_the_whole_batch() -> None:
    torch.manual_seed(0)
    step = secateurs.prune(Placed(), list(torch.randn(3, 6, 8, 5)), secateurs.Budget(params=0.7))
    assert step.model.first.out_features < 12 and step.verified.effect > 0


class Listing(nn.Module):
    """Takes a list of images, as detectors do."""

    def __init__(self) -> None:
        super().__init__()
        self.body = TinyNet()

    def forward(self, images: list[Tensor]) -> Tensor:
        result: Tensor = self.body(torch.stack(images))
        return result


def test_images_in_a_list_are_no_examples_to_choose_from() -> None:
    torch.manual_seed(0)
    data = [((list(torch.randn(2, 3, 8, 8)),), None) for _ in range(70)]
    step = secateurs.prune(Listing().eval(), data, secateurs.Budget(macs=0.6))
    assert step.plan.after.macs <= 0.6 * step.plan.before.macs and step.repaired is not None


def test_a_cut_of_nothing_is_never_as_fast_as_was_asked_for(
    model: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    graph, asked = secateurs.trace(model, batches(1)[0]), []

    def decide(budget: secateurs.Budget) -> secateurs.Plan:
        asked.append(budget)
        return secateurs.Plan.of(graph, {graph.groups[0].name: [0]} if len(asked) > 1 else {})

    monkeypatch.setattr(pruning, "latency_share", lambda *_: 0.5)  # a busy machine says so of anything
    found = pruning._aimed(model, model, decide, batches(1)[0], 0.5)
    assert len(asked) == 2 and found.plan.groups


def test_what_is_refused(model: nn.Module) -> None:
    goal = secateurs.Budget(macs=0.5)
    with pytest.raises(ScoreError, match=r"one tensor of shape \(4, 3, 8, 8\)"):
        secateurs.prune(model, torch.zeros(4, 3, 8, 8), goal)
    with pytest.raises(ScoreError, match="no batches"):
        secateurs.prune(model, [], goal)
    with pytest.raises(BudgetError, match="out of reach"):
        secateurs.prune(model, batches(1), secateurs.Budget(macs=0.001))
    with pytest.raises(BudgetError, match="remains, as reconstruction ranks no units of ") as caught:
        secateurs.prune(RowsNet().eval(), batches(1), secateurs.Budget(params=0.05))
    assert "criterion='l2'" in str(caught.value)
    with pytest.raises(BudgetError, match="say how much is to leave"):
        secateurs.prune(model, batches(1))


@pytest.mark.parametrize("made_there", [False, True])
def test_it_works_in_inference_mode_as_outside_of_it(made_there: bool) -> None:
    torch.manual_seed(0)
    model, images = nn.Sequential(nn.Linear(4, 16), nn.ReLU(True), nn.Linear(16, 2)), torch.randn(64, 4)
    wanted = secateurs.prune(model, images.split(16), secateurs.Budget(macs=0.5))
    with torch.inference_mode():
        given = secateurs.prune(
            model, (images.clone() if made_there else images).split(16), secateurs.Budget(macs=0.5)
        )
    assert given.plan == wanted.plan and given.verified.max_error < 1e-9
    for one, other in zip(given.model.parameters(), wanted.model.parameters(), strict=True):
        assert not one.is_inference() and torch.equal(one, other)
    given.model(images).sum().backward()  # it can be trained
