"""A recurrent network that reads images row after row: cut, ranked in several ways, and repaired.

Run: python -m benchmarks.recurrent [--threads 1] [--hidden 96] [--epochs 6] [--share 0.75 0.5]

An LSTM and a GRU are trained on CIFAR-10, 32 steps of 96 values, and a linear layer reads the last state.
Hidden units leave until a share of the MACs remains. Torch-Pruning's row is its cut alone, by bisection.
"""

from __future__ import annotations

import copy
import importlib.util
import time
from argparse import Namespace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import secateurs
from benchmarks.cifar_resnet56 import top1
from benchmarks.common import arguments, cifar10, header
from secateurs.recovery import Recipe, finetune, repair


class Rows(nn.Module):
    """A recurrent layer over the rows of an image."""

    def __init__(self, kind: type[nn.RNNBase], hidden: int) -> None:
        super().__init__()
        self.layer, self.out = kind(96, hidden, batch_first=True), nn.Linear(hidden, 10)

    def forward(self, images: Tensor) -> Tensor:
        scores: Tensor = self.out(self.layer(images.permute(0, 2, 1, 3).flatten(2))[0][:, -1])
        return scores


def trained(kind: type[nn.RNNBase], args: Namespace) -> nn.Module:
    """A network that was trained on all training images."""
    torch.manual_seed(0)
    model, (images, labels) = Rows(kind, args.hidden), cifar10(args.data, "train")
    chance = torch.Generator().manual_seed(0)

    def epoch(seed: int) -> list[tuple[Tensor, Tensor]]:
        order = torch.randperm(len(images), generator=chance)
        return [(images[some], labels[some]) for some in order.split(128)]

    recipe = Recipe(
        epochs=args.epochs, lr=3e-3, optimizer="adamw", warmup_epochs=0.5, clip_norm=1.0, weight_decay=0.01
    )
    finetune(model, epoch, recipe=recipe)
    return model.eval()


def theirs(model: nn.Module, image: Tensor, share: float) -> nn.Module | str:
    """Torch-Pruning's cut by L2, or why there is none."""
    import torch_pruning as tp

    whole, low, high, best = macs(model, image), 0.0, 0.95, None
    try:
        for _ in range(7):
            small = copy.deepcopy(model)
            tp.pruner.BasePruner(
                small, image, importance=tp.importance.GroupMagnitudeImportance(p=2),
                pruning_ratio=(low + high) / 2, ignored_layers=[small.out],
            ).step()  # fmt: skip
            if macs(small, image) <= share * whole:
                best, high = small, (low + high) / 2
            else:
                low = (low + high) / 2
    except Exception as error:  # whatever it raises is what its user sees
        return f"{type(error).__name__}: {error}"
    return best if best is not None else "no cut reaches the share"


def macs(model: nn.Module, image: Tensor) -> int:
    """Multiply-accumulates of one image."""
    return secateurs.trace(model, image).cost().macs


def ours(model: nn.Module, some: list[Any], criterion: str, share: float, tested: Any) -> str:
    """A row of the table: cut, repaired, and the CPU seconds of each."""
    image = some[0][0][:1]
    graph, started = secateurs.trace(model, image), time.process_time()
    scores = secateurs.score(model, graph, criterion, data=some, loss_fn=cross_entropy)
    plan = secateurs.plan(graph, scores, secateurs.Budget(macs=share))
    small, ranked = secateurs.apply(model, plan), time.process_time() - started
    cut, started = top1(small, *tested), time.process_time()
    done = repair(model, small, plan, some)
    took = time.process_time() - started
    left = f"; left: {list(done.left)}" if done.left else ""
    return (
        f"{plan.after.macs / plan.before.macs:.1%} | {cut:.1%} | {top1(small, *tested):.1%} | "
        f"{ranked:.1f} + {took:.1f}{left} |"
    )


def main() -> None:
    """Train, and print a line for each way to rank."""
    parser = arguments("A recurrent network, cut and repaired.")
    parser.add_argument("--hidden", type=int, default=96, help="hidden units")
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--images", type=int, default=2000, help="images to rank and repair on")
    parser.add_argument(
        "--share", type=float, nargs="+", default=[0.75, 0.5], help="of the MACs, that remain"
    )
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    header(f"CIFAR-10, row after row, {args.hidden} hidden units, {args.images} images to rank and repair on")
    images, labels = cifar10(args.data, "train")
    some = list(zip(images[: args.images].split(100), labels[: args.images].split(100), strict=True))
    tested = cifar10(args.data, "test")
    for kind in (nn.LSTM, nn.GRU):
        model = trained(kind, args)
        print(f"\n{kind.__name__}: {top1(model, *tested):.1%} on {len(tested[1])} test images\n")
        print("| units by | MACs | cut | repaired | CPU seconds |\n| --- | --- | --- | --- | --- |")
        for share in args.share:
            for criterion in ("reconstruction", "l2", "taylor"):
                print(f"| {criterion} | {ours(model, some, criterion, share, tested)}", flush=True)
            if importlib.util.find_spec("torch_pruning"):
                small = theirs(model, images[:1], share)
                said = small if isinstance(small, str) else f"{top1(small, *tested):.1%}"
                print(f"| Torch-Pruning 1.6.1, group L2 | {share:.0%} | {said} | | |", flush=True)


if __name__ == "__main__":
    main()
