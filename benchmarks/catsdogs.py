"""The article's job on real photographs: train MobileNetV2 on cats and dogs, prune it, print both models.

Run: python -m benchmarks.catsdogs --threads 1 [--macs 0.48] [--article] [--out runs/catsdogs] [--resume]

`--article` also goes the article's way to the same share of MACs: five cuts by Taylor expansion, ten epochs
of fine-tuning after each and fifteen at the end, without a teacher and without a refit. It does get what the
article's network had no need of, batch norms that are re-estimated after each cut.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from benchmarks.common import arguments, header

_TRAIN = (
    "--model torchvision:mobilenet_v2 --head linear --mean 0.5,0.5,0.5 --std 0.5,0.5,0.5 --image-size 160 "
    "--epochs 3 --optimizer adamw --lr 0.0001 --freeze-bn"
)
_PRUNE = (
    "--pace one-shot --criterion reconstruction --allocation error --rank-images 512 --round-to 8 "
    "--finetune-epochs 0 --final-epochs 0"
)
_ARTICLE = (
    "--iterations 5 --criterion taylor --repair batch-norm --round-to 8 "
    "--finetune-epochs 10 --final-epochs 15 --optimizer adamw --lr 0.0001 --freeze-bn"
)
_ROWS = (
    ("test accuracy", "accuracy", lambda value: f"{value:.1%}"),
    ("validation accuracy", "val_accuracy", lambda value: f"{value:.1%}"),
    ("parameters", "params", lambda value: f"{value:,}"),
    ("MACs", "macs", lambda value: f"{value / 1e6:.1f} M"),
    ("file", "file_bytes", lambda value: f"{value / 1e6:.2f} MB"),
    ("CPU time an image", "latency_ms", lambda value: f"{value:.2f} ms"),
)


def command(*words: object) -> None:
    """One command of the tool, in a process of its own."""
    line = [str(word) for word in words]
    print("\n$ secateurs", *line, flush=True)
    subprocess.run([sys.executable, "-c", "from secateurs.cli import main; main()", *line], check=True)


def table(metrics: dict[str, dict[str, Any]]) -> None:
    """Before, after, and how many times less."""
    before, after = metrics["before"], metrics["after"]
    print("\n| | before | after | times less |\n| --- | --- | --- | --- |")
    for title, key, show in _ROWS:
        ratio = "" if "accuracy" in key else f"{before[key] / after[key]:.2f}"
        print(f"| {title} | {show(before[key])} | {show(after[key])} | {ratio} |")


def main() -> None:
    """Train and prune, or go on with what was stopped; then print the table."""
    parser = arguments("Train MobileNetV2 on cats and dogs, prune it, print both.")
    parser.add_argument("--macs", type=float, default=0.48, help="share of MACs that remains")
    parser.add_argument("--article", action="store_true", help="also prune by the article's schedule")
    parser.add_argument("--out", type=Path, default=Path("runs/catsdogs"), help="folder of the two runs")
    parser.add_argument("--resume", action="store_true", help="go on with runs that were stopped")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    header("Cats and dogs: MobileNetV2, the whole job")
    weights = args.data / "weights" / "mobilenet_v2_imagenet.safetensors"
    common = ["--threads", args.threads, *(["--resume"] if args.resume else [])]
    base, pruned = args.out / "trained", args.out / f"pruned-{args.macs:g}"
    images = args.data / "catsdogs"
    command("train", "--data", images, "--weights", weights, *_TRAIN.split(), *common, "--out", base)
    command("prune", base, "--target", f"macs={args.macs:g}", *_PRUNE.split(), *common, "--out", pruned)
    table(json.loads((pruned / "metrics.json").read_text()))
    if args.article:
        pruned = args.out / f"article-{args.macs:g}"
        command("prune", base, "--target", f"macs={args.macs:g}", *_ARTICLE.split(), *common, "--out", pruned)
        table(json.loads((pruned / "metrics.json").read_text()))


if __name__ == "__main__":
    main()
