"""Cutting until a measured latency is met: what a forecast is corrected by."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import nn

from secateurs.errors import BudgetError
from secateurs.planning.plan import Plan

_ABOVE, _BELOW = 0.02, 0.07  # of the goal: how far from it a measured share may be
_TRIALS = 6
_CUTS = 20  # that are planned for them
_FURTHER = 0.95  # of a forecast that gave the same cut as another
_FARTHEST = 4.0  # times the last forecast, or a part of it


@dataclass(frozen=True, slots=True, kw_only=True)
class Trial:
    """A cut that was measured.

    Args:
        forecast: The share of the time that it was forecast to take.
        measured: The share that it took.
        plan: The cut.
    """

    forecast: float
    measured: float
    plan: Plan


def aim(
    cut: Callable[[float], tuple[Plan, nn.Module]],
    measure: Callable[[nn.Module, Plan], float],
    goal: float,
    start: float | None = None,
) -> Trial:
    """Cut to a forecast, measure, and forecast again with what was learned, until the goal is met.

    Args:
        cut: Gives the cut whose forecast share is the one that it is called with.
        measure: The share of the time that a smaller model takes; it is called with that and the cut.
        goal: The share that may remain. Between 7 % less and 2 % more of it is close enough; after six cuts
            the largest that is not slower counts.
        start: The first forecast; the goal if None.

    Returns:
        The cut.

    Raises:
        BudgetError: No cut is as fast as that.
    """
    trials: list[Trial] = []
    forecast = min(goal if start is None else start, 1.0)
    for _ in range(_CUTS):
        try:
            plan, model = cut(forecast)
        except BudgetError:
            if not trials:
                raise
            forecast = (forecast + trials[-1].forecast) / 2  # so little cannot be, somewhat more may
            continue
        if any(plan.groups == trial.plan.groups for trial in trials):
            if any(trial.measured <= goal for trial in trials):
                break  # no other cut lies between a slow one and a fast one
            forecast *= _FURTHER
            continue
        trials.append(Trial(forecast=forecast, measured=measure(model, plan), plan=plan))
        if goal * (1 - _BELOW) <= trials[-1].measured <= goal * (1 + _ABOVE) or len(trials) == _TRIALS:
            break
        forecast = _next(trials, goal)
    met = [trial for trial in trials if trial.measured <= goal * (1 + _ABOVE)]
    if not met:
        least = min(trial.measured for trial in trials)
        raise BudgetError(
            f"latency={goal:.4g} is out of reach: the fastest cut that was tried takes {least:.4f}",
            fix="raise the budget, lower round_to, min_units or shares, or allow more kinds of groups",
        )
    return max(met, key=lambda trial: trial.measured)


def _next(trials: list[Trial], goal: float) -> float:
    """The forecast to try: on the line through the two trials that are nearest to the goal on both sides.

    Where all are on one side it is the line through the last two, and the first one's error is taken for a
    factor.
    """
    slow = min((t for t in trials if t.measured > goal), key=lambda t: t.measured, default=None)
    fast = max((t for t in trials if t.measured <= goal), key=lambda t: t.measured, default=None)
    one, other = (slow, fast) if slow is not None and fast is not None else (trials[-1], trials[0])
    if one.measured == other.measured:
        return min(one.forecast * goal / one.measured, 1.0)
    slope = (one.forecast - other.forecast) / (one.measured - other.measured)
    found = one.forecast + slope * (goal - one.measured)
    return min(max(found, one.forecast / _FARTHEST), one.forecast * _FARTHEST, 1.0)
