"""Deciding which units leave."""

from secateurs.planning.budgets import Budget, Remove
from secateurs.planning.plan import AxisCut, GroupCut, IntegerChange, Plan, RowScale
from secateurs.planning.ranking import plan

__all__ = ["AxisCut", "Budget", "GroupCut", "IntegerChange", "Plan", "Remove", "RowScale", "plan"]
