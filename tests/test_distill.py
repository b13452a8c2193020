"""Distillation: the gradient of its loss, who teaches, and what it leaves alone."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from secateurs.errors import TrainingError
from secateurs.recovery import Recipe, distillation_loss, finetune
from test_finetune import Memory, assert_same, batches, data, network, state_of


class OnlyTheTeacherKnows(nn.Module):
    """A teacher that is sure of the class that its rule gives, whatever the targets say."""

    def forward(self, x: Tensor) -> Tensor:
        return 9 * nn.functional.one_hot(x[:, :3].argmin(1), 3).float()


def logits(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
@pytest.mark.parametrize("shape", [(5, 3), (2, 4, 3)], ids=["classes", "maps"])
def test_its_gradient_is_that_of_finite_differences(temperature: float, shape: tuple[int, ...]) -> None:
    outputs, taught, step = logits(1, *shape).requires_grad_(True), logits(2, *shape), 1e-6
    (found,) = torch.autograd.grad(distillation_loss(outputs, taught, temperature), outputs)
    expected = torch.zeros(outputs.numel(), dtype=torch.float64)
    with torch.no_grad():
        for place in range(outputs.numel()):
            nudge = torch.zeros(outputs.numel(), dtype=torch.float64)
            nudge[place] = step
            above, below = (outputs + sign * nudge.view(shape) for sign in (1, -1))
            high, low = (distillation_loss(moved, taught, temperature) for moved in (above, below))
            expected[place] = (high - low) / (2 * step)
    torch.testing.assert_close(found.flatten(), expected, rtol=1e-6, atol=1e-9)


def test_it_is_the_divergence_written_out() -> None:
    outputs, taught = [0.2, -1.0, 0.7], [1.5, 0.0, -0.5]
    told, said = ([math.exp(value / 2) for value in row] for row in (taught, outputs))
    shares = [(p / sum(told), q / sum(said)) for p, q in zip(told, said, strict=True)]
    expected = 4 * sum(p * math.log(p / q) for p, q in shares)
    found = distillation_loss(torch.tensor([outputs] * 7), torch.tensor([taught] * 7), 2.0)
    assert found.item() == pytest.approx(expected, rel=1e-5)  # a mean: seven alike count as one


def test_the_gradient_of_a_high_temperature_is_on_the_scale_of_a_low_one() -> None:
    outputs, taught = logits(1, 8, 5).requires_grad_(True), logits(2, 8, 5)
    lengths = [
        torch.autograd.grad(distillation_loss(outputs, taught, temperature), outputs)[0].norm()
        for temperature in (10.0, 100.0)
    ]
    assert lengths[0] == pytest.approx(lengths[1].item(), rel=0.1)


def test_the_loss_is_the_mixture_that_was_asked_for() -> None:
    batch = data().tensors
    losses = {
        share: finetune(
            network().eval(),
            [batch],
            recipe=Recipe(epochs=1, distill=share, temperature=2.0),
            teacher=network(1) if share else None,
        ).epochs[0].loss
        for share in (0.0, 0.3, 1.0)
    }  # fmt: skip
    assert losses[0.3] == pytest.approx(0.7 * losses[0.0] + 0.3 * losses[1.0], rel=1e-5)
    assert losses[1.0] != pytest.approx(losses[0.0], rel=0.01)


def test_the_network_learns_what_its_teacher_says() -> None:
    model, teacher = network(), OnlyTheTeacherKnows()
    finetune(model, batches(), recipe=Recipe(epochs=25, lr=0.1, distill=1.0), teacher=teacher)
    inputs = data().tensors[0]
    assert (model.eval()(inputs).argmax(1) == teacher(inputs).argmax(1)).float().mean() > 0.9


@pytest.mark.parametrize("ending", ["success", "model raises"])
def test_a_teacher_is_left_as_it_was(ending: str) -> None:
    teacher = network(1).train()
    before, seen = state_of(teacher), set()
    handle = teacher.register_forward_hook(
        lambda module, _, outputs: seen.add((module.training, outputs.requires_grad))
    )

    def loss_fn(outputs: Tensor, targets: Tensor) -> Tensor:
        if seen and ending == "model raises":
            raise ValueError("from inside")
        return nn.functional.cross_entropy(outputs, targets)

    def train() -> None:
        finetune(network(), batches(), recipe=Recipe(epochs=1, distill=0.5), loss_fn=loss_fn, teacher=teacher)

    if ending == "success":
        train()
    else:
        with pytest.raises(ValueError, match="from inside"):
            train()
    handle.remove()
    assert seen == {(False, False)}  # evaluation mode, no gradient
    assert all(module.training for module in teacher.modules())
    assert all(parameter.grad is None and parameter.requires_grad for parameter in teacher.parameters())
    assert_same(state_of(teacher), before)


def test_resumed_at_any_epoch_it_ends_with_the_same_bits() -> None:
    recipe = Recipe(epochs=3, lr=0.05, optimizer="adamw", distill=0.7)

    def run(memory: Memory) -> tuple[dict[str, Tensor], list[float | None]]:
        model = network()
        loader: DataLoader[Any] = DataLoader(data(), batch_size=16, shuffle=True)
        history = finetune(model, loader, recipe=recipe, teacher=network(1), checkpoint=memory)
        return state_of(model), [epoch.loss for epoch in history.epochs]

    whole = Memory()
    expected, losses = run(whole)
    assert len(whole.states) == 3
    for state in whole.states:
        found, again = run(Memory(state))
        assert_same(found, expected)
        assert again == losses


def test_side_outputs_are_not_taught() -> None:
    class WithSide(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.main, self.side = nn.Linear(6, 3), nn.Linear(6, 3)

        def forward(self, x: Tensor) -> Any:
            return (self.main(x), self.side(x)) if self.training else self.main(x)

    model = WithSide()
    before = model.side.weight.detach().clone()
    recipe = Recipe(epochs=1, lr=0.1, distill=1.0, weight_decay=0.0)
    finetune(model, batches(), recipe=recipe, teacher=network(1))
    assert torch.equal(model.side.weight, before)


def test_what_does_not_go_together_is_refused() -> None:
    model = network()
    with pytest.raises(TrainingError, match=r"distill=0\.5, .* needs a teacher"):
        finetune(model, batches(), recipe=Recipe(distill=0.5))
    with pytest.raises(TrainingError, match="a teacher has no effect with distill=0"):
        finetune(model, batches(), recipe=Recipe(), teacher=network(1))
    with pytest.raises(TrainingError, match="cannot be its own teacher"):
        finetune(model, batches(), recipe=Recipe(distill=0.5), teacher=model)
    with pytest.raises(TrainingError, match=r"outputs of shape \(16, 3\), its teacher \(16, 5\)"):
        finetune(model, batches(), recipe=Recipe(distill=0.5), teacher=nn.Linear(6, 5))


@pytest.mark.parametrize(
    ("field", "value"), [("distill", 1.5), ("distill", -0.1), ("distill", math.nan), ("temperature", 0.0)]
)
def test_a_recipe_checks_its_teaching(field: str, value: float) -> None:
    with pytest.raises(TrainingError, match=f"must hold, got {field}={value}"):
        Recipe(**{field: value})  # type: ignore[arg-type]
