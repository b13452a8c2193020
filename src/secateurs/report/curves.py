"""The picture of a sensitivity analysis: accuracy over prune ratio, a line a group."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from secateurs.report.charts import SOFT, figure_at

Curve = Sequence[tuple[float, float]]
_NAMED = 48  # lines that get a name of their own


def sensitivity_chart(
    curves: Mapping[str, Curve],
    path: str | Path,
    *,
    title: str,
    accuracy: float,
    max_drop: float = 0.01,
    measure: str = "accuracy",
) -> None:
    """Accuracy without retraining when one group alone is pruned, as in figure 2 of Li et al.

    Colours go from the first group to the last. Where there are very many, the ones that lose most are named.

    Args:
        curves: For each group, in the order of the network, pairs of the share that left and the accuracy.
        path: The PNG file to write.
        title: Which model this is.
        accuracy: That of the model as it is.
        max_drop: Where to draw the line below which a group counts as sensitive.
        measure: What the accuracies are called.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp()) / "sensitivity.png"
        >>> sensitivity_chart({"conv1": [(0.5, 0.8), (0.9, 0.4)]}, path, title="A model", accuracy=0.9)
        >>> path.read_bytes()[1:4]
        b'PNG'
    """
    from matplotlib import colormaps

    named = _most_sensitive(curves) if len(curves) > _NAMED else set(curves)
    columns = 1 + (len(named) - 1) // 24
    with figure_at(path, (6.6 + 1.9 * columns, 4.6)) as figure:
        axes = figure.subplots()
        colours = colormaps["viridis"].resampled(max(len(curves), 2))
        for place, (name, curve) in enumerate(curves.items()):
            ratios = [0.0, *(100 * ratio for ratio, _ in curve)]
            heights = [100 * accuracy, *(100 * value for _, value in curve)]
            label = name if name in named else None
            axes.plot(ratios, heights, ".-", color=colours(place), linewidth=1.1, markersize=4, label=label)
        axes.axhline(100 * (accuracy - max_drop), color=SOFT, linewidth=0.8, linestyle=(0, (4, 3)), zorder=0)
        label = f"{100 * max_drop:g} point{'' if max_drop == 0.01 else 's'} lost"
        axes.text(99, 100 * (accuracy - max_drop), label, ha="right", va="top", fontsize=8, color=SOFT)
        axes.set_xlim(0, 100)
        axes.set_xlabel("units of the group that left, %")
        axes.set_ylabel(f"validation {measure}, no retraining, %")
        axes.grid(axis="y", color="#e8ebed")
        axes.set_axisbelow(True)
        axes.set_title(title)
        figure.legend(loc="outside right upper", ncols=columns, frameon=False, fontsize=7)


def _most_sensitive(curves: Mapping[str, Curve]) -> set[str]:
    means = {name: sum(value for _, value in curve) / len(curve) for name, curve in curves.items()}
    return set(sorted(means, key=lambda name: means[name])[:_NAMED])
