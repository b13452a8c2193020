"""Momentum carried through a cut: training goes on as if the removed units had been silent."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn, optim
from torch.nn.functional import cross_entropy

import secateurs
from secateurs.errors import TrainingError
from secateurs.planning import Plan
from secateurs.recovery import carry_optimizer


class FlattenHead(nn.Module):
    """A convolution whose units are three columns each of the layer behind."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(2, 6, 1)
        self.fc = nn.Linear(18, 3)

    def forward(self, x: Tensor) -> Tensor:
        scores: Tensor = self.fc(self.conv(x).tanh().flatten(1))
        return scores


OPTIMIZERS: dict[str, Any] = {
    "sgd": lambda parameters: optim.SGD(parameters, lr=0.1, momentum=0.9, nesterov=True, weight_decay=0.01),
    "adamw": lambda parameters: optim.AdamW(parameters, lr=0.01, weight_decay=0.1, amsgrad=True),
    "rmsprop": lambda parameters: optim.RMSprop(parameters, lr=0.01, momentum=0.5),
}
INPUTS = torch.randn(20, 2, 3, generator=torch.Generator().manual_seed(0))
TARGETS = torch.arange(20) % 3
COLUMNS = [3, 4, 5, 12, 13, 14]  # of fc: what units 1 and 4 of the convolution give


def train(net: nn.Module, optimizer: optim.Optimizer, steps: int) -> None:
    for _ in range(steps):
        optimizer.zero_grad()
        cross_entropy(net(INPUTS), TARGETS).backward()
        optimizer.step()


def trained(name: str) -> tuple[Any, Any, Plan]:
    torch.manual_seed(0)
    net = FlattenHead()
    optimizer = OPTIMIZERS[name](net.parameters())
    train(net, optimizer, 4)
    return net, optimizer, Plan.of(secateurs.trace(net, INPUTS[:1]), {"conv": [1, 4]})


@pytest.mark.parametrize("inplace", [False, True], ids=["copy", "inplace"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_it_trains_on_as_if_the_removed_units_were_silent(name: str, inplace: bool) -> None:
    net, optimizer, cut = trained(name)
    whole = copy.deepcopy(net)
    full = OPTIMIZERS[name](whole.parameters())
    full.load_state_dict(copy.deepcopy(optimizer.state_dict()))

    def silence(_: nn.Module) -> None:
        with torch.no_grad():
            whole.fc.weight[:, COLUMNS] = 0

    silence(whole)
    small: Any = secateurs.apply(net, cut, inplace=inplace)
    carried = carry_optimizer(optimizer, net, small, cut)
    assert type(carried) is type(optimizer)
    for _ in range(5):
        train(whole, full, 1)
        silence(whole)
        train(small, carried, 1)
    kept = [column for column in range(18) if column not in COLUMNS]
    torch.testing.assert_close(small.fc.weight, whole.fc.weight[:, kept])
    torch.testing.assert_close(small.conv.weight, whole.conv.weight[[0, 2, 3, 5]])
    torch.testing.assert_close(small.fc.bias, whole.fc.bias)


def test_the_given_optimizer_is_as_it_was_and_shares_nothing() -> None:
    net, optimizer, cut = trained("sgd")
    before = copy.deepcopy(optimizer.state_dict())
    small = secateurs.apply(net, cut)
    train(small, carry_optimizer(optimizer, net, small, cut), 3)
    after = optimizer.state_dict()
    assert after["param_groups"] == before["param_groups"]
    for index, entries in before["state"].items():
        assert torch.equal(after["state"][index]["momentum_buffer"], entries["momentum_buffer"])


def test_groups_keep_their_settings_and_frozen_parameters_their_place() -> None:
    net, _, cut = trained("sgd")
    net.conv.bias.requires_grad_(False)
    groups = [{"params": [net.fc.weight], "lr": 0.5}, {"params": [net.conv.weight, net.conv.bias]}]
    small: Any = secateurs.apply(net, cut)
    carried = carry_optimizer(optim.SGD(groups, lr=0.1, momentum=0.9), net, small, cut)
    assert [group["lr"] for group in carried.param_groups] == [0.5, 0.1]
    assert carried.param_groups[0]["params"][0] is small.fc.weight
    assert carried.param_groups[1]["params"][1] is small.conv.bias


def test_what_cannot_be_carried_is_said() -> None:
    net, optimizer, cut = trained("sgd")
    small = secateurs.apply(net, cut)
    with pytest.raises(TrainingError, match=r"shape \(6, 2, 1\) that is none of the model's"):
        carry_optimizer(optimizer, FlattenHead(), small, cut)
    optimizer.state[net.conv.weight]["row_average"] = torch.zeros(6)
    with pytest.raises(
        TrainingError, match=r"'row_average' of 'conv.weight' has shape \(6,\), .* \(6, 2, 1\)"
    ):
        carry_optimizer(optimizer, net, small, cut)
