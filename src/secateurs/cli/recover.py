"""``secateurs recover``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from secateurs.cli import common


def recover(
    run: Annotated[Path, typer.Argument(help="The run directory of a pruned model.")],
    original: Annotated[
        Path | None,
        typer.Option(help="The run of the network before the cuts.", show_default="as RUN names it"),
    ] = None,
    data: Annotated[str | None, typer.Option(help="Folder of images.", show_default="the run's own")] = None,
    repair: common.Repair = "reconstruct",
    repair_images: common.RepairImages = 2000,
    epochs: Annotated[
        int, typer.Option(min=0, help="Epochs of a fine-tune afterwards.", rich_help_panel="Training")
    ] = 0,
    lr: Annotated[float, typer.Option(help="The highest learning rate.", rich_help_panel="Training")] = 0.001,
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
    ema: common.Ema = 0.0,
    patience: common.Patience = None,
    distill: common.Distill = None,
    temperature: common.Temperature = 4.0,
    distill_features: common.DistillFeatures = None,
    batch_size: common.BatchSize = 32,
    workers: common.Workers = 0,
    seed: common.Seed = 0,
    threads: common.Threads = None,
    checkpoint_minutes: common.CheckpointMinutes = 5.0,
    out: Annotated[
        Path | None, typer.Option(help="The run directory to make.", show_default="RUN-recovered")
    ] = None,
    resume: common.Resume = False,
) -> None:
    """Heal a pruned model later: repair it without training, then fine-tune it if asked to.

    RUN stays as it is; the healed model gets a run directory of its own. What the layers behind the cuts lost
    is put back in closed form, from the network before them and images without labels:

    [bold]secateurs recover runs/train-vgg16-pruned[/bold]

    With five epochs more, in which the network before the cuts teaches:

    [bold]secateurs recover runs/train-vgg16-pruned --epochs 5 --distill 0.7[/bold]
    """
    from secateurs.cli.display import Display
    from secateurs.jobs import RecoverSettings, recover_job

    with common.clear_exits(parsing=True):
        common.check_trains(locals(), epochs, "--epochs 1")
        settings = RecoverSettings(
            source=str(run),
            original=None if original is None else str(original),
            data=data,
            repair=repair,
            repair_images=repair_images,
            recipe=common.recipe_of(locals(), epochs=epochs),
            batch_size=batch_size,
            workers=workers,
            threads=threads,
            seed=seed,
        )
    with common.clear_exits(), Display() as display:
        place = out or run.with_name(f"{run.name}-recovered")
        result = recover_job(settings, place, resume=resume, observer=display)
        display.say(f"\nrun directory: {result.path}")
