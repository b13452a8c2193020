"""Models whose forward pass leaves tables for the next one, which then calls less."""

from __future__ import annotations

import functools
import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import secateurs
from secateurs.graph.attributes_kept import Attributes
from secateurs.recovery import repair


@functools.lru_cache(maxsize=1)
def ramp(batch: int, length: int) -> Tensor:
    return torch.linspace(-1, 1, length).mul(2).add(1).repeat(batch, 1)


def kept_inside(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """A decorator with a memo of its own, of one result for all objects of the class."""
    memo = functools.lru_cache(maxsize=1)(function)

    @functools.wraps(function)
    def call(*args: Any) -> Tensor:
        return memo(*args)

    return call


class Keeping(nn.Module):
    """Its first layer is followed by positions that are kept in one of several ways."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.way, self.first, self.second, self.last = (
            way,
            nn.Linear(5, 12),
            nn.Linear(12, 9),
            nn.Linear(9, 3),
        )
        self.tables: dict[int, Tensor] = {}
        self.register_buffer("table", torch.zeros(1), persistent=False)

    def positions(self, length: int) -> Tensor:
        return torch.linspace(-1, 1, length).mul(2).add(1)[:, None]

    @staticmethod
    @kept_inside
    def ramp(batch: int, length: int) -> Tensor:
        return torch.linspace(-1, 1, length).mul(2).add(1)[:, None].repeat(batch, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        length = x.shape[1]
        if self.way == "dictionary":
            if length not in self.tables:
                self.tables[length] = self.positions(length)
            added = self.tables[length]
        elif self.way == "buffer":
            if self.table.shape[0] != length:
                self.table = self.positions(length)
            added = self.table
        elif self.way == "attribute":
            if not hasattr(self, "made"):
                self.made = self.positions(length)
            added = self.made
        elif self.way == "memo":
            added = ramp(x.shape[0], length)[..., None]
        else:
            added = self.ramp(x.shape[0], length)
        return self.last((self.second((self.first(x) + added).relu()).relu() + added).relu())


WAYS = ["dictionary", "buffer", "attribute", "memo", "memo in a closure"]


def a_model(way: str) -> tuple[nn.Module, list[Tensor]]:
    ramp.cache_clear()
    torch.manual_seed(0)
    return Keeping(way).eval(), list(torch.randn(40, 7, 5).split((10, 10, 10, 9, 1)))


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("is_warm", [False, True])
@pytest.mark.parametrize("criterion", ["reconstruction", "mean-activation", "taylor"])
def test_every_pass_finds_what_the_trace_found(way: str, is_warm: bool, criterion: str) -> None:
    model, inputs = a_model(way)
    graph = secateurs.trace(model, inputs[0])
    if is_warm:
        model(inputs[0])
    before = Attributes(model)
    data = [(each, torch.zeros(len(each), 7, dtype=torch.long)) for each in inputs]

    def loss_fn(given: Tensor, wanted: Tensor) -> Tensor:
        return nn.functional.cross_entropy(given.flatten(0, 1), wanted.flatten())

    found = secateurs.score(model, graph, criterion, data=data, loss_fn=loss_fn)
    assert {*found} == {"first", "second"}
    assert not before.are_changed()


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("warm", [(), (0,), (1,), (0, 1)])
def test_both_networks_call_the_same_in_all_passes(way: str, warm: tuple[int, ...]) -> None:
    model, inputs = a_model(way)
    plan = secateurs.Plan.of(secateurs.trace(model, inputs[0]), {"first": [0, 1, 2], "second": [4]})
    small = secateurs.apply(model, plan)
    for each in warm:
        (model, small)[each](inputs[0])
    expected = secateurs.apply(model, plan)
    with torch.no_grad():
        wanted = torch.cat([model(each) for each in inputs])
        cut = (torch.cat([expected(each) for each in inputs]) - wanted).square().mean()
        done = repair(model, small, plan, inputs)
        given = torch.cat([small(each) for each in inputs])
    assert [layer.name for layer in done.layers] == ["second.weight", "last.weight"]
    assert float((given - wanted).square().mean()) < 0.5 * float(cut)
    last = done.layers[-1]
    spread = (wanted - wanted.mean((0, 1))).square().sum()
    assert float((given - wanted).square().sum() / spread) == pytest.approx(last.after, rel=1e-3)


def test_a_model_that_holds_the_one_above_it_is_not_kept_alive() -> None:
    class Below(nn.Module):
        def __init__(self, above: list[nn.Module]) -> None:
            super().__init__()
            self.above = above

    model, inputs = a_model("dictionary")
    model.below = Below([model])
    secateurs.trace(model, inputs[0])
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None
