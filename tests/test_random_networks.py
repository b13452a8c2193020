"""Networks drawn at random: whatever is put together, the cut is exact and its cost is forecast exactly.

Each network draws its operators and widths from a seed, keeps several branches alive and joins them by sums,
products and concatenations. All operators keep channels apart, so that equality is always expected.
"""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import secateurs
from secateurs import Plan
from secateurs.graph.labels import Labels

SIZE = 6


class RandomNet(nn.Module):
    """A program of operators on a list of live tensors, all of them `SIZE` pixels wide."""

    def __init__(self, seed: int, steps: int) -> None:
        super().__init__()
        self.draw = random.Random(seed)
        self.layers = nn.ModuleDict()
        self.program: list[tuple[str, tuple[int, ...], str]] = []
        self.widths = [3]
        self._conv(0, self.draw.choice([4, 6, 8, 12]))
        for _ in range(steps):
            getattr(self, f"_{self.draw.choice(STEPS)}")(self._any())
        used = {place for _, sources, _ in self.program for place in sources}
        self.live = [place for place in range(1, len(self.widths)) if place not in used]
        self.head = nn.Linear(sum(self.widths[place] for place in self.live), 4)

    def _any(self) -> int:
        return self.draw.randrange(max(1, len(self.widths) - 4), len(self.widths))

    def _add(self, what: str, sources: tuple[int, ...], width: int, layer: nn.Module | None = None) -> None:
        name = f"{what}{len(self.program)}"
        if layer is not None:
            self.layers[name] = layer
        self.program.append((what, sources, name))
        self.widths.append(width)

    # -- what can be drawn: each takes the place of a live tensor --------------------------------

    def _conv(self, x: int, width: int | None = None) -> None:
        width = width or self.draw.choice([2, 3, 4, 6, 8, 12])
        kernel = self.draw.choice([1, 3])
        bias = self.draw.random() < 0.5
        layer = nn.Conv2d(self.widths[x], width, kernel, padding=kernel // 2, bias=bias)
        self._add("layer", (x,), width, layer)

    def _grouped(self, x: int) -> None:
        divisors = [g for g in (2, 3, 4) if self.widths[x] % g == 0]
        if divisors:
            groups = self.draw.choice(divisors)
            width = groups * self.draw.choice([1, 2, 3])
            self._add("layer", (x,), width, nn.Conv2d(self.widths[x], width, 3, padding=1, groups=groups))

    def _depthwise(self, x: int) -> None:
        times = self.draw.choice([1, 1, 2])
        width = self.widths[x]
        self._add("layer", (x,), times * width, nn.Conv2d(width, times * width, 3, padding=1, groups=width))

    def _transposed(self, x: int) -> None:
        width = self.draw.choice([3, 4, 6])
        self._add("layer", (x,), width, nn.ConvTranspose2d(self.widths[x], width, 3, padding=1))

    def _norm(self, x: int) -> None:
        layer = nn.BatchNorm2d(self.widths[x])
        for tensor in (layer.weight.data, layer.bias.data, layer.running_mean, layer.running_var):
            tensor.uniform_(0.5, 1.5)
        self._add("layer", (x,), self.widths[x], layer)

    def _activation(self, x: int) -> None:
        choices = [nn.ReLU, nn.SiLU, nn.Hardswish, nn.Sigmoid, nn.Tanh, nn.ELU]
        self._add("layer", (x,), self.widths[x], self.draw.choice(choices)())

    def _slope(self, x: int) -> None:
        self._add("layer", (x,), self.widths[x], nn.PReLU(self.widths[x]))

    def _excite(self, x: int) -> None:
        width, inner = self.widths[x], self.draw.choice([2, 3])
        layer = nn.Sequential(
            nn.AdaptiveAvgPool2d(1),
            nn.Conv2d(width, inner, 1),
            nn.SiLU(),
            nn.Conv2d(inner, width, 1),
            nn.Sigmoid(),
        )
        self._add("gate", (x,), width, layer)

    def _join(self, x: int) -> None:
        other = self._any()
        self._add("cat", (x, other), self.widths[x] + self.widths[other])

    def _sum(self, x: int) -> None:
        others = [place for place in range(1, len(self.widths)) if self.widths[place] == self.widths[x]]
        self._add(
            self.draw.choice(["sum", "product", "maximum"]), (x, self.draw.choice(others)), self.widths[x]
        )

    def _residual(self, x: int) -> None:
        inner = self.draw.choice([2, 3, 5])
        width = self.widths[x]
        layer = nn.Sequential(nn.Conv2d(width, inner, 1), nn.ReLU(), nn.Conv2d(inner, width, 3, padding=1))
        self._add("residual", (x,), width, layer)

    def _again(self, x: int) -> None:
        known = [name for _, _, name in self.program if name in self.layers]
        name = self.draw.choice(known)
        layer = self.layers[name]
        if isinstance(layer, nn.Conv2d) and layer.in_channels == self.widths[x] and layer.groups == 1:
            self.program.append(("layer", (x,), name))
            self.widths.append(layer.out_channels)

    def _halves(self, x: int) -> None:
        if self.widths[x] % 2 == 0 and self.widths[x] > 2:
            self._add(self.draw.choice(["first half", "gated halves"]), (x,), self.widths[x] // 2)

    def _shuffle(self, x: int) -> None:
        if self.widths[x] % 2 == 0 and self.widths[x] > 2:
            self._add(self.draw.choice(["shuffle", "shuffle by views"]), (x,), self.widths[x])

    def _pool(self, x: int) -> None:
        self._add(self.draw.choice(["max pool", "average pool", "up and down"]), (x,), self.widths[x])

    def _pixels(self, x: int) -> None:
        if self.widths[x] % 4 == 0 and self.widths[x] > 4:
            self._add("pixel shuffle", (x,), self.widths[x] // 4)

    def _pad(self, x: int) -> None:
        self._add("pad", (x,), self.widths[x] + 3)

    def _flatten(self, x: int) -> None:
        width = self.draw.choice([2, 3])
        self._add("flatten", (x,), width, nn.Linear(self.widths[x] * SIZE * SIZE, width * SIZE * SIZE))

    def forward(self, x: Tensor) -> Tensor:
        values = [x]
        for what, sources, name in self.program:
            taken = [values[place] for place in sources]
            layer = self.layers[name] if name in self.layers else None  # noqa: SIM401 (ModuleDict has no get)
            values.append(OPERATORS[what](layer, *taken))
        return self.head(torch.cat([values[place].mean((2, 3)) for place in self.live], 1))


def _views(layer: None, x: Tensor) -> Tensor:
    batch, channels, height, width = x.shape
    return (
        x.view(batch, 2, channels // 2, height, width).transpose(1, 2).reshape(batch, channels, height, width)
    )


def _flat(layer: nn.Module, x: Tensor) -> Tensor:
    return layer(x.flatten(1)).view(x.shape[0], -1, SIZE, SIZE)


def _gated_halves(layer: None, x: Tensor) -> Tensor:
    a, b = x.chunk(2, 1)
    return a * b.sigmoid()


OPERATORS = {
    "layer": lambda layer, x: layer(x),
    "gate": lambda layer, x: x * layer(x),
    "residual": lambda layer, x: x + layer(x),
    "flatten": _flat,
    "cat": lambda layer, x, y: torch.cat([x, y], 1),
    "sum": lambda layer, x, y: x + y,
    "product": lambda layer, x, y: x * y,
    "maximum": lambda layer, x, y: torch.maximum(x, y),
    "first half": lambda layer, x: x.chunk(2, 1)[0],
    "gated halves": _gated_halves,
    "shuffle": lambda layer, x: F.channel_shuffle(x, 2),
    "shuffle by views": _views,
    "max pool": lambda layer, x: F.max_pool2d(x, 3, 1, 1),
    "average pool": lambda layer, x: F.avg_pool2d(x, 3, 1, 1),
    "up and down": lambda layer, x: F.adaptive_avg_pool2d(F.interpolate(x, scale_factor=2), SIZE),
    "pixel shuffle": lambda layer, x: F.pixel_shuffle(x, 2)[:, :, ::2, ::2],
    "pad": lambda layer, x: F.pad(x, (0, 0, 0, 0, 1, 2)),
}
STEPS = [
    "conv", "conv", "grouped", "depthwise", "transposed", "norm", "norm", "activation", "activation", "slope",
    "excite", "join", "sum", "sum",
    "residual", "again", "halves", "shuffle", "pool", "pixels", "pad", "flatten",
]  # fmt: skip


def check(seed: int, steps: int = 9) -> int:
    """Cut a random network in a random way, twice; the number of units that left."""
    torch.manual_seed(seed)
    model, left = RandomNet(seed, steps).eval(), 0
    generator = np.random.default_rng(seed)
    inputs = torch.randn(2, 3, SIZE, SIZE)
    for _ in range(2):
        graph = secateurs.trace(model, inputs)
        assert not graph.unknown
        assert not graph.mixers
        removed = {
            group.name: generator.permutation(group.size)[: generator.integers(0, group.size)].tolist()
            for group in graph.groups
            if generator.random() < 0.8
        }
        plan = Plan.of(graph, removed)
        small = secateurs.apply(model, plan)
        report = secateurs.verify(model, small, plan, inputs).raise_if_failed()
        assert report.exact_expected
        assert plan.after.params == sum(p.numel() for p in small.parameters())
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            small(inputs)
        assert plan.after.macs == counter.get_total_flops() // 4
        model, left = small, left + len(plan)
    model.train()(inputs).sum().backward()
    return left


@pytest.mark.parametrize("first", range(0, 60, 10))
def test_networks_drawn_at_random_are_cut_exactly(first: int) -> None:
    assert sum(check(seed) for seed in range(first, first + 10)) > 50


@pytest.mark.parametrize(
    ("seed", "steps"),
    [(2047, 9), (2261, 9), (2383, 9), (3297, 9), (30016, 20), (30120, 20), (30132, 20)],
)
def test_networks_whose_layouts_contradict_each_other(
    seed: int, steps: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls, expand = [], Labels._expand

    def counted(*arguments: Any) -> None:
        calls.append(1)
        if len(calls) > 100_000:
            raise RecursionError("too many calls")
        expand(*arguments)

    monkeypatch.setattr(Labels, "_expand", counted)
    check(seed, steps)
