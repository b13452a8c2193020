"""A small vision transformer with mixtures of experts, cut and repaired.

Run: python -m benchmarks.mixture [--threads 1] [--epochs 3] [--share 0.7 0.5]

Trained on CIFAR-10: each of 64 tokens goes to the best two of eight experts in each of four blocks. The same
weights are cut twice: as experts that are modules, each with a width of its own, and as stacked weights that
one call of ``grouped_mm`` multiplies with, where all experts of a block have one width. The stream's width
stays. Units and shares by reconstruction error, and one share by L2 norm; repaired, not trained. "Other
experts" says how many tokens of the test images go to other two experts in the last block than before.
"""

from __future__ import annotations

import copy
import time
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.functional import cross_entropy, gelu

import secateurs
from benchmarks.attention import Block, Transformer
from benchmarks.cifar_resnet56 import top1
from benchmarks.common import arguments, cifar10, from_scratch, header
from secateurs.recovery import repair

BEST = 2


class Modules(nn.Module):
    """Experts that are modules, one after the other."""

    def __init__(self, width: int, hidden: int, count: int) -> None:
        super().__init__()
        self.gate = nn.Linear(width, count)
        self.experts = nn.ModuleList(
            nn.Sequential(nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, width)) for _ in range(count)
        )

    def forward(self, x: Tensor) -> Tensor:
        shares, chosen = self.gate(x).softmax(-1).topk(BEST, -1)
        out = torch.zeros_like(x)
        for number, expert in enumerate(self.experts):
            rows, rank = torch.where(chosen == number)
            if len(rows):
                out = out.index_add(0, rows, shares[rows, rank][:, None] * expert(x[rows]))
        return out


class Grouped(nn.Module):
    """The same with stacked weights."""

    def __init__(self, like: Modules) -> None:
        super().__init__()
        self.gate = copy.deepcopy(like.gate)
        pairs = [(expert[0], expert[2]) for expert in like.experts]  # type: ignore[index]
        self.up, self.down = (
            nn.Parameter(torch.stack([pair[side].weight.detach().T for pair in pairs])) for side in (0, 1)
        )
        self.up_bias, self.down_bias = (
            nn.Parameter(torch.stack([pair[side].bias.detach() for pair in pairs])) for side in (0, 1)
        )

    def forward(self, x: Tensor) -> Tensor:
        shares, chosen = self.gate(x).softmax(-1).topk(BEST, -1)
        expert, order = chosen.flatten().sort(stable=True)
        rows = order // BEST
        ends = torch.bincount(expert, minlength=len(self.up)).cumsum(0).to(torch.int32)
        hidden = gelu(functional.grouped_mm(x[rows], self.up, offs=ends) + self.up_bias[expert])
        given = functional.grouped_mm(hidden, self.down, offs=ends) + self.down_bias[expert]
        return torch.zeros_like(x).index_add(0, rows, shares.flatten()[order][:, None] * given)


class MixtureBlock(Block):
    """Attention, and a mixture in place of the two layers."""

    def __init__(self, width: int, heads: int, count: int) -> None:
        super().__init__(width, heads)
        del self.up, self.down
        self.mixture: nn.Module = Modules(width, width, count)

    def feed(self, x: Tensor) -> Tensor:
        """What the mixture gives for each token."""
        given: Tensor = self.mixture(x.flatten(0, 1))
        return given.view(x.shape)


def network(count: int = 8) -> Transformer:
    """The transformer of `benchmarks.attention` with mixtures."""
    model = Transformer()
    width, heads = model.norm.weight.numel(), model.blocks[0].heads  # type: ignore[union-attr]
    model.blocks = nn.Sequential(*(MixtureBlock(width, int(heads), count) for _ in model.blocks))
    return model


def grouped(model: nn.Module) -> nn.Module:
    """The same network with stacked weights."""
    other = copy.deepcopy(model)
    for block in other.blocks:  # type: ignore[union-attr]
        block.mixture = Grouped(block.mixture)  # type: ignore[union-attr,arg-type]
    return other.eval()


@torch.no_grad()
def chosen(model: nn.Module, images: Tensor) -> Tensor:
    """The experts of each token in the last block, ascending."""
    found: list[Tensor] = []
    gate = model.blocks[-1].mixture.gate  # type: ignore[union-attr,index]
    handle = gate.register_forward_hook(
        lambda _, __, out: found.append(out.topk(BEST, -1).indices.sort(-1).values)
    )
    for part in images.split(500):
        model(part)
    handle.remove()
    return torch.cat(found)


def main() -> None:
    """Train, cut and repair, and print a line for each way to write the experts and each share."""
    parser = arguments("Mixtures of experts, cut and repaired.")
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--images", type=int, default=1000, help="images to rank and repair on")
    parser.add_argument("--share", type=float, nargs="+", default=[0.7, 0.5], help="of the MACs, that remain")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    header(f"CIFAR-10, mixtures of experts, {args.images} images to rank and repair on")
    images, labels = cifar10(args.data, "train")
    some = list(zip(images[: args.images].split(100), labels[: args.images].split(100), strict=True))
    tested = cifar10(args.data, "test")
    torch.manual_seed(0)
    model = from_scratch(network(), args.data, args.epochs, lr=2e-3)
    print(f"whole: {top1(model, *tested):.1%} on {len(tested[1])} test images")
    columns = ["MACs", "units by", "cut", "constants", "reconstruction", "other experts", "left"]
    print("| experts | " + " | ".join(columns) + " |\n|" + " --- |" * 8)
    for kind, whole in (("modules", model), ("stacked", grouped(model))):
        graph = secateurs.trace(whole, images[:100])
        for criterion in ("reconstruction", "l2"):
            scores = secateurs.score(whole, graph, criterion, data=some, loss_fn=cross_entropy)
            for share in args.share:
                row = cut_and_repaired(whole, graph, scores, share, some, tested)
                print(f"| {kind} | {share:.0%} | {criterion} | {' | '.join(row)} |", flush=True)


def cut_and_repaired(
    whole: nn.Module, graph: Any, scores: Any, share: float, some: list[Any], tested: Any
) -> list[str]:
    """The accuracy after the cut and after two repairs, and what the second one did."""
    allocation = "error" if scores.curves else None
    stream = [g.name for g in graph.groups if any(part.parameter == "norm.weight" for part in g.slices)]
    plan = secateurs.plan(
        graph,
        scores,
        secateurs.Budget(macs=share),
        scope="local",
        allocation=allocation,
        skip=stream,
    )
    small = secateurs.apply(whole, plan)
    row = [f"{top1(small, *tested):.1%}"]
    for how in ("compensate", "reconstruct"):
        healed, started = copy.deepcopy(small), time.process_time()
        done = repair(whole, healed, plan, some, how=how)
        row.append(f"{top1(healed, *tested):.1%} ({time.process_time() - started:.0f} s)")
    moved = (chosen(whole, tested[0]) != chosen(healed, tested[0])).any(-1).double().mean()
    return [*row, f"{moved:.1%}", str(len(done.left))]


if __name__ == "__main__":
    main()
