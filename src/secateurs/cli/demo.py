"""``secateurs demo``."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated

import typer

from secateurs.cli import common


def demo(
    seed: common.Seed = 0,
    threads: common.Threads = None,
    out: Annotated[
        Path | None, typer.Option(help="The run directory.", show_default="runs/demo-TIME")
    ] = None,
    resume: common.Resume = False,
) -> None:
    """Train a network on bundled digits, prune it to a tenth of its MACs, and show what it cost.

    Needs no download and a minute or two on two cores:

    [bold]secateurs demo[/bold]
    """
    from secateurs.cli.display import Display
    from secateurs.jobs import demo_job

    place = out or Path("runs") / time.strftime("demo-%Y%m%d-%H%M%S")
    started = time.perf_counter()
    with common.clear_exits(), Display() as display:
        result = demo_job(place, seed=seed, threads=threads, resume=resume, observer=display)
        display.say(f"\ndone in {time.perf_counter() - started:.0f} s; run directory: {result.path}")
        display.say(f"the pruned model, in Python: secateurs.load({str(result.path)!r})")
