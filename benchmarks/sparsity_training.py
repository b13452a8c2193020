"""CIFAR-10 ResNet-20: training for sparsity before a cut, against plain training of the same length.

Every network is trained for --epochs, with a method or without. Its batch norms are re-estimated, since those
of filters that were just set to zero are stale. Then it is cut to the same share of MACs, repaired, and
fine-tuned for --finetune-epochs. Compare a method with the plain training that the same ranking cuts, and
with "cut first", which cuts the network as it is by reconstruction error, repairs it, and spends all epochs
on fine-tuning.

Run: python -m benchmarks.sparsity_training [--epochs 2] [--finetune-epochs 1] [--images 4000] [--seeds 1]
"""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

import secateurs
from benchmarks.cifar_resnet56 import top1
from benchmarks.common import arguments, cifar10, finetuned, header, pretrained
from secateurs.errors import BudgetError
from secateurs.recovery import Recipe, repair
from secateurs.recovery.batch_norm import reestimate
from secateurs.recovery.sparsify import METHODS, Sparsifier, sparsifier

# How far the pull alone would take what it acts on over the whole training: a scale of a batch norm by 0.4, a
# weight by 0.06; a unit that leaves shrinks by about e^6, since that pull grows while the steps become small.
DISTANCES = {"slimming": 0.4, "group-lasso": 0.06, "growing": 18.0}
MOMENTUM = 0.9


@dataclass
class Row:
    """What one way came to, a number for each seed."""

    trained: list[float] = field(default_factory=list)
    cut: list[float] = field(default_factory=list)
    repaired: list[float] = field(default_factory=list)
    tuned: list[float] = field(default_factory=list)
    macs: list[float] = field(default_factory=list)

    def told(self) -> str:
        """The accuracies of the last seed in one line."""
        return f"{self.cut[-1]:.4f} cut, {self.repaired[-1]:.4f} repaired, {self.tuned[-1]:.4f} tuned"

    def cells(self) -> list[str]:
        """Means, with the standard deviation where there are several seeds."""
        cells = [f"{statistics.mean(self.macs):.3f}"]
        for values in (self.trained, self.cut, self.repaired, self.tuned):
            spread = f" ± {100 * statistics.stdev(values):.1f}" if len(values) > 1 else ""
            cells.append(f"{100 * statistics.mean(values):.1f}{spread}")
        return cells


def main() -> None:
    """Print a line for each training and a table at the end."""
    parser = arguments("Training for sparsity on CIFAR-10 ResNet-20.")
    parser.add_argument("--macs", type=float, default=0.5, help="share of MACs that remains")
    parser.add_argument("--epochs", type=int, default=2, help="of training before the cut")
    parser.add_argument("--finetune-epochs", type=int, default=1, help="after the cut")
    parser.add_argument("--images", type=int, default=4000, help="training images")
    parser.add_argument("--test-images", type=int, default=2000)
    parser.add_argument("--lr", type=float, default=0.02)
    parser.add_argument("--clip-norm", type=float, default=None, help="the longest gradient; any if left out")
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--precision", choices=["no", "bf16"], default="no", help="of all trainings")
    parser.add_argument("--repair", default="batch-norm", help="none, batch-norm, compensate or reconstruct")
    parser.add_argument("--repair-images", type=int, default=500)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--pull", type=float, default=1.0, help="factor on all strengths")
    parser.add_argument("--methods", default=",".join(METHODS))
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    header(f"CIFAR-10 ResNet-20: {args.epochs} epochs for sparsity, {args.macs:g} of the MACs, "
           f"{args.finetune_epochs} epochs after; {args.images} images an epoch")  # fmt: skip
    images, labels = (part[: args.images] for part in cifar10(args.data, "train"))
    test: tuple[Tensor, ...] = tuple(part[: args.test_images] for part in cifar10(args.data, "test"))
    base = pretrained(args.data, 20)
    graph = secateurs.trace(base, images[:2])
    print(f"before: top-1 {top1(base, *test):.4f} on {len(test[1])} test images")
    methods = {name: method_for(name, graph, base, args) for name in args.methods.split(",")}
    rankings: list[tuple[str, Any]] = list(
        dict.fromkeys((kind.criterion, kind.scope) for kind in methods.values())
    )
    ways: list[tuple[str, Sparsifier | None, list[tuple[str, Any]]]] = [("none", None, rankings)]
    ways += [(name, kind, [(kind.criterion, kind.scope)]) for name, kind in methods.items()]
    rows: dict[tuple[str, str, str], Row] = {}
    for seed in range(args.seeds):
        first = rows.setdefault(("cut first", "reconstruction", "shares by error"), Row())
        cut_first(first, base, graph, images, labels, test, args, seed)
        for name, method, cuts in ways:
            started = time.perf_counter()
            model = trained(base, images, labels, args, args.epochs, seed, method)
            reestimate(model, model.buffers(), images[: args.repair_images].split(100))
            accuracy, seconds = top1(model, *test), time.perf_counter() - started
            print(f"seed {seed}, {name}: {accuracy:.4f} after {seconds:.0f} s", flush=True)
            for criterion, scope in cuts:
                row = rows.setdefault((name, criterion, scope), Row())
                scores = secateurs.score(model, graph, criterion)
                plan = secateurs.plan(graph, scores, secateurs.Budget(macs=args.macs), scope=scope)
                smaller = cut_and_repaired(row, model, plan, images, test, args)
                tuned = trained(smaller, images, labels, args, args.finetune_epochs, seed, None)
                row.trained.append(accuracy)
                row.tuned.append(top1(tuned, *test))
                print(f"  {criterion}, {scope}: {row.told()}", flush=True)
    print("\n| method | ranking | MACs | before the cut | right after | repaired | fine-tuned |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for (name, criterion, scope), row in sorted(rows.items(), key=lambda item: item[0][1:]):
        print(f"| {name} | {criterion}, {scope} | {' | '.join(row.cells())} |")


def cut_first(
    row: Row,
    base: nn.Module,
    graph: secateurs.Graph,
    images: Tensor,
    labels: Tensor,
    test: tuple[Tensor, ...],
    args: Any,
    seed: int,
) -> None:
    """Cut by reconstruction error, repair, then fine-tune for as many epochs as the others get in all."""
    some = [(part, torch.zeros(len(part)).long()) for part in images[: args.repair_images].split(100)]
    scores = secateurs.score(base, graph, "reconstruction", data=some)
    budget = secateurs.Budget(macs=args.macs)
    skip = ["conv1"]  # a residual stream keeps its width
    plan = secateurs.plan(graph, scores, budget, scope="local", allocation="error", skip=skip)
    smaller = cut_and_repaired(row, base, plan, images, test, args)
    epochs = args.epochs + args.finetune_epochs
    row.trained.append(top1(base, *test))
    row.tuned.append(top1(trained(smaller, images, labels, args, epochs, seed, None), *test))
    print(f"seed {seed}, cut first: {row.told()}", flush=True)


def cut_and_repaired(
    row: Row, model: nn.Module, plan: secateurs.Plan, images: Tensor, test: tuple[Tensor, ...], args: Any
) -> nn.Module:
    """The smaller network; the row learns how accurate it is before and after the repair."""
    smaller = secateurs.apply(model, plan)
    row.macs.append(plan.after.macs / plan.before.macs)
    row.cut.append(top1(smaller, *test))
    repair(model, smaller, plan, images[: args.repair_images].split(100), how=args.repair)
    row.repaired.append(top1(smaller, *test))
    return smaller


def method_for(name: str, graph: secateurs.Graph, model: nn.Module, args: Any) -> Sparsifier:
    """A method that aims at the share of MACs, as strong as the length of the training asks for."""
    steps = args.epochs * (args.images // args.batch_size)
    path = args.lr / 2 * steps / (1 - MOMENTUM)  # the cosine's mean
    options: dict[str, Any] = {}
    if name in DISTANCES:
        options["strength"] = args.pull * DISTANCES[name] / path
    if name == "growing":
        options["epochs"] = args.epochs
    if name in ("growing", "sfp", "fpgm"):
        rate = rate_for(graph, secateurs.score(model, graph, "l2"), args.macs)
        options["rate_dist" if name == "fpgm" else "rate"] = rate
    print(f"{name}: " + ", ".join(f"{key} {value:.4g}" for key, value in options.items()))
    return sparsifier(name, graph, **options)


def rate_for(graph: secateurs.Graph, scores: secateurs.Scores, macs: float) -> float:
    """The least share of every group that has to leave for a share of the MACs."""
    for thousandths in range(1, 1000):
        budget = secateurs.Budget(units=1 - thousandths / 1000)
        after = secateurs.plan(graph, scores, budget, scope="local").after.macs
        if after <= macs * graph.cost().macs:
            return thousandths / 1000
    raise BudgetError(f"macs={macs} is out of reach")


def trained(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    args: Any,
    epochs: int,
    seed: int,
    method: Sparsifier | None,
) -> nn.Module:
    """A copy of the model, trained; the last weights."""
    recipe = Recipe(
        epochs=epochs,
        lr=args.lr,
        momentum=MOMENTUM,
        weight_decay=5e-4,
        clip_norm=args.clip_norm,
        precision=args.precision,
        seed=seed,
    )
    return finetuned(model, images, labels, recipe, batch_size=args.batch_size, regularizer=method)


if __name__ == "__main__":
    main()
