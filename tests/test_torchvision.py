"""Every classification network of torchvision that is made of convolutions, at half its width."""

from __future__ import annotations

import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
import torchvision
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

import secateurs
from secateurs import Budget

NAMES = [
    name
    for name in torchvision.models.list_models(module=torchvision.models)
    if not name.startswith(("vit", "swin", "maxvit"))
]
QUICK = ["resnet18", "mobilenet_v2", "densenet121"]
SMALLEST = {"inception_v3": 299}  # pixels, for its second head in training; 64 is enough for the others
COPIES = 6  # of the weights that are alive at once: the proof runs in double precision


def build(name: str) -> nn.Module:
    options = {"init_weights": False} if name in ("googlenet", "inception_v3") else {}
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torchvision.models.get_model(name, weights=None, num_classes=10, **options).eval()


def seasoned(model: nn.Module) -> nn.Module:
    """Norms with scales, offsets and statistics of their own, so that forgetting one is seen."""
    generator = torch.Generator().manual_seed(0)
    for module in model.modules():
        mean, variance = getattr(module, "running_mean", None), getattr(module, "running_var", None)
        if mean is not None and variance is not None:
            mean.copy_(0.1 * torch.randn(mean.shape, generator=generator))
            variance.copy_(0.5 + torch.rand(variance.shape, generator=generator))
        for name in ("bias", "layer_scale"):
            parameter = getattr(module, name, None)
            if isinstance(parameter, nn.Parameter):
                parameter.data.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    return model


class Clock:
    """Seconds by what they were spent on."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, what: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.seconds[what] = time.perf_counter() - start

    def __str__(self) -> str:
        return "  ".join(f"{what} {seconds:6.2f} s" for what, seconds in self.seconds.items())


def counted(model: nn.Module, inputs: torch.Tensor) -> int:
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(inputs)
    return counter.get_total_flops() // 2 // len(inputs)


def check(name: str, pixels: int) -> str:
    """Trace, plan, cut, prove, count, train one step; the line that says how it went."""
    model, clock = seasoned(build(name)), Clock()
    inputs = torch.randn(2, 3, pixels, pixels)
    shape = model(inputs).shape
    with clock("trace"):
        graph = secateurs.trace(model, inputs)
    with clock("plan"):
        scores = secateurs.score(model, graph, "random")
        plan = secateurs.plan(graph, scores, Budget(units=0.5), scope="local")
    with clock("apply"):
        small = secateurs.apply(model, plan)
    with clock("verify"):
        report = secateurs.verify(model, small, plan, inputs).raise_if_failed()
    assert not graph.unknown
    assert report.exact_expected
    assert report.effect > 0
    assert small(inputs).shape == shape
    assert plan.before.params == sum(p.numel() for p in model.parameters())
    assert plan.after.params == sum(p.numel() for p in small.parameters())
    assert (plan.before.macs, plan.after.macs) == (counted(model, inputs), counted(small, inputs))
    del model
    with clock("training step"):
        train_one_step(small, pixels)
    params, macs = plan.after.share_of(plan.before)
    assert params < 0.6, "at least 40 % of the parameters go"
    assert macs < 0.6, "at least 40 % of the multiply-accumulates go"
    error = f"{report.max_error / max(report.scale, 1e-300):.0e}"
    return f"{name:20} {clock}  params {params:4.0%}  macs {macs:4.0%}  error {error}"


def free_bytes() -> float:
    """Memory that can be had; without end where the system does not say."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return float("inf")
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable"))


def train_one_step(model: nn.Module, pixels: int) -> None:
    model.train()
    optimiser = torch.optim.SGD(model.parameters(), lr=1e-4, momentum=0.9)
    outputs = model(torch.randn(2, 3, pixels, pixels))
    losses = [cross_entropy(leaf, torch.tensor([1, 2])) for leaf in tree_leaves(outputs)]
    torch.stack(losses).sum().backward()
    assert all(p.grad is not None and p.grad.shape == p.shape for p in model.parameters())
    optimiser.step()
    assert all(p.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("name", QUICK)
def test_a_few_networks_at_half_width(name: str) -> None:
    print(check(name, 64))


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_every_network_at_half_width(name: str) -> None:
    size = 4 * torchvision.models.get_model_weights(name).DEFAULT.meta["num_params"]
    if COPIES * size > free_bytes():
        pytest.skip(f"{name} needs {COPIES * size / 1e9:.0f} GB of memory")
    print(check(name, SMALLEST.get(name, 64)))
