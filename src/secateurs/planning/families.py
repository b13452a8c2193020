"""Families of cuts, each a superset of the one before, in which a bisection finds the one that is wanted."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Literal, TypeAlias

import numpy as np
import numpy.typing as npt
import torch

from secateurs.graph.groups import Graph, Group
from secateurs.planning.allocation import Savings, spending_order
from secateurs.planning.fit import Counts, Fit

Scope: TypeAlias = Literal["global", "local"]
Orders: TypeAlias = Mapping[str, npt.NDArray[np.int64]]
Curves: TypeAlias = Mapping[str, torch.Tensor]
Family: TypeAlias = tuple[Callable[[int], Counts], int]


def ranked_cuts(
    groups: Sequence[Group],
    order: Orders,
    scores: Mapping[str, torch.Tensor],
    scope: Scope,
    fit: Fit,
    kept: Mapping[str, int],
) -> Family:
    """A family of cuts, each a superset of the one before, and the number of the largest."""
    free = np.array([group.name not in kept for group in groups])
    if scope == "local":
        given = np.array([group.size - kept.get(group.name, group.size) for group in groups])
        sizes = np.array([group.size for group in groups])
        steps = max(1000, int(sizes.max()))

        def alike(step: int) -> Counts:
            return fit((given + free * np.ceil(sizes * step / steps - 1e-9).astype(np.int64)).tolist())

        return alike, steps
    least = {group.name: fit.least(group.name) if group.name not in kept else group.size for group in groups}
    return _one_by_one(groups, _ranked(groups, order, scores, least), fit, kept)


def spent_cuts(
    graph: Graph,
    groups: Sequence[Group],
    curves: Curves,
    savings: Savings,
    fit: Fit,
    kept: Mapping[str, int],
) -> Family:
    """The same, where each cut goes on from the one before where the error is least for what it saves."""
    order = spending_order(
        graph,
        groups,
        curves,
        savings,
        multiples=[fit.multiple(group.name) for group in groups],
        least=[fit.least(group.name) for group in groups],
        kept=kept,
    )
    return _one_by_one(groups, order, fit, kept)


def _one_by_one(
    groups: Sequence[Group], owners: npt.NDArray[np.int64], fit: Fit, kept: Mapping[str, int]
) -> Family:
    """Cuts in which one unit leaves after the other, of the groups that are named in this order."""
    given = np.array([group.size - kept.get(group.name, group.size) for group in groups])

    def cut(step: int) -> Counts:
        return fit((given + np.bincount(owners[:step], minlength=len(groups))).tolist())

    return cut, len(owners)


def first_cut(steps: int, holds: Callable[[int], bool], cut: Callable[[int], Counts]) -> Counts:
    """The first cut for which a condition holds that stays true once it is."""
    low, high = 0, steps
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if holds(middle) else (middle + 1, high)
    return cut(low)


def last_cut(steps: int, holds: Callable[[int], bool], cut: Callable[[int], Counts]) -> Counts:
    """The last cut for which a condition holds that stays false once it is not."""
    low, high = 0, steps
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if holds(middle) else (low, middle - 1)
    return cut(low)


def _ranked(
    groups: Sequence[Group],
    order: Orders,
    scores: Mapping[str, torch.Tensor],
    least: Mapping[str, int],
) -> npt.NDArray[np.int64]:
    """The group of each unit in ascending order of importance, without the best units that have to stay.

    One stable sort of all units serves every step of the bisection, and breaks ties alike each time; a
    selection of the lowest ones by partition would do neither.
    """
    values, owners = [], []
    for place, group in enumerate(groups):
        able = group.size - least[group.name]
        mine = np.asarray(torch.as_tensor(scores[group.name]).detach().cpu(), np.float64)[order[group.name]]
        values.append(mine[:able])
        owners.append(np.full(able, place, np.int64))
    ranked: npt.NDArray[np.int64] = np.concatenate(owners)[np.argsort(np.concatenate(values), kind="stable")]
    return ranked
