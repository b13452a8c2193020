"""Pictures of a pruning run, drawn by matplotlib without a display and written whole."""

from __future__ import annotations

import io
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from secateurs import files

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_GONE, _KEPT, _BEFORE, _AFTER = "#c8553d", "#dfe3e6", "#9aa5ad", "#2f6f4f"
INK, SOFT = "#22292e", "#5b666e"
_UPRIGHT = 24  # layers that still fit side by side
_STYLE: Any = {
    "font.size": 10,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": "#b4bcc2",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 12,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "xtick.color": INK,
    "ytick.color": INK,
    "svg.hashsalt": "secateurs",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerCut:
    """What one layer lost.

    Attributes:
        name: The layer.
        size: Its units before.
        removed: How many of them left.
    """

    name: str
    size: int
    removed: int


def removed_chart(layers: Sequence[LayerCut], path: str | Path, *, title: str) -> None:
    """The article's figure: how many units each layer lost, drawn over how many it had.

    Up to 24 layers stand side by side; more lie below one another, so that every name can be read.

    Args:
        layers: In the order of the network.
        path: The PNG file to write.
        title: What was cut.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp()) / "removed.png"
        >>> removed_chart([LayerCut(name="features.0", size=64, removed=6)], path, title="First cut")
        >>> path.read_bytes()[1:4]
        b'PNG'
    """
    flat = len(layers) > _UPRIGHT
    size = (8.5, 1.4 + 0.235 * len(layers)) if flat else (max(5.5, 1.2 + 0.62 * len(layers)), 4.2)
    with figure_at(path, size) as figure:
        axes = figure.subplots()
        places = range(len(layers))
        names = [layer.name for layer in layers]
        draw = axes.barh if flat else axes.bar
        draw(places, [layer.size for layer in layers], 0.78, color=_KEPT, label="kept")
        draw(places, [layer.removed for layer in layers], 0.78, color=_GONE, label="removed")
        widest = max((layer.size for layer in layers), default=1)
        for place, layer in zip(places, layers, strict=True):
            _label_bar(axes, place, layer, widest, flat)
        if flat:
            axes.set_yticks(places, names, fontsize=8)
            axes.set_ylim(len(layers) - 0.4, -0.6)
            axes.set_xlim(0, widest * 1.13)
            axes.set_xlabel("units")
        else:
            axes.set_xticks(places, names, rotation=40, ha="right", rotation_mode="anchor")
            axes.set_xlim(-0.6, len(layers) - 0.4)
            axes.set_ylim(0, widest * 1.16)
            axes.set_ylabel("units")
        _title(
            axes, title, f"{sum(c.removed for c in layers)} of {sum(c.size for c in layers)} units removed"
        )
        figure.legend(
            *axes.get_legend_handles_labels(), loc="outside upper right", frameon=False, ncols=2, fontsize=9
        )


def _label_bar(axes: Axes, place: int, layer: LayerCut, widest: int, flat: bool) -> None:
    """The number removed, just beyond the end of the whole bar."""
    share = f"{layer.removed / layer.size:.0%}"
    if flat:
        text = f"{layer.removed} of {layer.size}"
        axes.text(layer.size + widest * 0.01, place, text, va="center", fontsize=7.5)
    else:
        label = f"{layer.removed}\n{share}"
        axes.text(place, layer.size + widest * 0.012, label, ha="center", va="bottom", fontsize=8)


@dataclass(frozen=True, slots=True, kw_only=True)
class Quantity:
    """One panel of the picture before and after.

    Attributes:
        title: What it is, with its unit.
        before: Its value before.
        after: Its value after.
        shape: How a value is written, as a format string.
        relative: Whether the ratio of the two is of interest, or else the difference in points.
        share: What the second is of the first, where that was measured; the ratio of the two if None.
    """

    title: str
    before: float
    after: float
    shape: str
    relative: bool = True
    share: float | None = None

    @property
    def verdict(self) -> str:
        """The change in words."""
        if not self.relative:
            return f"{(self.after - self.before):+.1f} points"
        if self.after <= 0 or self.before <= 0:
            return ""
        ratio = self.before / self.after if self.share is None else 1 / self.share
        return (
            f"{ratio:.1f}x less" if ratio >= 1.05 else ("same" if ratio > 0.95 else f"{1 / ratio:.1f}x more")
        )


def quantities(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[Quantity]:
    """The panels for two entries of ``metrics.json``; what either lacks is left out."""
    scales = (
        ("accuracy", f"{measured_in(before)}, %", 100.0, "{:.1f}", False),
        ("params", "parameters, M", 1e-6, "{:,.3g}", True),
        (
            "macs",
            *(("MACs, G", 1e-9) if (before.get("macs") or 0) >= 1e9 else ("MACs, M", 1e-6)),
            "{:.3g}",
            True,
        ),
        ("file_bytes", "file, MB", 1e-6, "{:.3g}", True),
        ("latency_ms", "CPU time, ms an image", 1.0, "{:.3g}", True),
    )
    return [
        Quantity(
            title=title,
            before=float(before[key]) * scale,
            after=float(after[key]) * scale,
            shape=shape,
            relative=relative,
            share=after.get("latency_share") if key == "latency_ms" else None,
        )
        for key, title, scale, shape, relative in scales
        if before.get(key) is not None and after.get(key) is not None
    ]


def measured_in(facts: Mapping[str, Any]) -> str:
    """What the accuracy of an entry of ``metrics.json`` is: of images without classes, agreement."""
    return "agreement" if "labels" in facts else "accuracy"


def before_after_chart(
    before: Mapping[str, Any], after: Mapping[str, Any], path: str | Path, *, title: str
) -> None:
    """Accuracy, parameters, MACs, file size and time of the two models, each in a panel of its own scale.

    Args:
        before: The first entry of ``metrics.json``.
        after: The second.
        path: The PNG file to write.
        title: Which model this is.
    """
    panels = quantities(before, after)
    with figure_at(path, (2.15 * max(len(panels), 2), 3.5)) as figure:
        for axes, panel in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
            bars = axes.bar((0, 1), (panel.before, panel.after), 0.72, color=(_BEFORE, _AFTER))
            axes.bar_label(bars, [panel.shape.format(v) for v in (panel.before, panel.after)], padding=2)
            axes.set_xticks((0, 1), ("before", "after"))
            axes.set_yticks(())
            axes.spines["left"].set_visible(False)
            axes.tick_params(axis="x", length=0)
            axes.set_ylim(0, max(panel.before, panel.after, 1e-9) * 1.15)
            axes.set_title(panel.title, fontsize=10, fontweight="normal", loc="center", pad=22)
            axes.text(
                0.5, 1.05, panel.verdict, transform=axes.transAxes, ha="center", weight="bold", color=_AFTER
            )
        figure.suptitle(title, fontsize=12, weight="bold", x=0.02, ha="left")


def accuracy_chart(
    start: float,
    rows: Sequence[Mapping[str, Any]],
    path: str | Path,
    *,
    title: str,
    measure: str = "accuracy",
) -> None:
    """How accuracy fell at each cut and came back with the repair and the fine-tune, over the MACs left.

    Args:
        start: Validation accuracy before the first cut, as a share.
        rows: An entry for each cut with ``iteration``, ``macs_share``, ``accuracy_cut``, ``accuracy_tuned``
            and, where it was repaired, ``accuracy_repaired``; the last one is the fine-tune at the end if its
            ``iteration`` is ``None``.
        path: The PNG file to write.
        title: Which model this is.
        measure: What the accuracies are called.
    """
    looks = {
        "cut": (_GONE, "after the cut"),
        "repaired": (_BEFORE, "after the repair"),
        "tuned": (_AFTER, "after training"),
    }
    points: dict[str, list[tuple[float, float]]] = {
        "cut": [],
        "repaired": [],
        "tuned": [(100.0, 100 * start)],
    }
    way = list(points["tuned"])
    for row in rows:
        for stage, found in points.items():
            value = row.get(f"accuracy_{stage}")
            if value is not None and (stage == "tuned" or row["iteration"] is not None):
                found.append((100 * row["macs_share"], 100 * value))
                way.append(found[-1])
    with figure_at(path, (7.5, 4.0)) as figure:
        axes = figure.subplots()
        axes.plot(*zip(*way, strict=True), color="#b4bcc2", linewidth=1.2, zorder=1)
        for layer, (stage, (color, label)) in enumerate(looks.items()):
            if points[stage]:
                size = {"cut": 36, "repaired": 80, "tuned": 30}[stage]  # a repair shows behind the training
                macs, accuracies = zip(*points[stage], strict=True)
                axes.scatter(macs, accuracies, s=size, color=color, label=label, zorder=2 + layer)
        axes.set_xlim(103, max(0.0, points["tuned"][-1][0] - 5))
        axes.margins(y=0.12)
        axes.grid(axis="y", color="#e8ebed")
        axes.set_axisbelow(True)
        axes.set_xlabel("MACs that remain, %")
        axes.set_ylabel(f"validation {measure}, %")
        _title(axes, title, "")
        axes.legend(frameon=False, loc="lower left")


def _title(axes: Axes, title: str, below: str) -> None:
    axes.set_title(title, pad=26 if below else 10)
    axes.annotate(
        below,
        (0, 1),
        (0, 10),
        xycoords="axes fraction",
        textcoords="offset points",
        fontsize=9.5,
        color=SOFT,
    )


@contextmanager
def figure_at(path: str | Path, size: tuple[float, float]) -> Iterator[Figure]:
    """A figure that belongs to no window and to no global state; written when the block ends."""
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=size, dpi=130, layout="constrained")
        FigureCanvasAgg(figure)
        yield figure
        picture = io.BytesIO()
        figure.savefig(picture, format="png")
    with files.whole_file(Path(path)) as temporary:
        temporary.write_bytes(picture.getvalue())
