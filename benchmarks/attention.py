"""A small vision transformer, cut with queries and keys left whole, and with them ranked.

Run: python -m benchmarks.attention [--threads 1] [--epochs 5] [--share 0.5 0.4 0.3]

Trained on CIFAR-10; the stream's width stays. Units and shares by reconstruction error, repaired, not
trained.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, gelu, scaled_dot_product_attention

import secateurs
from benchmarks.cifar_resnet56 import top1
from benchmarks.common import arguments, augmented, cifar10, header
from secateurs.recovery import Recipe, finetune, repair


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
        rest: Tensor = self.down(gelu(self.up(self.norm2(x))))
        return x + rest


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


def main() -> None:
    """Train, and print a line for each share."""
    parser = arguments("A vision transformer, cut with and without its queries and keys.")
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--images", type=int, default=1000, help="images to rank and repair on")
    parser.add_argument(
        "--share", type=float, nargs="+", default=[0.8, 0.6, 0.5, 0.4, 0.3], help="of the MACs"
    )
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


if __name__ == "__main__":
    main()
