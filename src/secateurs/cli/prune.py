"""``secateurs prune``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from secateurs.cli import common
from secateurs.errors import BudgetError


def prune(
    run: Annotated[Path, typer.Argument(help="The run directory of the model, from train or prune.")],
    data: Annotated[str | None, typer.Option(help="Folder of images.", show_default="the run's own")] = None,
    remove: Annotated[int | None, typer.Option(min=1, help="Filters that leave in each iteration.")] = None,
    target: Annotated[
        str | None, typer.Option(help="What remains at the end: macs=0.3, params=0.3 or units=0.3.")
    ] = None,
    iterations: Annotated[int, typer.Option(min=1, help="Rounds of rank, cut and fine-tune.")] = 5,
    finetune_epochs: Annotated[int, typer.Option(min=0, help="Epochs after each cut.")] = 10,
    final_epochs: Annotated[
        int | None,
        typer.Option(min=0, help="Epochs of the longer fine-tune at the end.", show_default="1.5 times"),
    ] = None,
    criterion: Annotated[
        str,
        typer.Option(
            help="How units are ranked: taylor, taylor-2019, l1, l2, fpgm, bn-scale, apoz, ...; a name that "
            "is unknown lists them all."
        ),
    ] = "taylor",
    scope: Annotated[
        str, typer.Option(help="global: one ranking of all units; local: the same share everywhere.")
    ] = "global",
    round_to: Annotated[int, typer.Option(min=1, help="Layers keep a multiple of this many units.")] = 1,
    kinds: Annotated[
        str | None,
        typer.Option(
            help="Kinds of groups to cut, with commas: channel,neuron,head,...",
            show_default="channel with --remove, else every kind",
        ),
    ] = None,
    skip: Annotated[
        list[str] | None, typer.Option(help="Groups to leave alone, as a pattern; may be given again.")
    ] = None,
    shares: Annotated[
        str | None,
        typer.Option(help="What remains of single groups at the end: 'layer1.*=0.6,layer2.*=0.7'."),
    ] = None,
    sensitivity: Annotated[
        Path | None, typer.Option(help="What secateurs sensitivity wrote: gives each group its share.")
    ] = None,
    max_drop: Annotated[
        float, typer.Option(help="With --sensitivity: the accuracy that a group alone may cost.")
    ] = 0.01,
    min_units: Annotated[
        str, typer.Option(help="What every group keeps at least: a number of units, or a share as 0.1.")
    ] = "1",
    selection: Annotated[
        str,
        typer.Option(
            help="Which units leave of a group: its lowest (independent), or the lowest without "
            "the inputs that have left (greedy)."
        ),
    ] = "independent",
    normalization: Annotated[
        str | None,
        typer.Option(
            help="Of the importances in each group: none, l1, l2, max, mean or flops.",
            show_default="the criterion's own",
        ),
    ] = None,
    rank_images: Annotated[
        int | None, typer.Option(min=1, help="Training images to rank on.", show_default="all")
    ] = None,
    reconstruct_images: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Training images to refit the layers behind each cut on, by least squares; 300 are plenty.",
            show_default="none",
        ),
    ] = None,
    lr: Annotated[float, typer.Option(help="The highest learning rate of a fine-tune.")] = 0.001,
    optimizer: common.Optimizer = "sgd",
    schedule: common.Schedule = "cosine",
    warmup_epochs: common.Warmup = 0.0,
    weight_decay: common.WeightDecay = 1e-4,
    label_smoothing: common.LabelSmoothing = 0.0,
    clip_norm: common.ClipNorm = None,
    freeze_bn: common.FreezeBn = False,
    distill: Annotated[
        float, typer.Option(help="Share of the loss that comes from the outputs of the unpruned network.")
    ] = 0.0,
    temperature: Annotated[float, typer.Option(help="How soft --distill makes these outputs.")] = 4.0,
    batch_size: common.BatchSize = 32,
    workers: common.Workers = 0,
    seed: common.Seed = 0,
    threads: common.Threads = None,
    out: Annotated[
        Path | None, typer.Option(help="The run directory to make.", show_default="RUN-pruned")
    ] = None,
    resume: common.Resume = False,
) -> None:
    """Rank, cut, verify and fine-tune a trained model, again and again.

    The article's way, 512 filters of the whole network at a time:

    [bold]secateurs prune runs/train-vgg16 --remove 512 --iterations 5 --finetune-epochs 10[/bold]

    Or down to a share of the multiply-accumulates, in steps that each take the same share:

    [bold]secateurs prune runs/train-vgg16 --target macs=0.3[/bold]

    Or as far as each group can go alone (see secateurs sensitivity), all of them together:

    [bold]secateurs prune runs/train-vgg16 --sensitivity runs/train-vgg16-sensitivity --max-drop 0.01[/bold]

    Where images or hours are few: refit the layers behind each cut, and let the unpruned network teach:

    [bold]secateurs prune runs/train-vgg16 --target macs=0.3 --reconstruct-images 300 --distill 0.5[/bold]
    """
    from secateurs.cli.display import Display
    from secateurs.jobs import PruneSettings, prune_job
    from secateurs.recovery import Recipe

    with common.clear_exits(parsing=True):
        if remove is None and target is None and shares is None and sensitivity is None:
            raise BudgetError("say how much is to leave", fix="--remove 512, or --target macs=0.3")
        given, spared = parse_shares(shares), tuple(skip or ())
        if sensitivity is not None:
            given, spared = from_sensitivity(sensitivity, max_drop, given or {}, spared)
        settings = PruneSettings(
            source=str(run),
            data=data,
            remove=remove,
            target=parse_target(target),
            iterations=iterations,
            criterion=criterion,
            scope=scope,
            round_to=round_to,
            kinds=tuple(kinds.split(",")) if kinds else None,
            skip=spared,
            shares=given,
            min_units=parse_least(min_units),
            selection=selection,
            normalization=normalization,
            rank_images=rank_images,
            reconstruct_images=reconstruct_images,
            final_epochs=final_epochs,
            recipe=Recipe(
                epochs=finetune_epochs,
                lr=lr,
                optimizer=optimizer,
                schedule=schedule,
                warmup_epochs=warmup_epochs,
                weight_decay=weight_decay,
                label_smoothing=label_smoothing,
                clip_norm=clip_norm,
                freeze_bn=freeze_bn,
                distill=distill,
                temperature=temperature,
            ),
            batch_size=batch_size,
            workers=workers,
            threads=threads,
            seed=seed,
        )
    with common.clear_exits(), Display() as display:
        place = out or run.with_name(f"{run.name}-pruned")
        result = prune_job(settings, place, resume=resume, observer=display)
        display.say(f"\nrun directory: {result.path}")


def parse_target(text: str | None) -> tuple[str, float] | None:
    """``"macs=0.3"`` as a name and a number.

    Raises:
        BudgetError: It is not of that form.
    """
    if text is None:
        return None
    name, _, value = text.partition("=")
    try:
        return name, float(value)
    except ValueError as error:
        raise BudgetError(f"a target is a name and a share, got {text!r}", fix="--target macs=0.3") from error


def parse_shares(text: str | None) -> dict[str, float] | None:
    """``"layer1.*=0.6,layer2.*=0.7"`` as patterns and numbers.

    Raises:
        BudgetError: It is not of that form.

    Example:
        >>> parse_shares("layer1.*=0.6,fc=0.5")
        {'layer1.*': 0.6, 'fc': 0.5}
    """
    if text is None:
        return None
    pairs = [part.strip().rpartition("=") for part in text.split(",")]
    try:
        if not all(pattern for pattern, _, _ in pairs):
            raise ValueError("a part without a pattern")
        return {pattern: float(share) for pattern, _, share in pairs}
    except ValueError as error:
        raise BudgetError(
            f"shares are patterns with what remains, got {text!r}", fix="--shares 'layer1.*=0.6,layer2.*=0.7'"
        ) from error


def from_sensitivity(
    file: Path, max_drop: float, shares: dict[str, float], skip: tuple[str, ...]
) -> tuple[dict[str, float], tuple[str, ...]]:
    """Shares and groups to leave alone by a sensitivity analysis, but for groups that are named outright.

    Raises:
        RunError: The file is none.
        PlanError: No group stays within the fall.
    """
    from secateurs.planning.limits import matching
    from secateurs.sensitivities import Sensitivity

    found, spared = Sensitivity.load(file).within(max_drop)
    found = {name: share for name, share in found.items() if not matching(name, (*shares, *skip))}
    return {**found, **shares}, (*skip, *(name for name in spared if not matching(name, (*shares, *skip))))


def parse_least(text: str) -> int | float:
    """``"8"`` as a number of units, ``"0.1"`` as a share.

    Raises:
        BudgetError: It is neither.
    """
    try:
        return float(text) if "." in text else int(text)
    except ValueError as error:
        raise BudgetError(
            f"--min-units is a number of units or a share, got {text!r}", fix="--min-units 8"
        ) from error
