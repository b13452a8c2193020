"""MobileNetV2 with its linear streams cut: single channels that stay, against the best combinations of all.

Run: python -m benchmarks.streams --threads 1 [--kept 0.9 0.75 0.5] [--share 0.8 0.65 0.5]

ImageNet weights on photographs of cats and dogs, no labels: how often the smaller network gives the same
of 1,000 classes as the whole one. The first table cuts all seven streams to a share of their channels and
nothing else, the second the whole network to a share of its MACs, units and shares by reconstruction error.
Each row is repaired twice, with no streams found and as is done by default; nothing is trained.
"""

from __future__ import annotations

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
    """Print both tables."""
    parser = arguments("Linear streams, cut to channels and to combinations.")
    parser.add_argument("--size", type=int, default=160, help="pixels")
    parser.add_argument("--images", type=int, default=500, help="images to rank and repair on")
    parser.add_argument("--kept", type=float, nargs="*", default=[0.9, 0.75, 0.5], help="of the channels")
    parser.add_argument("--share", type=float, nargs="*", default=[0.8, 0.65, 0.5], help="of the MACs")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    header(f"MobileNetV2 at {args.size} pixels, {args.images} images to rank and repair on")
    model = mobilenet_v2()
    model.load_state_dict(load_file(args.data / "weights" / "mobilenet_v2_imagenet.safetensors"))
    model.eval()
    some = list(photographs(args.data / "catsdogs" / "train", args.size, args.images).split(25))
    tested = photographs(args.data / "catsdogs" / "test", args.size, 10_000)
    wanted = classes(model, tested)
    graph = secateurs.trace(model, some[0][:2])
    scores: dict[str, secateurs.Scores] = {}
    for way, within in WAYS.items():
        with within():
            scores[way] = secateurs.score(model, graph, "reconstruction", data=some)

    def row(name: str, plans: dict[str, secateurs.Plan]) -> None:
        cells = []
        for way, plan in plans.items():
            small = secateurs.apply(model, plan)
            cells.append(f"{(classes(small, tested) == wanted).float().mean():.1%}")
            with WAYS[way]():
                repair(model, small, plan, some)
            cells.append(f"{(classes(small, tested) == wanted).float().mean():.1%}")
        print(f"| {name} | {' | '.join(cells)} |", flush=True)

    for title, parts in (("of the streams", args.kept), ("of the MACs", args.share)):
        print(f"\n| {title} | channels: cut | repaired | combinations: cut | repaired |")
        print("|" + " --- |" * 5)
        for part in parts:
            plans = {}
            for way, own in scores.items():
                if title == "of the MACs":
                    plans[way] = secateurs.plan(graph, own, secateurs.Budget(macs=part), allocation="error")
                else:
                    streams = [
                        each for each in graph.groups if each.name.count(".") == 3
                    ]  # features.2.conv.2
                    removed = {
                        each.name: own[each.name].argsort()[: round((1 - part) * each.size)].tolist()
                        for each in streams
                    }
                    plans[way] = secateurs.Plan.of(graph, removed)
            row(f"{part:.0%}", plans)


if __name__ == "__main__":
    main()
