"""CIFAR-10 ResNet-56 to half of its MACs: accuracy before, after the cut, and after a short fine-tune.

Run: python benchmarks/cifar_resnet56.py [--epochs 2] [--steps 5]
"""

from __future__ import annotations

import time

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import secateurs
from benchmarks.common import arguments, augmented, cifar10, header, pretrained
from secateurs.recovery import Recipe, finetune


def top1(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    """The share of images whose largest output is their label."""
    model.eval()
    with torch.no_grad():
        right = sum(
            int((model(x).argmax(1) == y).sum())
            for x, y in zip(images.split(500), labels.split(500), strict=True)
        )
    return right / len(labels)


def main() -> None:
    """Print one line for each step and a table at the end."""
    parser = arguments("Prune CIFAR-10 ResNet-56 to half of its MACs.")
    parser.add_argument("--macs", type=float, default=0.5, help="share of MACs that remains")
    parser.add_argument("--steps", type=int, default=5, help="prune-and-recover rounds")
    parser.add_argument("--epochs", type=float, default=1.0, help="epochs after the last cut")
    parser.add_argument("--between", type=int, default=50, help="batches of 128 after each cut but the last")
    parser.add_argument("--lr", type=float, default=0.02)
    parser.add_argument("--criterion", default="taylor")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    header("CIFAR-10 ResNet-56: rank, cut, verify, fine-tune")

    train_x, train_y = cifar10(args.data, "train")
    test_x, test_y = cifar10(args.data, "test")
    order = torch.randperm(len(train_x), generator=torch.Generator().manual_seed(1))
    held, used = order[:2500], order[2500:]
    model = pretrained(args.data, 56)
    base = top1(model, test_x, test_y)
    print(f"before: top-1 {base:.4f} on {len(test_y)} test images (published 0.9339 on all 10,000)")

    ranking = [(train_x[used[i : i + 100]], train_y[used[i : i + 100]]) for i in range(0, 2000, 100)]
    started = time.perf_counter()
    steps = secateurs.prune_steps(
        model,
        test_x[:2],
        criterion=args.criterion,
        budget=secateurs.Budget(macs=args.macs),
        steps=args.steps,
        data=ranking, loss_fn=cross_entropy,
    )  # fmt: skip
    for step in steps:
        params, macs = step.plan.after.params, step.plan.after.macs
        cut = top1(step.model, train_x[held], train_y[held])
        last = step.number == args.steps
        images = used if last else used[torch.randperm(len(used))[: args.between * 128]]
        epochs = args.epochs if last else 1
        step.model.train()
        finetune(
            step.model,
            lambda seed, images=images: augmented(train_x[images], train_y[images], 128, seed),
            recipe=Recipe(
                epochs=max(1, round(epochs)), lr=args.lr, weight_decay=5e-4, seed=args.seed + step.number
            ),
        )
        healed = top1(step.model, train_x[held], train_y[held])
        print(
            f"step {step.number}: {len(step.plan)} units leave, {params:,} params, {macs / 1e6:.1f} M MACs, "
            f"validation {cut:.4f} -> {healed:.4f} after fine-tuning, {time.perf_counter() - started:.0f} s; "
            f"{step.verified}"
        )
        final = step
    after = top1(final.model, test_x, test_y)
    graph = secateurs.trace(model, test_x[:1])
    whole = graph.cost()
    print(
        f"after: top-1 {after:.4f} ({after - base:+.4f}), "
        f"params {final.plan.after.params / whole.params:.1%}, "
        f"MACs {final.plan.after.macs / whole.macs:.1%} of {whole.macs / 1e6:.1f} M remain"
    )


if __name__ == "__main__":
    main()
