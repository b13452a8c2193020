"""What the commands share: options, exits, and models by name."""

from __future__ import annotations

import contextlib
import json
import re
import sys
from collections.abc import Iterator, Mapping
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

from secateurs.errors import (
    BudgetError,
    DataError,
    ModelError,
    PatternError,
    RunError,
    SecateursError,
    TrainingError,
    UnknownNameError,
)

if TYPE_CHECKING:
    from torch import nn

    from secateurs.recovery import Recipe

_NUMBERS = {"k": 1e3, "M": 1e6, "G": 1e9}
_BYTES = {
    **{"B": 1.0, "kB": 1e3, "KB": 1e3, "MB": 1e6, "GB": 1e9},
    **{"KiB": 2.0**10, "MiB": 2.0**20, "GiB": 2.0**30},
}
_TIMES = {"us": 1e-3, "ms": 1.0, "s": 1e3}
FAILED, BAD_ARGUMENTS, INTERRUPTED = 1, 2, 130
_OF_THE_USER = (DataError, ModelError, PatternError, RunError, UnknownNameError)

Seed = Annotated[int, typer.Option(help="What every random number follows from.", rich_help_panel="The run")]
Threads = Annotated[
    int | None, typer.Option(min=1, help="CPU threads.", show_default="all cores", rich_help_panel="The run")
]
Resume = Annotated[
    bool,
    typer.Option(
        "--resume", help="Continue a job that was stopped, from where it was.", rich_help_panel="The run"
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]
BatchSize = Annotated[int, typer.Option(min=1, help="Images in a batch.", rich_help_panel="The run")]
Workers = Annotated[
    int, typer.Option(min=0, help="Processes that read images ahead.", rich_help_panel="The run")
]
_TRAINING, _TEACHING, _RUN = "Training", "Teaching", "The run"
Optimizer = Annotated[str, typer.Option(help="sgd (with momentum) or adamw.", rich_help_panel=_TRAINING)]
Nesterov = Annotated[
    bool, typer.Option("--nesterov", help="Look ahead along sgd's momentum.", rich_help_panel=_TRAINING)
]
Schedule = Annotated[
    str,
    typer.Option(help="How the learning rate goes: cosine, step or constant.", rich_help_panel=_TRAINING),
]
LrSteps = Annotated[
    str, typer.Option(help="With step: shares of the training where it falls.", rich_help_panel=_TRAINING)
]
LrFactor = Annotated[
    float, typer.Option(help="With step: what it is multiplied by there.", rich_help_panel=_TRAINING)
]
WeightDecay = Annotated[
    float, typer.Option(help="Pull of the weights towards zero.", rich_help_panel=_TRAINING)
]
Warmup = Annotated[
    float,
    typer.Option(help="Epochs over which the learning rate rises first.", rich_help_panel=_TRAINING),
]
ClipNorm = Annotated[
    float | None,
    typer.Option(help="The longest gradient allowed.", show_default="any", rich_help_panel=_TRAINING),
]
LabelSmoothing = Annotated[
    float,
    typer.Option(help="Share of each target spread over all classes.", rich_help_panel=_TRAINING),
]
FreezeBn = Annotated[
    bool,
    typer.Option(
        "--freeze-bn", help="Keep the running statistics of batch norms.", rich_help_panel=_TRAINING
    ),
]
Accumulate = Annotated[
    int, typer.Option(min=1, help="Batches that make one step.", rich_help_panel=_TRAINING)
]
Precision = Annotated[
    str | None,
    typer.Option(help="Mixed precision: bf16, fp16 or no.", show_default="no", rich_help_panel=_TRAINING),
]
ChannelsLast = Annotated[
    bool | None,
    typer.Option(
        "--channels-last/--no-channels-last",
        help="Memory layout of images in training.",
        show_default="where it is faster",
        rich_help_panel=_TRAINING,
    ),
]
Mixup = Annotated[
    float, typer.Option(help="Alpha of the samples that are mixed; 0 for none.", rich_help_panel=_TRAINING)
]
Ema = Annotated[
    float,
    typer.Option(help="Decay of an average of the weights, as 0.999; 0 for none.", rich_help_panel=_TRAINING),
]
Patience = Annotated[
    int | None,
    typer.Option(
        min=1,
        help="Epochs without a better validation to stop after.",
        show_default="never",
        rich_help_panel=_TRAINING,
    ),
]
Distill = Annotated[
    float | None,
    typer.Option(
        help="Share of the loss that comes from the outputs of the unpruned network.",
        show_default="0; 1 without labels",
        rich_help_panel=_TEACHING,
    ),
]
Temperature = Annotated[
    float, typer.Option(help="How soft --distill makes these outputs.", rich_help_panel=_TEACHING)
]
DistillFeatures = Annotated[
    float | None,
    typer.Option(
        help="How much it counts in the loss to differ from what the blocks of that network give.",
        show_default="1 with --distill",
        rich_help_panel=_TEACHING,
    ),
]
CheckpointMinutes = Annotated[
    float, typer.Option(min=0, help="Time between states kept within an epoch.", rich_help_panel=_RUN)
]
Repair = Annotated[
    str,
    typer.Option(
        help="What heals a cut, without training: reconstruct, compensate, batch-norm or none.",
        rich_help_panel="Repair",
    ),
]
RepairImages = Annotated[
    int, typer.Option(min=1, help="Training images that the repair looks at.", rich_help_panel="Repair")
]
Classes = Annotated[int | None, typer.Option(min=2, help="Classes of an architecture.", show_default="1000")]
InputSize = Annotated[
    str | None, typer.Option(help="Channels x height x width of an image.", show_default="3x224x224")
]


@contextlib.contextmanager
def clear_exits(*, parsing: bool = False) -> Iterator[None]:
    """Turn an error of ours into its message and the exit that goes with it; no traceback.

    Args:
        parsing: Whether the block only reads arguments, so that every error is one of the user's.
    """
    try:
        yield
    except SecateursError as error:
        code = BAD_ARGUMENTS if parsing or isinstance(error, _OF_THE_USER) else FAILED
        leave(str(error), code)
    except KeyboardInterrupt:
        leave("interrupted; the same command with --resume continues", INTERRUPTED)
    except MemoryError:
        leave("out of memory: choose a smaller --batch-size", FAILED)
    except RuntimeError as error:
        if type(error).__name__ != "OutOfMemoryError":
            raise
        leave(f"out of GPU memory: choose a smaller --batch-size ({str(error).splitlines()[0]})", FAILED)


def leave(message: str, code: int) -> NoReturn:
    """Print ``message`` on stderr and exit."""
    sys.stdout.flush()
    typer.echo(f"secateurs: {message}", err=True)
    raise typer.Exit(code)


def print_json(value: object) -> None:
    """One JSON document on stdout."""
    typer.echo(json.dumps(value, indent=2))


def recipe_of(options: Mapping[str, Any], *, epochs: int) -> Recipe:
    """How to train, from the options of a command that have the names of a recipe's fields.

    Raises:
        TrainingError: A value is out of range.
    """
    from secateurs.recovery import Recipe

    names = {each.name for each in fields(Recipe)} - {"seed"}  # the job's seed gives each training its own
    given = {name: value for name, value in options.items() if name in names}
    try:
        given["lr_steps"] = tuple(float(part) for part in options["lr_steps"].split(","))
    except ValueError as error:
        message = f"--lr-steps is shares such as 0.5,0.75, got {options['lr_steps']!r}"
        raise TrainingError(message, fix="--lr-steps 0.5,0.75") from error
    return Recipe(**{**given, "epochs": epochs})


def check_trains(options: Mapping[str, Any], epochs: int, fix: str) -> None:
    """Refuse a teacher where there is no training for it to teach in.

    Raises:
        TrainingError: There is one.
    """
    for name in ("distill", "distill_features"):
        if options[name] and not epochs:
            raise TrainingError(f"{name}={options[name]:g} has no effect: nothing is trained", fix=fix)


def parse_target(text: str | None) -> tuple[str, float] | None:
    """``"macs=0.3"`` as a name and a number; a number with a unit, as ``"bytes=4MB"``, is no share.

    Milliseconds and seconds are ``"latency_ms"``.

    Raises:
        BudgetError: It is not of that form.

    Example:
        >>> parse_target("bytes=1.5MB"), parse_target("macs=300M"), parse_target("latency=20ms")
        (('bytes', 1500000.0), ('macs', 300000000.0), ('latency_ms', 20.0))
    """
    name, _, value = (text or "").partition("=")
    found = re.fullmatch(r"([0-9.]+(?:e[+-]?[0-9]+)?) *([a-zA-Z]+)", value.strip())
    if found is None:
        share = parse_setting(text, "--target macs=0.3")
        if share is not None and share[1] > 1:
            raise BudgetError(
                f"--target is a share in (0, 1], or a number with its unit; got {name}={share[1]:g}",
                fix="--target macs=0.3, --target bytes=4MB, or --target latency=20ms",
            )
        return share
    unit = found[2]
    scales = _TIMES if name == "latency" else _BYTES | _NUMBERS if name == "bytes" else _NUMBERS
    if unit not in scales:
        raise BudgetError(
            f"--target {text}: {unit!r} is no unit of {name}", fix=f"use one of: {', '.join(scales)}"
        )
    _, number = parse_setting(f"{name}={found[1]}", "--target macs=0.3") or (name, 0.0)
    return ("latency_ms" if name == "latency" else name), number * scales[unit]


def parse_setting(text: str | None, example: str) -> tuple[str, float] | None:
    """``"accuracy-drop=0.01"`` as a name and a number.

    Raises:
        BudgetError: It is not of that form.
    """
    if text is None:
        return None
    name, _, value = text.partition("=")
    try:
        return name, float(value)
    except ValueError as error:
        option = example.split()[0]
        raise BudgetError(f"{option} is a name and a share, got {text!r}", fix=example) from error


def parse_input_size(text: str) -> tuple[int, int, int]:
    """``"3x224x224"`` as numbers.

    Raises:
        ModelError: It is not three positive numbers.
    """
    parts = text.lower().split("x")
    if len(parts) == 3 and all(part.isdecimal() and int(part) > 0 for part in parts):
        return (int(parts[0]), int(parts[1]), int(parts[2]))
    raise ModelError(f"an input size is three positive numbers such as 3x224x224, got {text!r}")


def parse_pixels(name: str, text: str | None) -> tuple[float, ...] | None:
    """``"0.5,0.5,0.5"`` or ``"0.5"`` as numbers, one a channel.

    Raises:
        DataError: It is not numbers.
    """
    if text is None:
        return None
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError as error:
        raise DataError(f"--{name} is numbers such as 0.5,0.5,0.5, got {text!r}") from error


def named_model(
    name: str, *, classes: int | None, input_size: str | None
) -> tuple[nn.Module, tuple[int, int, int]]:
    """A model by the name of its architecture, or by the run directory that holds it.

    Args:
        name: ``"torchvision:vgg16"`` or a path.
        classes: For an architecture.
        input_size: For an architecture; a run knows its own.

    Returns:
        The model in eval mode, and ``(C, H, W)`` of its images.

    Raises:
        ModelError: There is no such architecture.
        RunError: The path is no finished run.
    """
    from secateurs.models import Architecture, build_architecture
    from secateurs.runs import Run

    if Path(name).exists():
        run = Run(name)
        return run.model(), Architecture.from_dict(run.config["architecture"]).input_size
    if ":" not in name:
        raise RunError(
            f"{name!r} is neither a run directory that exists nor the name of an architecture",
            fix="write torchvision:NAME, timm:NAME, secateurs:vgg-digits or package.module:factory",
        )
    usual: dict[str, Any] = {"num_classes": 1000, "input_size": (3, 224, 224)}
    if name == "secateurs:vgg-digits":
        usual = {"num_classes": 10, "input_size": (1, 16, 16)}
    if classes is not None:
        usual["num_classes"] = classes
    if input_size is not None:
        usual["input_size"] = parse_input_size(input_size)
    return build_architecture(Architecture(name=name, **usual)).eval(), usual["input_size"]
