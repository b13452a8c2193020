"""The article's surgery at full size: VGG16 with its head, random weights, five cuts of 512 filters.

Prints parameters, bytes and CPU latency before and after each cut, the time of each cut, and the time of
cutting filter by filter, as the article did.

Run: python -m benchmarks.vgg16_article
"""

from __future__ import annotations

import time

import torch

import secateurs
from benchmarks.common import arguments, header
from secateurs.measure.latency import compare_latency, latency_ms
from secateurs.measure.size import file_bytes
from secateurs.models import build


def main() -> None:
    """Print a line a cut and the comparison with the article."""
    parser = arguments("VGG16 with the article's head: five cuts of 512 filters.")
    parser.add_argument("--singles", type=int, default=8, help="filters to cut one by one for comparison")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    header("VGG16, article head, random weights, 5 x 512 filters by L1 within layers' norm")
    model = build(
        "torchvision:vgg16", num_classes=2, weights="none", head="article", input_size=(3, 224, 224)
    ).eval()
    image = torch.randn(1, 3, 224, 224)
    first = latency_ms(model, image)
    print(
        f"before: {secateurs.trace(model, image).cost().params:,} params, {file_bytes(model) / 1e6:.0f} MB, "
        f"{first.median_ms:.0f} ms an image ({first.threads} threads)"
    )
    original = model
    started = time.perf_counter()
    for number in range(1, 6):
        begun = time.perf_counter()
        graph = secateurs.trace(model, image)
        traced = time.perf_counter()
        scores = secateurs.score(model, graph, "l1", normalization="l2")
        plan = secateurs.plan(graph, scores, secateurs.Remove(512), kinds=("channel",))
        planned = time.perf_counter()
        pruned = secateurs.apply(model, plan)
        cut = time.perf_counter()
        report = secateurs.verify(model, pruned, plan, image).raise_if_failed()
        print(
            f"cut {number}: {len(plan)} filters, trace {traced - begun:.2f} s, "
            f"rank {planned - traced:.2f} s, "
            f"apply {cut - planned:.2f} s, {plan.after.params:,} params, {plan.after.macs / 1e9:.2f} G MACs, "
            f"{file_bytes(pruned) / 1e6:.0f} MB; {report}",
            flush=True,
        )
        model = pruned
    print(f"all five cuts with proofs: {time.perf_counter() - started:.1f} s")
    both = compare_latency({"before": original, "after": model}, image)
    ratio = both["before"].median_ms / both["after"].median_ms
    print(
        f"latency, interleaved: {both['before'].median_ms:.0f} -> {both['after'].median_ms:.0f} ms "
        f"({ratio:.2f}x); "
        f"file {file_bytes(original) / 1e6:.0f} -> {file_bytes(model) / 1e6:.0f} MB. "
        "The article: 780 -> 277 ms (2.8x) on an i7, 538 -> 150 MB"
    )
    graph = secateurs.trace(original, image)
    scores = secateurs.score(original, graph, "l1", normalization="l2")
    one = secateurs.plan(graph, scores, secateurs.Remove(1), kinds=("channel",))
    begun = time.perf_counter()
    for _ in range(args.singles):
        secateurs.apply(original, one)
    each = (time.perf_counter() - begun) / args.singles
    print(f"one filter alone: {each:.2f} s, so {512 * each:.0f} s for 512 one by one; the article: 1 s each")


if __name__ == "__main__":
    main()
