"""CIFAR-10 ResNet-56: which units leave inside a block, and how many of each; then a repair without labels.

Run: python benchmarks/allocation.py [--macs 0.469] [--images 2000] [--threads 1]
"""

from __future__ import annotations

import time

import torch
from safetensors.torch import load_file

import secateurs
from benchmarks.cifar_resnet56 import top1
from benchmarks.common import CifarResNet, arguments, cifar10, header
from secateurs.recovery import repair

ROWS = (
    ("l2", "share"),
    ("l2", "error"),
    ("thinet", "share"),
    ("reconstruction", "share"),
    ("reconstruction", "error"),
)


def main() -> None:
    """Print a row for each ranking and allocation, after the cut and after the repair."""
    parser = arguments("Shares by one number or by error curves; units by norm, ThiNet or elimination.")
    parser.add_argument("--macs", type=float, default=1 / 2.13, help="share of MACs that remains")
    parser.add_argument("--images", type=int, default=2000, help="unlabelled training images")
    parser.add_argument("--tested", type=int, default=3000, help="test images")
    parser.add_argument("--rows", default=",".join("/".join(row) for row in ROWS), help="ranking/allocation")
    parser.add_argument("--how", default="reconstruct", help="see secateurs.recovery.repair")
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    header("CIFAR-10 ResNet-56: units and shares by reconstruction error")

    images, _ = cifar10(args.data, "train")
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(args.seed))
    batches = list(images[order[: args.images]].split(100))
    test_x, test_y = (each[: args.tested] for each in cifar10(args.data, "test"))
    model = CifarResNet(56)
    model.load_state_dict(load_file(args.data / "weights" / "cifar_resnet56.safetensors"), strict=False)
    model.eval()
    graph = secateurs.trace(model, test_x[:2])
    base = top1(model, test_x, test_y)
    print(f"base: top-1 {base:.4f} on {len(test_y)} test images, {args.images} to repair on", flush=True)

    rows = [tuple(row.split("/")) for row in args.rows.split(",")]
    known: dict[str, secateurs.Scores] = {}
    for name in dict.fromkeys([ranking for ranking, _ in rows] + ["reconstruction"] * ("error" in args.rows)):
        started = time.process_time()
        known[name] = secateurs.score(model, graph, name, data=batches)
        print(f"{name}: scored in {time.process_time() - started:.1f} s of CPU", flush=True)
    for ranking, shares in rows:
        curves = known["reconstruction"] if shares == "error" else None
        plan = secateurs.plan(
            graph,
            known[ranking],
            secateurs.Budget(macs=args.macs),
            scope="local",
            allocation=curves,
            skip=["conv1"],  # the stream keeps its width
        )
        small = secateurs.apply(model, plan)
        cut, started = top1(small, test_x, test_y), time.process_time()
        repair(model, small, plan, batches, how=args.how)
        seconds = time.process_time() - started
        macs = plan.after.macs / plan.before.macs
        print(
            f"{ranking:>15} units, shares by {shares:5}: MACs {macs:.3f}, cut {cut:.4f}, "
            f"after {args.how} {top1(small, test_x, test_y):.4f} ({seconds:.1f} s of CPU)",
            flush=True,
        )


if __name__ == "__main__":
    main()
