"""Networks whose weights are computed from parameters in every pass: cut and repaired, beside plain weights.

Run: python -m benchmarks.computed_weights [--threads 1] [--epochs 3] [--share 0.5]

Three small networks are trained on CIFAR-10: with standardized weights and group norms (as BiT), with scaled
standardized weights and no norms (as NFNets), and with spectral norm. Units and shares are by reconstruction
error. The last column is the same network with the same cut, its weights written out as plain parameters
before: what a fit could do that may give them any values.
"""

from __future__ import annotations

import copy
import time
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.functional import cross_entropy
from torch.nn.utils.parametrizations import spectral_norm

import secateurs
from benchmarks.cifar_resnet56 import top1
from benchmarks.common import arguments, cifar10, from_scratch, header
from secateurs.recovery import repair


class StdConv(nn.Conv2d):
    """Standardized weights (arXiv 1903.10520): each filter has mean 0 and variance 1."""

    def weight_now(self) -> Tensor:
        """The weight of this pass."""
        var, mean = torch.var_mean(self.weight, (1, 2, 3), keepdim=True, correction=0)
        return (self.weight - mean) / (var + 1e-6).sqrt()

    def forward(self, x: Tensor) -> Tensor:
        return functional.conv2d(x, self.weight_now(), self.bias, self.stride, self.padding)


class ScaledStdConv(StdConv):
    """The same divided by the root of its inputs, with a learned gain (arXiv 2101.08692)."""

    def __init__(self, *args: int) -> None:
        super().__init__(*args)
        self.gain = nn.Parameter(torch.full((self.out_channels, 1, 1, 1), 1.7))
        self.scale = self.weight[0].numel() ** -0.5

    def weight_now(self) -> Tensor:
        """The weight of this pass."""
        return self.gain * self.scale * super().weight_now()


def spectral(*args: int) -> nn.Module:
    """A convolution under spectral norm (arXiv 1802.05957), which a gain follows."""
    return spectral_norm(nn.Conv2d(*args))


class Gain(nn.Module):
    """A factor for each channel, which a network of layers of norm 1 needs."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.factor = nn.Parameter(torch.full((channels, 1, 1), 3.0))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.factor


KINDS: dict[str, tuple[Any, Any]] = {
    "standardized, group norms": (StdConv, lambda channels: nn.GroupNorm(8, channels)),
    "scaled standardized, no norms": (ScaledStdConv, lambda channels: nn.Identity()),
    "spectral norm": (spectral, Gain),
}


class Net(nn.Module):
    """Six convolutions; the second of each stage has a shortcut."""

    def __init__(self, conv: Any, norm: Any) -> None:
        super().__init__()
        widths = [16, 32, 64]
        before = [3, *widths]
        self.first = nn.ModuleList(conv(one, two, 3, 1, 1) for one, two in zip(before, widths, strict=False))
        self.second = nn.ModuleList(conv(width, width, 3, 1, 1) for width in widths)
        self.norms = nn.ModuleList(norm(width) for width in widths for _ in range(2))
        self.out = nn.Linear(widths[-1], 10)

    def forward(self, x: Tensor) -> Tensor:
        for stage, (first, second) in enumerate(zip(self.first, self.second, strict=True)):
            x = self.norms[2 * stage](first(x)).relu()
            x = (x + self.norms[2 * stage + 1](second(x))).relu()
            x = functional.max_pool2d(x, 2)
        scores: Tensor = self.out(x.mean((2, 3)))
        return scores


def written_out(model: nn.Module) -> nn.Module:
    """The same network with its weights as plain parameters."""
    plain = Net(nn.Conv2d, KINDS["standardized, group norms"][1])
    plain.norms, plain.out = copy.deepcopy(model.norms), copy.deepcopy(model.out)
    for ours, theirs in ((plain.first, model.first), (plain.second, model.second)):
        for one, other in zip(ours, theirs, strict=True):  # type: ignore[call-overload]
            weight = other.weight_now() if isinstance(other, StdConv) else other.weight
            one.load_state_dict({"weight": weight.detach(), "bias": other.bias.detach()})
    return plain.eval()


def repaired(model: nn.Module, small: nn.Module, plan: Any, some: list[Any], tested: Any, how: str) -> str:
    """The accuracy after a repair, and its CPU seconds."""
    small, started = copy.deepcopy(small), time.process_time()
    done = repair(model, small, plan, some, how=how)
    took = time.process_time() - started
    assert how != "reconstruct" or not done.left
    return f"{top1(small, *tested):.1%} ({took:.0f} s)"


def main() -> None:
    """Train, cut and repair, and print a line for each kind of weights."""
    parser = arguments("Weights that are computed, cut and repaired.")
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--images", type=int, default=2000, help="images to rank and repair on")
    parser.add_argument("--share", type=float, default=0.5, help="of the MACs, that remain")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    header(f"CIFAR-10, weights that are computed, {args.images} images to rank and repair on")
    images, labels = cifar10(args.data, "train")
    some = list(zip(images[: args.images].split(100), labels[: args.images].split(100), strict=True))
    tested = cifar10(args.data, "test")
    print("| weights | whole | cut | constants | reconstruction | as plain weights |\n|" + " --- |" * 6)
    for kind in KINDS:
        torch.manual_seed(0)
        model = from_scratch(Net(*KINDS[kind]), args.data, args.epochs, lr=4e-3, precision="bf16")
        graph = secateurs.trace(model, images[:2])
        scores = secateurs.score(model, graph, "reconstruction", data=some, loss_fn=cross_entropy)
        plan = secateurs.plan(
            graph, scores, secateurs.Budget(macs=args.share), scope="local", allocation="error"
        )
        small = secateurs.apply(model, plan)
        plain = written_out(model)
        names = {
            group.name: group.name.removesuffix(".parametrizations.weight.original") for group in plan.groups
        }
        same = secateurs.Plan.of(
            secateurs.trace(plain, images[:2]), {names[group.name]: group.removed for group in plan.groups}
        )
        print(
            f"| {kind} | {top1(model, *tested):.1%} | {top1(small, *tested):.1%} | "
            f"{repaired(model, small, plan, some, tested, 'compensate')} | "
            f"{repaired(model, small, plan, some, tested, 'reconstruct')} | "
            f"{repaired(plain, secateurs.apply(plain, same), same, some, tested, 'reconstruct')} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
