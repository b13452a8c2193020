"""The memory layout of images: channels last where a model runs with it, and never seen from outside."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.nn.utils import parameters_to_vector

import secateurs
from secateurs.channels_last import ChannelsLast
from secateurs.errors import TrainingError
from secateurs.measure.accuracy import accuracy
from secateurs.progress import State
from secateurs.recovery import Recipe, finetune
from test_finetune import Memory
from tiny_net import TinyNet

_LAST = torch.channels_last


class Viewing(nn.Module):
    """Sees the layout of a map: ``view`` refuses channels last."""

    def __init__(self, *, only_in_training: bool = False) -> None:
        super().__init__()
        self.only_in_training = only_in_training
        self.conv = nn.Conv2d(3, 4, 3, padding=1)
        self.last = nn.Linear(4 * 64, 2)

    def forward(self, x: Tensor) -> Tensor:
        maps = self.conv(x)
        sees = self.training or not self.only_in_training
        return self.last(maps.view(len(x), -1) if sees else maps.flatten(1))  # type: ignore[no-any-return]


def net(kind: type[nn.Module] = TinyNet, **options: Any) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return kind(**options)


def batches(count: int = 3) -> list[tuple[Tensor, Tensor]]:
    chance = torch.Generator().manual_seed(1)
    return [(torch.randn(8, 3, 8, 8, generator=chance), torch.arange(8) % 2) for _ in range(count)]


def layouts(model: nn.Module, *, of_training: bool = True) -> list[bool]:
    """For each batch of what follows: whether its maps lay channels last."""
    seen: list[bool] = []

    def see(_: nn.Module, inputs: Any, maps: Tensor) -> None:
        if model.training or not of_training:
            seen.append(maps.is_contiguous(memory_format=_LAST))

    next(each for each in model.modules() if isinstance(each, nn.Conv2d)).register_forward_hook(see)
    return seen


@pytest.mark.parametrize("wanted", [None, True, False])
def test_maps_lie_channels_last_in_training_and_weights_as_before_after_it(wanted: bool | None) -> None:
    model = net()
    seen = layouts(model)
    finetune(model, batches(), recipe=Recipe(epochs=2, channels_last=wanted))
    assert seen == [wanted is not False] * 6
    assert all(parameter.is_contiguous() for parameter in model.parameters())


def test_values_are_the_same_to_rounding() -> None:
    def trained(wanted: bool) -> nn.Module:
        model = net().double()
        doubled = [(inputs.double(), targets) for inputs, targets in batches()]
        finetune(model, doubled, recipe=Recipe(epochs=3, lr=0.05, channels_last=wanted))
        return model

    before, one, other = net().double(), trained(True), trained(False)
    for left, right in zip(one.parameters(), other.parameters(), strict=True):
        assert torch.allclose(left, right, rtol=0, atol=1e-12)
    assert not any(map(torch.equal, _kernels(before), _kernels(one)))


def test_a_layout_of_the_users_own_stays() -> None:
    model = net().to(memory_format=_LAST)
    finetune(model, batches(), recipe=Recipe(epochs=1))
    assert all(kernel.is_contiguous(memory_format=_LAST) for kernel in _kernels(model))


def test_a_model_that_looks_at_the_layout_trains_as_it_is() -> None:
    model = net(Viewing)
    seen = layouts(model)
    finetune(model, batches(), recipe=Recipe(epochs=1))
    assert seen == [False] * 3


def test_the_trial_changes_nothing() -> None:
    """A model that refuses has trained as if nobody had tried."""
    tried, plain = net(Viewing), net(Viewing)
    finetune(tried, batches(), recipe=Recipe(epochs=2, lr=0.1))
    finetune(plain, batches(), recipe=Recipe(epochs=2, lr=0.1, channels_last=False))
    assert all(map(torch.equal, tried.state_dict().values(), plain.state_dict().values()))


@pytest.mark.parametrize("only_in_training", [True, False])
def test_a_model_that_cannot_says_what_to_do(only_in_training: bool) -> None:
    model = net(Viewing, only_in_training=only_in_training)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(TrainingError, match=r"does not run with channels last.*\n.*channels_last=False"):
        finetune(model, batches(), recipe=Recipe(epochs=1, channels_last=True))
    assert all(map(torch.equal, model.state_dict().values(), before.values()))
    assert all(parameter.is_contiguous() for parameter in model.parameters())


def test_a_teacher_that_looks_at_the_layout_keeps_both_from_it() -> None:
    model, teacher = net(), net(Viewing)
    seen = layouts(model)
    finetune(model, batches(), recipe=Recipe(epochs=1, distill=0.5), teacher=teacher)
    assert seen == [False] * 3
    assert all(each.is_contiguous() for network in (model, teacher) for each in network.parameters())


def test_a_teacher_lies_as_before_afterwards() -> None:
    model, teacher = net(), net()
    taught = layouts(model)
    finetune(model, batches(), recipe=Recipe(epochs=1, distill=0.5), teacher=teacher)
    assert taught == [True] * 3
    assert all(parameter.is_contiguous() for parameter in teacher.parameters())


@pytest.mark.parametrize("changes", [{}, {"ema": 0.9}, {"precision": "bf16"}, {"optimizer": "adamw"}])
def test_a_resumed_run_ends_with_the_same_bits(changes: dict[str, Any]) -> None:
    recipe = Recipe(epochs=2, lr=0.05, checkpoint_minutes=0, **changes)
    whole, memory = net(), Memory()
    finetune(whole, batches(), recipe=recipe, checkpoint=memory)
    for state in memory.states[:-1]:
        resumed = net()
        finetune(resumed, batches(), recipe=recipe, checkpoint=Memory(_as_read_from_a_file(state)))
        assert all(map(torch.equal, whole.state_dict().values(), resumed.state_dict().values()))


@pytest.mark.parametrize("criterion", ["taylor", "apoz", "reconstruction", "fisher", "taylor-2019"])
def test_importances_are_the_same_in_either_layout(criterion: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = net().double()
    graph = secateurs.trace(model, torch.zeros(2, 3, 8, 8).double())
    data = [(inputs.double(), targets) for inputs, targets in batches()]
    seen = layouts(model, of_training=False)
    found = []
    for is_faster in (True, False):
        monkeypatch.setattr(ChannelsLast, "_is_faster", lambda _, on=is_faster: on)
        seen.clear()
        found.append(secateurs.score(model, graph, criterion, data=data, loss_fn=cross_entropy))
        assert seen[-1] is is_faster and (any(seen) is is_faster)
    for group in graph.groups:
        one, other = (each[group.name] for each in found)
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-12)
    assert all(parameter.is_contiguous() for parameter in model.parameters())


def test_accuracy_is_measured_channels_last_also_where_it_fails() -> None:
    model, data = net(), batches()
    seen = layouts(model, of_training=False)
    found = accuracy(model, data)
    assert all(seen) and found.count == 24
    with pytest.raises(IndexError):
        accuracy(model, [*data, (data[0][0], torch.full((8,), 7))])  # there are two classes
    assert all(parameter.is_contiguous() for parameter in model.parameters())


def test_a_model_that_looks_at_the_layout_is_measured_as_it_is() -> None:
    model, data = net(Viewing), batches()
    graph = secateurs.trace(model, data[0][0])
    assert accuracy(model, data).count == 24
    assert len(secateurs.score(model, graph, "taylor", data=data, loss_fn=cross_entropy)["conv"]) == 4


def test_a_validation_of_ones_own_finds_kernels_as_they_were() -> None:
    model = net()
    seen = layouts(model)
    places = [kernel.data_ptr() for kernel in _kernels(model)]
    vectors: list[Tensor] = []

    def validation(network: nn.Module) -> float:
        assert [kernel.data_ptr() for kernel in _kernels(network)] == places
        vectors.append(parameters_to_vector(network.parameters()).detach().clone())  # by `view`
        return float(len(vectors))

    finetune(model, batches(), validation, recipe=Recipe(epochs=3, lr=0.1))
    assert len(vectors) == 4 and not torch.equal(vectors[-1], vectors[-2])
    assert seen == [True] * 9
    assert torch.equal(vectors[-1], parameters_to_vector(model.parameters()))


@pytest.mark.parametrize("how", ["a view", "other processes"])
def test_memory_that_is_shared_stays_where_it_is(how: str) -> None:
    """A kernel that something else looks at: training it elsewhere would part the two."""
    model = net()
    kernel = _kernels(model)[0]
    if how == "a view":
        model.register_buffer("seen", kernel.data.view(-1))
    else:
        kernel.share_memory_()
    memory, before = kernel.data, kernel.detach().clone()
    finetune(model, batches(), recipe=Recipe(epochs=1, lr=0.1))
    assert not torch.equal(memory, before) and torch.equal(memory, kernel)


def test_kernels_come_back_to_the_memory_that_they_had() -> None:
    model = net()
    before = [(kernel.data_ptr(), kernel.data) for kernel in _kernels(model)]
    finetune(model, batches(), recipe=Recipe(epochs=1, lr=0.1))
    assert [(kernel.data_ptr()) for kernel in _kernels(model)] == [place for place, _ in before]
    assert all(map(torch.equal, _kernels(model), (memory for _, memory in before)))


def test_weights_made_in_inference_mode_are_measured_as_they_are() -> None:
    with torch.inference_mode():
        model = net()
    assert accuracy(model, batches()).count == 24


def test_a_compiled_model_stays_as_it_is() -> None:
    model = torch.compile(net(), backend="eager")
    with ChannelsLast(torch.device("cpu")) as layout:
        assert layout.choose(batches()[0][0], model) is None
        assert not layout.is_on


def _kernels(model: nn.Module) -> list[Tensor]:
    return [each.weight for each in model.modules() if isinstance(each, nn.Conv2d)]


def _as_read_from_a_file(state: State) -> State:
    return State(state.facts, {name: tensor.contiguous() for name, tensor in state.tensors.items()})
