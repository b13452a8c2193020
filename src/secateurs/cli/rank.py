"""``secateurs rank``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from secateurs.cli import common, text

_SHOWN = 20


def rank(
    model: Annotated[str, typer.Argument(help="A run directory, or an architecture with --weights.")],
    data: Annotated[str | None, typer.Option(help="Folder of images.", show_default="the run's own")] = None,
    weights: Annotated[
        str, typer.Option(help="For an architecture: a name of torchvision's, or a file.")
    ] = "none",
    criterion: Annotated[
        str, typer.Option(help="How units are ranked; oracle-abs and oracle-loss measure every unit.")
    ] = "taylor",
    normalization: Annotated[
        str | None,
        typer.Option(help="What makes layers comparable: none, l2, ...", show_default="the criterion's own"),
    ] = None,
    images: Annotated[int, typer.Option(min=1, help="Training images to rank on.")] = 512,
    batch_size: common.BatchSize = 64,
    workers: common.Workers = 0,
    seed: common.Seed = 0,
    threads: common.Threads = None,
    json: common.Json = False,
    out: Annotated[
        Path | None, typer.Option(help="A .csv or .json file for all units.", show_default="none")
    ] = None,
) -> None:
    """Rank every unit of a model: layer, unit, score, and the MACs and parameters that it alone would save.

    [bold]secateurs rank runs/train-vgg16 --criterion taylor --out ranking.csv[/bold]

    The least important come first; the terminal shows the first twenty.
    """
    from secateurs.cli.display import Display
    from secateurs.jobs import RankSettings, rank_job
    from secateurs.progress import ignore

    with common.clear_exits(parsing=True):
        settings = RankSettings(
            source=model,
            data=data,
            weights=weights,
            criterion=criterion,
            normalization=normalization,
            images=images,
            batch_size=batch_size,
            workers=workers,
            threads=threads,
            seed=seed,
        )
    with common.clear_exits(), Display() as display:
        rows = rank_job(settings, out, observer=ignore if json else display)
        if json:
            common.print_json(rows)
            return
        shown = [
            (row["layer"], str(row["unit"]), f"{row['score']:.4g}", *_saved(row)) for row in rows[:_SHOWN]
        ]
        display.say(text.table(("layer", "unit", "score", "MACs saved", "params saved"), shown))
        if len(rows) > _SHOWN:
            display.say(f"... and {len(rows) - _SHOWN} more" + (f" in {out}" if out else "; --out has all"))


def _saved(row: dict[str, float]) -> tuple[str, str]:
    return text.count(row["macs_saved"]), text.count(row["params_saved"])
