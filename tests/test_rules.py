"""One table: operator families x promises.

Every case is a producer, the operator, a consumer, and goes through the public kit: each group is cut at half
and at odd places, and the result must compute what the original does with the units silenced. Where the
operator keeps channels apart, what a unit takes with it is found a second time by nudging its filters.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import models
import more_models
import secateurs
from models import TOYS, build
from secateurs import Graph, Plan
from secateurs.testing import Between, Sandwich, check_rule, cuts
from toy import Toy

SHAPES = {"vector": (3, 4), "sequence": (3, 4, 10), "image": (3, 4, 8, 8), "volume": (2, 4, 4, 4, 4)}


def _half(x: Tensor, part: int, parts: int = 2) -> Tensor:
    return x.chunk(parts, 1)[part]


def _inplace(x: Tensor) -> Tensor:
    y = x * 1.0
    y += x
    y.mul_(0.5).clamp_(-1, 1)
    y[:, :, 1:3] = 0
    return y


def _shuffle(x: Tensor) -> Tensor:
    batch, _, height, width = x.shape
    return x.view(batch, 3, -1, height, width).transpose(1, 2).flatten(1, 2)


def _pool_both(x: Tensor) -> Tensor:
    return torch.cat([F.adaptive_avg_pool2d(x, 2), F.adaptive_max_pool2d(x, 2)], 1)


# name -> (operator or module, form of the example); each must leave at least one group that can be cut
PER_CHANNEL: dict[str, tuple[Between, str]] = {
    "relu": (F.relu, "image"),
    "relu_": (lambda x: F.relu_(x + 0), "image"),
    "sigmoid product": (lambda x: x * torch.sigmoid(x), "image"),
    "gelu, silu, mish": (lambda x: F.gelu(x) + F.silu(x) - F.mish(x), "vector"),
    "elu, selu, softplus": (lambda x: F.elu(x) + F.selu(x) * F.softplus(x), "image"),
    "hard functions": (lambda x: F.hardswish(x) + F.hardsigmoid(x) + F.hardtanh(x) + F.relu6(x), "image"),
    "leaky relu, threshold": (lambda x: F.leaky_relu(x, 0.1) + F.threshold(x, 0.2, 1.0), "image"),
    "clamp, abs, exp": (lambda x: x.clamp(-0.3, 0.3) + x.abs().exp(), "image"),
    "where": (lambda x: torch.where(x > 0, x, -2 * x), "image"),
    "masked fill": (lambda x: x.masked_fill(x < 0, 0.25), "image"),
    "maximum": (lambda x: torch.maximum(x, x.flip(-1)), "image"),
    "in place, index put": (_inplace, "image"),
    "dropout in eval": (nn.Dropout(0.5), "image"),
    "dropout2d in eval": (nn.Dropout2d(0.5), "image"),
    "prelu": (nn.PReLU(12), "image"),
    "batch norm 1d": (nn.BatchNorm1d(12), "vector"),
    "batch norm 1d of sequences": (nn.BatchNorm1d(12), "sequence"),
    "batch norm 2d": (nn.BatchNorm2d(12), "image"),
    "batch norm without affine": (nn.BatchNorm2d(12, affine=False), "image"),
    "batch norm without statistics": (nn.BatchNorm2d(12, track_running_stats=False), "image"),
    "batch norm 3d": (nn.BatchNorm3d(12), "volume"),
    "instance norm": (nn.InstanceNorm2d(12, affine=True), "image"),
    "max pool": (nn.MaxPool2d(2), "image"),
    "max pool 1d": (nn.MaxPool1d(2), "sequence"),
    "max pool 3d": (nn.MaxPool3d(2), "volume"),
    "max pool with indices": (lambda x: F.max_pool2d(x, 3, 1, return_indices=True)[0], "image"),
    "average pool": (nn.AvgPool2d(3, 2, 1), "image"),
    "average pool 1d": (nn.AvgPool1d(2), "sequence"),
    "adaptive pools": (_pool_both, "image"),
    "adaptive pool 3d": (nn.AdaptiveAvgPool3d(1), "volume"),
    "lp pool": (nn.LPPool2d(2, 2), "image"),
    "mean over space": (lambda x: x.mean((2, 3)), "image"),
    "sum and amax over space": (lambda x: x.sum((2, 3)) + x.amax((2, 3)), "image"),
    "std over space": (lambda x: x.flatten(2).std(2), "image"),
    "max over one axis": (lambda x: x.max(3).values.max(2)[0], "image"),
    "logsumexp over space": (lambda x: x.logsumexp((2, 3)), "image"),
    "norm over space": (lambda x: torch.linalg.vector_norm(x, dim=(2, 3)), "image"),
    "softmax over space": (lambda x: x.flatten(2).softmax(2), "image"),
    "nearest": (nn.Upsample(scale_factor=2), "image"),
    "bilinear": (nn.Upsample(scale_factor=2, mode="bilinear"), "image"),
    "bicubic": (lambda x: F.interpolate(x, size=(5, 7), mode="bicubic"), "image"),
    "area": (lambda x: F.interpolate(x, size=(4, 4), mode="area"), "image"),
    "linear in one dimension": (nn.Upsample(scale_factor=2, mode="linear"), "sequence"),
    "trilinear": (nn.Upsample(scale_factor=2, mode="trilinear"), "volume"),
    "zero pad": (nn.ZeroPad2d((1, 2, 0, 1)), "image"),
    "reflect pad": (nn.ReflectionPad2d(1), "image"),
    "replicate pad": (lambda x: F.pad(x, (1, 1, 2, 0), mode="replicate"), "image"),
    "circular pad": (lambda x: F.pad(x, (1, 1, 1, 1), mode="circular"), "image"),
    "pad of channels": (lambda x: F.pad(x, (0, 0, 0, 0, 2, 3)), "image"),
    "flatten": (nn.Flatten(), "image"),
    "flatten and back": (lambda x: x.flatten(2).unflatten(2, (8, 8)), "image"),
    "permute": (lambda x: x.permute(2, 3, 0, 1).contiguous().permute(2, 3, 0, 1), "image"),
    "transpose": (lambda x: x.transpose(1, 2).relu().transpose(2, 1), "sequence"),
    "squeeze": (lambda x: x.mean((2, 3), keepdim=True).squeeze(3).squeeze(2), "image"),
    "unsqueeze and expand": (lambda x: x[..., None].expand(-1, -1, 3), "vector"),
    "repeat": (lambda x: x[:, :, None].repeat(1, 1, 4), "vector"),
    "repeat of channels": (lambda x: x.repeat(1, 3, 1, 1), "image"),
    "channel shuffle by views": (_shuffle, "image"),
    "channel shuffle": (nn.ChannelShuffle(3), "image"),
    "pixel shuffle": (nn.PixelShuffle(2), "image"),
    "pixel unshuffle": (nn.PixelUnshuffle(2), "image"),
    "chunk, one half": (lambda x: _half(x, 0) + 0, "image"),
    "chunk, product": (lambda x: _half(x, 0) * _half(x, 1).sigmoid(), "image"),
    "chunk in three": (lambda x: _half(x, 0, 3) + _half(x, 2, 3), "image"),
    "split and join": (lambda x: torch.cat(x.split([5, 7], 1)[::-1], 1), "image"),
    "slice of space": (lambda x: x[:, :, 1:7:2, ::2], "image"),
    "slice of channels": (lambda x: x[:, :6] - x[:, 6:], "image"),
    "join with itself": (lambda x: torch.cat([x, -x], 1), "image"),
    "stack and sum": (lambda x: torch.stack([x, x.relu()]).sum(0), "image"),
    "stack as a new axis": (lambda x: torch.stack([x, x.relu()], -1).flatten(2), "image"),
    "flip of space": (lambda x: x.flip(2, 3), "image"),
    "roll of space": (lambda x: x.roll((1, 2), (2, 3)), "image"),
    "unfold of space": (lambda x: x.unfold(2, 2, 2).flatten(3).mean(3), "image"),
    "grouped convolution": (nn.Conv2d(12, 9, 3, groups=3, padding=1), "image"),
    "depthwise convolution": (nn.Conv2d(12, 12, 3, groups=12), "image"),
    "depthwise with multiplier": (nn.Conv2d(12, 24, 3, groups=12), "image"),
    "dilated, strided convolution": (nn.Conv2d(12, 8, 3, stride=2, dilation=2, padding=2), "image"),
    "padding of another kind": (nn.Conv2d(12, 8, 3, padding=1, padding_mode="reflect"), "image"),
    "transposed convolution": (nn.ConvTranspose2d(12, 8, 3, stride=2, output_padding=1), "image"),
    "grouped transposed convolution": (nn.ConvTranspose2d(12, 6, 2, groups=3), "image"),
    "depthwise transposed convolution": (nn.ConvTranspose2d(12, 12, 2, groups=12), "image"),
    "transposed convolution 1d": (nn.ConvTranspose1d(12, 6, 3), "sequence"),
    "convolution 1d": (nn.Conv1d(12, 8, 3), "sequence"),
    "convolution 3d": (nn.Conv3d(12, 8, 2), "volume"),
    "linear": (nn.Sequential(nn.Linear(12, 9), nn.ReLU()), "vector"),
    "linear on the last axis": (nn.Linear(10, 10), "sequence"),
    "linear over channels last": (lambda x: x.mT.mT, "sequence"),
    "gather of features": (lambda x: x[:, torch.arange(12)] + 0, "vector"),
    "batched product": (lambda x: torch.einsum("bct,bdt->bcd", x, torch.ones(x.shape[0], 6, 10)), "sequence"),
}
LOCKS_ALL = {  # what can become of all units, and why
    "local response norm": "a window slides along it",
    "gather of features": "indexed by a tensor",
    "split and join": "aten.split_with_sizes.default",
    "slice of channels": "ends at the fixed place 6",
}


def cases(table: dict[str, Any]) -> list[Any]:
    return [pytest.param(name, id=name.replace(" ", "-")) for name in table]


def sandwich(name: str, table: dict[str, tuple[Between, str]]) -> tuple[Sandwich, Tensor]:
    between, form = table[name]
    torch.manual_seed(3)
    example = torch.randn(SHAPES[form])
    model = Sandwich(between, example).eval()
    for module in model.modules():
        if getattr(module, "running_var", None) is not None:
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2)
    return model, example


def check(model: nn.Module, inputs: Any, removed: dict[str, list[int]], graph: Graph) -> nn.Module:
    """Cut, prove, and see that a gradient reaches all that is left."""
    plan = Plan.of(graph, removed)
    small = secateurs.apply(model, plan)
    report = secateurs.verify(model, small, plan, inputs).raise_if_failed()
    assert report.exact_expected
    assert report.max_error <= 1e-9 * max(report.scale, 1)
    assert report.way == ("gathered" if report.mixed else "silenced")
    shapes = {name: tuple(p.shape) for name, p in small.named_parameters()}
    assert shapes != {name: tuple(p.shape) for name, p in model.named_parameters()}
    return small


@pytest.mark.parametrize("name", cases(PER_CHANNEL))
def test_an_operator_that_keeps_channels_apart_is_cut_exactly(name: str) -> None:
    between, form = PER_CHANNEL[name]
    if name in LOCKS_ALL:
        with pytest.raises(AssertionError, match=LOCKS_ALL[name]):
            check_rule(between, torch.randn(SHAPES[form]))
    else:
        check_rule(between, torch.randn(SHAPES[form]))


def _attend(x: Tensor) -> Tensor:
    weights = (x.mT @ x).softmax(-1)
    return x @ weights


MIXING: dict[str, tuple[Between, str]] = {
    "softmax over channels": (lambda x: x.softmax(1), "image"),
    "log softmax over channels": (lambda x: x.log_softmax(1), "vector"),
    "layer norm": (nn.LayerNorm(12), "vector"),
    "layer norm without affine": (nn.LayerNorm(12, elementwise_affine=False), "vector"),
    "layer norm over everything": (nn.LayerNorm((12, 8, 8)), "image"),
    "rms norm": (nn.RMSNorm(12), "vector"),
    "group norm": (nn.GroupNorm(3, 12), "image"),
    "one group norm": (nn.GroupNorm(1, 12), "image"),
    "mean over channels": (lambda x: x - x.mean(1, keepdim=True), "image"),
    "unit length": (lambda x: F.normalize(x, dim=1), "image"),
    "extreme over channels": (lambda x: x / (1 + x.amax(1, keepdim=True).abs()), "image"),
    "local response norm": (nn.LocalResponseNorm(3), "image"),
    "cumulative sum": (lambda x: x.cumsum(1), "image"),
    "attention over positions": (_attend, "sequence"),
}


EXACT_THOUGH_MIXED = {"attention over positions"}


@pytest.mark.parametrize("name", cases(MIXING))
def test_an_operator_that_mixes_channels_still_runs_when_cut_and_says_so(name: str) -> None:
    between, form = MIXING[name]
    if name in LOCKS_ALL:
        with pytest.raises(AssertionError, match=LOCKS_ALL[name]):
            check_rule(between, torch.randn(SHAPES[form]), exact=False)
    else:
        check_rule(between, torch.randn(SHAPES[form]), exact=name in EXACT_THOUGH_MIXED)


@pytest.mark.parametrize("name", ["group norm", "batch norm 2d", "layer norm", "softmax over channels"])
def test_a_mixing_operator_is_what_one_gets_from_the_kept_channels(name: str) -> None:
    """The second way: compute the operator on the kept filters alone, by hand."""
    table = MIXING if name in MIXING else PER_CHANNEL
    model, example = sandwich(name, table)
    graph = secateurs.trace(model, example)
    group = graph.groups[0]
    plan = Plan.of(graph, {group.name: [0]})
    small = secateurs.apply(model, plan)
    kept = np.delete(
        np.arange(12), next(axis for axis in plan.axes if axis.parameter == "make.weight").removed
    )
    with torch.no_grad():
        made = model.make(example)[:, kept]
        inside = {
            "group norm": lambda: (
                F.group_norm(made, 2, model.between.weight[kept], model.between.bias[kept])
                if group.size == 3
                else F.group_norm(made, 3, model.between.weight[kept], model.between.bias[kept])
            ),
            "batch norm 2d": lambda: model.between(model.make(example))[:, kept],
            "layer norm": lambda: F.layer_norm(
                made, (11,), model.between.weight[kept], model.between.bias[kept]
            ),
            "softmax over channels": lambda: made.softmax(1),
        }[name]()
        weight = model.read.weight[:, kept]
        by_hand = (
            F.linear(inside, weight, model.read.bias)
            if made.dim() == 2
            else F.conv2d(inside, weight, model.read.bias)
        )
        assert torch.allclose(small(example), by_hand, atol=1e-6)


@pytest.mark.parametrize("toy", TOYS)
def test_every_toy_is_cut_exactly_wherever_one_cuts(toy: type[Toy]) -> None:
    model = build(toy)
    inputs = model.example(3)
    graph = secateurs.trace(model, inputs)
    for removed in cuts(graph):
        if removed:
            check(model, inputs, removed, graph)


def test_indices_that_are_no_prefix_of_a_grouped_convolution() -> None:
    model = build(models.GroupedConv)
    inputs = model.example()
    graph = secateurs.trace(model, inputs)
    whole = next(group for group in graph.groups if group.size == 4)
    small = check(model, inputs, {whole.name: [0, 2]}, graph)
    assert small.grouped.groups == 2
    assert tuple(small.grouped.weight.shape) == (6, 2, 3, 3)
    assert torch.equal(small.grouped.weight, model.grouped.weight[[3, 4, 5, 9, 10, 11]])


def test_the_first_and_the_last_of_six_convolution_groups_go() -> None:
    model = build(more_models.SixConvGroups)
    inputs = model.example()
    graph = secateurs.trace(model, inputs)
    small = check(model, inputs, {"stem": [0, 5]}, graph)
    assert small.grouped.groups == 4
    assert torch.equal(small.grouped.weight, model.grouped.weight[3:15])
    assert torch.equal(small.stem.weight, model.stem.weight[2:10])


class StandardizedConv(nn.Conv2d):
    """A convolution whose filters are first normalised by a batch norm over its own weights."""

    def forward(self, x: Tensor) -> Tensor:
        rows = self.weight.reshape(1, self.out_channels, -1)
        weight = F.batch_norm(rows, None, None, training=True).reshape_as(self.weight)
        return F.conv2d(x, weight, self.bias, padding=1)


def test_weights_that_are_standardized_mix_their_input_planes() -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 8, 1), nn.ReLU(), StandardizedConv(8, 6, 3), nn.ReLU(), nn.Conv2d(6, 4, 1)
    )
    inputs = torch.randn(2, 3, 8, 8)
    graph = secateurs.trace(model.eval(), inputs)
    assert "0" in graph.mixers
    assert "2" not in graph.mixers
    check(model, inputs, {"2": [0, 5]}, graph)
    check(model, inputs, {"0": [0, 5]}, graph)


class ScaledByWidth(nn.Module):
    """A number that `forward` derives from a size: after the cut it is another number."""

    def __init__(self) -> None:
        super().__init__()
        self.make, self.read = nn.Linear(4, 9), nn.Linear(9, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.make(x)
        return self.read(x / x.shape[1])


def test_a_number_that_is_derived_from_a_size_is_caught_by_the_proof() -> None:
    model, inputs = ScaledByWidth(), torch.randn(3, 4)
    graph = secateurs.trace(model, inputs)
    plan = Plan.of(graph, {group.name: [0, 5] for group in graph.groups})
    report = secateurs.verify(model, secateurs.apply(model, plan), plan, inputs)
    assert not report.ok or not len(plan)
