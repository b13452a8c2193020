"""CIFAR-10 networks at a given speed-up: after the cut, after the repair, and after epochs with a teacher.

Run: python -m benchmarks.recovery resnet56 --threads 1 [--speedup 2.13] [--epochs 1 10 20] [--seeds 0 1 2]
     python -m benchmarks.recovery vgg16 --weights runs/cifar_vgg16.safetensors --width 0.25 --speedup 2.5

All rows of a network have the same MACs and the same fine-tuning, with the whole network as the teacher.
Torch-Pruning's rows are cut with one share for all layers, found by bisection, and its groups of coupled
layers. Ours are repaired: with units and shares by reconstruction error, with the same share of each group,
and with units and shares by one Taylor ranking. They learn from the outputs of the teacher's blocks too, so
they take a plan.
Each number of epochs is a training of its own, from the cut or repaired network, with its own schedule.
"""

from __future__ import annotations

import copy
import importlib.util
import statistics
import time
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import secateurs
from benchmarks.cifar_resnet56 import top1
from benchmarks.common import CifarVGG, arguments, cifar10, finetuned, header, pretrained
from secateurs.recovery import Recipe, repair

Batches = list[tuple[Tensor, Tensor]]


def network(args: Namespace) -> nn.Module:
    """The trained network."""
    if args.network != "vgg16":
        return pretrained(args.data, int(args.network.removeprefix("resnet")))
    model = CifarVGG(args.width)
    model.load_state_dict(load_file(args.weights))
    return model.eval()


def ours(model: nn.Module, some: Batches, share: float, row: str) -> tuple[nn.Module, Any]:
    """Cut by reconstruction error, or by one Taylor ranking; the smaller network and the plan."""
    graph = secateurs.trace(model, some[0][0][:2])
    criterion = "taylor" if row == "taylor" else "reconstruction"
    scores = secateurs.score(model, graph, criterion, data=some, loss_fn=cross_entropy)
    plan = secateurs.plan(
        graph,
        scores,
        secateurs.Budget(macs=share),
        scope="global" if row == "taylor" else "local",
        allocation="error" if row == "error" else None,
        skip=["conv1"] if "conv1" in graph.by_name else [],  # a residual stream keeps its width
    )
    return secateurs.apply(model, plan), plan


def theirs(model: nn.Module, some: Batches, share: float, taylor: bool) -> nn.Module:
    """Torch-Pruning: group L2 or Taylor, one ratio for all layers, by bisection to the same MACs."""
    import torch_pruning as tp

    whole, low, high = macs(model), 0.0, 0.95
    best = model
    for _ in range(6):
        ratio = (low + high) / 2
        small = copy.deepcopy(model)
        last = [layer for layer in small.modules() if isinstance(layer, nn.Linear)][-1]
        importance = (
            tp.importance.GroupTaylorImportance() if taylor else tp.importance.GroupMagnitudeImportance(p=2)
        )
        pruner = tp.pruner.BasePruner(
            small, some[0][0][:1], importance=importance, pruning_ratio=ratio, ignored_layers=[last]
        )
        if taylor:
            for inputs, targets in some:
                cross_entropy(small(inputs), targets).backward()
        pruner.step()
        small.zero_grad(set_to_none=True)
        if macs(small) <= share * whole:
            best, high = small, ratio
        else:
            low = ratio
    return best


def macs(model: nn.Module) -> int:
    """Multiply-accumulates of one image."""
    return secateurs.trace(model, torch.zeros(1, 3, 32, 32)).cost().macs


ROWS = {
    "error": "secateurs, shares by error",
    "share": "secateurs, one share",
    "taylor": "secateurs, one Taylor ranking",
}
THEIRS = {"tp-l2": "Torch-Pruning, group L2", "tp-taylor": "Torch-Pruning, group Taylor"}


def contenders(
    model: nn.Module, some: Batches, share: float, rows: list[str]
) -> Iterator[tuple[str, nn.Module, Any]]:
    """Name, smaller network, and the plan where we made it."""
    for row in rows:
        if row in ROWS:
            yield ROWS[row], *ours(model, some, share, row)
        elif importlib.util.find_spec("torch_pruning"):
            yield THEIRS[row], theirs(model, some, share, taylor=row == "tp-taylor"), None


def main() -> None:
    """Print a line for each contender and seed, and the means at the end."""
    parser = arguments("Accuracy after the cut, the repair and some epochs.")
    parser.add_argument("network", choices=["resnet20", "resnet56", "vgg16"])
    parser.add_argument("--weights", type=Path, help="weights of VGG-16")
    parser.add_argument("--width", type=float, default=1.0, help="width of VGG-16")
    parser.add_argument("--speedup", type=float, default=2.13, help="times fewer MACs")
    parser.add_argument("--images", type=int, default=2000, help="images to rank and repair on")
    parser.add_argument(
        "--epochs", type=int, nargs="*", default=[1], help="fine-tunings, each from the start"
    )
    parser.add_argument("--epoch-images", type=int, default=50_000)
    parser.add_argument("--lr", type=float, nargs="+", default=[0.01], help="one for all, or one for each")
    parser.add_argument("--distill", type=float, default=0.7, help="share of the loss that the teacher has")
    parser.add_argument("--temperature", type=float, default=4.0, help="of the teacher's answers")
    parser.add_argument("--mixup", type=float, default=0.0, help="alpha of the Beta distribution")
    parser.add_argument(
        "--features", type=float, default=10.0, help="what the blocks' outputs count; where we have the plan"
    )
    parser.add_argument("--precision", choices=["no", "bf16"], default="no", help="of the fine-tuning")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--tested", type=int, default=10_000, help="test images")
    parser.add_argument("--rows", nargs="+", choices=[*ROWS, *THEIRS], default=[*ROWS, *THEIRS])
    args = parser.parse_args()
    rates = args.lr * len(args.epochs) if len(args.lr) == 1 else args.lr
    if len(rates) != len(args.epochs):
        parser.error(f"--lr has {len(rates)} values and --epochs {len(args.epochs)}; give one or as many")
    torch.set_num_threads(args.threads)
    header(f"CIFAR-10 {args.network} at {args.speedup:g}x fewer MACs")
    images, labels = cifar10(args.data, "train")
    tested = [each[: args.tested] for each in cifar10(args.data, "test")]
    model = network(args)
    print(
        f"base {top1(model, *tested):.4f} on {len(tested[1])} test images; {args.images} images to rank and "
        f"repair on; epochs of {args.epoch_images} images, {args.epochs} of them at {rates}, "
        f"precision {args.precision}, distill {args.distill:g} at temperature {args.temperature:g}, "
        f"features {args.features:g}, mixup {args.mixup:g}",
        flush=True,
    )
    found: dict[str, list[dict[str, float]]] = {}
    for seed in args.seeds:
        order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))
        some = [(images[part], labels[part]) for part in order[: args.images].split(100)]
        for name, small, plan in contenders(model, some, 1 / args.speedup, args.rows):
            row = {"macs": macs(small) / macs(model), "cut": top1(small, *tested)}
            if plan is not None:
                started = time.process_time()
                repair(model, small, plan, some)
                row |= {"repair_s": time.process_time() - started, "repaired": top1(small, *tested)}
            print(f"seed {seed}, {name}: {told(row)}", flush=True)
            chosen = order[: args.epoch_images]
            for epochs, lr in zip(args.epochs, rates, strict=True):
                recipe = Recipe(
                    epochs=epochs,
                    lr=lr,
                    weight_decay=5e-4,
                    distill=args.distill,
                    temperature=args.temperature,
                    mixup=args.mixup,
                    distill_features=args.features if plan is not None else 0.0,
                    precision=args.precision,
                    seed=seed,
                )
                tuned = finetuned(small, images[chosen], labels[chosen], recipe, teacher=model, plan=plan)
                row[f"{epochs} epochs"] = top1(tuned, *tested)
                print(f"seed {seed}, {name}, {epochs} epochs: {row[f'{epochs} epochs']:.4f}", flush=True)
            found.setdefault(name, []).append(row)
    columns = ["macs", "cut", "repaired", *(f"{epochs} epochs" for epochs in args.epochs)]
    print(f"\n| | {' | '.join(columns)} |\n|{' --- |' * (len(columns) + 1)}")
    for name, rows in found.items():
        cells = (shown([row[column] for row in rows if column in row]) for column in columns)
        print(f"| {name} | {' | '.join(cells)} |")


def told(row: dict[str, float]) -> str:
    """The figures of a row in one line."""
    return ", ".join(f"{name} {value:.4f}" for name, value in row.items())


def shown(values: list[float]) -> str:
    """Mean and standard deviation over the seeds, in per cent."""
    spread = f" ± {100 * statistics.stdev(values):.1f}" if len(values) > 1 else ""
    return f"{100 * statistics.mean(values):.1f}{spread}" if values else ""


if __name__ == "__main__":
    main()
