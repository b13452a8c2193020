"""The training loop: what it learns, what it keeps, and what it leaves alone."""

from __future__ import annotations

import copy
import json
import re
from typing import Any

import pytest
import torch
from accelerate.state import GradientState
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from secateurs.errors import SecateursError, TrainingError, UnknownNameError
from secateurs.progress import Event, State
from secateurs.recovery import Epoch, History, Recipe, finetune
from toy import OwnNorm


class NormAndDropout(nn.Module):
    """Batch norm and dropout: state and randomness beside the weights."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(6, 16)
        self.norm = nn.BatchNorm1d(16)
        self.drop = nn.Dropout(0.3)
        self.last = nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        hidden: Tensor = self.last(self.drop(self.norm(self.first(x)).relu()))
        return hidden


class Memory:
    """A checkpoint that goes through JSON, as a file does, and keeps every state."""

    def __init__(self, state: State | None = None) -> None:
        self.states: list[State] = [] if state is None else [state]

    def load(self) -> State | None:
        return self.states[-1] if self.states else None

    def save(self, state: State) -> None:
        tensors = {name: tensor.clone() for name, tensor in state.tensors.items()}
        self.states.append(State(json.loads(json.dumps(state.facts)), tensors))


def network(seed: int = 0) -> NormAndDropout:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return NormAndDropout()


def data(count: int = 48) -> TensorDataset:
    inputs = torch.randn(count, 6, generator=torch.Generator().manual_seed(1))
    return TensorDataset(inputs, inputs[:, :3].argmax(1))


def batches() -> DataLoader[Any]:
    return DataLoader(data(), batch_size=16, shuffle=True)


def state_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def assert_same(left: dict[str, Tensor], right: dict[str, Tensor]) -> None:
    assert left.keys() == right.keys()
    for name in left:
        assert torch.equal(left[name], right[name]), name


def test_it_learns_and_says_so() -> None:
    model, events = network(), []
    held_out = list(DataLoader(data(), batch_size=16))
    history = finetune(model, batches(), held_out, recipe=Recipe(epochs=12, lr=0.1), observer=events.append)
    assert history.kept.score is not None and history.kept.score > 0.9
    assert history.start.score is not None and history.start.score < 0.7
    assert [event.facts["epoch"] for event in events if event.name == "epoch"] == list(range(1, 13))
    assert sum(event.name == "batch" for event in events) == 12 * 3
    json.dumps([event.facts for event in events], allow_nan=False)


def test_the_best_weights_are_kept() -> None:
    model = network()
    scores = iter([0.1, 0.5, 0.9, 0.3])
    seen = []

    def validation(current: nn.Module) -> float:
        seen.append(state_of(current))
        return next(scores)

    history = finetune(model, batches(), validation, recipe=Recipe(epochs=3, lr=0.1))
    assert history.best == 2
    assert history.kept.score == 0.9
    assert_same(state_of(model), seen[2])


def test_training_that_only_harms_leaves_the_first_weights() -> None:
    model = network()
    before = state_of(model)
    scores = iter([0.9, 0.5, 0.6])
    history = finetune(model, batches(), lambda _: next(scores), recipe=Recipe(epochs=2, lr=0.1))
    assert history.best == 0
    assert_same(state_of(model), before)


def test_without_validation_the_last_weights_are_kept() -> None:
    history = finetune(network(), batches(), recipe=Recipe(epochs=3))
    assert history.best == 3
    assert history.kept.score is None


def test_no_epochs_change_nothing() -> None:
    model = network()
    before = state_of(model)
    history = finetune(model, batches(), lambda _: 0.25, recipe=Recipe(epochs=0))
    assert (history.start.score, history.epochs) == (0.25, ())
    assert_same(state_of(model), before)


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
@pytest.mark.parametrize("seeded_loader", [False, True], ids=["global", "own-generator"])
def test_a_resumed_run_ends_with_the_same_bits(optimizer: str, seeded_loader: bool) -> None:
    recipe = Recipe(epochs=4, lr=0.05, optimizer=optimizer, warmup_epochs=1.0, clip_norm=1.0, seed=7)

    def run(memory: Memory) -> tuple[dict[str, Tensor], History]:
        model = network()
        generator = torch.Generator().manual_seed(int(torch.randint(1000, ()))) if seeded_loader else None
        loader = DataLoader(data(), batch_size=16, shuffle=True, generator=generator)
        scores = {0: 0.0, 1: 0.8, 2: 0.5, 3: 0.6, 4: 0.7}  # the best is not the last
        done = [len(memory.states[-1].facts["history"]["epochs"]) + 1 if memory.states else 0]

        def validation(_: nn.Module) -> float:
            done[0] += 1
            return scores[done[0] - 1]

        history = finetune(model, loader, validation, recipe=recipe, checkpoint=memory)
        return state_of(model), history

    whole = Memory()
    expected, history = run(whole)
    assert len(whole.states) == 4
    for state in whole.states:
        torch.manual_seed(int(torch.randint(10_000, ())))  # what ran before must not matter
        resumed = Memory(state)
        found, again = run(resumed)
        assert_same(found, expected)
        assert again.best == history.best
        assert [epoch.loss for epoch in again.epochs] == [epoch.loss for epoch in history.epochs]
        assert_same(dict(resumed.states[-1].tensors), dict(whole.states[-1].tensors))


def test_another_seed_trains_differently() -> None:
    losses = [finetune(network(), batches(), recipe=Recipe(epochs=1, seed=seed)).kept.loss for seed in (0, 1)]
    assert losses[0] != losses[1]


def test_a_function_gives_the_batches_of_an_epoch() -> None:
    seeds: list[int] = []

    def make(seed: int) -> list[Any]:
        seeds.append(seed)
        return list(batches())

    finetune(network(), make, recipe=Recipe(epochs=3))
    assert len(set(seeds)) == 3


@pytest.mark.parametrize("form", ["tensor", "tuple", "dict"])
def test_inputs_take_any_form(form: str) -> None:
    inputs, targets = data().tensors
    given: Any = {"tensor": inputs, "tuple": (inputs,), "dict": {"x": inputs}}[form]
    history = finetune(network(), [(given, targets)], recipe=Recipe(epochs=1))
    assert history.epochs[0].loss == pytest.approx(1.2, abs=0.5)


def test_side_outputs_count_in_training() -> None:
    class SideOutput(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.main, self.side = nn.Linear(6, 3), nn.Linear(6, 3)

        def forward(self, x: Tensor) -> Any:
            return (self.main(x), self.side(x)) if self.training else self.main(x)

    model = SideOutput()
    before = model.side.weight.clone()
    finetune(model, batches(), recipe=Recipe(epochs=1, lr=0.1))
    assert not torch.equal(model.side.weight, before)


def test_frozen_batch_norms_keep_their_statistics() -> None:
    for freeze in ("recipe", "parameters"):
        model = network()
        model.norm.requires_grad_(freeze == "recipe")
        before = model.norm.running_mean.clone()  # type: ignore[union-attr]
        finetune(model, batches(), recipe=Recipe(epochs=1, freeze_bn=freeze == "recipe"))
        assert torch.equal(model.norm.running_mean, before)  # type: ignore[arg-type]
    finetune(model.requires_grad_(True), batches(), recipe=Recipe(epochs=1))
    assert not torch.equal(model.norm.running_mean, before)  # type: ignore[arg-type]


def test_a_frozen_norm_of_ones_own_keeps_its_statistics() -> None:
    model = network()
    model.norm = OwnNorm(16)
    finetune(model, batches(), recipe=Recipe(epochs=1, freeze_bn=True))
    assert not model.norm.running_mean.any()
    finetune(model, batches(), recipe=Recipe(epochs=1))
    assert model.norm.running_mean.any()


def test_frozen_parameters_stay() -> None:
    model = network()
    model.first.requires_grad_(False)
    before = state_of(model.first)
    finetune(model, batches(), recipe=Recipe(epochs=2, lr=0.1))
    assert_same(state_of(model.first), before)
    assert not model.first.weight.requires_grad


@pytest.mark.parametrize("how", ["nan", "inf"])
def test_divergence_keeps_the_last_good_weights(how: str) -> None:
    model = network()
    good: list[dict[str, Tensor]] = []
    calls = [0]

    def loss_fn(outputs: Tensor, targets: Tensor) -> Tensor:
        calls[0] += 1
        loss = nn.functional.cross_entropy(outputs, targets)
        return loss * float(how) if calls[0] == 8 else loss

    def validation(current: nn.Module) -> float:
        good.append(state_of(current))
        return float(len(good))

    with pytest.raises(TrainingError, match=f"the loss became {how} in epoch 3, batch 2"):
        finetune(model, batches(), validation, recipe=Recipe(epochs=5, lr=0.1), loss_fn=loss_fn)
    assert_same(state_of(model), good[2])


@pytest.mark.parametrize("ending", ["success", "bad argument", "model raises", "loss is nan"])
def test_nothing_else_changes(ending: str) -> None:
    model = network()
    model.norm.eval()
    calls = []
    handle = model.first.register_forward_hook(lambda *_: calls.append(1))
    loader = DataLoader(data(), batch_size=16, shuffle=True, generator=torch.Generator().manual_seed(3))
    recipe = Recipe(epochs=2, lr=0.1, label_smoothing=0.1 if ending == "bad argument" else 0.0)

    def loss_fn(outputs: Tensor, targets: Tensor) -> Tensor:
        if ending == "model raises":
            raise ValueError("from inside")
        factor = float("nan") if ending == "loss is nan" else 1.0
        return nn.functional.cross_entropy(outputs, targets) * factor

    modes = {name: module.training for name, module in model.named_modules()}
    attributes = {name: set(vars(module)) for name, module in model.named_modules()}
    hooks = {name: list(module._forward_hooks) for name, module in model.named_modules()}
    parameters = list(model.parameters())
    state, weights = torch.get_rng_state(), state_of(model)
    assert loader.generator is not None
    own = loader.generator.get_state()
    if ending == "success":
        finetune(model, loader, recipe=recipe, loss_fn=loss_fn)
    else:
        with pytest.raises((SecateursError, ValueError)):
            finetune(model, loader, recipe=recipe, loss_fn=loss_fn)
        assert_same(state_of(model), weights)
    assert {name: module.training for name, module in model.named_modules()} == modes
    assert {name: set(vars(module)) for name, module in model.named_modules()} == attributes
    assert {name: list(module._forward_hooks) for name, module in model.named_modules()} == hooks
    assert all(old is new for old, new in zip(parameters, model.parameters(), strict=True))
    assert all(parameter.grad is None and parameter.requires_grad for parameter in model.parameters())
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(loader.generator.get_state(), own)
    assert not GradientState().in_dataloader
    copy.deepcopy(model)
    handle.remove()


def test_decay_spares_biases_and_norms() -> None:
    groups = Recipe(weight_decay=0.5).optimizer_for(network()).param_groups
    assert [(group["weight_decay"], {p.ndim for p in group["params"]}) for group in groups] == [
        (0.5, {2}),
        (0.0, {1}),
    ]


def test_the_learning_rate_rises_and_falls() -> None:
    recipe = Recipe(epochs=10, lr=1.0, warmup_epochs=2.0)
    rates = [recipe.lr_at(epoch) for epoch in (0, 1, 2, 6, 10)]
    assert rates == pytest.approx([0.001, 0.5, 1.0, 0.5, 0.0], abs=1e-9)
    assert Recipe(epochs=10, lr=1.0, schedule="constant").lr_at(9.5) == 1.0


def test_nothing_to_train_is_said() -> None:
    with pytest.raises(TrainingError, match="no parameter of the model requires a gradient"):
        finetune(network().requires_grad_(False), batches())
    with pytest.raises(TrainingError, match="gave no batch"):
        finetune(network(), [], recipe=Recipe(epochs=1))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *(("epochs", -1), ("lr", 0.0), ("lr", float("nan")), ("momentum", 1.0), ("clip_norm", 0.0)),
        *(("accumulate", 0), ("mixup", -1.0), ("ema", 1.0), ("patience", 0), ("lr_factor", 1.0)),
        *(("lr_steps", (0.5, 0.5)), ("lr_steps", (0.5, 1.0)), ("distill_features", float("nan"))),
        *(("checkpoint_minutes", -1.0), ("lr_steps", (0.0, 0.5))),
    ],
)
def test_a_recipe_checks_itself(field: str, value: Any) -> None:
    with pytest.raises(TrainingError, match=re.escape(f"must hold, got {field}={value}")):
        Recipe(**{field: value})  # type: ignore[arg-type]


def test_unknown_names_are_met_with_the_known() -> None:
    with pytest.raises(UnknownNameError, match="did you mean 'adamw'"):
        Recipe(optimizer="adam")
    with pytest.raises(UnknownNameError, match="unknown schedule 'stair'"):
        Recipe(schedule="stair")


def test_a_history_survives_json() -> None:
    events: list[Event] = []
    history = finetune(network(), batches(), lambda _: 0.5, recipe=Recipe(epochs=2), observer=events.append)
    assert History.from_dict(json.loads(json.dumps(history.to_dict()))) == history


@pytest.mark.parametrize(
    ("scores", "keep", "patience", "sentence"),
    [
        ([0.5], False, None, "nothing was trained"),
        ([None, None, None], False, None, "epoch 2 of 2 kept: the last, because nothing was measured"),
        ([0.5, 0.7, 0.6], False, None, "epoch 1 of 2 kept: the best validation"),
        ([0.5, 0.7, 0.6], True, None, "epoch 2 of 2 kept: the last, whatever the validation"),
        ([0.5, 0.4], False, None, "no epoch kept: none was better than the weights before them"),
        ([0.5, 0.7, 0.6, 0.6], False, 3, "epoch 1 of 3 kept: the best validation"),
        (
            [0.5, 0.7, 0.6, 0.6],
            False,
            2,
            "epoch 1 of 3 kept: the best validation; stopped after 2 epochs without a better one",
        ),
    ],
)
def test_a_history_says_which_weights_were_kept_and_why(
    scores: list[float | None], keep: bool, patience: int | None, sentence: str
) -> None:
    start, *rest = (
        Epoch(number=number, loss=None, score=score, val_loss=None, seconds=0.0)
        for number, score in enumerate(scores)
    )
    history = History(start=start)
    for epoch in rest:
        history = history.with_epoch(epoch, keep=keep)
    assert history.told(patience) == sentence
