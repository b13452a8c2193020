"""Prune lists of published models and write one JSON line for each; or a table of such lines.

Run: python -m benchmarks.zoo timm-families --out zoo.jsonl [--only 'resnet*'] [--skip-done] [--torch-pruning]
     python -m benchmarks.zoo --table zoo.jsonl > docs/coverage.md
Lists: torchvision, timm-families, timm-all, transformers, others, or a Python file with a mapping MODELS. The
libraries come with the extras `timm`, `transformers` and `bench`. `others` takes small models of whichever of
vit-pytorch, x-transformers, diffusers, pytorchcv, segmentation-models-pytorch, monai and open_clip is
installed, named by library: --only 'monai.*'.
"""

from __future__ import annotations

import argparse
import fnmatch
import json
import os
import signal
import sys
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"  # before the imports: nothing is downloaded

import torch

from benchmarks.zoo import levels
from benchmarks.zoo.example import Case
from benchmarks.zoo.lists import cases_of
from benchmarks.zoo.records import read, software
from benchmarks.zoo.table import causes, markdown
from benchmarks.zoo.workers import Limits, Work, run_all
from secateurs.errors import UnknownNameError

RIVAL_SECONDS = 120


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("lists", nargs="*", metavar="LIST", help="lists to run")
    parser.add_argument("--out", type=Path, default=Path("zoo.jsonl"), help="lines are added to this file")
    parser.add_argument("--jobs", type=int, default=1, help="models at once")
    parser.add_argument("--limit-seconds", type=float, default=300)
    parser.add_argument("--limit-gb", type=float, default=8)
    parser.add_argument("--only", metavar="PATTERN", help="names that match this glob")
    parser.add_argument("--skip-done", action="store_true", help="leave out what the file has a line for")
    parser.add_argument("--up-to", type=int, choices=[3, 4, 5], default=5, help="the last level asked")
    parser.add_argument(
        "--torch-pruning",
        nargs="?",
        const="too",
        choices=["too", "only"],
        help="Torch-Pruning beside, or alone",
    )
    parser.add_argument("--state-dict", action="store_true", help="also load the state into a fresh model")
    parser.add_argument("--export", action="store_true", help="also try torch.export")
    parser.add_argument("--table", nargs="+", type=Path, metavar="FILE", help="print these lines as markdown")
    parser.add_argument("--causes", nargs="+", type=Path, metavar="FILE", help="print what failed, by cause")
    args = parser.parse_args()
    if not (args.lists or args.table or args.causes):
        parser.error("name a list, or pass --table or --causes")
    return args


def main() -> None:
    """Run the lists, or print a table."""
    args = arguments()
    if args.table or args.causes:
        print(markdown(read(args.table)) if args.table else causes(read(args.causes)))
        return
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the processes under way are ended, too
    torch.set_num_threads(1)  # and so no thread pool that a fork would lose
    try:
        cases = {(name, model): case for name in args.lists for model, case in cases_of(name).items()}
    except UnknownNameError as error:
        raise SystemExit(str(error)) from error
    if args.only:
        cases = {key: case for key, case in cases.items() if fnmatch.fnmatch(key[1], args.only)}
    tools = {"too": ["secateurs", "torch_pruning"], "only": ["torch_pruning"], None: ["secateurs"]}
    work = list(_work(cases, tools[args.torch_pruning], args))
    _run(work, args)


def _work(
    cases: dict[tuple[str, str], Case], tools: list[str], args: argparse.Namespace
) -> Iterator[tuple[tuple[str, str, str], Work, Limits]]:
    done = read([args.out]) if args.skip_done and args.out.exists() else {}
    for (name, model), case in cases.items():
        for tool in tools:
            if tool in done.get((name, model), {}):
                continue
            if tool == "secateurs":
                check = partial(
                    levels.check, case, up_to=args.up_to, extras=args.state_dict, export=args.export
                )
                seconds = args.limit_seconds
            else:
                from benchmarks.zoo import rival

                check = partial(rival.check, case)
                seconds = min(args.limit_seconds, RIVAL_SECONDS)
            yield (name, model, tool), check, Limits(seconds=seconds, gigabytes=args.limit_gb)


def _run(work: list[Any], args: argparse.Namespace) -> None:
    started, shared = time.monotonic(), software()
    with args.out.open("a") as file:
        for number, ((name, model, tool), facts) in enumerate(run_all(work, args.jobs), 1):
            line = {"list": name, "model": model, tool: facts, "software": shared}
            file.write(json.dumps(line) + "\n")
            file.flush()
            seconds = time.monotonic() - started
            print(f"{number}/{len(work)} {seconds:6.0f} s  {_told(model, tool, facts)}", flush=True)


def _told(model: str, tool: str, facts: dict[str, Any]) -> str:
    reached = facts.get("levels", {})
    shown = "".join(
        number if reached.get(number) else "-" if reached.get(number) is None else "x" for number in "12345"
    )
    errors = [
        f"{stage}: {error['message'].splitlines()[0][:90]}"
        for stage, error in facts.get("errors", {}).items()
    ]
    remain = " ".join(f"{name} {share:.0%}" for name, share in facts.get("remain", {}).items())
    tool = "" if tool == "secateurs" else f" ({tool})"
    return f"{model}{tool} [{shown}] {facts['wall_s']:.1f} s {remain} {'; '.join(errors)}"


if __name__ == "__main__":
    sys.exit(main())
