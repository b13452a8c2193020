"""MobileNetV2 with its linear streams cut: single channels that stay, against the best combinations of all.

Run: python -m benchmarks.streams --threads 1 [--images 200] [--ridge 1e-3] [--kept 0.9] [--share 0.8 0.6]

ImageNet weights on photographs of cats and dogs, no labels: how often the smaller network gives the same
of 1,000 classes as the whole one. The first rows cut all seven streams to a share of their channels and
nothing else, the others the whole network to a share of its MACs: with one share of each group, and with
shares by reconstruction error. Units leave in the order of reconstruction. Each row is repaired twice, with
no streams found and as is done by default; nothing is trained.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from unittest.mock import patch

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torchvision.datasets import ImageFolder
from torchvision.models import mobilenet_v2
from torchvision.transforms import v2

import secateurs
from benchmarks.common import arguments, header
from secateurs.recovery import repair

WAYS: dict[str, Callable[[], AbstractContextManager[object]]] = {
    "channels": lambda: patch("secateurs.recovery.combining.streams_in", return_value=()),
    "combinations": nullcontext,
}


def photographs(folder: Path, size: int, most: int) -> Tensor:
    """Images of both classes in turn, ``(N, 3, size, size)``."""
    steps = [v2.Resize(size), v2.CenterCrop(size), v2.PILToTensor(), v2.ToDtype(torch.float32, scale=True)]
    steps.append(v2.Normalize([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]))
    images = ImageFolder(str(folder), v2.Compose(steps))
    places = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))[:most].tolist()
    return torch.stack([images[place][0] for place in places])


@torch.no_grad()
def classes(model: nn.Module, images: Tensor) -> Tensor:
    """What the network says; ``(N,)``."""
    model.eval()
    return torch.cat([model(some).argmax(1) for some in images.split(50)])


def main() -> None:
    """Print a line for each cut."""
    parser = arguments("Linear streams, cut to channels and to combinations.")
    parser.add_argument("--size", type=int, default=160, help="pixels")
    parser.add_argument("--images", type=int, default=200, help="images to rank and repair on")
    parser.add_argument("--ridge", type=float, help="instead of the one that is chosen")
    parser.add_argument("--kept", type=float, nargs="*", default=[0.9, 0.75], help="of the channels")
    parser.add_argument("--share", type=float, nargs="*", default=[0.8, 0.6], help="of the MACs")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    header(
        f"MobileNetV2 at {args.size} pixels, {args.images} images to rank and repair on, ridge {args.ridge}"
    )
    model = mobilenet_v2()
    model.load_state_dict(load_file(args.data / "weights" / "mobilenet_v2_imagenet.safetensors"))
    model.eval()
    some = list(photographs(args.data / "catsdogs" / "train", args.size, args.images).split(25))
    tested = photographs(args.data / "catsdogs" / "test", args.size, 10_000)
    wanted = classes(model, tested)
    graph = secateurs.trace(model, some[0][:2])
    scores = secateurs.score(model, graph, "reconstruction", data=some)
    streams = [each for each in graph.groups if each.name.count(".") == 3]  # such as features.2.conv.2
    plans = {}
    for part in args.kept:
        gone = {each: round((1 - part) * each.size) for each in streams}
        removed = {each.name: scores[each.name].argsort()[:count].tolist() for each, count in gone.items()}
        plans[f"streams to {part:.0%}"] = secateurs.Plan.of(graph, removed)
    for part in args.share:
        budget = secateurs.Budget(macs=part)
        plans[f"one share, {part:.0%} of the MACs"] = secateurs.plan(graph, scores, budget, scope="local")
        plans[f"by error, {part:.0%} of the MACs"] = secateurs.plan(graph, scores, budget, allocation="error")
    print("| | cut | channels | combinations | seconds |\n|" + " --- |" * 5)
    for name, plan in plans.items():
        small = secateurs.apply(model, plan)
        cells = [f"{(classes(small, tested) == wanted).float().mean():.1%}"]
        for within in WAYS.values():
            small, started = secateurs.apply(model, plan), time.process_time()
            with within():
                repair(model, small, plan, some, ridge=args.ridge)
            seconds = time.process_time() - started
            cells.append(f"{(classes(small, tested) == wanted).float().mean():.1%}")
        print(f"| {name} | {' | '.join(cells)} | {seconds:.0f} |", flush=True)


if __name__ == "__main__":
    main()
