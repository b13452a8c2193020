"""``secateurs train``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from secateurs.cli import common


def train(
    data: Annotated[
        str | None,
        typer.Option(help="Folder with train/ and test/, a folder a class in each.", show_default="digits"),
    ] = None,
    model: Annotated[
        str, typer.Option(help="torchvision:NAME, timm:NAME, secateurs:vgg-digits or package.module:factory.")
    ] = "secateurs:vgg-digits",
    head: Annotated[
        str,
        typer.Option(
            help="linear: a new last layer; article: convolutions frozen and three new layers; keep.",
            show_default="linear, keep for the digits' network",
        ),
    ] = "",
    weights: Annotated[
        str, typer.Option(help="A name of torchvision's, a .pth or .safetensors file, or none.")
    ] = "none",
    epochs: Annotated[int, typer.Option(min=0, help="Passes over the data.")] = 20,
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
    ema: common.Ema = 0.0,
    patience: common.Patience = None,
    image_size: Annotated[
        int | None, typer.Option(min=8, help="Pixels of the square images.", show_default="224")
    ] = None,
    channels: Annotated[
        int | None, typer.Option(help="3 for colour, 1 for grey.", show_default="3, digits 1")
    ] = None,
    mean: Annotated[
        str | None, typer.Option(help="Subtracted from each channel.", show_default="ImageNet's")
    ] = None,
    std: Annotated[
        str | None, typer.Option(help="What each channel is divided by.", show_default="ImageNet's")
    ] = None,
    val_share: Annotated[float, typer.Option(help="Share of the training images held out.")] = 0.1,
    augment: Annotated[bool, typer.Option(help="Vary the training images at random.")] = True,
    batch_size: common.BatchSize = 32,
    workers: common.Workers = 0,
    seed: common.Seed = 0,
    threads: common.Threads = None,
    checkpoint_minutes: common.CheckpointMinutes = 5.0,
    out: Annotated[
        Path | None, typer.Option(help="The run directory.", show_default="runs/train-NAME")
    ] = None,
    resume: common.Resume = False,
) -> None:
    """Train a classifier on a folder of images, to be pruned afterwards.

    The article's first step, the convolutions frozen and three new layers trained for 20 epochs:

    [bold]secateurs train --data catsdogs --model torchvision:vgg16 --head article --weights DEFAULT[/bold]

    A part of the training images is held out for validation, and every choice rests on it; the test images
    are read once before and once after.
    """
    from secateurs.cli.display import Display
    from secateurs.jobs import DataSettings, TrainSettings, train_job

    with common.clear_exits(parsing=True):
        settings = TrainSettings(
            data=DataSettings(
                path=data,
                image_size=image_size,
                channels=channels,
                mean=common.parse_pixels("mean", mean),
                std=common.parse_pixels("std", std),
                val_share=val_share,
                seed=seed,
                augment=augment,
            ),
            model=model,
            head=head or ("keep" if model.startswith("secateurs:") else "linear"),
            weights=weights,
            recipe=common.recipe_of(locals(), epochs=epochs),
            batch_size=batch_size,
            workers=workers,
            threads=threads,
            seed=seed,
        )
    with common.clear_exits(), Display() as display:
        place = out or Path("runs") / f"train-{model.rpartition(':')[2]}"
        result = train_job(settings, place, resume=resume, observer=display)
        display.say(f"\nrun directory: {result.path}")
        display.say(f"next: secateurs prune {result.path} --target macs=0.3")
