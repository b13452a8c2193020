"""Pictures of how criteria agree with the oracle."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from scipy.stats import rankdata

from secateurs.report.charts import SOFT, figure_at

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_PANELS = (
    ("per_layer", "within each layer"),
    ("all_layers", "all layers"),
    ("all_layers_l2", "all layers, scores / layer's l2"),
)
_DOT, _INTERVAL = "#2f6f4f", "#9dbfae"
_MOST_POINTS = 4000  # of a scatter; more are one blot


def correlation_chart(
    criteria: Sequence[Mapping[str, Any]], path: str | Path, *, title: str, oracle: str = "oracle-abs"
) -> None:
    """The shape of table 1 of Molchanov et al.: a line a criterion, Spearman's correlation in three ways.

    Bars are 95 % confidence intervals, small ticks the single layers. What does not exist is a dash.

    Args:
        criteria: Entries with ``criterion``, ``seconds`` and ``agreement``, best first, as
            `secateurs.judging.Comparison.to_dict` gives them.
        path: The PNG file to write.
        title: Which model this is, on what.
        oracle: Which oracle's correlations are shown.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp()) / "comparison.png"
        >>> one = {"value": 0.7, "low": 0.6, "high": 0.8}
        >>> found = {"per_layer": one, "layers": {"conv": 0.7}, "all_layers": one, "all_layers_l2": one}
        >>> correlation_chart([{"criterion": "taylor", "seconds": 1.0, "agreement": {"oracle-abs": found}}],
        ...                   path, title="A model")
        >>> path.read_bytes()[1:4]
        b'PNG'
    """
    with figure_at(path, (11.5, 1.7 + 0.3 * max(len(criteria), 3))) as figure:
        panels = figure.subplots(1, len(_PANELS), sharey=True, squeeze=False)[0]
        for axes, (measure, name) in zip(panels, _PANELS, strict=True):
            for place, each in enumerate(criteria):
                found = each["agreement"][oracle]
                layers = found["layers"].values() if measure == "per_layer" else ()
                _line(axes, place, found[measure], [value for value in layers if value is not None])
            axes.axvline(0, color="#b4bcc2", linewidth=0.8, zorder=0)
            axes.set_xlim(-1.05, 1.42)
            axes.set_xticks((-1, -0.5, 0, 0.5, 1))
            axes.set_title(name, fontsize=10, fontweight="normal")
            axes.grid(axis="y", color="#eef0f2")
            axes.set_axisbelow(True)
        labels = [f"{each['criterion']}  {_seconds(each['seconds'])}" for each in criteria]
        panels[0].set_yticks(range(len(criteria)), labels, fontsize=9)
        panels[0].set_ylim(len(criteria) - 0.4, -0.6)
        figure.supxlabel(f"Spearman's correlation with {oracle}, 95 % interval", fontsize=10)
        figure.suptitle(title, fontsize=12, weight="bold", x=0.02, ha="left")


def _line(axes: Axes, place: int, found: Mapping[str, Any], layers: Sequence[float]) -> None:
    """One criterion in one panel."""
    axes.plot(layers, [place] * len(layers), "|", color="#c7ced3", markersize=7, zorder=1)
    if found["value"] is None:
        axes.text(1.4, place, "-", ha="right", va="center", fontsize=9, color=SOFT)
        return
    if found["low"] is not None:
        axes.plot((found["low"], found["high"]), (place, place), color=_INTERVAL, linewidth=3.5, zorder=2)
    axes.plot(found["value"], place, "o", color=_DOT, markersize=5, zorder=3)
    axes.text(1.4, place, f"{found['value']:.2f}", ha="right", va="center", fontsize=9)


def _seconds(value: float) -> str:
    return "<0.1 s" if value < 0.1 else f"{value:.1f} s" if value < 10 else f"{value:.0f} s"


def ranks_chart(units: Sequence[Mapping[str, Any]], path: str | Path, *, title: str) -> None:
    """A small scatter for each criterion: the rank of each unit within its layer, over the oracle's.

    Ranks are shares of the layer, 0 the least important; colours go from the first layer to the last.

    Args:
        units: Entries with ``layer``, ``unit``, ``oracle-loss`` and a score (or None) for each criterion.
        path: The PNG file to write.
        title: Which model this is.
    """
    criteria = [name for name in (units[0] if units else {}) if name not in ("layer", "unit", "oracle-loss")]
    layers = list(dict.fromkeys(each["layer"] for each in units))
    truth = _within([abs(each["oracle-loss"]) for each in units], units)
    step = 1 + len(units) // _MOST_POINTS
    colours = [layers.index(each["layer"]) for each in units][::step]
    columns = min(5, max(len(criteria), 1))
    rows = 1 + (len(criteria) - 1) // columns
    with figure_at(path, (2.1 * columns + 0.6, 2.25 * max(rows, 1) + 0.7)) as figure:
        grid = figure.subplots(max(rows, 1), columns, squeeze=False, sharex=True, sharey=True).ravel()
        for place, (axes, name) in enumerate(zip(grid, criteria, strict=False)):
            scores = [math.nan if each[name] is None else each[name] for each in units]
            ranks = _within(scores, units)
            axes.scatter(
                truth[::step], ranks[::step], s=6, c=colours, cmap="viridis", alpha=0.6, linewidths=0
            )
            axes.set_title(name, fontsize=9.5, fontweight="normal")
            axes.set_xticks((0, 0.5, 1), ("0", "0.5", "1"))
            axes.set_yticks((0, 0.5, 1), ("0", "0.5", "1"))
            axes.tick_params(labelbottom=place + columns >= len(criteria))
        for axes in grid[len(criteria) :]:
            axes.set_visible(False)
        figure.supxlabel("rank by oracle-abs within the layer", fontsize=10)
        figure.supylabel("rank by the criterion", fontsize=10)
        figure.suptitle(title, fontsize=12, weight="bold", x=0.02, ha="left")


def _within(values: Sequence[float], units: Sequence[Mapping[str, Any]]) -> list[float]:
    """For each unit its rank in its layer, as a share of the layer in (0, 1); ties share a rank.

    A layer with a value that is no number has no ranks.
    """
    places: dict[str, list[int]] = {}
    for place, each in enumerate(units):
        places.setdefault(each["layer"], []).append(place)
    ranks = [0.0] * len(units)
    for mine in places.values():
        for place, rank in zip(mine, rankdata([values[place] for place in mine]), strict=True):
            ranks[place] = (float(rank) - 0.5) / len(mine)
    return ranks
