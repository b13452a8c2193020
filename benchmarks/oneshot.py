"""`secateurs.prune` with nothing but a model, images and a budget: accuracy before and after, and seconds.

Run: python -m benchmarks.oneshot --threads 1 [--network resnet56] [--macs 0.75 0.47] [--images 2000]

CIFAR-10, unlabelled training images, all test images that are there. Nothing is skipped: the widths of the
residual streams may change too.
"""

from __future__ import annotations

import time

import torch

import secateurs
from benchmarks.cifar_resnet56 import top1
from benchmarks.common import arguments, cifar10, header, pretrained


def main() -> None:
    """Print a line for each budget and seed."""
    parser = arguments("One call on a CIFAR-10 network.")
    parser.add_argument("--network", choices=["resnet20", "resnet56"], default="resnet56")
    parser.add_argument("--macs", type=float, nargs="+", default=[0.75, 0.47], help="shares that remain")
    parser.add_argument("--images", type=int, default=2000)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    header(f"secateurs.prune on CIFAR-10 {args.network}, {args.images} unlabelled images")
    images, _ = cifar10(args.data, "train")
    tested = cifar10(args.data, "test")
    model = pretrained(args.data, int(args.network.removeprefix("resnet")))
    print(f"base {top1(model, *tested):.4f} on {len(tested[1])} test images", flush=True)
    for seed in args.seeds:
        order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))
        batches = images[order[: args.images]].split(100)
        for share in args.macs:
            started = time.process_time()
            step = secateurs.prune(model, batches, secateurs.Budget(macs=share), images=args.images)
            seconds = time.process_time() - started
            right = top1(step.model, *tested)
            print(f"seed {seed}, macs={share:g}: top-1 {right:.4f}, {seconds:.0f} s of CPU; {step.plan}; "
                  f"{step.verified}", flush=True)  # fmt: skip


if __name__ == "__main__":
    main()
