"""``secateurs sensitivity``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from secateurs.cli import common, text
from secateurs.errors import BudgetError

if TYPE_CHECKING:
    from secateurs.sensitivities import Sensitivity


def sensitivity(
    model: Annotated[str, typer.Argument(help="A run directory, or an architecture with --weights.")],
    data: Annotated[str | None, typer.Option(help="Folder of images.", show_default="the run's own")] = None,
    weights: Annotated[
        str, typer.Option(help="For an architecture: a name of torchvision's, or a file.")
    ] = "none",
    criterion: Annotated[str, typer.Option(help="What decides which units of a group leave first.")] = "l1",
    ratios: Annotated[
        str | None, typer.Option(help="Shares of a group that leave.", show_default="0.1,0.2,...,0.9")
    ] = None,
    images: Annotated[
        int | None, typer.Option(min=1, help="Validation images to measure on.", show_default="all")
    ] = None,
    rank_images: Annotated[
        int | None, typer.Option(min=1, help="Training images to rank on.", show_default="all")
    ] = None,
    kinds: Annotated[
        str | None,
        typer.Option(
            help="Kinds of groups, with commas: channel,neuron,head,branch,...",
            show_default="every kind but position",
        ),
    ] = None,
    skip: Annotated[
        list[str] | None, typer.Option(help="Groups to leave out, as a pattern; may be given again.")
    ] = None,
    max_drop: Annotated[float, typer.Option(help="Accuracy that a group alone may cost.")] = 0.01,
    batch_size: common.BatchSize = 100,
    workers: common.Workers = 0,
    seed: common.Seed = 0,
    threads: common.Threads = None,
    json: common.Json = False,
    out: Annotated[
        Path | None, typer.Option(help="The run directory to make.", show_default="MODEL-sensitivity")
    ] = None,
    resume: common.Resume = False,
) -> None:
    """Prune each group alone at 10 to 90 % and measure the accuracy, without any retraining.

    Groups whose curve falls early are the ones to spare (Li et al.). Units are silenced, which gives what a
    cut would; where an operator mixes units, the model is cut. Curves are written as JSON, CSV and picture,
    and the JSON can be handed to prune:

    [bold]secateurs sensitivity runs/train-vgg16 --images 500[/bold]

    [bold]secateurs prune runs/train-vgg16 --sensitivity runs/train-vgg16-sensitivity --max-drop 0.01[/bold]
    """
    from secateurs.cli.display import Display
    from secateurs.jobs import SensitivitySettings, sensitivity_job
    from secateurs.progress import ignore
    from secateurs.sensitivities import RATIOS

    with common.clear_exits(parsing=True):
        settings = SensitivitySettings(
            source=model,
            data=data,
            weights=weights,
            criterion=criterion,
            ratios=parse_ratios(ratios) or RATIOS,
            images=images,
            rank_images=rank_images,
            kinds=tuple(kinds.split(",")) if kinds else None,
            skip=tuple(skip or ()),
            batch_size=batch_size,
            workers=workers,
            threads=threads,
            seed=seed,
        )
    with common.clear_exits(), Display() as display:
        place = out or Path("runs") / f"{Path(model.rpartition(':')[2]).name}-sensitivity"
        found = sensitivity_job(settings, place, resume=resume, observer=ignore if json else display)
        if json:
            common.print_json(asdict(found))
            return
        display.say(f"\naccuracy {text.share(found.accuracy)} on {found.images} validation images; per cent "
                    "left when one group alone is pruned:\n")  # fmt: skip
        display.say(as_table(found, settings.ratios, max_drop))
        display.say(f"\nrun directory: {place}")
        display.say(f"next: secateurs prune {model} --sensitivity {place} --max-drop {max_drop}")


def as_table(found: Sensitivity, ratios: Sequence[float], max_drop: float) -> str:
    """A line a group, a column a ratio; the last column says what may leave within a fall of `max_drop`.

    Several ratios of a small group may come to the same number of units; a ratio that removes none is a dash.
    """
    rows = []
    for name, points in found.curves().items():
        cells = []
        for ratio in ratios:
            reached = [point for point in points if point.ratio <= ratio + 1e-9]
            cells.append(f"{100 * reached[-1].accuracy:.1f}" if reached else "-")
        good = 0.0
        for point in points:
            if found.accuracy - point.accuracy > max_drop:
                break
            good = point.ratio
        rows.append((name, str(points[0].size), *cells, f"{100 * good:.0f} %"))
    header = ("group", "units", *(f"{100 * ratio:.0f} %" for ratio in ratios), f"within {100 * max_drop:g}")
    return text.table(header, rows)


def parse_ratios(given: str | None) -> tuple[float, ...] | None:
    """``"0.25,0.5"`` as numbers.

    Raises:
        BudgetError: It is not numbers.

    Example:
        >>> parse_ratios("0.5,0.25")
        (0.25, 0.5)
    """
    if given is None:
        return None
    try:
        return tuple(sorted(float(part) for part in given.split(",")))
    except ValueError as error:
        raise BudgetError(
            f"ratios are numbers with commas, got {given!r}", fix="--ratios 0.25,0.5"
        ) from error
