"""The hook of the training loop: when it is called, what it may change, and that it resumes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from secateurs.errors import TrainingError
from secateurs.progress import Event, State
from secateurs.recovery import Recipe, Regularizer, finetune
from test_finetune import Memory, assert_same, batches, network, state_of


class Diary(Regularizer):
    """Writes down when it is called."""

    def __init__(self) -> None:
        self.calls: list[Any] = []

    def start(self, model: nn.Module) -> None:
        self.calls.append("start")

    def after_backward(self, model: nn.Module, epochs_done: float) -> None:
        assert all(parameter.grad is not None for parameter in model.parameters())
        self.calls.append(round(epochs_done, 3))

    def after_step(self, model: nn.Module) -> None:
        self.calls.append("step")

    def after_epoch(self, model: nn.Module, epoch: int) -> None:
        self.calls.append(("epoch", epoch))


class GrowingPull(Regularizer):
    """A pull that depends on how often it was applied: a fact and a tensor beside the weights."""

    def __init__(self) -> None:
        self.count, self.total = 0, torch.zeros(())

    def after_backward(self, model: nn.Module, epochs_done: float) -> None:
        self.count, self.total = self.count + 1, self.total + 0.01
        for parameter in model.parameters():
            assert parameter.grad is not None
            parameter.grad += self.count * self.total * parameter.detach()

    def facts(self, model: nn.Module) -> dict[str, Any]:
        return {"pull": self.count}

    def state(self) -> State:
        return State({"count": self.count}, {"total": self.total})

    def load_state(self, state: State) -> None:
        self.count, self.total = state.facts["count"], state.tensors["total"]


def test_it_is_called_at_every_step_and_epoch() -> None:
    diary = Diary()
    finetune(network(), batches(), recipe=Recipe(epochs=2), regularizer=diary)
    first = [0.0, "step", 0.333, "step", 0.667, "step", ("epoch", 1)]
    second = [1.0, "step", 1.333, "step", 1.667, "step", ("epoch", 2)]
    assert diary.calls == ["start", *first, *second]


def test_a_penalty_on_the_gradient_is_one_in_the_loss() -> None:
    """Half of ``strength * |w|^2`` in the loss against ``strength * w`` in the gradient."""

    class Decay(Regularizer):
        def after_backward(self, model: nn.Module, epochs_done: float) -> None:
            for parameter in model.parameters():
                assert parameter.grad is not None
                parameter.grad += 0.3 * parameter.detach()

    by_hook, by_loss = network(), network()
    recipe = Recipe(epochs=2, lr=0.1)
    finetune(by_hook, batches(), recipe=recipe, regularizer=Decay())

    def loss_fn(outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        size = sum(parameter.square().sum() for parameter in by_loss.parameters())
        return nn.functional.cross_entropy(outputs, targets) + 0.15 * size

    finetune(by_loss, batches(), recipe=recipe, loss_fn=loss_fn)
    for name, weight in by_hook.state_dict().items():
        torch.testing.assert_close(weight, by_loss.state_dict()[name], rtol=1e-4, atol=1e-5)


def test_what_the_end_of_an_epoch_changes_is_measured_and_kept() -> None:
    class Zero(Regularizer):
        def after_epoch(self, model: nn.Module, epoch: int) -> None:
            model.first.weight.detach().zero_()  # type: ignore[operator, union-attr]

    model, seen = network(), []
    finetune(
        model,
        batches(),
        lambda net: seen.append(net.first.weight.abs().sum().item()) or 0.5,
        recipe=Recipe(epochs=2),
        regularizer=Zero(),
    )
    assert seen[0] > 0 and seen[1:] == [0.0, 0.0]
    assert not model.first.weight.any()


def test_the_last_weights_are_kept_however_good_the_first_were() -> None:
    scores = iter([0.9, 0.8, 0.7])
    history = finetune(
        network(), batches(), lambda _: next(scores), recipe=Recipe(epochs=2), regularizer=Regularizer()
    )
    assert history.best == 2


def test_a_regularised_run_resumes_to_the_same_bits() -> None:
    recipe, whole = Recipe(epochs=4, lr=0.05, clip_norm=1.0), Memory()
    model = network()
    finetune(model, batches(), recipe=recipe, regularizer=GrowingPull(), checkpoint=whole)
    assert len(whole.states) == 4
    for state in whole.states:
        again = network(seed=5)
        finetune(again, batches(), recipe=recipe, regularizer=GrowingPull(), checkpoint=Memory(state))
        assert_same(state_of(again), state_of(model))


def test_its_facts_are_told_with_the_epoch() -> None:
    events: list[Event] = []
    finetune(network(), batches(), recipe=Recipe(epochs=2), regularizer=GrowingPull(), observer=events.append)
    assert [event.facts["pull"] for event in events if event.name == "epoch"] == [3, 6]


@pytest.mark.parametrize("first", [None, Regularizer()], ids=["without", "with"])
def test_a_checkpoint_of_another_kind_of_training_is_refused(first: Regularizer | None) -> None:
    memory = Memory()
    finetune(network(), batches(), recipe=Recipe(epochs=1), regularizer=first, checkpoint=memory)
    other = Regularizer() if first is None else None
    model = network()
    before = state_of(model)
    with pytest.raises(TrainingError, match="the checkpoint is of a training with"):
        finetune(model, batches(), recipe=Recipe(epochs=2), regularizer=other, checkpoint=memory)
    assert_same(state_of(model), before)
