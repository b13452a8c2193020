"""Every criterion on CIFAR-10 ResNet-56 at half of its MACs: accuracy after the cut, and after an epoch.

Run: python -m benchmarks.criteria_resnet56 --threads 1 [--criteria l1,taylor] [--seeds 3]

A seed decides which training images are ranked on and how the epoch is shuffled; criteria on weights alone
rank alike for every seed. The batch norms of the second column are re-estimated on the images of the ranking.
"""

from __future__ import annotations

import statistics
import time

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import secateurs
from benchmarks.cifar_resnet56 import top1
from benchmarks.common import arguments, augmented, cifar10, header, pretrained
from secateurs.criteria import names
from secateurs.recovery import Recipe, finetune, repair


def ranked(
    model: nn.Module, graph: secateurs.Graph, name: str, data: list[tuple[Tensor, Tensor]], macs: float
) -> tuple[nn.Module, secateurs.Plan]:
    """The model cut by one criterion."""
    scores = secateurs.score(model, graph, name, data=data, loss_fn=cross_entropy)
    plan = secateurs.plan(graph, scores, secateurs.Budget(macs=macs), skip=list(scores.missing))
    return secateurs.apply(model, plan), plan


def spread(values: list[float]) -> str:
    """The mean in per cent, and the standard deviation where there are several."""
    mean = 100 * statistics.mean(values)
    return f"{mean:.1f}" + (f" ± {100 * statistics.stdev(values):.1f}" if len(values) > 1 else "")


def main() -> None:
    """Print a row for each criterion as soon as it is known."""
    parser = arguments("Accuracy of ResNet-56 at half of its MACs, by criterion.")
    parser.add_argument("--criteria", default=",".join(names()), help="names, with commas")
    parser.add_argument("--macs", type=float, default=0.5, help="share of MACs that remains")
    parser.add_argument("--images", type=int, default=500, help="training images to rank on")
    parser.add_argument("--epoch-images", type=int, default=50_000, help="training images of the epoch")
    parser.add_argument("--tested", type=int, default=2000, help="test images")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--lr", type=float, default=0.02)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    header(f"CIFAR-10 ResNet-56 at {args.macs:g} of its MACs, by criterion")
    images, labels = cifar10(args.data, "train")
    tested = [each[: args.tested] for each in cifar10(args.data, "test")]
    model = pretrained(args.data, 56)
    graph = secateurs.trace(model, images[:2])
    print(f"base {top1(model, *tested):.4f}; ranked on {args.images}, epoch of {args.epoch_images} images, "
          f"tested on {args.tested}; {args.seeds} seeds\n")  # fmt: skip
    print("| criterion | cut | batch norm re-estimated | after the epoch | seconds to rank |")
    print("| --- | --- | --- | --- | --- |", flush=True)
    for name in args.criteria.split(","):
        cut, norms, tuned, seconds = [], [], [], []
        for seed in range(args.seeds):
            order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))
            some = order[: args.images]
            data = list(zip(images[some].split(100), labels[some].split(100), strict=True))
            started = time.perf_counter()
            small, plan = ranked(model, graph, name, data, args.macs)
            seconds.append(time.perf_counter() - started)
            cut.append(top1(small, *tested))
            repair(model, small, plan, data, how="batch-norm")
            norms.append(top1(small, *tested))
            if args.epoch_images:
                chosen = order[: args.epoch_images]
                recipe = Recipe(epochs=1, lr=args.lr, weight_decay=5e-4, seed=seed)
                finetune(
                    small,
                    lambda seed, chosen=chosen: augmented(images[chosen], labels[chosen], 128, seed),
                    recipe=recipe,
                )
                tuned.append(top1(small, *tested))
        after = spread(tuned) if tuned else ""
        print(
            f"| {name} | {spread(cut)} | {spread(norms)} | {after} | {statistics.mean(seconds):.1f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
