"""``secateurs bench``."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from secateurs.cli import common, text


def bench(
    model: Annotated[str, typer.Argument(help="An architecture such as torchvision:vgg16, or a run.")],
    other: Annotated[str, typer.Argument(help="Another one, to be set beside it.")],
    classes: common.Classes = None,
    input_size: common.InputSize = None,
    threads: common.Threads = None,
    json: common.Json = False,
) -> None:
    """Measure two models side by side: parameters, MACs, file size and time.

    [bold]secateurs bench runs/train-vgg16 runs/train-vgg16-pruned[/bold]

    The models take turns at the clock, one image at a time, so that the machine's moods meet both alike.
    """
    with common.clear_exits():
        import torch

        from secateurs.errors import ModelError
        from secateurs.jobs.measuring import sizes, speeds
        from secateurs.jobs.workplace import threads as with_threads

        first, shape = common.named_model(model, classes=classes, input_size=input_size)
        second, other_shape = common.named_model(other, classes=classes, input_size=input_size)
        if shape != other_shape:
            raise ModelError(
                f"{model} takes images of {shape}, but {other} of {other_shape}",
                fix="take two runs that were trained on one size, or two architectures with --input-size",
            )
        image = torch.zeros(1, *shape)
        with with_threads(threads):
            speed = speeds({"first": first, "second": second}, image)
        numbers = [
            {"model": name, **sizes(network, image), **speed[place]}
            for name, network, place in ((model, first, "first"), (other, second, "second"))
        ]
        ratios = {
            key: round(numbers[0][key] / numbers[1][key], 4) for key in ("params", "macs", "file_bytes")
        }
        for kind in ("latency", "latency_cuda"):  # by passes that follow each other
            if f"{kind}_share" in numbers[1]:
                ratios[f"{kind}_ms"] = round(1 / numbers[1][f"{kind}_share"], 4)
        if json:
            common.print_json({"models": numbers, "ratio": ratios, "input_size": list(shape)})
        else:
            typer.echo(_as_text(numbers))


def _as_text(numbers: list[dict[str, Any]]) -> str:
    header, *lines = text.before_after(numbers[0], numbers[1]).splitlines()
    names = f"before: {numbers[0]['model']}\nafter:  {numbers[1]['model']}"
    return "\n".join((names, "", header, *lines))
