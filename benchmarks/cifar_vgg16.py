"""Train VGG-16 with batch norm on CIFAR-10, for the benchmarks that prune it.

Run: python -m benchmarks.cifar_vgg16 --width 0.5 --epochs 8 --out runs/cifar_vgg16.safetensors
"""

from __future__ import annotations

import os
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch.nn.functional import cross_entropy

from benchmarks.cifar_resnet56 import top1
from benchmarks.common import CifarVGG, arguments, augmented, cifar10, header


def main() -> None:
    """Train with one cycle of the learning rate; print a line for each epoch; save the last weights."""
    parser = arguments("Train VGG-16 with batch norm on CIFAR-10.")
    parser.add_argument("--width", type=float, default=1.0, help="factor on all widths")
    parser.add_argument("--epochs", type=int, default=30)
    parser.add_argument("--lr", type=float, default=0.1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--precision", choices=["no", "bf16"], default="no")
    parser.add_argument("--out", type=Path, default=Path("runs/cifar_vgg16.safetensors"))
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    header(f"CIFAR-10 VGG-16 with batch norm, {args.width:g} of its width")
    images, labels = cifar10(args.data, "train")
    test_images, test_labels = cifar10(args.data, "test")
    model = CifarVGG(args.width).to(memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(
        model.parameters(), lr=args.lr, momentum=0.9, weight_decay=5e-4, nesterov=True
    )
    steps = args.epochs * len(augmented(images, labels, 128, 0))
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, args.lr, total_steps=steps)
    for epoch in range(1, args.epochs + 1):
        model.train()
        for inputs, targets in augmented(images, labels, 128, args.seed * 1000 + epoch):
            optimizer.zero_grad()
            with torch.autocast("cpu", torch.bfloat16, enabled=args.precision == "bf16"):
                loss = cross_entropy(model(inputs), targets, label_smoothing=0.05)
            loss.backward()
            optimizer.step()
            schedule.step()
        print(
            f"epoch {epoch}: loss {loss.item():.4f}, top-1 {top1(model, test_images, test_labels):.4f}",
            flush=True,
        )
        args.out.parent.mkdir(parents=True, exist_ok=True)
        partial = args.out.with_suffix(".partial")
        save_file({name: tensor.contiguous() for name, tensor in model.state_dict().items()}, partial)
        os.replace(partial, args.out)


if __name__ == "__main__":
    main()
