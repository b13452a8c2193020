"""The oracle against brute force on VGG16 and resnet18: seconds, and how far the answers are apart.

Both measure the same sample of units on the same batches. Brute force runs the whole network with the weights
that read the unit at zero, once for each unit and batch. In a small sample the fixed costs weigh much: clean
passes over each batch, and one pass of brute force for each layer as a check. The column "work for all units"
is without them: the operations that brute force needs for all units of the network, over those behind each
unit's first reader. They are counted and not timed, so they are the same on every machine.

Run: python -m benchmarks.oracle_speed --threads 1 [--units 60] [--size 112] [--batch 4]
"""

from __future__ import annotations

import time

import torch
import torchvision
from torch.nn.functional import cross_entropy
from torch.utils.flop_counter import FlopCounterMode

import secateurs
from benchmarks.common import arguments, header
from secateurs.judging import sample_units
from secateurs.judging.passes import Passes
from secateurs.judging.tape import CallMode


def main() -> None:
    """Print a line a model."""
    parser = arguments("The oracle against brute force.")
    parser.add_argument("--models", nargs="+", default=["resnet18", "vgg16"], help="torchvision's names")
    parser.add_argument("--units", type=int, default=60, help="units of the sample, by the layers' sizes")
    parser.add_argument("--batch", type=int, default=4, help="images in a batch")
    parser.add_argument("--batches", type=int, default=2)
    parser.add_argument("--size", type=int, default=112, help="pixels of an image")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    header(f"{args.batches} batches of {args.batch} images of {args.size} pixels, random weights and images")
    columns = (
        *("model", "work for all units", "units", "brute force, s", "oracle, s", "times faster"),
        *("largest difference", "largest change"),
    )
    print(f"| {' | '.join(columns)} |\n|{' --- |' * len(columns)}", flush=True)
    for name in args.models:
        torch.manual_seed(0)
        model = getattr(torchvision.models, name)(weights=None).eval()
        shape = (args.batch, 3, args.size, args.size)
        data = [(torch.randn(shape), torch.randint(1000, (args.batch,))) for _ in range(args.batches)]
        graph = secateurs.trace(model, data[0][0])
        units = sample_units(graph, args.units)
        started = time.perf_counter()
        found = secateurs.oracle(model, graph, data=data, loss_fn=cross_entropy, units=units)
        ours = time.perf_counter() - started
        started = time.perf_counter()
        truth = brute_force(model, graph, data, units)
        theirs = time.perf_counter() - started
        pairs = [(float(found.changes[layer][unit]), value) for (layer, unit), value in truth.items()]
        apart = max(abs(a - b) for a, b in pairs)
        spared = work_spared(model, graph, data[0][0])
        print(
            f"| {name} | {spared:.1f}x | {len(pairs)} of {graph.units} | {theirs:.1f} | {ours:.1f} | "
            f"{theirs / ours:.1f} | {apart:.1e} | {max(abs(b) for _, b in pairs):.1e} |",
            flush=True,
        )


class Work(CallMode):
    """Counts the operations of each call."""

    def __init__(self) -> None:
        super().__init__()
        self.flops: list[int] = []

    def call(self, place, func, args, kwargs):
        with FlopCounterMode(display=False) as counter:
            out = func(*args, **kwargs)
        self.flops.append(counter.get_total_flops())
        return out


def work_spared(model, graph, inputs) -> float:
    """Operations of a whole pass for every unit, over those from each unit's first reader on."""
    passes, work = Passes(model, graph), Work()
    tape = passes.tape(inputs[:1])
    passes.run(inputs[:1], mode=work)
    behind = [sum(work.flops[passes.start(tape, group) :]) * group.size for group in graph.groups]
    return sum(work.flops) * graph.units / sum(behind)


def brute_force(model, graph, data, units) -> dict[tuple[str, int], float]:
    """The change of the mean loss, from a pass of the whole network for each unit and batch."""
    passes = Passes(model, graph)
    examples = sum(len(targets) for _, targets in data)
    changes = {(layer, unit): 0.0 for layer, chosen in units.items() for unit in chosen}
    for inputs, targets in data:
        clean = float(cross_entropy(passes.run(inputs), targets))
        for layer, unit in changes:
            outputs = passes.brute_force(inputs, graph.by_name[layer], unit)
            change = float(cross_entropy(outputs, targets)) - clean
            changes[layer, unit] += change * len(targets) / examples
    return changes


if __name__ == "__main__":
    main()
