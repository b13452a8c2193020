"""What a repair in closed form gives back: CIFAR-10 ResNet-56 at half of its MACs, without labels.

Run: python benchmarks/repair.py [--images 2000] [--threads 1] [--curve] [--large 16 100 500]

The inner channels of each block are cut to the same share by their L2 norms. `--curve` repairs on 100, 500,
2,000 and 10,000 images; `--large` repairs a torchvision resnet50 with random weights on random images of 224
pixels, for the time and the memory alone; `--detector` a RetinaNet, whose head is shared by five maps.
"""

from __future__ import annotations

import argparse
import resource
import time

import torch
import torchvision
from torch import Tensor, nn
from torchvision.models.detection import RetinaNet, retinanet_resnet50_fpn

import secateurs
from benchmarks.cifar_resnet56 import top1
from benchmarks.common import arguments, cifar10, header, pretrained
from secateurs.recovery import repair

TESTED = 3000


def uniform(model: nn.Module, example: Tensor, names: tuple[str, ...], share: float) -> secateurs.Plan:
    """The plan that keeps the same share of every group whose name ends in one of `names`, by L2 norm."""
    graph = secateurs.trace(model, example)
    scores = secateurs.score(model, graph, "l2")
    removed = {}
    for group in graph.groups:
        if "." in group.name and group.name.endswith(names):
            kept = max(1, int(share * group.size))
            removed[group.name] = scores[group.name].argsort()[: group.size - kept].tolist()
    return secateurs.Plan.of(graph, removed)


def cifar(args: argparse.Namespace) -> None:
    """The table, and the curve over images."""
    train_x, _ = cifar10(args.data, "train")
    test_x, test_y = (part[:TESTED] for part in cifar10(args.data, "test"))
    order = torch.randperm(len(train_x), generator=torch.Generator().manual_seed(args.seed))
    model = pretrained(args.data, 56)
    plan = uniform(model, test_x[:1], ("conv1",), args.share)
    print(f"# {plan}, {plan.before.macs / plan.after.macs:.2f}x fewer MACs; {TESTED} test images")
    print(f"{'before the cut':<14} top-1 {top1(model, test_x, test_y):.4f}")
    runs = [(how, args.images) for how in args.how]
    runs += [("reconstruct", count) for count in (100, 500, 2000, 10000) if args.curve]
    for how, count in runs:
        small, started = secateurs.apply(model, plan), time.process_time()
        images = train_x[order[:count]].split(100)
        done = repair(model, small, plan, images, how=how, ridge=args.ridge, memory=args.memory << 30)
        seconds = time.process_time() - started
        print(
            f"{how:<14} top-1 {top1(small, test_x, test_y):.4f}, {done.images:,} images, "
            f"{seconds:.1f} s of CPU, at most {done.peak_bytes / 2**20:,.0f} MiB; {done}",
            flush=True,
        )


def large(args: argparse.Namespace, count: int) -> None:
    """A torchvision resnet50 at 224 pixels: time and memory."""
    torch.manual_seed(args.seed)
    model = torchvision.models.resnet50(weights=None).eval()
    plan = uniform(model, torch.randn(1, 3, 224, 224), ("conv1", "conv2"), args.share)
    small, started, before = secateurs.apply(model, plan), time.process_time(), memory_taken()
    images = (torch.randn(4, 3, 224, 224) for _ in range(0, count, 4))
    done = repair(model, small, plan, images, memory=args.memory << 30)
    seconds, grown = time.process_time() - started, memory_taken() - before
    print(
        f"resnet50 at 224 pixels, {count:,} images: {seconds:.1f} s of CPU, "
        f"{done.peak_bytes / 2**20:,.0f} MiB; the process grew by {grown / 2**20:,.0f} MiB at most, of which "
        f"{4 * count * 3 * 224**2 / 2**20:,.0f} are images; {plan}; {done}",
        flush=True,
    )


def memory_taken() -> int:
    """The most bytes that this process has taken so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10


class Heads(nn.Module):
    """What of a detector is computed the same for every image: the backbone, and the head on each map."""

    def __init__(self, detector: RetinaNet) -> None:
        super().__init__()
        self.backbone, self.head = detector.backbone, detector.head

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Class scores and boxes of all places of all maps."""
        found: dict[str, Tensor] = self.head(list(self.backbone(images).values()))
        return found


def detector(args: argparse.Namespace) -> None:
    """RetinaNet, whose head reads five maps with the same weights: what is missed on other images."""
    torch.manual_seed(args.seed)
    model = Heads(retinanet_resnet50_fpn(weights=None, weights_backbone=None, num_classes=5)).eval()
    images, others = torch.randn(2, 8, 3, 128, 128)
    graph = secateurs.trace(model, images[:1])
    plan = secateurs.plan(graph, secateurs.score(model, graph, "l2"), secateurs.Budget(macs=0.6))
    small = secateurs.apply(model, plan)
    with torch.no_grad():
        wanted = model(others)
        for when in ("cut", "repaired"):
            if when == "repaired":
                print(repair(model, small, plan, images.split(4)))
            given = small(others)
            for key, value in wanted.items():
                missed = float((value - given[key]).square().mean() / value.var())
                print(f"RetinaNet {when}, on other images: {key} misses {missed:.1%}", flush=True)


def main() -> None:
    """Print a line for each way, each number of images, and the larger network."""
    parser = arguments("Repair a cut in closed form.")
    parser.add_argument("--images", type=int, default=2000, help="unlabelled training images")
    parser.add_argument("--share", type=float, default=0.4701, help="share of inner channels that remains")
    parser.add_argument("--how", nargs="*", default=["none", "batch-norm", "compensate", "reconstruct"])
    parser.add_argument("--ridge", type=float, help="instead of the one that is chosen")
    parser.add_argument("--memory", type=int, default=8, help="GiB that activations may take")
    parser.add_argument("--curve", action="store_true", help="also 100, 500, 2,000 and 10,000 images")
    parser.add_argument("--large", type=int, nargs="*", default=[], help="resnet50 on so many images each")
    parser.add_argument("--detector", action="store_true", help="RetinaNet at 128 pixels, random weights")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    header("Repair in closed form, without labels")
    if args.how or args.curve:
        cifar(args)
    for count in args.large:
        large(args, count)
    if args.detector:
        detector(args)


if __name__ == "__main__":
    main()
