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
        str | None,
        typer.Option(
            help="What remains at the end: macs=0.3, params=0.3, bytes=0.3, units=0.3, or latency=0.5, the "
            "time of an image as it is measured on this machine. Or what there may be at most: macs=300M, "
            "params=2M, bytes=4MB (of the file), latency=20ms."
        ),
    ] = None,
    iterations: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Rounds of rank, cut, repair and fine-tune.",
            show_default="5 with --remove, --until or a pace of several, else 1",
        ),
    ] = None,
    pace: Annotated[
        str | None,
        typer.Option(
            help="How --target is spread over the rounds: geometric, linear, cubic or one-shot.",
            show_default="geometric",
        ),
    ] = None,
    until: Annotated[
        str | None,
        typer.Option(
            help="accuracy-drop=0.01: undo the cut that costs more validation accuracy, and stop there.",
            show_default="the target",
        ),
    ] = None,
    finetune_epochs: Annotated[
        int | None,
        typer.Option(min=0, help="Epochs after each cut.", show_default="10 with --remove, else 0"),
    ] = None,
    final_epochs: Annotated[
        int | None,
        typer.Option(min=0, help="Epochs of the longer fine-tune at the end.", show_default="1.5 times"),
    ] = None,
    criterion: Annotated[
        str | None,
        typer.Option(
            help="How units are ranked: taylor, taylor-2019, l1, l2, fpgm, bn-scale, apoz, ...; a name that "
            "is unknown lists them all.",
            show_default="reconstruction; taylor with --remove or --normalization and labels",
        ),
    ] = None,
    scope: Annotated[
        str, typer.Option(help="global: one ranking of all units; local: the same share everywhere.")
    ] = "global",
    round_to: Annotated[int, typer.Option(min=1, help="Layers keep a multiple of this many units.")] = 1,
    kinds: Annotated[
        str | None,
        typer.Option(
            help="Kinds of groups to cut, with commas: channel,neuron,head,branch,...",
            show_default="channel with --remove, else every kind but position",
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
    allocation: Annotated[
        str | None,
        typer.Option(
            help="error: spend the target where the error is least for what it saves, by the curves of "
            "--criterion reconstruction (units may be ranked by another); none: by --scope.",
            show_default="error where reconstruction is the default, else none",
        ),
    ] = None,
    selection: Annotated[
        str,
        typer.Option(
            help="Which units of a group leave: its lowest (independent), the lowest without the inputs "
            "that have left (greedy), or those that cost fewest validation images (particles)."
        ),
    ] = "independent",
    normalization: Annotated[
        str | None,
        typer.Option(
            help="Of the importances in each group: none, l1, l2, max, mean, kind or flops.",
            show_default="the criterion's own",
        ),
    ] = None,
    rank_images: Annotated[
        int | None,
        typer.Option(min=1, help="Training images to rank on.", show_default="all; for reconstruction 2000"),
    ] = None,
    repair: common.Repair = "reconstruct",
    repair_images: common.RepairImages = 2000,
    lr: Annotated[
        float, typer.Option(help="The highest learning rate of a fine-tune.", rich_help_panel="Training")
    ] = 0.001,
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
        Path | None, typer.Option(help="The run directory to make.", show_default="RUN-pruned")
    ] = None,
    resume: common.Resume = False,
) -> None:
    """Rank, cut, verify and repair a trained model, and fine-tune it if asked to; once or again and again.

    Down to a share of the multiply-accumulates, in one cut that is repaired without labels or training:

    [bold]secateurs prune runs/train-vgg16 --target macs=0.5[/bold]

    Or to half of the time of an image as it is measured on this machine:

    [bold]secateurs prune runs/train-vgg16 --target latency=0.5[/bold]

    Into four megabytes, or into twenty milliseconds:

    [bold]secateurs prune runs/train-vgg16 --target bytes=4MB[/bold]

    [bold]secateurs prune runs/train-vgg16 --target latency=20ms[/bold]

    With an epoch after the cut in which the unpruned network teaches; or in three rounds of this:

    [bold]secateurs prune runs/train-vgg16 --target macs=0.3 --finetune-epochs 1 --distill 0.7[/bold]

    [bold]secateurs prune runs/train-vgg16 --target macs=0.3 --finetune-epochs 1 --iterations 3[/bold]

    The article's way, 512 filters of the whole network at a time, by Taylor expansion:

    [bold]secateurs prune runs/train-vgg16 --remove 512 --iterations 5 --finetune-epochs 10[/bold]

    As far as each group can go alone (see secateurs sensitivity), all of them together:

    [bold]secateurs prune runs/train-vgg16 --sensitivity runs/train-vgg16-sensitivity --max-drop 0.01[/bold]

    On a folder of images without classes, where agreement with the unpruned network stands for accuracy:

    [bold]secateurs prune runs/train-vgg16 --data photos --target macs=0.5[/bold]

    As far as a hundredth of accuracy goes:

    [bold]secateurs prune runs/train-vgg16 --target macs=0.1 --iterations 20 --until accuracy-drop=0.01[/bold]
    """
    from secateurs.cli.display import Display
    from secateurs.jobs import PruneSettings, prune_job

    with common.clear_exits(parsing=True):
        if remove is None and target is None and shares is None and sensitivity is None:
            raise BudgetError("say how much is to leave", fix="--remove 512, or --target macs=0.3")
        given, spared = parse_shares(shares), tuple(skip or ())
        in_rounds = remove is not None or until is not None or pace not in (None, "one-shot")
        usual_epochs = 0 if remove is None else 10
        epochs = usual_epochs if finetune_epochs is None else finetune_epochs
        if sensitivity is not None:
            given, spared = from_sensitivity(sensitivity, max_drop, given or {}, spared)
        common.check_trains(locals(), epochs or final_epochs or 0, "--finetune-epochs 1")
        settings = PruneSettings(
            source=str(run),
            data=data,
            remove=remove,
            target=common.parse_target(target),
            iterations=iterations or (5 if in_rounds else 1),
            criterion=criterion,
            scope=scope,
            round_to=round_to,
            kinds=tuple(kinds.split(",")) if kinds else None,
            skip=spared,
            shares=given,
            min_units=parse_least(min_units),
            allocation=allocation,
            selection=selection,
            normalization=normalization,
            rank_images=rank_images,
            pace=pace,
            until=common.parse_setting(until, "--until accuracy-drop=0.01"),
            repair=repair,
            repair_images=repair_images,
            final_epochs=final_epochs,
            recipe=common.recipe_of(locals(), epochs=epochs),
            batch_size=batch_size,
            workers=workers,
            threads=threads,
            seed=seed,
        )
    with common.clear_exits(), Display() as display:
        place = out or run.with_name(f"{run.name}-pruned")
        result = prune_job(settings, place, resume=resume, observer=display)
        display.say(f"\nrun directory: {result.path}")
        if not settings.recipe.epochs and not settings.last_epochs:
            display.say(f"next: secateurs recover {result.path} --epochs 1 --distill 0.7  # trains an epoch")


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
