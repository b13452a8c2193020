"""``secateurs sparsify``."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from secateurs.cli import common


def sparsify(
    run: Annotated[Path, typer.Argument(help="The run directory of the model, from train or prune.")],
    method: Annotated[str, typer.Option(help="slimming, group-lasso, growing, sfp or fpgm.")] = "group-lasso",
    strength: Annotated[
        float | None,
        typer.Option(
            help="Of the penalty, for slimming, group-lasso and growing.",
            show_default="1e-4, growing 1 in the last step",
        ),
    ] = None,
    rate: Annotated[
        float | None,
        typer.Option(help="Share of the units that empty, for sfp and growing.", show_default="0.3 and 0.5"),
    ] = None,
    rate_dist: Annotated[
        float | None, typer.Option(help="Share that goes by distance, for fpgm.", show_default="0.4")
    ] = None,
    rate_norm: Annotated[
        float | None, typer.Option(help="Share that stays when norm decides, for fpgm.", show_default="1")
    ] = None,
    initial_scale: Annotated[
        float | None,
        typer.Option(
            help="Set all scales of batch norms first, for slimming from scratch.",
            show_default="as they are",
        ),
    ] = None,
    epochs: Annotated[int, typer.Option(min=1, help="Passes over the data.")] = 10,
    data: Annotated[str | None, typer.Option(help="Folder of images.", show_default="the run's own")] = None,
    kinds: Annotated[
        str | None,
        typer.Option(
            help="Kinds of groups, with commas: channel,neuron,head,branch,...",
            show_default="every kind but position",
        ),
    ] = None,
    skip: Annotated[list[str] | None, typer.Option(help="Groups to leave alone, as a pattern.")] = None,
    lr: Annotated[float, typer.Option(help="The highest learning rate.")] = 0.01,
    optimizer: common.Optimizer = "sgd",
    nesterov: common.Nesterov = False,
    schedule: common.Schedule = "cosine",
    lr_steps: common.LrSteps = "0.5,0.75",
    lr_factor: common.LrFactor = 0.1,
    warmup_epochs: common.Warmup = 0.0,
    weight_decay: common.WeightDecay = 1e-4,
    label_smoothing: common.LabelSmoothing = 0.0,
    clip_norm: common.ClipNorm = None,
    freeze_bn: common.FreezeBn = False,
    accumulate: common.Accumulate = 1,
    precision: common.Precision = None,
    channels_last: common.ChannelsLast = None,
    mixup: common.Mixup = 0.0,
    batch_size: common.BatchSize = 32,
    workers: common.Workers = 0,
    seed: common.Seed = 0,
    threads: common.Threads = None,
    checkpoint_minutes: common.CheckpointMinutes = 5.0,
    out: Annotated[
        Path | None, typer.Option(help="The run directory to make.", show_default="RUN-sparse")
    ] = None,
    resume: common.Resume = False,
) -> None:
    """Train a model so that units empty before they are cut; nothing is cut yet.

    Penalties act on whole units, and the ranking afterwards finds what they emptied:

    [bold]secateurs sparsify runs/train-vgg16 --method group-lasso --strength 1e-4 --epochs 10[/bold]

    Or set the least filters of every layer to zero after each epoch, and train on; then cut these:

    [bold]secateurs sparsify runs/train-vgg16 --method sfp --rate 0.4[/bold]

    The last line printed is the prune command that fits the method.
    """
    from secateurs.cli.display import Display
    from secateurs.jobs import SparsifySettings, sparsify_job
    from secateurs.runs import Run

    given = {
        "strength": strength,
        "rate": rate,
        "rate_dist": rate_dist,
        "rate_norm": rate_norm,
        "initial_scale": initial_scale,
    }
    with common.clear_exits(parsing=True):
        settings = SparsifySettings(
            source=str(run),
            method=method,
            options={name: value for name, value in given.items() if value is not None},
            data=data,
            kinds=tuple(kinds.split(",")) if kinds else None,
            skip=tuple(skip or ()),
            recipe=common.recipe_of(locals(), epochs=epochs),
            batch_size=batch_size,
            workers=workers,
            threads=threads,
            seed=seed,
        )
    with common.clear_exits(), Display() as display:
        place = out or run.with_name(f"{run.name}-sparse")
        result = sparsify_job(settings, place, resume=resume, observer=display)
        display.say(f"\nrun directory: {result.path}")
        display.say(f"next: {next_command(result.path, Run(result.path).config['prune'])}")


def next_command(run: Path, fits: Mapping[str, Any]) -> str:
    """The prune command that takes what a method has emptied.

    Example:
        >>> next_command(Path("runs/sparse"), {"criterion": "bn-scale", "scope": "global", "rate": None})
        'secateurs prune runs/sparse --iterations 1 --criterion bn-scale --scope global --target macs=0.5'
        >>> next_command(Path("runs/sparse"), {"criterion": "l2", "scope": "local", "rate": 0.4})
        'secateurs prune runs/sparse --iterations 1 --criterion l2 --scope local --target units=0.6'
    """
    target = "macs=0.5" if fits["rate"] is None else f"units={1 - fits['rate']:g}"
    ranking = f"--criterion {fits['criterion']} --scope {fits['scope']}"
    return f"secateurs prune {run} --iterations 1 {ranking} --target {target}"
