"""Repair in closed form: every kind of layer that reads what left, at the point where its outputs matter."""

from __future__ import annotations

import math
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils.parametrizations import weight_norm

import mixtures
import secateurs
from secateurs.errors import TrainingError, UnknownNameError
from secateurs.recovery import pairs, repair
from secateurs.recovery.both import Both
from secateurs.recovery.layout import lay_out
from test_streams import IMAGES, narrow
from toy import OwnNorm, conv


def ready(model: nn.Module, seed: int = 0) -> nn.Module:
    """Random weights, and batch norms whose statistics are no ones and zeros."""
    chance = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if tensor.is_floating_point():
                scale = 0.5 if tensor.dim() < 2 else 1 / math.sqrt(tensor[0].numel())
                tensor.copy_(torch.randn(tensor.shape, generator=chance) * scale)
                if name.endswith("running_var"):
                    tensor.abs_().add_(0.5)
    return model.eval()


def cut(model: nn.Module, inputs: Any, removed: dict[str, Any]) -> tuple[secateurs.Plan, nn.Module]:
    plan = secateurs.Plan.of(secateurs.trace(model, inputs), removed)
    return plan, secateurs.apply(model, plan)


def missed(model: nn.Module, small: nn.Module, inputs: Tensor) -> float:
    """Share of the variance of the outputs that the smaller model misses."""
    with torch.no_grad():
        wanted, given = model(inputs).double(), small(inputs).double()
    last = (
        isinstance(model, (Attention, FunctionalWeights, TransposedProduct, WideLetters)) or wanted.dim() == 2
    )
    channel = wanted.dim() - 1 if last else 1
    spread = wanted - wanted.mean([dim for dim in range(wanted.dim()) if dim != channel], keepdim=True)
    return float((wanted - given).square().sum() / spread.square().sum())


class Convolutions(nn.Module):
    """One convolution reads another, with whatever options; the last one's outputs are the model's."""

    def __init__(self, first: nn.Module, last: nn.Module) -> None:
        super().__init__()
        self.first, self.last = first, last

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.last(self.first(x).relu())
        return out


class FunctionalWeights(nn.Module):
    """Parameters without modules: a convolution, a product with a matrix, and a sum that is its bias."""

    def __init__(self) -> None:
        super().__init__()
        self.kernel = nn.Parameter(torch.randn(10, 3, 3, 3))
        self.matrix, self.offset = nn.Parameter(torch.randn(10, 4)), nn.Parameter(torch.randn(4))

    def forward(self, x: Tensor) -> Tensor:
        x = functional.conv2d(x, self.kernel).relu().movedim(1, -1)
        return x @ self.matrix + self.offset


class TransposedProduct(nn.Module):
    """The reader is a transposed view of its parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.weight = nn.Linear(5, 12), nn.Parameter(torch.randn(3, 12))

    def forward(self, x: Tensor) -> Tensor:
        return self.first(x).relu() @ self.weight.T


class NormedWeight(nn.Module):
    """The reader's weight is computed from the parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.weight = nn.Linear(5, 8), nn.Parameter(torch.randn(3, 8))
        self.bias = nn.Parameter(torch.randn(3))

    def forward(self, x: Tensor) -> Tensor:
        return functional.linear(self.first(x).relu(), functional.normalize(self.weight, dim=0), self.bias)


class Letters(nn.Module):
    """Products by einsum, whose letters lie anywhere."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(5, 12)
        self.one, self.two = nn.Parameter(torch.randn(12, 9)), nn.Parameter(torch.randn(6, 9))
        self.bias = nn.Parameter(torch.randn(6, 1))

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x).relu().transpose(1, 2)  # (N, 12, T)
        x = torch.einsum("nit, io -> not", x, self.one).relu()
        return torch.einsum("oi,nit->not", self.two, x) + self.bias


class WideLetters(nn.Module):
    """Products by einsum with weights of three dimensions: to heads, and from them."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(5, 12)
        self.one, self.two = nn.Parameter(torch.randn(12, 3, 4)), nn.Parameter(torch.randn(3, 4, 6))
        self.bias = nn.Parameter(torch.randn(6))

    def forward(self, x: Tensor) -> Tensor:
        x = torch.einsum("ntd,dhk->nhtk", self.first(x).relu(), self.one).relu()
        return torch.einsum("nhtk,hko->nto", [x, self.two]) + self.bias


class Attention(nn.Module):
    """Heads leave; the output projection reads them, behind it a residual sum."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(16, 4, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = x + self.attention(x, x, x, need_weights=False)[0]
        return out


class ResidualBlock(nn.Module):
    """A stream behind a stem that is cut too, a block, and a shortcut with weights: both meet in one sum."""

    def __init__(self, inplace: bool = False) -> None:
        super().__init__()
        self.stem, self.bn0 = conv(3, 8, bias=False), nn.BatchNorm2d(8)
        self.conv1, self.bn1 = conv(8, 12, bias=False), nn.BatchNorm2d(12)
        self.conv2, self.bn2 = conv(12, 6, bias=False), nn.BatchNorm2d(6)
        self.short, self.bn3 = conv(8, 6, 1, bias=False), nn.BatchNorm2d(6)
        self.inplace = inplace

    def forward(self, x: Tensor) -> Tensor:
        x = functional.relu(self.bn0(self.stem(x)), inplace=self.inplace)
        out: Tensor = functional.relu(self.bn1(self.conv1(x)), inplace=self.inplace)
        out = self.bn2(self.conv2(out))
        if self.inplace:
            out += self.bn3(self.short(x))
            return out
        return out + self.bn3(self.short(x))


class ChannelsLast(nn.Module):
    """As ConvNeXt's blocks: linear layers on channels last, turned back and scaled before the sum."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.deep = conv(3, 6), nn.Conv2d(6, 6, 3, padding=1, groups=6)
        self.up, self.down = nn.Linear(6, 12), nn.Linear(12, 6)
        self.gamma = nn.Parameter(torch.randn(6))

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        y = self.down(self.up(self.deep(x).permute(0, 2, 3, 1)).relu())
        return x + y.permute(0, 3, 1, 2) * self.gamma.view(-1, 1, 1)


class Windows(nn.Module):
    """As Swin's blocks: rows are shifted and put into windows of 4 x 5, computed with, and put back."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.up, self.down = conv(3, 6), nn.Linear(6, 12), nn.Linear(12, 6)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).permute(0, 2, 3, 1)  # (B, 8, 9, 6)
        shifted = functional.pad(torch.roll(x, (-2, -1), (1, 2)), (0, 0, 0, 1))
        windows = shifted.view(len(x), 2, 4, 2, 5, 6).transpose(2, 3).reshape(-1, 20, 6)
        y = self.down(self.up(windows).relu()).view(len(x), 2, 2, 4, 5, 6).transpose(2, 3)
        y = torch.roll(y.reshape(len(x), 8, 10, 6)[:, :, :9], (2, 1), (1, 2)).contiguous()
        return (x + y).permute(0, 3, 1, 2)


class Levels(nn.Module):
    """As a detector's head: one convolution reads maps of several sizes."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.head = conv(3, 12), conv(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        levels = (x.relu(), functional.avg_pool2d(x, 2).relu(), functional.max_pool2d(x, 4).relu())
        return torch.cat([self.head(level).flatten(2) for level in levels], 2)


IMAGE, ROWS = torch.Size((24, 3, 8, 9)), torch.Size((30, 5))
READERS: dict[str, tuple[Callable[[], nn.Module], torch.Size, dict[str, list[int]]]] = {
    "strided and dilated": (
        lambda: Convolutions(conv(3, 12), nn.Conv2d(12, 5, (3, 2), (2, 1), (1, 0), (1, 2))),
        IMAGE,
        {"first": [0, 3, 7, 8]},
    ),
    "grouped": (
        lambda: Convolutions(conv(3, 12), nn.Conv2d(12, 6, 3, groups=2)),
        IMAGE,
        {"first": [0, 1]},
    ),
    "transposed": (
        lambda: Convolutions(conv(3, 12), nn.ConvTranspose2d(12, 5, 3, 2, 1, 1)),
        IMAGE,
        {"first": [0, 3, 7, 8]},
    ),
    "one dimension": (
        lambda: Convolutions(nn.Conv1d(3, 12, 3), nn.Conv1d(12, 4, 3, padding=1)),
        torch.Size((24, 3, 20)),
        {"first": [1, 2, 3]},
    ),
    "three dimensions": (
        lambda: Convolutions(nn.Conv3d(3, 12, 2), nn.Conv3d(12, 4, 2)),
        torch.Size((8, 3, 5, 5, 5)),
        {"first": [1, 2, 3]},
    ),
    "linear": (lambda: Convolutions(nn.Linear(5, 12), nn.Linear(12, 3)), ROWS, {"first": [0, 5, 6]}),
    "reflected padding": (
        lambda: Convolutions(conv(3, 12), nn.Conv2d(12, 5, 3, padding=1, padding_mode="reflect")),
        IMAGE,
        {"first": [0, 3]},
    ),
    "no bias": (lambda: Convolutions(conv(3, 12), conv(12, 4, bias=False)), IMAGE, {"first": [0, 5, 6]}),
    "raw parameters": (FunctionalWeights, IMAGE, {"kernel": [2, 4]}),
    "transposed view": (TransposedProduct, ROWS, {"first": [2, 4, 5]}),
    "computed weight": (NormedWeight, ROWS, {"first": [2, 4, 5]}),
    "einsum of three dimensions": (WideLetters, torch.Size((30, 7, 5)), {"first": [2, 4], "one": [1]}),
    "einsum": (Letters, torch.Size((30, 7, 5)), {"first": [2, 4, 5], "one": [1, 8]}),
    "attention": (Attention, torch.Size((24, 7, 16)), {"attention.head": [1]}),
    "inside a block": (ResidualBlock, IMAGE, {"conv1": [0, 4, 5, 9]}),
    "a stream": (ResidualBlock, IMAGE, {"stem": [0, 4, 5]}),
    "channels last": (ChannelsLast, IMAGE, {"up": [0, 3, 7]}),
    "windows": (Windows, IMAGE, {"up": [0, 3, 7]}),
    "several calls": (Levels, IMAGE, {"stem": [0, 3, 7]}),
    "weight norm": (
        lambda: Convolutions(weight_norm(conv(3, 12)), weight_norm(conv(12, 5))),
        IMAGE,
        {"first.parametrizations.weight.original1": [0, 3, 7, 8]},
    ),
    "weight norm as a whole, transposed": (
        lambda: Convolutions(conv(3, 12), weight_norm(nn.ConvTranspose2d(12, 5, 2, 2), dim=None)),
        IMAGE,
        {"first": [0, 3, 7, 8]},
    ),
    "in place": (lambda: ResidualBlock(inplace=True), IMAGE, {"conv1": [0, 4], "stem": [1, 2]}),
}


def prepared(name: str) -> tuple[nn.Module, nn.Module, secateurs.Plan, Tensor]:
    if name == "linear stream":
        model, inputs = narrow(8), IMAGES[:24]
        plan, small = cut(model, inputs, {"narrow.0": [0, 3, 6]})
        return model, small, plan, inputs
    make, shape, removed = READERS["attention" if name == "dimensions of heads" else name]
    model, inputs = ready(make()), torch.randn(shape)
    if make is Attention:
        graph, kind = secateurs.trace(model, inputs), "head" if name == "attention" else "head_dim"
        removed = {next(group.name for group in graph.groups if group.kind == kind): [1]}
    plan, small = cut(model, inputs, removed)
    return model, small, plan, inputs


@pytest.mark.parametrize("name", READERS)
def test_what_a_layer_is_said_to_miss_is_what_it_misses(name: str) -> None:
    model, small, plan, inputs = prepared(name)
    plainly = missed(model, small, inputs)
    done = repair(model, small, plan, inputs.split(7), ridge=1e-8)
    last = done.layers[-1]
    assert not done.left and last.what == "weights"
    assert last.after is not None and last.before is not None
    assert missed(model, small, inputs) == pytest.approx(last.after, rel=1e-3, abs=1e-6)
    assert last.after < 0.9 * last.before
    if len(done.layers) == 1:
        assert plainly == pytest.approx(last.before, rel=1e-3)
    assert all(layer.after <= layer.before for layer in done.layers if layer.before and layer.after)


@pytest.mark.parametrize("name", READERS)
def test_a_constant_is_worth_less_than_weights_and_more_than_nothing(name: str) -> None:
    model, small, plan, inputs = prepared(name)
    done = repair(model, small, plan, inputs.split(7), how="compensate")
    if name in ("no bias", "transposed view"):
        assert list(done.left.values()) == ["nothing behind it can hold a constant"] and not done.layers
        return
    last = done.layers[-1]
    assert last.what == "constant" and last.after is not None and last.before is not None
    assert missed(model, small, inputs) == pytest.approx(last.after, rel=1e-3, abs=1e-6)
    assert last.after < last.before
    other = secateurs.apply(model, plan)
    repair(model, other, plan, inputs.split(7), ridge=1e-8)
    assert missed(model, other, inputs) < missed(model, small, inputs)


def test_the_weights_are_those_of_lstsq_on_stored_activations() -> None:
    model, small, plan, inputs = prepared("strided and dilated")
    repair(model, small, plan, [inputs[:10], inputs[10:]], ridge=1e-9)
    with torch.no_grad():
        kept = model.first(inputs).relu()[:, [1, 2, 4, 5, 6, 9, 10, 11]]  # type: ignore[operator]
        wanted = model(inputs).permute(0, 2, 3, 1).reshape(-1, 5).double()
    columns = functional.unfold(kept, (3, 2), dilation=(1, 2), padding=(1, 0), stride=(2, 1))
    rows = columns.permute(0, 2, 1).reshape(-1, 8 * 6).double()
    system = torch.cat([rows, torch.ones(len(rows), 1)], 1)
    best = torch.linalg.lstsq(system, wanted).solution
    torch.testing.assert_close(small.last.weight.flatten(1).double(), best[:-1].T, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(small.last.bias.double(), best[-1], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", ["channels last", "windows"])
def test_a_layer_behind_moves_makes_up_for_what_the_sum_lacks(name: str) -> None:
    model, _, plan, inputs = prepared(name)
    small = secateurs.apply(model, plan)
    with torch.no_grad():
        small.stem.weight *= 0.9  # type: ignore[operator]  # an error of the stream
        read: list[Tensor] = []
        handle = small.down.register_forward_pre_hook(lambda _, args: read.append(args[0]))  # type: ignore[union-attr]
        lacks = model(inputs) - small(inputs)
        handle.remove()
        rows = read[0]
        if name == "windows":  # back to the place of each pixel, by hand
            whole = rows.view(24, 2, 2, 4, 5, -1).permute(0, 1, 3, 2, 4, 5).reshape(24, 8, 10, -1)[:, :, :9]
            rows = whole[:, [(row - 2) % 8 for row in range(8)]][:, :, [(col - 1) % 9 for col in range(9)]]
    rows = rows.reshape(-1, rows.shape[-1]).double()
    wanted = lacks.permute(0, 2, 3, 1).reshape(-1, 6).double()
    system = torch.cat([rows, torch.ones(len(rows), 1)], 1)
    best = system @ torch.linalg.lstsq(system, wanted).solution
    done = repair(model, small, plan, inputs.split(7), ridge=1e-9)
    left = (model(inputs) - small(inputs)).permute(0, 2, 3, 1).reshape(-1, 6).double()
    torch.testing.assert_close(left, wanted - best, atol=2e-4, rtol=1e-3)
    assert [layer.name for layer in done.layers] == ["down.weight"]


@pytest.mark.parametrize("name", ["inside a block", "a stream", "in place"])
def test_a_fitted_norm_has_the_statistics_of_what_it_sees(name: str) -> None:
    model, small, plan, inputs = prepared(name)
    repair(model, small, plan, [inputs])
    seen: dict[str, Tensor] = {}
    for norm in ("bn1", "bn2", "bn3"):
        small.get_submodule(norm).register_forward_pre_hook(
            lambda _, args, norm=norm: seen.update({norm: args[0].detach().clone()})
        )
    evaluated = small(inputs)
    fitted = ["bn2"] if name == "inside a block" else ["bn1", "bn2", "bn3"]
    for norm in fitted:
        here = small.get_submodule(norm)
        torch.testing.assert_close(here.running_mean, seen[norm].mean((0, 2, 3)), atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(here.running_var, seen[norm].var((0, 2, 3)), atol=1e-4, rtol=1e-3)
        here.train()
    # a pass in training mode computes the same, but for Bessel's correction
    torch.testing.assert_close(small(inputs), evaluated, atol=5e-3, rtol=5e-3)


def test_errors_of_earlier_layers_are_made_up_for() -> None:
    model = ready(nn.Sequential(nn.Linear(5, 9), nn.ReLU(), nn.Linear(9, 9), nn.ReLU(), nn.Linear(9, 3)))
    inputs = torch.randn(60, 5)
    plan, small = cut(model, inputs, {"0": [0, 1, 2], "2": [3, 4]})
    repair(model, small, plan, [inputs], ridge=1e-9)
    with torch.no_grad():
        read = small[:4](inputs).double()  # as it is in the smaller network, after the first refit
        wanted = model(inputs).double()
    system = torch.cat([read, torch.ones(60, 1)], 1)
    best = torch.linalg.lstsq(system, wanted).solution
    torch.testing.assert_close(small[4].weight.double(), best[:-1].T, atol=1e-4, rtol=1e-4)


class Shrinking(nn.Module):
    """Large maps first, small ones later: a pass holds less and less."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third = conv(3, 8), conv(8, 8), conv(8, 8)
        self.last = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = nn.functional.max_pool2d(self.first(x).relu(), 4)
        x = nn.functional.max_pool2d(self.second(x).relu(), 4)
        return self.last(self.third(x).relu().mean((2, 3)))


def test_batches_without_room_join_later_and_find_the_weights_as_they_are_then() -> None:
    model, images = ready(Shrinking()), torch.randn(12, 3, 32, 32)
    plan, small = cut(model, images[:2], {"first": [0, 1], "second": [2, 3], "third": [4]})
    first_alone, all_at_once = secateurs.apply(model, plan), secateurs.apply(model, plan)
    held = lay_out(Both.of(model, small, images[:3]), plan, weights=True).held
    assert held[0] > 4 * held[-1]
    assert repair(model, small, plan, images.split(3), memory=held[0]).images == 12
    repair(model, first_alone, plan, [images[:3]])
    repair(model, all_at_once, plan, images.split(3))
    torch.testing.assert_close(small.second.weight, first_alone.second.weight)
    assert not torch.allclose(small.second.weight, all_at_once.second.weight, atol=1e-4)
    assert missed(model, small, images) < missed(model, first_alone, images)


def test_threads_that_wait_take_room_too(monkeypatch: pytest.MonkeyPatch) -> None:
    model, small, plan, inputs = prepared("linear")
    monkeypatch.setattr(pairs, "THREAD_BYTES", 1 << 20)
    assert repair(model, small, plan, inputs.split(1), memory=4 << 20).images == len(inputs)
    monkeypatch.setattr(pairs, "_FEW_PAIRS", 1)
    assert repair(model, small, plan, inputs.split(1), memory=8 << 20).images == 4


@pytest.mark.parametrize("name", ["in place", "attention", "several calls"])
def test_many_small_batches_are_one_large_one_and_few_threads(name: str) -> None:
    model, small, plan, _ = prepared(name)
    _, at_once, _, few = prepared(name)
    inputs = torch.cat([few, *(few + 0.1 * torch.randn_like(few) for _ in range(1 + 140 // len(few)))])[:140]
    threads = []

    def first_of_its_kind(*_: object) -> None:
        threads.append(threading.active_count())

    handle = model.register_forward_pre_hook(first_of_its_kind)
    before = threading.active_count()
    assert repair(model, small, plan, inputs.split(1)).images == 140
    handle.remove()
    assert max(threads) - before <= 2 * pairs._MOST_PAIRS
    assert repair(model, at_once, plan, [inputs]).images == 140
    for one, other in zip(small.state_dict().values(), at_once.state_dict().values(), strict=True):
        torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-4)


def test_batches_of_other_shapes_stay_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pairs, "_MOST_PAIRS", 2)
    model = ready(Shrinking())
    plan, small = cut(model, torch.randn(2, 3, 32, 32), {"first": [0, 1]})
    seen = []
    small.register_forward_pre_hook(lambda _, args: seen.append(tuple(args[0].shape[::2])))
    sizes = [32, 32, 32, 48, 48, 32]
    done = repair(model, small, plan, [torch.randn(3, 3, size, size) for size in sizes])
    assert done.images == 18
    assert sorted(seen[1:]) == [(3, 32), (6, 48), (9, 32)]  # the first call is the one that lays out


class Steps(nn.Module):
    """Reads sequences whose first dimension counts steps."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(5, 12), nn.Linear(12, 3)

    def forward(self, x: Tensor) -> Tensor:
        first = torch.relu(self.first(x))
        result: Tensor = self.last(first - first.mean(0))
        return result


def test_batches_of_steps_stay_apart() -> None:
    model, inputs = ready(Steps()), torch.randn(70, 6, 4, 5)
    plan, small = cut(model, inputs[0], {"first": [0, 5, 6]})
    shapes = []
    small.register_forward_pre_hook(lambda _, args: shapes.append(tuple(args[0].shape)))
    repair(model, small, plan, list(inputs))
    assert set(shapes) == {(6, 4, 5)}


def test_batches_that_go_together_leave_room_for_others() -> None:
    model, images = ready(Shrinking()), torch.randn(200, 3, 32, 32)
    plan, small = cut(model, images[:2], {"first": [0, 1], "second": [2, 3], "third": [4]})
    held = lay_out(Both.of(model, small, images[:1]), plan, weights=True).held
    memory = 40 * held[0]
    seen = []
    small.register_forward_pre_hook(lambda _, args: seen.append(len(args[0])))
    done = repair(model, small, plan, images.split(1), memory=memory)
    assert (done.images, sum(seen[1:])) == (200, 200)
    assert (
        seen[1:11] == [4] * 10
    )  # a tenth of the room each; the rest follows in larger ones, as it needs less
    assert done.peak_bytes < 1.3 * memory


def test_without_any_room_one_batch_is_read() -> None:
    model, waited, plan, inputs = prepared("attention")
    alone = secateurs.apply(model, plan)
    done = repair(model, waited, plan, inputs.split(5), memory=0)
    assert done.images == 5
    repair(model, alone, plan, [inputs[:5]])
    for one, other in zip(waited.state_dict().values(), alone.state_dict().values(), strict=True):
        torch.testing.assert_close(one, other)


def test_a_constant_unit_is_compensated_to_rounding() -> None:
    model = Convolutions(conv(3, 8), conv(8, 4, 1))
    with torch.no_grad():
        model.first.weight[[1, 5]] = 0
        model.first.bias[1], model.first.bias[5] = -1.0, 2.0  # dead, and stuck at 2
    inputs = torch.randn(IMAGE)
    plan, small = cut(model, inputs, {"first": [1, 5]})
    assert missed(model, small, inputs) > 1e-2
    repair(model, small, plan, [inputs], how="compensate")
    torch.testing.assert_close(small(inputs), model(inputs))


def test_at_padded_borders_a_constant_is_right_on_average() -> None:
    model = Convolutions(conv(3, 8), conv(8, 4))
    with torch.no_grad():
        model.first.weight[5] = 0
        model.first.bias[5] = 2.0
    inputs = torch.randn(IMAGE)
    plan, small = cut(model, inputs, {"first": [5]})
    repair(model, small, plan, [inputs], how="compensate")
    apart = model(inputs) - small(inputs)
    assert apart.abs().max() > 1e-2
    assert apart.mean((0, 2, 3)).abs().max() < 1e-5


def test_batch_norms_behind_the_cut_are_estimated_anew_and_no_others() -> None:
    model, small, plan, inputs = prepared("inside a block")
    before = {name: tensor.clone() for name, tensor in small.state_dict().items()}
    batches = inputs.split(8)
    done = repair(model, small, plan, batches, how="batch-norm")
    assert [layer.name for layer in done.layers] == ["bn2.running_mean"]
    changed = {name for name, tensor in small.state_dict().items() if not torch.equal(tensor, before[name])}
    assert changed == {"bn2.running_mean", "bn2.running_var"}
    with torch.no_grad():
        x = functional.relu(small.bn0(small.stem(inputs)))
        seen = small.conv2(functional.relu(small.bn1(small.conv1(x))))
    mean = torch.stack([part.mean((0, 2, 3)) for part in seen.split(8)]).mean(0)
    var = torch.stack([part.var((0, 2, 3)) for part in seen.split(8)]).mean(0)
    torch.testing.assert_close(small.bn2.running_mean, mean)
    torch.testing.assert_close(small.bn2.running_var, var)
    assert small.bn2.momentum == 0.1 and not any(module.training for module in small.modules())


@pytest.mark.parametrize("how", ["batch-norm", "compensate", "reconstruct"])
def test_hooks_of_the_user_run_and_make_no_difference(how: str) -> None:
    model, small, plan, inputs = prepared("inside a block")
    expected = secateurs.apply(model, plan)
    repair(model, expected, plan, [inputs], how=how)
    seen: list[Tensor] = []
    for network in (model, small):
        network.get_submodule("conv1").register_forward_hook(lambda _, x, out: seen.append(out.relu().sum()))
    done = repair(model, small, plan, [inputs], how=how)
    assert seen and done.layers
    assert all(map(torch.equal, expected.state_dict().values(), small.state_dict().values()))


def test_of_values_that_are_constant_no_more_than_all_is_missed() -> None:
    """One position has no variance, but for rounding."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3), nn.Tanh(), nn.Linear(3, 2)).eval()
    one = torch.randn(1, 4)
    graph = secateurs.trace(model, one)
    plan = secateurs.Plan.of(graph, {"0": [0, 3, 5]})
    small = secateurs.apply(model, plan)
    done = repair(model, small, plan, [one])
    shares = [(float(each.before or 0), float(each.after or 0)) for each in done.layers]
    assert shares[0][0] > 0.01 and all(0 <= after <= before <= 1 for before, after in shares)


def test_a_network_without_batch_norm_is_left_alone() -> None:
    model, small, plan, inputs = prepared("linear")
    before = [tensor.clone() for tensor in small.state_dict().values()]
    done = repair(model, small, plan, [inputs], how="batch-norm")
    assert done.layers == () and "0 layers" in str(done)
    assert all(map(torch.equal, before, small.state_dict().values()))


def variants() -> dict[str, Callable[[int], nn.Module]]:
    found: dict[str, Callable[[int], nn.Module]] = {
        "SyncBatchNorm": nn.SyncBatchNorm,
        "OwnNorm": OwnNorm,
        "OwnNorm by operator": partial(OwnNorm, by_operator=True),
    }
    try:
        from timm.layers import BatchNormAct2d
    except ImportError:
        return found
    return found | {"BatchNormAct2d": BatchNormAct2d}


@pytest.mark.parametrize("how", ["batch-norm", "reconstruct"])
@pytest.mark.parametrize("variant", variants())
def test_variants_of_batch_norm_are_batch_norms(variant: str, how: str) -> None:
    model = ready(nn.Sequential(conv(3, 8), nn.ReLU(), conv(8, 4, bias=False), variants()[variant](4)))
    inputs = torch.randn(IMAGE)
    plan, small = cut(model, inputs, {"0": [1, 2, 3]})
    done = repair(model, small, plan, [inputs], how=how)
    assert [layer.name for layer in done.layers] == ["3.running_mean" if how == "batch-norm" else "2.weight"]
    seen = small[:3](inputs)  # type: ignore[index]
    torch.testing.assert_close(small[3].running_mean, seen.mean((0, 2, 3)), atol=1e-4, rtol=1e-4)  # type: ignore[index]
    torch.testing.assert_close(small[3].running_var, seen.var((0, 2, 3)), atol=1e-4, rtol=1e-3)  # type: ignore[index]


@pytest.mark.parametrize("name", READERS)
def test_rows_that_are_kept_give_what_products_of_columns_give(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, by_rows, plan, inputs = prepared(name)
    by_products = secateurs.apply(model, plan)
    done = []
    for small, few in ((by_rows, True), (by_products, False)):
        monkeypatch.setattr("secateurs.recovery.fitting.are_few", lambda rows, columns, few=few: few)
        done.append(repair(model, small, plan, inputs.split(7), ridge=0.01))
    for one, other in zip(*(each.layers for each in done), strict=True):
        assert (one.name, one.what) == (other.name, other.what)
        assert (one.before, one.after) == pytest.approx((other.before, other.after), rel=1e-4, abs=1e-7)
    for one, other in zip(by_rows.state_dict().values(), by_products.state_dict().values(), strict=True):
        if name != "computed weight":  # whose columns may be of any length
            torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-4)


def test_layers_that_are_too_wide_together_are_fitted_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("secateurs.recovery.layout.WIDEST", 50)
    model, small, plan, inputs = prepared("in place")
    done = repair(model, small, plan, [inputs])
    assert not done.left
    assert [layer.what for layer in done.layers] == ["weights"] * 3


class FlattenedMaps(nn.Module):
    """A linear layer reads 9,216 values, more than there are images: 24 x 24 pixels of 16 channels."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.fc, self.last = conv(3, 16), nn.Linear(16 * 24 * 24, 32), nn.Linear(32, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.fc(self.first(x).relu().flatten(1)).relu())


def test_a_layer_behind_flattened_maps_is_fitted_for_images_that_it_has_not_seen() -> None:
    model = ready(FlattenedMaps())
    images = functional.interpolate(torch.randn(160, 3, 3, 3), size=24, mode="bilinear")
    seen, others = images[:80], images[80:]
    plan, small = cut(model, images[:2], {"first": [0, 3, 5, 6]})
    constants = secateurs.apply(model, plan)
    repair(model, constants, plan, seen.split(16), how="compensate")
    done = repair(model, small, plan, seen.split(16))
    assert (done.layers[0].name, done.layers[0].what) == ("fc.weight", "weights")
    assert not done.left and done.peak_bytes < 64 << 20  # the products of 6,912 columns would take 364 MiB
    assert missed(model, small, others) < 0.5 * missed(model, constants, others)
    with torch.no_grad():
        kept = [channel for channel in range(16) if channel not in (0, 3, 5, 6)]
        rows = model.first(seen).relu()[:, kept].flatten(1).double()
        old = secateurs.apply(model, plan).fc.weight.double()
        gap = model.fc(model.first(seen).relu().flatten(1)).double() - rows @ old.T - model.fc.bias
    centred = rows - rows.mean(0)
    ridge = 1e-3 * 16 * rows.shape[1] / 80
    pull = (ridge * centred.square().sum(0).mean()).sqrt()
    basis = torch.linalg.svd(centred, full_matrices=False).Vh  # nothing outside it is fitted
    system = torch.cat([centred @ basis.T, pull * torch.eye(len(basis))])
    best = torch.linalg.lstsq(system, torch.cat([gap - gap.mean(0), torch.zeros(len(basis), 32)])).solution
    torch.testing.assert_close(small.fc.weight.double(), old + best.T @ basis, atol=1e-6, rtol=1e-4)


class TwoCalls(nn.Module):
    """Two calls read with one weight; what becomes of their results is up to `join`."""

    def __init__(self, join: str) -> None:
        super().__init__()
        self.first, self.one, self.join = nn.Linear(5, 8), nn.Linear(8, 8), join
        self.gains = nn.ParameterList([torch.randn(8), torch.randn(8)])
        self.norms = nn.ModuleList([nn.BatchNorm1d(8), nn.BatchNorm1d(8)])

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.first(x)
        ways = [hidden.relu(), hidden.sigmoid()]
        if self.join == "scaled":
            return torch.cat([self.one(way) * gain for way, gain in zip(ways, self.gains, strict=True)], 1)
        if self.join == "normed":
            return torch.cat([norm(self.one(way)) for way, norm in zip(ways, self.norms, strict=True)], 1)
        return self.one(ways[0]) + self.one(ways[1])


@pytest.mark.parametrize("join", ["scaled", "normed", "sum"])
@pytest.mark.parametrize("count", [30, 4], ids=["sums", "rows"])
def test_a_weight_of_several_calls_is_that_of_lstsq_on_what_all_of_them_read(join: str, count: int) -> None:
    model, inputs = ready(TwoCalls(join)), torch.randn(count, 5)
    plan, small = cut(model, inputs, {"first": [1, 4, 5]})
    done = repair(model, small, plan, inputs.split(3), ridge=1e-9)
    assert [layer.name for layer in done.layers] == ["one.weight"] and not done.left
    with torch.no_grad():
        hidden = model.first(inputs).double()  # type: ignore[operator]
        whole = torch.cat([hidden.relu(), hidden.sigmoid()])
        wanted = functional.linear(whole, model.one.weight.double(), model.one.bias.double())  # type: ignore[union-attr, arg-type, operator]
        system = torch.cat([whole[:, [0, 2, 3, 6, 7]], torch.ones(len(whole), 1)], 1)
    best = torch.linalg.lstsq(system, wanted)
    given = torch.cat([small.one.weight.T, small.one.bias[None]]).double()
    torch.testing.assert_close(system @ given, system @ best.solution, atol=1e-4, rtol=1e-4)


def test_levels_of_a_head_are_right_where_what_left_is_in_what_stays() -> None:
    """Layer after layer of a shared head, each read at two scales before the next; behind different gains."""

    class Heads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.one, self.two = conv(3, 8), conv(8, 10), conv(10, 4, bias=False)
            self.scales = nn.ParameterList([torch.ones(1), torch.ones(1)])

        def forward(self, x: Tensor) -> tuple[Tensor, ...]:
            x = self.stem(x)
            levels = zip((x, functional.avg_pool2d(x, 2)), self.scales, strict=True)
            return tuple(self.two(self.one(level.relu()).relu()) * scale for level, scale in levels)

    model, inputs = ready(Heads()), torch.randn(24, 3, 8, 8)
    for layer in (model.stem, model.one):  # each unit of the first half has a double
        half = len(layer.weight) // 2
        layer.weight.data[half:], layer.bias.data[half:] = layer.weight[:half], layer.bias[:half]
    plan, small = cut(model, inputs, {"stem": [0, 1, 2, 3], "one": [0, 1, 2, 3, 4]})
    done = repair(model, small, plan, inputs.split(5), ridge=1e-10)
    assert [layer.name for layer in done.layers] == ["one.weight", "two.weight"]
    with torch.no_grad():
        for one, other in zip(model(inputs), small(inputs), strict=True):
            torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-4)


class InARow(nn.Module):
    """A layer that reads what it gave, as in a recurrence."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.one, self.out = nn.Linear(5, 8), nn.Linear(8, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.one(self.one(self.first(x).relu()).relu()))


def test_a_layer_in_a_loop_is_fitted_on_what_the_original_reads() -> None:
    model, inputs = ready(InARow()), torch.randn(40, 5)
    plan, small = cut(model, inputs, {"first": [0, 1]})
    done = repair(model, small, plan, inputs.split(9), ridge=1e-10)
    assert [layer.name for layer in done.layers] == ["one.weight", "out.weight"] and not done.left
    kept = list(range(2, 8))
    with torch.no_grad():
        first = model.first(inputs).relu()  # type: ignore[operator]
        second = model.one(first)  # type: ignore[operator]
        read = torch.cat([first, second.relu()]).double()
        wanted = torch.cat([second, model.one(second.relu())]).double()[:, kept]  # type: ignore[operator]
    system = torch.cat([read[:, kept], torch.ones(len(read), 1)], 1)
    best = torch.linalg.lstsq(system, wanted).solution
    torch.testing.assert_close(small.one.weight.double(), best[:-1].T, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(small.one.bias.double(), best[-1], atol=1e-4, rtol=1e-4)


def test_the_original_and_random_numbers_are_left_as_they_were() -> None:
    model, small, plan, inputs = prepared("in place")
    whole = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model.train(), small.bn1.train()
    state = torch.get_rng_state()
    repair(model, small, plan, [(inputs, torch.zeros(24))])
    assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(tensor, whole[name]) for name, tensor in model.state_dict().items())
    assert all(module.training for module in model.modules())
    assert [name for name, module in small.named_modules() if module.training] == ["bn1"]


def test_a_failed_repair_leaves_the_smaller_network_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    model, small, plan, inputs = prepared("in place")
    before = {name: tensor.clone() for name, tensor in small.state_dict().items()}

    def fail(*_: Any) -> None:  # called once the first layers are fitted
        assert not torch.equal(small.conv1.weight, before["conv1.weight"])
        raise RuntimeError("no more")

    monkeypatch.setattr(pairs, "correct", fail)
    with pytest.raises(RuntimeError, match="no more"):
        repair(model, small, plan, inputs.split(6))
    assert all(torch.equal(tensor, before[name]) for name, tensor in small.state_dict().items())
    assert threading.active_count() == 1  # the passes that waited are gone


class TwoInputs(nn.Module):
    """One input is scaled by the other."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(5, 9), nn.Linear(9, 2)

    def forward(self, x: Tensor, scale: Tensor) -> Tensor:
        return self.last(self.first(x).relu() * scale)


def test_several_inputs_stand_in_a_tuple_of_their_own() -> None:
    model, inputs = ready(TwoInputs()), (torch.randn(40, 5), torch.rand(40, 1))
    plan, small = cut(model, inputs, {"first": [0, 1, 2, 3]})
    with pytest.raises(TrainingError, match=r"TwoInputs could not be called on a batch: .*'scale'"):
        repair(model, small, plan, [inputs])  # the second is taken for targets
    before = (model(*inputs) - small(*inputs)).square().mean()
    assert repair(model, small, plan, [(inputs, None)]).images == 40
    assert (model(*inputs) - small(*inputs)).square().mean() < before


def test_few_positions_are_not_followed_by_chance() -> None:
    model = ready(Convolutions(nn.Linear(5, 200), nn.Linear(200, 3)))
    inputs, others = torch.randn(30, 5), torch.randn(500, 5)
    plan, small = cut(model, inputs, {"first": list(range(100))})
    plainly = missed(model, small, others)
    repair(model, small, plan, [inputs])
    assert missed(model, small, inputs) < 0.1 * plainly
    assert missed(model, small, others) < 0.5 * plainly


def test_a_classifier_does_not_learn_few_images_by_heart() -> None:
    """The ridge that is chosen leaves more of other images right than the least one."""
    model = ready(Convolutions(nn.Linear(20, 300), nn.Linear(300, 50)))
    chance = torch.Generator().manual_seed(1)
    inputs, others = (torch.randn(count, 20, generator=chance) for count in (200, 1000))
    plan, small = cut(model, inputs, {"first": list(range(20))})
    plainly, given = secateurs.apply(model, plan), secateurs.apply(model, plan)
    repair(model, small, plan, inputs.split(50))
    repair(model, given, plan, inputs.split(50), ridge=1e-3)
    left = [missed(model, each, others) for each in (small, given, plainly)]
    assert left[0] < 0.9 * left[1] and left[0] < left[2]


def test_what_is_refused() -> None:
    model, small, plan, inputs = prepared("linear")
    with pytest.raises(TrainingError, match="gave no batch"):
        repair(model, small, plan, [])
    with pytest.raises(TrainingError, match="`0 < ridge` must hold, got ridge=0"):
        repair(model, small, plan, [inputs], ridge=0)
    with pytest.raises(
        UnknownNameError, match="unknown way to repair 'reconstuct'; did you mean 'reconstruct'"
    ):
        repair(model, small, plan, [inputs], how="reconstuct")
    with pytest.raises(TrainingError, match="calls other functions"):
        repair(nn.Sequential(nn.Linear(5, 2)), small, plan, [inputs])
    with pytest.raises(RuntimeError):
        repair(model, small, plan, [inputs, inputs[:, :2]])
    assert repair(model, small, plan, [], how="none").layers == ()


TWO_PROCESSES = """
import sys
from accelerate import Accelerator
from safetensors.torch import save_file
from test_repair import SHARED, UNEQUAL, prepared, repair
import torch

torch.manual_seed(0)
model, small, plan, inputs = SHARED[sys.argv[2]]() if sys.argv[2] in SHARED else prepared(sys.argv[2])
here = Accelerator()
own = list(inputs.split(UNEQUAL))[here.process_index :: here.num_processes]
done = repair(model, small, plan, own, how=sys.argv[1], accelerator=here)
assert (here.num_processes, done.images) == (2, 24)
save_file(small.state_dict(), f"result-{here.process_index}.safetensors")
"""


UNEQUAL = [6, 6, 6, 4, 2]  # images in a batch, dealt out to two processes


def wide() -> tuple[nn.Module, nn.Module, secateurs.Plan, Tensor]:
    """A layer that reads more values than there are images, so that their rows are kept."""
    torch.manual_seed(0)
    model, inputs = ready(Convolutions(nn.Linear(5, 200), nn.Linear(200, 3))), torch.randn(24, 5)
    plan, small = cut(model, inputs, {"first": list(range(100))})
    return model, small, plan, inputs


def mixture() -> tuple[nn.Module, nn.Module, secateurs.Plan, Tensor]:
    """Experts, of which some batches leave some out."""
    torch.manual_seed(0)
    model, inputs = mixtures.net("skipped", best=3), torch.randn(24, 8)
    plan, small = cut(model, inputs, {"first.experts.1.0": list(range(12)), "stem.0": list(range(16))})
    return model, small, plan, inputs


SHARED = {"wide": wide, "mixture": mixture}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("how", "case"),
    [
        ("batch-norm", "in place"),
        ("compensate", "in place"),
        ("reconstruct", "in place"),
        ("reconstruct", "wide"),
        ("reconstruct", "mixture"),
        ("reconstruct", "several calls"),
        ("reconstruct", "dimensions of heads"),
        ("reconstruct", "linear stream"),
    ],
)
def test_two_processes_end_as_one(tmp_path: Path, how: str, case: str) -> None:
    model, alone, plan, inputs = SHARED[case]() if case in SHARED else prepared(case)
    repair(model, alone, plan, inputs.split(UNEQUAL), how=how)
    script = tmp_path / "heal.py"
    script.write_text(TWO_PROCESSES)
    places = [str(Path(secateurs.__file__).parents[1]), str(Path(__file__).parent)]
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(places),
        "ACCELERATE_USE_CPU": "1",
        "OMP_NUM_THREADS": "1",
    }
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    subprocess.run(
        [*launch, str(script), how, case], env=environment, cwd=tmp_path, capture_output=True, check=True
    )
    first, second = (load_file(path) for path in sorted(tmp_path.glob("result-*")))
    for name, tensor in alone.state_dict().items():
        assert torch.equal(first[name], second[name])
        torch.testing.assert_close(first[name], tensor, atol=1e-4, rtol=1e-4)
