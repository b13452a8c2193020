"""Deciding which units leave."""

from secateurs.planning.budgets import AtMost, Budget, Remove
from secateurs.planning.latency import LatencyModel
from secateurs.planning.parts import AxisCut, GroupCut, IntegerChange, RowScale
from secateurs.planning.plan import Plan
from secateurs.planning.ranking import plan
from secateurs.planning.schedules import PACES, paced_share

__all__ = [
    "PACES",
    "AtMost",
    "AxisCut",
    "Budget",
    "GroupCut",
    "IntegerChange",
    "LatencyModel",
    "Plan",
    "Remove",
    "RowScale",
    "paced_share",
    "plan",
]
