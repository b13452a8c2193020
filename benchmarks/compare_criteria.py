"""Every criterion judged by the oracle: CIFAR-10 ResNet-56, VGG-16 with batch norm, a run of cats and dogs.

ResNet-56 has its published weights, VGG-16 those of benchmarks/cifar_vgg16.py; cats and dogs is the run
directory that benchmarks/catsdogs.py leaves.

Run: python -m benchmarks.compare_criteria resnet56 --threads 1 [--images 200] [--units 300]
     python -m benchmarks.compare_criteria vgg16 --weights runs/cifar_vgg16.safetensors --width 0.5
     python -m benchmarks.compare_criteria run --weights runs/catsdogs/trained
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import secateurs
from benchmarks.common import CifarResNet, CifarVGG, arguments, cifar10, header
from secateurs import files
from secateurs.cli.compare import as_text
from secateurs.jobs import CompareSettings, compare_job
from secateurs.judging import sample_units
from secateurs.report import correlation_chart, ranks_chart

_PAPER = "the paper, VGG-16 on Birds-200, within layers: Taylor .73, mean activation .56, weights .27"


def main() -> None:
    """Print the table; write it and the pictures to a folder."""
    parser = arguments("Judge every criterion by the oracle.")
    parser.add_argument("network", choices=["resnet56", "vgg16", "run"])
    parser.add_argument("--weights", type=Path, help="weights of VGG-16, or the run directory")
    parser.add_argument("--width", type=float, default=1.0, help="width of VGG-16")
    parser.add_argument("--images", type=int, default=200, help="training images")
    parser.add_argument("--batch", type=int, default=100)
    parser.add_argument("--units", type=int, help="units of a sample; all if not given")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("runs/compare"))
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    header(f"Criteria against the oracle: {args.network}, {args.images} images, {args.units or 'all'} units")
    if args.network == "run":
        settings = CompareSettings(
            source=str(args.weights), images=args.images, units=args.units, batch_size=args.batch,
            threads=args.threads, seed=args.seed,
        )  # fmt: skip
        print(as_text(compare_job(settings, args.out, resume=True)))
    else:
        print(as_text(of_cifar(args)))
    print(_PAPER)


def of_cifar(args: Any) -> dict[str, Any]:
    """The comparison on training images of CIFAR-10."""
    model = network(args).eval()
    images, labels = cifar10(args.data, "train")
    chosen = torch.randperm(len(images), generator=torch.Generator().manual_seed(args.seed))[: args.images]
    data: list[tuple[Tensor, Tensor]] = [(images[part], labels[part]) for part in chosen.split(args.batch)]
    graph = secateurs.trace(model, images[:2])
    units = sample_units(graph, args.units, seed=args.seed)
    found = secateurs.oracle(model, graph, data=data, loss_fn=cross_entropy, units=units)
    print(f"{found}, {found.seconds:.0f} s", flush=True)
    judged = secateurs.compare(model, graph, data=data, loss_fn=cross_entropy, found=found, seed=args.seed)
    facts = judged.to_dict()
    args.out.mkdir(parents=True, exist_ok=True)
    title = f"CIFAR-10 {args.network}: {facts['units']} units, {facts['examples']} images"
    correlation_chart(facts["criteria"], args.out / f"{args.network}.png", title=title)
    ranks_chart(list(judged.units()), args.out / f"{args.network}-ranks.png", title=title)
    files.write_json(args.out / f"{args.network}.json", facts)
    return facts


def network(args: Any) -> nn.Module:
    """The network with its weights."""
    if args.network == "vgg16":
        if args.weights is None:
            raise SystemExit("train VGG-16 first: python -m benchmarks.cifar_vgg16; then pass --weights")
        model: nn.Module = CifarVGG(args.width)
        model.load_state_dict(load_file(args.weights))
        return model
    model = CifarResNet(56)
    lacking = model.load_state_dict(
        load_file(args.data / "weights" / "cifar_resnet56.safetensors"), strict=False
    )
    assert all(name.endswith("num_batches_tracked") for name in lacking.missing_keys)
    return model


if __name__ == "__main__":
    main()
