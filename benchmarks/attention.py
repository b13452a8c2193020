"""A small vision transformer, cut with queries and keys left whole, and with them ranked.

Run: python -m benchmarks.attention [--threads 1] [--epochs 5] [--share 0.5 0.4 0.3] [--left 16 8 4]

Trained on CIFAR-10; the stream's width stays. Units and shares by reconstruction error, repaired, not
trained. A second table cuts the dimensions of all heads alone, of queries and keys or of values: repaired by
Secateurs; and, of queries and keys, with the kept dimensions of queries making up for the others by ridge
regression, as CORP (arXiv 2602.05243) does.
"""

from __future__ import annotations

from typing import TypeAlias

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, gelu, scaled_dot_product_attention

import secateurs
from benchmarks.cifar_resnet56 import top1
from benchmarks.common import arguments, augmented, cifar10, header
from secateurs.recovery import Recipe, finetune, repair

Batches: TypeAlias = list[tuple[Tensor, Tensor]]
Images: TypeAlias = tuple[Tensor, Tensor]


class Block(nn.Module):
    """Attention and two linear layers, each behind a layer norm."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads, self.norm1, self.norm2 = heads, nn.LayerNorm(width), nn.LayerNorm(width)
        self.query, self.key, self.value, self.out = (nn.Linear(width, width) for _ in range(4))
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm1(x)
        count, steps, _ = y.shape
        heads = (
            layer(y).view(count, steps, self.heads, -1).transpose(1, 2)
            for layer in (self.query, self.key, self.value)
        )
        x = x + self.out(scaled_dot_product_attention(*heads).transpose(1, 2).flatten(2))
        return x + self.feed(self.norm2(x))

    def feed(self, x: Tensor) -> Tensor:
        """The two layers."""
        given: Tensor = self.down(gelu(self.up(x)))
        return given


class Transformer(nn.Module):
    """Two strided convolutions, four blocks of 64 tokens, their mean."""

    def __init__(self, width: int = 96, heads: int = 3, depth: int = 4) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(3, width // 2, 3, 2, 1), nn.GELU(), nn.Conv2d(width // 2, width, 3, 2, 1)
        )
        self.positions = nn.Parameter(torch.randn(1, 64, width) * 0.02)
        self.blocks = nn.Sequential(*(Block(width, heads) for _ in range(depth)))
        self.norm, self.classify = nn.LayerNorm(width), nn.Linear(width, 10)

    def forward(self, images: Tensor) -> Tensor:
        tokens = self.stem(images).flatten(2).transpose(1, 2) + self.positions
        scores: Tensor = self.classify(self.norm(self.blocks(tokens)).mean(1))
        return scores


@torch.no_grad()
def made_up_for(model: Transformer, small: Transformer, plan: secateurs.Plan, images: Tensor) -> None:
    """Queries of the smaller network that make up for the dimensions which left, by what keys give."""
    gone = {cut.name.split("#")[0]: set(cut.removed) for cut in plan.groups}
    seen: dict[int, list[Tensor]] = {}
    handles = [
        block.key.register_forward_hook(lambda *call, place=place: seen.setdefault(place, []).append(call[2]))
        for place, block in enumerate(model.blocks)
    ]
    for some in images.split(50):
        model(some)
    for handle in handles:
        handle.remove()
    for place, (block, less) in enumerate(zip(model.blocks, small.blocks, strict=True)):
        depth = block.query.out_features // block.heads
        kept = [unit for unit in range(depth) if unit not in gone[f"blocks.{place}.query"]]
        keys = torch.cat(seen[place]).unflatten(-1, (block.heads, depth)).double()  # (N, n, heads, d)
        keys = (keys - keys.mean(1, keepdim=True)).flatten(0, 1).movedim(0, 1)
        spread = keys.mT @ keys / keys.shape[1]  # (heads, d, d)
        own = spread[:, kept][:, :, kept]
        pull = 1e-6 * own.diagonal(dim1=1, dim2=2).mean(1)[:, None, None] * torch.eye(len(kept)).double()
        mix = (len(kept) / depth) ** 0.5 * torch.linalg.solve(own + pull, spread[:, kept])  # (heads, r, d)
        for name in ("weight", "bias"):
            old = getattr(block.query, name).double().unflatten(0, (block.heads, depth))
            new = torch.einsum("hrd,hd...->hr...", mix, old).flatten(0, 1)
            getattr(less.query, name).copy_(new)


def dimensions(
    model: Transformer, scores: secateurs.Scores, left: list[int], some: Batches, tested: Images
) -> None:
    """Print a line for each number of dimensions that the heads are left."""
    graph = secateurs.trace(model, some[0][0][:2])
    depth = model.blocks[0].query.out_features // model.blocks[0].heads
    print(f"\n| left of {depth} | queries and keys: cut | as CORP | repaired | values: cut | repaired |")
    print("|" + " --- |" * 6)
    for count in left:
        cells = []
        for pattern in ("query", "value"):
            names = [g.name for g in graph.groups if pattern in g.name and g.size == depth]
            order = {name: scores[name].argsort()[: depth - count].tolist() for name in names}
            plan = secateurs.Plan.of(graph, order)
            small = secateurs.apply(model, plan)
            cells.append(f"{top1(small, *tested):.1%}")
            if pattern == "query":
                other = secateurs.apply(model, plan)
                made_up_for(model, other, plan, torch.cat([inputs for inputs, _ in some]))
                cells.append(f"{top1(other, *tested):.1%}")
            repair(model, small, plan, some)
            cells.append(f"{top1(small, *tested):.1%}")
        print(f"| {count} | {' | '.join(cells)} |", flush=True)


def main() -> None:
    """Train, and print a line for each share and for each number of dimensions."""
    parser = arguments("A vision transformer, cut with and without its queries and keys.")
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--images", type=int, default=1000, help="images to rank and repair on")
    parser.add_argument(
        "--share", type=float, nargs="+", default=[0.8, 0.6, 0.5, 0.4, 0.3], help="of the MACs"
    )
    parser.add_argument("--left", type=int, nargs="*", default=[16, 8, 4], help="dimensions of a head")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    header(f"CIFAR-10, a vision transformer, {args.images} images to rank and repair on")
    images, labels = cifar10(args.data, "train")
    tested = cifar10(args.data, "test")
    model = Transformer()
    recipe = Recipe(
        epochs=args.epochs, lr=1e-3, optimizer="adamw", weight_decay=0.05, warmup_epochs=0.5, precision="bf16"
    )
    finetune(model, lambda seed: augmented(images, labels, 128, seed), recipe=recipe)
    model.eval()
    some = list(zip(images[: args.images].split(50), labels[: args.images].split(50), strict=True))
    graph = secateurs.trace(model, images[:2])
    scores = secateurs.score(model, graph, "reconstruction", data=some, loss_fn=cross_entropy)
    print(f"{top1(model, *tested):.1%} on {len(tested[1])} test images\n")
    print("| MACs | queries and keys whole: cut | repaired | ranked: cut | repaired |\n|" + " --- |" * 5)
    for share in args.share:
        cells = []
        for skip in (["stem.2", "blocks.*.query#2"], ["stem.2"]):
            budget = secateurs.Budget(macs=share)
            plan = secateurs.plan(graph, scores, budget, skip=skip, allocation="error")
            small = secateurs.apply(model, plan)
            cells.append(f"{top1(small, *tested):.1%}")
            repair(model, small, plan, some)
            cells.append(f"{top1(small, *tested):.1%}")
        print(f"| {share:.0%} | {' | '.join(cells)} |", flush=True)
    dimensions(model, scores, args.left, some, tested)


if __name__ == "__main__":
    main()
