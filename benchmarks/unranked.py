"""Which groups of published models reconstruction cannot rank, so that `prune` leaves them whole.

Run: python -m benchmarks.unranked timm-families [--only 'vit*'] [--threads 1]
Lists are those of `benchmarks.zoo`. A line for each model that has such groups, and the sum.
"""

from __future__ import annotations

import argparse
import fnmatch
from collections import Counter

import torch

import secateurs
from benchmarks.common import header
from benchmarks.zoo.lists import cases_of
from secateurs.criteria.unit_reads import unrankable
from secateurs.errors import PlanError, some
from secateurs.planning.limits import candidates


def main() -> None:
    """Print the models that have such groups, with their share of all units that may be cut."""
    parser = argparse.ArgumentParser(description="Groups that reconstruction cannot rank.")
    parser.add_argument("list", help="a list of models, as benchmarks.zoo takes it")
    parser.add_argument("--only", metavar="PATTERN", default="*", help="names that match this glob")
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    header(f"groups of {args.list} that reconstruction cannot rank")
    models, having, kinds = 0, 0, Counter[str]()
    for name, case in cases_of(args.list).items():
        if not fnmatch.fnmatch(name, args.only):
            continue
        example = case()
        model = example.model.eval()
        graph = secateurs.trace(model, example.inputs)
        try:
            groups = candidates(graph)
        except PlanError:  # none may be cut
            continue
        unread = unrankable(model, graph, example.inputs)
        left = [group for group in groups if group.name in unread]
        models += 1
        having += bool(left)
        for group in left:
            kinds[group.kind] += group.size
        if left:
            share = sum(group.size for group in left) / sum(group.size for group in groups)
            print(f"{name}: {share:.1%} of the units ({some([group.name for group in left])})", flush=True)
    print(
        f"{models - having} of {models} models are ranked as a whole; units left whole by kind: {dict(kinds)}"
    )


if __name__ == "__main__":
    main()
