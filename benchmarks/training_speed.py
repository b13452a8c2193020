"""What a step of training costs: a loop written by hand against `finetune`, in either memory layout.

Run: python -m benchmarks.training_speed [--networks resnet18,mobilenet_v2] [--threads 1] [--size 160]

All ways take turns, step by step in rounds, so that what else the machine does falls on each alike. A line
gives the median of CPU milliseconds an image, and the ratio to the loop written by hand.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from itertools import pairwise

import torch
import torchvision
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from benchmarks.common import arguments, header
from secateurs.progress import Event
from secateurs.recovery import Recipe, finetune

Times = list[float]


def by_hand(model: nn.Module, batches: list[tuple[Tensor, Tensor]], precision: str) -> Times:
    """CPU seconds of each step but the first."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.001, momentum=0.9)
    model.train()
    ends = []
    for inputs, targets in batches:
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            loss = cross_entropy(model(inputs), targets)
        loss.backward()
        optimizer.step()
        ends.append(time.process_time())
    return [after - before for before, after in pairwise(ends)]


def by_finetune(
    model: nn.Module, batches: list[tuple[Tensor, Tensor]], precision: str, channels_last: bool | None
) -> Times:
    """The same, of the built-in loop."""
    ends = []

    def watch(event: Event) -> None:
        if event.name == "batch":
            ends.append(time.process_time())

    recipe = Recipe(epochs=1, lr=0.001, precision=precision, channels_last=channels_last)
    finetune(model, batches, recipe=recipe, observer=watch)
    return [after - before for before, after in pairwise(ends)]


def main() -> None:
    """Print a line for each network, precision and way."""
    parser = arguments("Speed of training.")
    parser.add_argument("--networks", default="resnet18,mobilenet_v2,vgg11_bn")
    parser.add_argument("--size", type=int, default=160, help="pixels")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    header(f"Training, images of {args.size} pixels, batches of {args.batch_size}")
    torch.manual_seed(0)
    images = torch.randn(args.batch_size, 3, args.size, args.size)
    batches = [(images, torch.arange(args.batch_size) % 2)] * 3
    for name in args.networks.split(","):
        for precision in ("no", "bf16"):
            ways: dict[str, Callable[[nn.Module], Times]] = {
                "by hand": lambda model, p=precision: by_hand(model, batches, p),
                "finetune, channels_last=False": lambda model, p=precision: by_finetune(
                    model, batches, p, False
                ),
                "finetune": lambda model, p=precision: by_finetune(model, batches, p, None),
            }
            found: dict[str, Times] = {way: [] for way in ways}
            for _ in range(args.rounds):
                for way, run in ways.items():
                    found[way] += run(torchvision.models.get_model(name, weights=None, num_classes=2))
            base = statistics.median(found["by hand"])
            for way, seconds in found.items():
                each = statistics.median(seconds)
                print(
                    f"{name}, precision {precision}, {way}: {1000 * each / args.batch_size:.1f} ms an image, "
                    f"{each / base:.2f} of the loop by hand",
                    flush=True,
                )


if __name__ == "__main__":
    main()
