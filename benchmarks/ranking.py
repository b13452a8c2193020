"""What ranking by Taylor costs over a plain forward and backward pass on the same data.

Beside it the article's hook loop (on models whose features are one chain) and Torch-Pruning's first-order
importance (weights form). All contenders of a model take turns in one process, and a ratio is the median over
the rounds, so that other load on the machine falls on all of them alike.

Run: python -m benchmarks.ranking [--models resnet50 vgg16] [--batch 16] [--batches 4] [--rounds 5]
"""

from __future__ import annotations

import importlib.util
import statistics
import time
from collections.abc import Callable
from typing import Any, TypeAlias

import torch
import torchvision
from torch import Tensor, nn
from torch.nn import functional

import secateurs
from benchmarks.common import arguments, header

Data: TypeAlias = list[tuple[Tensor, Tensor]]
Contender: TypeAlias = Callable[[], Any]
LOSS = functional.cross_entropy
ACTIVATIONS = ["mean-activation", "std-activation", "apoz"]


def contenders(name: str, model: nn.Module, data: Data) -> dict[str, Contender]:
    """What is timed, by name; the first is the plain pass."""
    graph = secateurs.trace(model, data[0][0][:1])
    every = ["taylor", "taylor-elementwise", "taylor-signed", "fisher", "gradient", *ACTIVATIONS]
    found: dict[str, Contender] = {
        "plain": lambda: plain(model, data),
        "plain, frozen": lambda: plain(model, data, frozen=True),
        "taylor": lambda: secateurs.score(model, graph, "taylor", data=data, loss_fn=LOSS),
        "taylor-2019": lambda: secateurs.score(model, graph, "taylor-2019", data=data, loss_fn=LOSS),
        "8 criteria": lambda: secateurs.score(model, graph, every, data=data, loss_fn=LOSS),
        "3 of activations": lambda: secateurs.score(model, graph, ACTIVATIONS, data=data),
    }
    if isinstance(getattr(model, "features", None), nn.Sequential) and name.startswith(("vgg", "alexnet")):
        found["article's hooks"] = lambda: hook_loop(model, data)
    if importlib.util.find_spec("torch_pruning"):
        groups = torch_pruning_groups(model, data[0][0][:1])
        found["torch-pruning"] = lambda: torch_pruning_taylor(model, data, groups)
    return found


def plain(model: nn.Module, data: Data, *, frozen: bool = False) -> None:
    """Forward and backward, with gradients of all parameters, or of activations alone."""
    model.requires_grad_(not frozen)
    for inputs, labels in data:
        LOSS(model(inputs.clone().requires_grad_(frozen)), labels).backward()
    model.zero_grad()
    model.requires_grad_(True)


def hook_loop(model: nn.Module, data: Data) -> dict[int, Tensor]:
    """The article's way: layer by layer, a hook on each convolution's output, signed means summed up."""
    ranks: dict[int, Tensor] = {}
    for inputs, labels in data:
        x, activations = inputs, []
        for layer in model.features:
            x = layer(x)
            if isinstance(layer, nn.Conv2d):
                place = len(activations)
                x.register_hook(lambda g, place=place, kept=activations: _rank(ranks, place, kept[place], g))
                activations.append(x)
        LOSS(model.classifier(model.avgpool(x).flatten(1)), labels).backward()
    model.zero_grad()
    return {place: values.abs() / values.norm() for place, values in ranks.items()}


def _rank(ranks: dict[int, Tensor], place: int, activation: Tensor, gradient: Tensor) -> None:
    with torch.no_grad():
        values = (activation * gradient).sum(dim=(0, 2, 3))
        values /= activation.shape[0] * activation.shape[2] * activation.shape[3]
        ranks[place] = ranks.get(place, 0) + values


def torch_pruning_groups(model: nn.Module, image: Tensor) -> list[Any]:
    """Torch-Pruning's groups; finding them is not timed."""
    import torch_pruning as tp

    found = tp.DependencyGraph().build_dependency(model, example_inputs=image)
    heads = [m for m in model.modules() if isinstance(m, nn.Linear) and m.out_features == 1000]
    return list(found.get_all_groups(ignored_layers=heads, root_module_types=[nn.Conv2d, nn.Linear]))


def torch_pruning_taylor(model: nn.Module, data: Data, groups: list[Any]) -> list[Tensor]:
    """Gradients of all weights, summed over the batches, then first-order importance of every group."""
    import torch_pruning as tp

    model.zero_grad()
    for inputs, labels in data:
        LOSS(model(inputs), labels).backward()
    importance = tp.importance.GroupTaylorImportance()
    scores = [importance(group) for group in groups]
    model.zero_grad()
    return scores


def main() -> None:
    """Print a line a model and contender: seconds of the fastest round, and times the plain pass."""
    parser = arguments("Cost of ranking over a plain forward and backward pass.")
    parser.add_argument("--models", nargs="+", default=["resnet50", "vgg16", "mobilenet_v2"])
    parser.add_argument("--batch", type=int, default=16, help="images in a batch")
    parser.add_argument("--batches", type=int, default=4)
    parser.add_argument("--size", type=int, default=224, help="side of an image")
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    header(f"{args.batches} batches of {args.batch} images of {args.size} pixels, {args.rounds} rounds")
    print(f"{'model':14s} {'contender':18s} {'seconds':>8s}   times the plain pass (lowest to highest)")
    for name in args.models:
        torch.manual_seed(0)
        model = torchvision.models.get_model(name, weights=None).eval()
        shape = (args.batch, 3, args.size, args.size)
        data = [(torch.randn(shape), torch.randint(1000, (args.batch,))) for _ in range(args.batches)]
        for each, (seconds, ratios) in timed(contenders(name, model, data), args.rounds).items():
            spread = f"({min(ratios):.2f} to {max(ratios):.2f})"
            print(
                f"{name:14s} {each:18s} {seconds:8.2f}   {statistics.median(ratios):5.2f} {spread}",
                flush=True,
            )


def timed(found: dict[str, Contender], rounds: int) -> dict[str, tuple[float, list[float]]]:
    """Fewest seconds, and ratios to the first contender, round by round; one round before is not counted."""
    seconds: dict[str, list[float]] = {name: [] for name in found}
    for _ in range(rounds + 1):
        for name, run in found.items():
            started = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - started)
    first = next(iter(seconds.values()))[1:]
    return {
        name: (min(mine[1:]), [a / b for a, b in zip(mine[1:], first, strict=True)])
        for name, mine in seconds.items()
    }


if __name__ == "__main__":
    main()
