"""Numbers and tables as text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

_STRAYS = 1.15  # times that the ratio of two medians is off before a table says so


def count(value: float) -> str:
    """A number with three digits and a unit.

    Example:
        >>> count(1_411_018), count(15_470_264_320), count(512)
        ('1.41 M', '15.5 G', '512')
    """
    for unit, name in ((1e9, " G"), (1e6, " M"), (1e3, " k")):
        if value >= unit:
            return f"{value / unit:.{_decimals(value / unit)}f}{name}"
    return f"{value:g}"


def _decimals(value: float) -> int:
    return 0 if value >= 100 else 1 if value >= 10 else 2


def size(value: float) -> str:
    """Bytes as the article counts them: a megabyte has a million.

    Example:
        >>> size(537_219_952)
        '537 MB'
    """
    return f"{count(value)}B" if value >= 1000 else f"{value:g} B"


def share(value: float | None) -> str:
    """A share as per cent.

    Example:
        >>> share(0.9871), share(None)
        ('98.7 %', '-')
    """
    return "-" if value is None else f"{100 * value:.1f} %"


def ms(value: float) -> str:
    """Milliseconds with three digits."""
    return f"{value:.{2 if value < 10 else 1 if value < 100 else 0}f} ms"


def ratio(before: float, after: float) -> str:
    """How many times less is left.

    Example:
        >>> ratio(10, 4), ratio(10, 10), ratio(4, 10)
        ('2.5x less', 'same', '2.5x more')
    """
    if before <= 0 or after <= 0:
        return "-"
    if before == after:
        return "same"
    times = max(before, after) / min(before, after)
    return f"{times:.{1 if times >= 1.95 else 2}f}x {'less' if before > after else 'more'}"


def table(header: Sequence[str], rows: Sequence[Sequence[str]], indent: str = "") -> str:
    """Columns of equal width, the first to the left and the others to the right.

    Example:
        >>> print(table(("layer", "units"), [("conv1", "64"), ("fc", "4096")]))
        layer  units
        conv1     64
        fc      4096
    """
    lines = [tuple(header), *map(tuple, rows)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(header))]
    text = []
    for line in lines:
        first = line[0].ljust(widths[0])
        others = [cell.rjust(width) for cell, width in zip(line[1:], widths[1:], strict=True)]
        text.append((indent + "  ".join([first, *others])).rstrip())
    return "\n".join(text)


def measured_by(facts: Mapping[str, Any]) -> str:
    """What an accuracy is: of images without classes, the share on which the network agrees."""
    from secateurs.report import measured_in  # not at the top: `--help` needs no torch

    return {"agreement": "agreement with the original", "accuracy": "test accuracy"}[measured_in(facts)]


def before_after(before: Mapping[str, Any], after: Mapping[str, Any]) -> str:
    """The table that a job ends with.

    Args:
        before: The first entry of ``metrics.json``.
        after: The second.
    """
    rows = []
    if before.get("accuracy") is not None and after.get("accuracy") is not None:
        points = 100 * (after["accuracy"] - before["accuracy"])
        old, new = share(before["accuracy"]), share(after["accuracy"])
        rows.append((measured_by(before), old, new, f"{points:+.1f} points"))
    threads = before.get("threads")
    plural = "" if threads == 1 else "s"
    for key, label, shape in (
        ("params", "parameters", count),
        ("macs", "MACs", count),
        ("file_bytes", "file size", size),
        ("latency_ms", f"CPU time an image, {threads} thread{plural}", ms),
        ("latency_cuda_ms", "GPU time an image", ms),
    ):
        if key in before and key in after:
            old, new = before[key], after[key]
            lasts = after.get(f"{key.removesuffix('_ms')}_share")
            rows.append((label, shape(old), shape(new), _less(old, new, lasts)))
    return table(("", "before", "after", ""), rows)


def _less(before: float, after: float, lasts: float | None) -> str:
    """How many times less a quantity is; a time by what passes that follow each other tell of it.

    Where other work makes both times vary, their medians may tell another ratio: then it says what it is of.
    """
    if lasts is None or lasts <= 0 or after <= 0:
        return ratio(before, after)
    strays = not 1 / _STRAYS < before * lasts / after < _STRAYS
    return ratio(1.0, lasts) + (", by pairs of passes" if strays else "")


def bars(layers: Sequence[Mapping[str, Any]], symbol: str = "#", width: int = 30) -> str:
    """Units that each layer lost, as a table with a bar.

    Args:
        layers: Entries with ``name``, ``size`` and ``removed``.
        symbol: What the bars are made of.
        width: The longest bar.
    """
    most = max((layer["removed"] for layer in layers), default=0)
    rows = []
    for layer in layers:
        removed = layer["removed"]
        length = round(width * removed / most) if most else 0
        line = (layer["name"], str(layer["size"]), str(removed), share(removed / layer["size"]))
        rows.append((*line, (symbol * max(length, 1 if removed else 0)).ljust(width)))
    return table(("layer", "units", "removed", "share", " " * width), rows, indent="  ")
