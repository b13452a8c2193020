"""A budget in time against budgets in MACs that are cut until they measure the same time.

Run: python -m benchmarks.latency_budget resnet56 --threads 1 [--share 0.75 0.6] [--batch 32] [--seeds 0 1 2]
     python -m benchmarks.latency_budget vgg16 --weights runs/cifar_vgg16.safetensors --width 0.25

Units and shares by reconstruction error in all rows, and every cut is repaired on the same images. The first
row's budget is in latency. That of the others is in MACs, with layers that keep any number of units or
multiples of 16, and is lowered until the time that is measured meets the same share.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

import secateurs
from benchmarks.cifar_resnet56 import top1
from benchmarks.common import arguments, cifar10, header
from benchmarks.recovery import macs, network, shown, told
from secateurs.aiming import Trial, aim
from secateurs.errors import BudgetError
from secateurs.measure import latency_share
from secateurs.recovery import repair

ROWS = ("latency", "macs", "macs, multiples of 16")


def decisions(
    model: nn.Module, graph: secateurs.Graph, some: list[Any], image: torch.Tensor, rows: list[str]
) -> dict[str, Callable[[float], secateurs.Plan]]:
    """For each row the plan at a share of what its budget is in."""
    scores = secateurs.score(model, graph, "reconstruction", data=some)
    skip = ["conv1"] if "conv1" in graph.by_name else []  # a residual stream keeps its width
    started = time.perf_counter()
    times = secateurs.latency_model(model, graph, image)
    print(
        f"latency model: {time.perf_counter() - started:.1f} s, {times.ms():.2f} ms, error {times.error:.1%} "
        f"on networks it has not seen, blocks {sorted(set(times.blocks.values()))}",
        flush=True,
    )

    def decide(share: float, budget: str, round_to: int) -> secateurs.Plan:
        return secateurs.plan(
            graph,
            scores,
            secateurs.Budget(**{budget: share}),
            allocation="error",
            skip=skip,
            round_to=round_to,
            latency=times,
        )

    given = {"latency": ("latency", 1), "macs": ("macs", 1), "macs, multiples of 16": ("macs", 16)}
    return {
        row: partial(decide, budget=budget, round_to=round_to)
        for row, (budget, round_to) in given.items()
        if row in rows
    }


def cut_to(
    model: nn.Module, decide: Callable[[float], secateurs.Plan], image: torch.Tensor, share: float
) -> Trial:
    """The cut that measures the share."""

    def cut(asked: float) -> tuple[secateurs.Plan, nn.Module]:
        plan = decide(asked)
        return plan, secateurs.apply(model, plan)

    return aim(cut, lambda smaller, _: latency_share(model, smaller, image), share)


def main() -> None:
    """Print a line for each row, share and seed, and the means at the end."""
    parser = arguments("Accuracy at the same time.")
    parser.add_argument("network", choices=["resnet20", "resnet56", "vgg16"])
    parser.add_argument("--weights", type=Path, help="weights of VGG-16")
    parser.add_argument("--width", type=float, default=1.0, help="width of VGG-16")
    parser.add_argument("--share", type=float, nargs="+", default=[0.75, 0.6], help="of the time")
    parser.add_argument("--batch", type=int, default=32, help="images in a pass that is timed")
    parser.add_argument("--images", type=int, default=2000, help="images to rank and repair on")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=list(ROWS))
    args: argparse.Namespace = parser.parse_args()
    torch.set_num_threads(args.threads)
    header(f"CIFAR-10 {args.network}, a budget in time, {args.batch} images a pass")
    images, labels = cifar10(args.data, "train")
    tested = cifar10(args.data, "test")
    model = network(args)
    print(f"base {top1(model, *tested):.4f} on {len(tested[1])} test images", flush=True)
    found: dict[tuple[float, str], list[dict[str, float]]] = {}
    for seed in args.seeds:
        order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))
        some = [(images[part], labels[part]) for part in order[: args.images].split(100)]
        timed = images[: args.batch]
        graph = secateurs.trace(model, timed)
        for row, decide in decisions(model, graph, some, timed, args.rows).items():
            for share in args.share:
                try:
                    trial = cut_to(model, decide, timed, share)
                except BudgetError as error:
                    print(f"seed {seed}, {share:g}, {row}: {error.message}", flush=True)
                    continue
                small = secateurs.apply(model, trial.plan)
                facts = {"measured": trial.measured, "macs": macs(small) / macs(model)}
                facts["cut"] = top1(small, *tested)
                repair(model, small, trial.plan, some)
                facts["repaired"] = top1(small, *tested)
                print(f"seed {seed}, {share:g}, {row}: {told(facts)}", flush=True)
                found.setdefault((share, row), []).append(facts)
    columns = ["measured", "macs", "cut", "repaired"]
    print(f"\n| time | budget in | {' | '.join(columns)} |\n|{' --- |' * (len(columns) + 2)}")
    for (share, row), all_facts in sorted(found.items(), reverse=True):
        cells = (shown([facts[column] for facts in all_facts]) for column in columns)
        print(f"| {share:.0%} | {row} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
