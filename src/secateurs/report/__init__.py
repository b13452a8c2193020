"""Pictures of what a job did; they show numbers and compute none."""

from __future__ import annotations

from secateurs.report.agreement import correlation_chart, ranks_chart
from secateurs.report.charts import (
    LayerCut,
    accuracy_chart,
    before_after_chart,
    measured_in,
    removed_chart,
)
from secateurs.report.curves import sensitivity_chart

__all__ = [
    "LayerCut",
    "accuracy_chart",
    "before_after_chart",
    "correlation_chart",
    "measured_in",
    "ranks_chart",
    "removed_chart",
    "sensitivity_chart",
]
