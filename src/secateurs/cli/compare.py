"""``secateurs compare``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from secateurs.cli import common, text


def compare(
    model: Annotated[str, typer.Argument(help="A run directory, or an architecture with --weights.")],
    data: Annotated[str | None, typer.Option(help="Folder of images.", show_default="the run's own")] = None,
    weights: Annotated[
        str, typer.Option(help="For an architecture: a name of torchvision's, or a file.")
    ] = "none",
    criteria: Annotated[str, typer.Option(help="Names with commas, or all that there are.")] = "all",
    images: Annotated[int, typer.Option(min=1, help="Training images to judge on.")] = 512,
    units: Annotated[
        int | None, typer.Option(min=1, help="Units that the oracle measures.", show_default="all")
    ] = None,
    layers: Annotated[
        list[str] | None,
        typer.Option(help="Groups to measure, as a pattern; may be given again.", show_default="all"),
    ] = None,
    memory_mb: Annotated[float, typer.Option(min=1, help="Megabytes for activations that are kept.")] = 512,
    batch_size: common.BatchSize = 64,
    workers: common.Workers = 0,
    seed: common.Seed = 0,
    threads: common.Threads = None,
    json: common.Json = False,
    out: Annotated[
        Path | None, typer.Option(help="The run directory to make.", show_default="runs/MODEL-compare")
    ] = None,
    resume: common.Resume = False,
) -> None:
    """Ask which criterion ranks best for this model on this data.

    The oracle silences each unit alone and measures the true change of the loss; each criterion is judged by
    Spearman's correlation with it. Tables, the scores of every unit and two pictures are written:

    [bold]secateurs compare runs/train-vgg16 --images 256 --units 400[/bold]

    "Per layer" says how well a criterion chooses within a layer, "all layers" how well it chooses among all
    units of the model; "l2" divides the scores of each layer by their norm before.
    """
    from secateurs.cli.display import Display
    from secateurs.jobs import CompareSettings, compare_job
    from secateurs.progress import ignore

    with common.clear_exits(parsing=True):
        settings = CompareSettings(
            source=model,
            data=data,
            weights=weights,
            criteria=tuple(criteria.split(",")),
            images=images,
            units=units,
            layers=tuple(layers or ("*",)),
            memory_mb=memory_mb,
            batch_size=batch_size,
            workers=workers,
            threads=threads,
            seed=seed,
        )
    with common.clear_exits(), Display() as display:
        place = out or Path("runs") / f"{Path(model.rpartition(':')[2]).name}-compare"
        found = compare_job(settings, place, resume=resume, observer=ignore if json else display)
        if json:
            common.print_json(found)
            return
        display.say("\n" + as_text(found))
        display.say(f"\nrun directory: {place}")


def as_text(found: dict[str, Any]) -> str:
    """What was measured, the table of correlations, and what stands beside it."""
    ways = found["ways"].values()
    slow = sum(way != "replayed" for way in ways)
    lines = [
        f"oracle: {found['units']} units of {len(ways)} layers on {found['examples']} images, loss "
        f"{found['loss']:.4f}, {found['oracle_seconds']:.0f} s"
        + (f"; {slow} layers not by stacked replay, see comparison.json" if slow else ""),
        "",
        as_table(found),
        "",
        "Spearman's correlation with oracle-abs (signed: with oracle-loss); ties share a mean rank.",
        "+- is the 95 % interval over units; a dash: scores or oracle are constant, so it has none.",
    ]
    lines += [f"left out: {name}: {reason}" for name, reason in found["left_out"].items()]
    for name, gaps in found["unranked"].items():
        reason = next(iter(gaps.values()))
        lines.append(f"{name} is judged on {len(ways) - len(gaps)} of {len(ways)} layers: {reason}")
    lines += [f"no {name}: {reason}" for name, reason in found["failed"].items()]
    return "\n".join(lines)


def as_table(found: dict[str, Any]) -> str:
    """A line a criterion, best within layers first."""
    rows = []
    for each in found["criteria"]:
        absolute, signed = each["agreement"]["oracle-abs"], each["agreement"]["oracle-loss"]
        measures = (absolute["per_layer"], absolute["all_layers"], absolute["all_layers_l2"])
        cells = [_correlation(measure) for measure in (*measures, signed["per_layer"])]
        spread = "-" if absolute["spread"] is None else f"{absolute['spread']:.2f}"
        rows.append((each["criterion"], cells[0], spread, *cells[1:], f"{each['seconds']:.2f}"))
    header = ("criterion", "per layer", "spread", "all layers", "all, l2", "signed, per layer", "seconds")
    return text.table(header, rows)


def _correlation(found: dict[str, Any]) -> str:
    """A correlation and the larger half of its interval.

    Example:
        >>> _correlation({"value": 0.731, "low": 0.70, "high": 0.75})
        '0.73 +- 0.03'
    """
    if found["value"] is None:
        return "-"
    if found["low"] is None:
        return f"{found['value']:.2f}"
    half = max(found["high"] - found["value"], found["value"] - found["low"])
    return f"{found['value']:.2f} +- {half:.2f}"
