"""Least-squares reconstruction: as good as any fit can be, and of nothing but the layers behind a cut."""

from __future__ import annotations

import sys
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import secateurs
from secateurs.errors import TrainingError
from secateurs.recovery import reconstruct


class StridedAndDilated(nn.Module):
    """Convolutions that read a unit at several places of an odd-sized map, in padding too."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 12, 3, padding=1, bias=False)
        self.second = nn.Conv2d(12, 5, (3, 2), stride=(2, 1), padding=(1, 0), dilation=(1, 2))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.second(self.first(x).relu())
        return out


class DepthwiseBetween(nn.Module):
    """An inverted residual: batch norms, a depthwise convolution, a residual sum, no bias anywhere."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 1, bias=False)
        self.expand, self.bn1 = nn.Conv2d(6, 24, 1, bias=False), nn.BatchNorm2d(24)
        self.depth, self.bn2 = nn.Conv2d(24, 24, 3, padding=1, groups=24, bias=False), nn.BatchNorm2d(24)
        self.project, self.bn3 = nn.Conv2d(24, 6, 1, bias=False), nn.BatchNorm2d(6)
        self.last = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        y = self.bn2(self.depth(self.bn1(self.expand(x)).clamp(0, 6))).clamp(0, 6)
        x = x + self.bn3(self.project(y))
        out: Tensor = self.last(x.mean((2, 3)))
        return out


def ready(model: nn.Module, seed: int = 0) -> nn.Module:
    """Random weights, and batch norms whose statistics are no ones and zeros."""
    chance = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if tensor.is_floating_point():
                tensor.copy_(torch.randn(tensor.shape, generator=chance) * 0.5)
                if name.endswith("running_var"):
                    tensor.abs_().add_(0.5)
    return model.eval()


def images(count: int = 24, size: int = 9) -> Tensor:
    return torch.randn(count, 3, size, size + 3, generator=torch.Generator().manual_seed(5))


def cut(model: nn.Module, inputs: Tensor, removed: dict[str, Any]) -> tuple[secateurs.Plan, nn.Module]:
    plan = secateurs.Plan.of(secateurs.trace(model, inputs[:1]), removed)
    return plan, secateurs.apply(model, plan)


def test_a_convolution_gets_the_best_weights_that_there_are() -> None:
    model, inputs = ready(StridedAndDilated()), images()
    plan, small = cut(model, inputs, {"first": [0, 3, 7, 8]})
    refit = reconstruct(model, small, plan, [inputs[:10], inputs[10:]], ridge=1e-9)
    with torch.no_grad():
        kept = model.first(inputs).relu()[:, [1, 2, 4, 5, 6, 9, 10, 11]]  # type: ignore[operator]
        wanted, found = model(inputs), small(inputs)
    # numpy's own solution, with the windows cut out by torch's unfold for even strides
    columns = nn.functional.unfold(kept, (3, 2), dilation=(1, 2), padding=(1, 0), stride=(2, 1))
    system = columns.permute(0, 2, 1).reshape(-1, 8 * 6).double().numpy()
    system = np.hstack([system, np.ones((len(system), 1))])
    right = wanted.permute(0, 2, 3, 1).reshape(-1, 5).double().numpy()
    best, *_ = np.linalg.lstsq(system, right, rcond=None)
    error = ((system @ best - right) ** 2).sum()
    assert ((found - wanted) ** 2).sum().item() == pytest.approx(error, rel=1e-3)
    spread = ((right - right.mean(0)) ** 2).sum()
    assert refit.unexplained["second"] == pytest.approx(error / spread, rel=1e-3)
    assert refit.left == ()


def test_a_batch_norm_takes_over_the_shift() -> None:
    model, inputs = ready(DepthwiseBetween()), images()
    plan, small = cut(model, inputs, {"expand": list(range(0, 24, 3))})
    outputs: dict[str, list[Tensor]] = {"whole": [], "small": []}
    for name, each in (("whole", model), ("small", small)):
        each.bn3.register_forward_hook(lambda _, __, out, name=name: outputs[name].append(out))
    with torch.no_grad():
        model(inputs), small(inputs)
        plainly = (outputs["whole"][0] - outputs["small"][0]).square().mean()
        reconstruct(model, small, plan, [(inputs, torch.zeros(24))])
        small(inputs)
    apart = outputs["whole"][0] - outputs["small"][-1]
    assert apart.square().mean() < 0.2 * plainly
    assert apart.mean((0, 2, 3)).abs().max() < 1e-4  # no channel is off on average
    assert torch.equal(small.bn3.running_var, model.bn3.running_var)


def test_only_readers_change() -> None:
    model, inputs = ready(DepthwiseBetween()), images()
    plan, small = cut(model, inputs, {"expand": [1, 2, 3]})
    before = {name: tensor.clone() for name, tensor in small.state_dict().items()}
    whole = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    refit = reconstruct(model.train(), small, plan, [inputs])
    changed = {name for name, tensor in small.state_dict().items() if not torch.equal(tensor, before[name])}
    assert changed == {"project.weight", "bn3.running_mean"}
    assert list(refit.unexplained) == ["project"]
    assert all(torch.equal(tensor, whole[name]) for name, tensor in model.state_dict().items())
    assert all(module.training for module in model.modules())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_a_cut_residual_stream_refits_all_its_readers() -> None:
    model, inputs = ready(DepthwiseBetween()), images()
    plan, small = cut(model, inputs, {"stem": [2, 5]})
    refit = reconstruct(model, small, plan, [inputs])
    assert set(refit.unexplained) == {"expand", "last"}
    assert all(0 <= share < 1 for share in refit.unexplained.values())
    assert small(inputs).isfinite().all()


def test_a_strong_pull_leaves_the_weights_as_they_are() -> None:
    model, inputs = ready(StridedAndDilated()), images()
    plan, small = cut(model, inputs, {"first": [4]})
    before = small.second.weight.clone()  # type: ignore[operator]
    reconstruct(model, small, plan, [inputs], ridge=1e12)
    torch.testing.assert_close(small.second.weight, before, rtol=1e-4, atol=1e-4)


def test_large_maps_are_sampled_alike_for_the_same_seed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules[reconstruct.__module__], "_ROWS", 200)
    model, inputs = ready(StridedAndDilated()), images()
    weights = []
    for seed in (0, 0, 1):
        plan, small = cut(model, inputs, {"first": [0, 1]})
        reconstruct(model, small, plan, [inputs], seed=seed)
        weights.append(small.second.weight.detach())  # type: ignore[operator]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


def test_a_shared_weight_stays() -> None:
    class TiedReaders(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.one, self.two = nn.Linear(6, 8), nn.Linear(8, 3), nn.Linear(8, 3)
            self.two.weight = self.one.weight

        def forward(self, x: Tensor) -> Tensor:
            hidden = self.first(x)
            return self.one(hidden.relu()) + self.two(hidden.sigmoid())

    model, inputs = TiedReaders().eval(), torch.randn(32, 6)
    plan, small = cut(model, inputs, {"first": [0, 1]})
    before = small.one.weight.clone()  # type: ignore[operator]
    refit = reconstruct(model, small, plan, [inputs])
    assert refit.unexplained == {} and refit.left == ("one",)
    assert torch.equal(small.one.weight, before)


def test_what_is_refused_and_what_is_left_then() -> None:
    model, inputs = ready(StridedAndDilated()), images()
    plan, small = cut(model, inputs, {"first": [0]})
    with pytest.raises(TrainingError, match="gave no batch"):
        reconstruct(model, small, plan, [])
    with pytest.raises(TrainingError, match="`0 < ridge` must hold, got ridge=0"):
        reconstruct(model, small, plan, [inputs], ridge=0)
    with pytest.raises(RuntimeError):
        reconstruct(model, small, plan, [inputs[:, :2]])
    assert not any(module._forward_hooks for module in model.modules())
