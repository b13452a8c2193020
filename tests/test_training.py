"""What a training run can do beside plain steps: each against a second way, and resumed at every step."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, one_hot
from torch.utils.data import DataLoader, Dataset, TensorDataset

from secateurs.errors import TrainingError, UnknownNameError
from secateurs.progress import Event
from secateurs.recovery import Recipe, finetune
from secateurs.recovery.batches import Batch, drawn_apart
from test_finetune import Memory, assert_same, batches, data, network, state_of


class NoisyLoader(Dataset[Any]):
    """Its augmentation draws from torch's global random numbers, as most do."""

    def __len__(self) -> int:
        return 40

    def __getitem__(self, index: int) -> Any:
        inputs, target = data()[index]
        return inputs + 0.1 * torch.randn(6), target


def plain(seed: int = 0) -> nn.Module:
    """Neither batch norm nor dropout: the mean over two batches is that over both together."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))


@pytest.mark.parametrize(
    "changes",
    [
        {"ema": 0.9, "mixup": 0.4, "optimizer": "adamw"},
        {"accumulate": 2, "nesterov": True, "schedule": "step", "clip_norm": 1.0},
        {"distill": 0.5, "patience": 1},
    ],
    ids=["average-and-mixup", "accumulated", "taught"],
)
def test_resumed_at_any_step_it_ends_with_the_same_bits(changes: dict[str, Any]) -> None:
    recipe = Recipe(epochs=2, lr=0.05, checkpoint_minutes=0.0, **changes)
    teacher = network(1) if recipe.distill else None

    def run(memory: Memory) -> tuple[dict[str, Tensor], list[float | None]]:
        model, loader = network(), DataLoader(NoisyLoader(), batch_size=8, shuffle=True)
        scores = iter([0.1, 0.7, 0.8] if not memory.states else [0.7, 0.8][-2:])
        if memory.states and len(memory.states[0].facts["history"]["epochs"]) == 1:
            next(scores)
        history = finetune(
            model, loader, lambda _: next(scores), recipe=recipe, teacher=teacher, checkpoint=memory
        )
        return state_of(model), [epoch.loss for epoch in history.epochs]

    whole = Memory()
    expected, losses = run(whole)
    steps = 5 if recipe.accumulate == 1 else 3
    assert len(whole.states) == 2 * (steps + 1)
    for state in whole.states:
        torch.manual_seed(int(torch.randint(10_000, ())))  # what ran before must not matter
        resumed = Memory(state)
        found, again = run(resumed)
        assert_same(found, expected)
        assert again == losses
        assert_same(dict(resumed.states[-1].tensors), dict(whole.states[-1].tensors))


def test_states_within_an_epoch_wait_for_their_time() -> None:
    memory = Memory()
    finetune(network(), batches(), recipe=Recipe(epochs=2, checkpoint_minutes=60), checkpoint=memory)
    assert len(memory.states) == 2


def test_a_checkpoint_of_another_kind_of_training_is_refused() -> None:
    memory = Memory()
    finetune(network(), batches(), recipe=Recipe(epochs=1, ema=0.9), checkpoint=memory)
    with pytest.raises(TrainingError, match="is of a training with an average of the weights"):
        finetune(network(), batches(), recipe=Recipe(epochs=2), checkpoint=memory)


def test_fetching_draws_apart_from_the_network() -> None:
    loader = DataLoader(NoisyLoader(), batch_size=8, shuffle=True)
    quiet = [inputs for inputs, _ in drawn_apart(loader, 3)]
    torch.manual_seed(0)
    noise, loud = [], []
    for inputs, _ in drawn_apart(loader, 3):
        loud.append(inputs)
        noise.append(torch.rand(()))
    assert all(map(torch.equal, quiet, loud))
    torch.manual_seed(0)
    assert noise == [torch.rand(()) for _ in noise]


def test_accumulated_batches_are_one_larger_batch() -> None:
    """40 samples: the last step has fewer, and each counts as much as any other of its step."""
    inputs, targets = (tensor[:40] for tensor in data().tensors)

    def trained(size: int, accumulate: int) -> dict[str, Tensor]:
        model = plain()
        parts = list(zip(inputs.split(size), targets.split(size), strict=True))
        recipe = Recipe(epochs=3, lr=0.1, schedule="constant", accumulate=accumulate)
        finetune(model, parts, recipe=recipe)
        return state_of(model)

    together, apart = trained(15, 1), trained(5, 3)
    for name, weight in together.items():
        torch.testing.assert_close(apart[name], weight, rtol=1e-5, atol=1e-6)
    assert not torch.allclose(trained(5, 1)["0.weight"], together["0.weight"], atol=1e-4)


def test_the_average_is_the_one_written_out() -> None:
    model = plain()
    expected = {name: weight.double() for name, weight in state_of(model).items()}
    steps = [0]

    def watch(event: Event) -> None:
        if event.name != "batch":
            return
        decay = min(0.8, (1 + steps[0]) / (10 + steps[0]))
        for name, weight in model.state_dict().items():
            expected[name] = decay * expected[name] + (1 - decay) * weight.double()
        steps[0] += 1

    finetune(model, batches(), recipe=Recipe(epochs=4, lr=0.1, ema=0.8), observer=watch)
    assert steps[0] == 12
    for name, weight in model.state_dict().items():
        torch.testing.assert_close(weight.double(), expected[name], rtol=1e-5, atol=1e-6)


def test_the_averaged_weights_are_what_is_measured_and_training_goes_on_with_its_own() -> None:
    seen: list[dict[str, Tensor]] = []
    model, own = plain(), []

    def watch(event: Event) -> None:
        own.append(state_of(model))

    def measure(net: nn.Module) -> float:
        seen.append(state_of(net))
        return float(len(seen))

    finetune(model, batches(), measure, recipe=Recipe(epochs=2, lr=0.1, ema=0.9), observer=watch)
    assert_same(state_of(model), seen[-1])
    *_, last_step, epoch_told = own  # after the last epoch's validation the weights are training's again
    assert_same(last_step, epoch_told)
    assert not torch.equal(last_step["0.weight"], seen[-1]["0.weight"])


def test_training_stops_when_the_validation_no_longer_rises() -> None:
    scores = [0.5, 0.6, 0.7, 0.65, 0.66, 0.9, 0.9]
    memory, rest = Memory(), iter(scores)
    recipe = Recipe(epochs=6, lr=0.01, patience=2)
    history = finetune(plain(), batches(), lambda _: next(rest), recipe=recipe, checkpoint=memory)
    assert (len(history.epochs), history.best) == (4, 2)
    again = finetune(plain(), batches(), lambda _: 1.0, recipe=recipe, checkpoint=memory)
    assert again == history


def test_the_rate_falls_in_steps_as_torchs_own_does() -> None:
    recipe = Recipe(epochs=10, lr=0.4, schedule="step", lr_steps=(0.3, 0.8), lr_factor=0.2)
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.4)
    theirs = torch.optim.lr_scheduler.MultiStepLR(optimizer, [3, 8], 0.2)
    for epoch in range(10):
        assert recipe.lr_at(epoch) == pytest.approx(theirs.get_last_lr()[0])
        assert recipe.lr_at(epoch + 0.99) == pytest.approx(theirs.get_last_lr()[0])
        optimizer.step()
        theirs.step()


def test_mixed_samples_have_the_loss_of_mixed_targets() -> None:
    inputs, targets = data().tensors
    mixed = Batch.of((inputs, targets)).mixed(0.5)
    assert 0 < mixed.share < 1
    pairs = mixed.share * one_hot(targets, 3) + (1 - mixed.share) * one_hot(mixed.others, 3)
    outputs = plain()(mixed.inputs)
    expected = cross_entropy(outputs, pairs)
    found = mixed.share * cross_entropy(outputs, targets) + (1 - mixed.share) * cross_entropy(
        outputs, mixed.others
    )
    torch.testing.assert_close(found, expected)
    partners = (mixed.inputs - mixed.share * inputs) / (1 - mixed.share)
    places = torch.cdist(partners, inputs).argmin(1)
    assert torch.equal(targets[places], mixed.others)
    assert sorted(places.tolist()) == list(range(len(inputs)))


def test_a_run_with_mixup_trains_on_mixed_samples() -> None:
    plainly, mixed = (
        finetune(plain(), batches(), recipe=Recipe(epochs=8, lr=0.1, mixup=alpha)).kept.loss
        for alpha in (0.0, 1.0)
    )
    assert mixed is not None and plainly is not None and mixed > plainly  # mixed samples are harder


@pytest.mark.parametrize("nested", [False, True], ids=["first", "after-another-engine"])
def test_mixed_precision_leaves_no_trace(nested: bool) -> None:
    mine = Accelerator() if nested else None
    before = dict(AcceleratorState._shared_state)
    model, dtypes = network(), set()
    handle = model.first.register_forward_hook(lambda *call: dtypes.add((call[0].training, call[2].dtype)))
    history = finetune(model, batches(), recipe=Recipe(epochs=6, lr=0.1, precision="bf16"))
    handle.remove()
    assert dtypes == {(True, torch.bfloat16)}
    assert {tensor.dtype for tensor in model.parameters()} == {torch.float32}
    assert model.eval()(torch.zeros(2, 6)).dtype == torch.float32
    assert "forward" not in vars(model)
    assert dict(AcceleratorState._shared_state) == before
    assert mine is None or mine.mixed_precision == "no"
    full = finetune(network(), batches(), recipe=Recipe(epochs=6, lr=0.1, precision="no"))
    assert history.kept.loss == pytest.approx(full.kept.loss, rel=0.1)
    assert history.kept.loss != full.kept.loss


def test_precisions_that_cannot_be_are_refused() -> None:
    with pytest.raises(UnknownNameError, match="unknown precision 'fp61'; did you mean 'fp16'"):
        Recipe(precision="fp61")
    with pytest.raises(TrainingError, match="asks for precision='bf16', the accelerator is for 'no'"):
        finetune(network(), batches(), recipe=Recipe(precision="bf16"), accelerator=Accelerator())


@pytest.mark.parametrize("form", ["tensor", "list of one", "none"])
def test_unlabelled_images_teach_as_labelled_ones_whose_labels_do_not_count(form: str) -> None:
    inputs, targets = data().tensors
    given: Any = {"tensor": inputs, "list of one": [inputs], "none": (inputs, None)}[form]
    unlabelled, labelled = network(), network()
    recipe = Recipe(epochs=3, lr=0.1, distill=0.3)
    finetune(unlabelled, [given], recipe=recipe, teacher=network(1))
    whole = Recipe(epochs=3, lr=0.1, distill=1.0)
    finetune(labelled, [(inputs, targets)], recipe=whole, teacher=network(1))
    assert_same(state_of(unlabelled), state_of(labelled))


def test_unlabelled_batches_of_a_loader_need_a_teacher() -> None:
    loader = DataLoader(TensorDataset(data().tensors[0]), batch_size=16)
    with pytest.raises(TrainingError, match="have no targets, and nobody teaches"):
        finetune(network(), loader, recipe=Recipe(epochs=1))


def test_what_would_have_no_effect_is_refused() -> None:
    from secateurs.recovery import Regularizer

    with pytest.raises(TrainingError, match="patience=3 has no effect without validation data"):
        finetune(network(), batches(), recipe=Recipe(patience=3))
    with pytest.raises(TrainingError, match=r"so ema=0\.9, patience=None have no effect"):
        finetune(network(), batches(), recipe=Recipe(ema=0.9), regularizer=Regularizer())
    with pytest.raises(TrainingError, match="`optimizer = sgd and momentum > 0` must hold"):
        Recipe(optimizer="adamw", nesterov=True)


COLLAPSES = {
    "for three epochs": (10, [0.9, 0.3, 0.2, 0.4], 3),
    "to the end": (2, [0.9, 0.8, 0.1], 2),
    "for a quarter": (20, [0.9, 0.3, 0.3, 0.3, 0.3, 0.3], 5),
}


@pytest.mark.parametrize("which", COLLAPSES)
def test_a_rate_that_destroys_the_network_is_noticed(which: str) -> None:
    epochs, scores, last = COLLAPSES[which]
    rest, model, seen = iter(scores), plain(), []

    def measure(net: nn.Module) -> float:
        seen.append(state_of(net))
        return next(rest)

    with pytest.raises(TrainingError, match=rf"lr=0\.5 destroyed the network: .* 0\.900 .*\(epoch {last}\)"):
        finetune(model, batches(), measure, recipe=Recipe(epochs=epochs, lr=0.5))
    assert_same(state_of(model), seen[0])


@pytest.mark.parametrize(
    "scores", [[0.9, 0.3, 0.2, 0.5, 0.9], [0.0, 0.0, 0.0, 0.0, 0.0], [-3, -9, -9, -9, -9]]
)
def test_a_fall_that_is_made_good_is_none(scores: list[float]) -> None:
    rest = iter(scores)
    assert len(finetune(plain(), batches(), lambda _: next(rest), recipe=Recipe(epochs=4)).epochs) == 4


OUT_OF_MEMORY = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
    RuntimeError("[enforce fail at alloc_cpu.cpp:121] . DefaultCPUAllocator: can't allocate memory"),
    MemoryError(),
]


@pytest.mark.parametrize("error", OUT_OF_MEMORY, ids=lambda error: type(error).__name__)
def test_out_of_memory_is_said_in_one_sentence_and_keeps_the_best(error: Exception) -> None:
    model, calls, good = plain(), [0], []

    def loss_fn(outputs: Tensor, targets: Tensor) -> Tensor:
        calls[0] += 1
        if calls[0] == 5:
            raise error
        return cross_entropy(outputs, targets)

    def measure(net: nn.Module) -> float:
        good.append(state_of(net))
        return float(len(good))

    with pytest.raises(TrainingError, match=r"out of memory in epoch 2 with a batch of 16; .*best") as caught:
        finetune(model, batches(), measure, recipe=Recipe(epochs=3, lr=0.1), loss_fn=loss_fn)
    assert caught.value.fix is not None and "batches of 8" in caught.value.fix
    assert_same(state_of(model), good[1])


def test_a_recipe_survives_json_in_a_configuration() -> None:
    from dataclasses import asdict

    facts = json.loads(json.dumps(asdict(Recipe(lr_steps=(0.2, 0.4)))))
    assert Recipe(**{**facts, "lr_steps": tuple(facts["lr_steps"])}) == Recipe(lr_steps=(0.2, 0.4))
