"""Trace, plan and apply at half width, beside Torch-Pruning in the same run.

Run: python -m benchmarks.surgery_speed [--models vgg16 resnet50 ...] [--repeats 5]
Needs the `bench` extra for the comparison.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import time

import torch
import torchvision

import secateurs
from benchmarks.common import arguments, header

MODELS = ["vgg16", "resnet50", "densenet201", "mobilenet_v3_large", "efficientnet_b0", "convnext_tiny"]


def ours(name: str, repeats: int) -> list[float]:
    """Seconds of each repeat; the first in this process includes what Python does only once."""
    model, image = _model(name)
    assert all((secateurs.trace, secateurs.score, secateurs.plan, secateurs.apply))  # imported at first use
    seconds = []
    for _ in range(repeats):
        started = time.perf_counter()
        graph = secateurs.trace(model, image)
        scores = secateurs.score(model, graph, "random")
        plan = secateurs.plan(graph, scores, secateurs.Budget(units=0.5), scope="local")
        secateurs.apply(model, plan)
        seconds.append(time.perf_counter() - started)
    return seconds


def theirs(name: str, repeats: int) -> list[float]:
    """The same with Torch-Pruning's documented recipe, which cuts the model in place."""
    import torch_pruning as tp

    seconds = []
    for _ in range(repeats):
        model, image = _model(name)
        ignored = [m for m in model.modules() if isinstance(m, torch.nn.Linear) and m.out_features == 1000]
        started = time.perf_counter()
        pruner = tp.pruner.MetaPruner(
            model,
            image,
            importance=tp.importance.RandomImportance(),
            pruning_ratio=0.5,
            ignored_layers=ignored,
        )
        pruner.step()
        seconds.append(time.perf_counter() - started)
    return seconds


def _model(name: str) -> tuple[torch.nn.Module, torch.Tensor]:
    torch.manual_seed(0)
    return torchvision.models.get_model(name, weights=None).eval(), torch.zeros(1, 3, 224, 224)


def _in_process(which: str, name: str, repeats: int, threads: int) -> list[float]:
    """Each measurement in a process of its own, so that neither warms the other up."""
    command = [sys.executable, "-W", "ignore", "-m", "benchmarks.surgery_speed", "--one", which, name]
    command += ["--repeats", str(repeats), "--threads", str(threads)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    if done.returncode:
        return []
    return [float(value) for value in done.stdout.split()]


def main() -> None:
    """Print a line a model: first and median seconds of both, and the ratio of the medians."""
    parser = arguments("Time of trace, plan and apply, beside Torch-Pruning.")
    parser.add_argument("--models", nargs="+", default=MODELS)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument(
        "--one", nargs=2, metavar=("WHICH", "MODEL"), help="measure one side, print seconds only"
    )
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.one:
        which, name = args.one
        print(*(ours if which == "ours" else theirs)(name, args.repeats))
        return
    header("Half width at 1x3x224x224: seconds, first call / median")
    print(f"{'model':22s} {'secateurs':>15s} {'torch-pruning':>15s}   ratio of medians")
    for name in args.models:
        mine = _in_process("ours", name, args.repeats, args.threads)
        other = _in_process("theirs", name, 3, args.threads)
        a = statistics.median(mine)
        shown = f"{other[0]:7.2f}/{statistics.median(other):6.2f}" if other else "failed"
        ratio = f"{statistics.median(other) / a:6.1f}x" if other else ""
        print(f"{name:22s} {mine[0]:8.2f}/{a:6.2f} {shown:>15s}   {ratio}", flush=True)


if __name__ == "__main__":
    main()
