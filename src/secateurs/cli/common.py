"""What the commands share: options, exits, and models by name."""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

from secateurs.errors import (
    DataError,
    ModelError,
    RunError,
    SecateursError,
    UnknownNameError,
)

if TYPE_CHECKING:
    from torch import nn

FAILED, BAD_ARGUMENTS, INTERRUPTED = 1, 2, 130
_OF_THE_USER = (DataError, ModelError, RunError, UnknownNameError)

Seed = Annotated[int, typer.Option(help="What every random number follows from.")]
Threads = Annotated[int | None, typer.Option(min=1, help="CPU threads.", show_default="all cores")]
Resume = Annotated[bool, typer.Option("--resume", help="Continue a job that was stopped, from where it was.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]
BatchSize = Annotated[int, typer.Option(min=1, help="Images in a batch.")]
Workers = Annotated[int, typer.Option(min=0, help="Processes that read images ahead.")]
Optimizer = Annotated[str, typer.Option(help="sgd (with momentum) or adamw.")]
Schedule = Annotated[str, typer.Option(help="How the learning rate goes: cosine or constant.")]
WeightDecay = Annotated[float, typer.Option(help="Pull of the weights towards zero.")]
Warmup = Annotated[float, typer.Option(help="Epochs over which the learning rate rises first.")]
ClipNorm = Annotated[float | None, typer.Option(help="The longest gradient allowed.", show_default="any")]
LabelSmoothing = Annotated[float, typer.Option(help="Share of each target spread over all classes.")]
FreezeBn = Annotated[bool, typer.Option("--freeze-bn", help="Keep the running statistics of batch norms.")]
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
