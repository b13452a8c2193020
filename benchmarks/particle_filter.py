"""CIFAR-10 ResNet-20: the masks that a particle filter finds, beside as many random ones at the same budget.

Run: python -m benchmarks.particle_filter [--remove 0.2] [--images 256] [--particles 24] [--generations 16]

For each seed the filter, its evolutionary variant and random masks evaluate the same number of masks on the
same images; the best of each is then measured on other images. Nothing is fine-tuned. `l2` is the mask of a
ranking by weights (one mask, no images), and `from l2` the filter begun there, numbers a group kept.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor

import secateurs
from benchmarks.common import CifarResNet, arguments, cifar10, header
from secateurs.masks import FeatureMaps, Granularity, Kernels, Strided
from secateurs.measure import accuracy
from secateurs.planning.particles import FilterSettings
from secateurs.sampling import Particles, mask_budget, particle_filter

Batches = list[tuple[Tensor, Tensor]]


def random_masks(
    model: torch.nn.Module, maps: Granularity, seen: Batches, budget: secateurs.Budget, count: int, seed: int
) -> np.ndarray:
    """The best of so many masks drawn at random at the budget."""
    exact, chance = mask_budget(maps, budget), np.random.default_rng(1000 + seed)
    masks = [exact.draw(chance) for _ in range(count)]
    return max(masks, key=lambda mask: accuracy(maps.masked(model, mask), seen).top1)


def main() -> None:
    """Print a line for each seed and way."""
    parser = arguments("Particle filter against random masks.")
    parser.add_argument("--remove", type=float, default=0.2, help="share of MACs (maps) or units")
    parser.add_argument("--granularity", default="map", choices=("map", "kernel", "strided"))
    parser.add_argument("--images", type=int, default=256, help="images that masks are chosen on")
    parser.add_argument("--held", type=int, default=1000, help="other images, to measure the chosen masks on")
    parser.add_argument("--particles", type=int, default=24)
    parser.add_argument("--generations", type=int, default=16)
    parser.add_argument("--noise", type=float, default=0.01)
    parser.add_argument("--temperature", type=float, default=0.01)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--ways", default="filter,evolutionary,random,l2,from l2", help="with commas")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    header(f"CIFAR-10 ResNet-20, {args.granularity} masks, {args.remove:.0%} leave, no fine-tuning")

    x, y = cifar10(args.data, "test")
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    seen, held = (
        [(x[part], y[part]) for part in places.split(256)]
        for places in (order[: args.images], order[args.images : args.images + args.held])
    )
    model = CifarResNet(20)
    model.load_state_dict(load_file(args.data / "weights" / "cifar_resnet20.safetensors"), strict=False)
    graph = secateurs.trace(model.eval(), x[:2])
    maps: Granularity = {
        "map": lambda: FeatureMaps(graph, min_units=0.1),
        "kernel": lambda: Kernels(model, x[:2]),
        "strided": lambda: Strided(model, x[:2]),
    }[args.granularity]()
    share = 1 - args.remove
    budget = secateurs.Budget(macs=share) if args.granularity == "map" else secateurs.Budget(units=share)
    print(f"whole: {accuracy(model, seen).top1:.4f} on the {args.images} images that masks are chosen on, "
          f"{accuracy(model, held).top1:.4f} on {args.held} others; {len(maps.owners)} units")  # fmt: skip
    print(f"{'seed':>4} {'way':<12} {'masks':>5} {'chosen on':>9} {'others':>7} {'MACs':>6} {'seconds':>7}")

    def row(seed: int, way: str, tried: int, find: Callable[[], np.ndarray]) -> None:
        if way not in args.ways.split(","):
            return
        started = time.perf_counter()
        mask = find()
        seconds = time.perf_counter() - started
        small = maps.masked(model, mask)
        macs = maps.macs(mask) / maps.macs(np.ones(len(mask), np.bool_))
        print(f"{seed:>4} {way:<12} {tried:>5} {accuracy(small, seen).top1:>9.4f} "
              f"{accuracy(small, held).top1:>7.4f} {macs:>6.3f} {seconds:>7.1f}", flush=True)  # fmt: skip

    def one_seed(seed: int) -> None:
        plain = FilterSettings(
            particles=args.particles,
            generations=args.generations,
            noise=args.noise,
            temperature=args.temperature,
            seed=seed,
        )
        evolving = replace(plain, evolve=True)
        count = args.particles * (args.generations + 1) + 1
        found = partial(particle_filter, model, maps, seen, budget)
        row(seed, "filter", count, lambda: found(settings=plain).mask)
        row(seed, "evolutionary", count, lambda: found(settings=evolving).mask)
        row(seed, "random", count, lambda: random_masks(model, maps, seen, budget, count, seed))
        if isinstance(maps, FeatureMaps):
            plan = secateurs.plan(graph, secateurs.score(model, graph, "l2"), budget, min_units=0.1)
            choose = Particles(batches=seen, settings=evolving)
            row(seed, "l2", 1, lambda: maps.mask_of(plan))
            row(seed, "from l2", count, lambda: maps.mask_of(choose(model, graph, plan)))

    for seed in range(args.seeds):
        one_seed(seed)


if __name__ == "__main__":
    main()
