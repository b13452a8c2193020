"""The pictures of a pruning job."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from secateurs.report import LayerCut, accuracy_chart, before_after_chart, measured_in, removed_chart

Row = Mapping[str, Any]


def draw_cut(row: Row, folder: Path, *, name: str, cuts: int) -> None:
    """``removed-01.png`` and so on: what one cut took from each layer.

    Args:
        row: The cut's entry of ``iterations.json``.
        folder: Where the picture goes.
        name: The model.
        cuts: How many cuts the job makes.
    """
    number = row["iteration"]
    layers = [LayerCut(**layer) for layer in row["layers"]]
    removed_chart(layers, folder / f"removed-{number:02d}.png", title=f"{name}, cut {number} of {cuts}")


def draw_all(before: Row, after: Row, rows: Sequence[Row], folder: Path, *, name: str, data: str) -> None:
    """``removed.png``, ``before-after.png`` and ``accuracy.png``.

    Args:
        before: The first entry of ``metrics.json``.
        after: The second.
        rows: The entries of ``iterations.json``.
        folder: Where the pictures go.
        name: The model.
        data: The data.
    """
    total = [LayerCut(**layer) for layer in _summed(rows)]
    cuts = sum(row["iteration"] is not None for row in rows)
    counted = "one cut" if cuts == 1 else f"all {cuts} cuts"
    removed_chart(total, folder / "removed.png", title=f"{name}, {counted}")
    title = f"{name} on {Path(data).name}"
    before_after_chart(before, after, folder / "before-after.png", title=title)
    accuracy_chart(
        before["val_accuracy"], rows, folder / "accuracy.png", title=title, measure=measured_in(before)
    )


def _summed(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """What each group had at first and lost over all cuts."""
    total: dict[str, dict[str, Any]] = {}
    for row in rows:
        for layer in row["layers"]:
            first = total.setdefault(layer["name"], {**layer, "removed": 0})
            first["removed"] += layer["removed"]
    return list(total.values())
