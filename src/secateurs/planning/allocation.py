"""Where a budget is spent: units leave where the error that this costs is least for what it saves.

Every group has an error curve: the error after 0, 1, ... of its units have left. What a unit saves depends
on how many units the other groups have left, as a layer's multiply-accumulates are a product of its widths.
So the greedy choice takes one stretch of one curve after the other, always the one with the least error for
its saving, and all savings anew after each. Only the lower convex hull of a curve counts: a dear unit behind
which many are cheap goes together with these.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from typing import Literal, Protocol, TypeAlias

import numpy as np
import numpy.typing as npt
import torch

from secateurs.errors import PlanError, UnknownNameError
from secateurs.graph.cost import CostModel, Length, Term
from secateurs.graph.counts import Counted
from secateurs.graph.groups import Graph, Group

Numbers: TypeAlias = npt.NDArray[np.float64]
Savings: TypeAlias = Callable[[Numbers], Numbers]


class Curved(Protocol):
    """Scores that come with an error curve for each group."""

    @property
    def curves(self) -> Mapping[str, torch.Tensor] | None:
        """By group name the error after 0, 1, ... of the group's units have left."""


Allocation: TypeAlias = Mapping[str, int] | Literal["error"] | Curved
_NEVER = float(np.finfo(np.float64).max)


def spending_order(
    graph: Graph,
    groups: Sequence[Group],
    curves: Mapping[str, torch.Tensor],
    savings: Savings,
    *,
    multiples: Sequence[int] | None = None,
    least: Sequence[int] | None = None,
    kept: Mapping[str, int] | None = None,
) -> npt.NDArray[np.int64]:
    """The group that loses a unit next, again and again until each is down to what it keeps at least.

    Args:
        graph: The graph.
        groups: Those of its groups that are cut.
        curves: For each of them the error after 0 to ``size - 1`` units have left, in one measure for all.
        savings: For the number of units that *every* group of the graph keeps, ``(groups of the graph,)``,
            what one unit fewer of each would save, same shape. See `marginal_savings` and
            `product_savings`, which takes the terms of a latency model.
        multiples: What each group's count is a multiple of; 1 by default.
        least: How many units each group keeps at least; 1 by default.
        kept: Numbers of units that are given, by group name; of these groups no unit leaves here.

    Returns:
        Indices into `groups`, one for each unit that can leave.

    Raises:
        PlanError: A curve is missing, of the wrong length or not finite.
    """
    given = kept or {}
    places = [graph.groups.index(group) for group in groups]
    ones = [1] * len(groups)
    hulls = [
        [] if group.name in given else _hull(_curve(group, curves), multiple, low)
        for group, multiple, low in zip(groups, multiples or ones, least or ones, strict=True)
    ]
    left = np.asarray([given.get(group.name, group.size) for group in graph.groups], np.float64)
    at = [0] * len(groups)
    order: list[int] = []
    slopes = np.asarray([hull[0][1] if hull else np.inf for hull in hulls])
    while np.isfinite(slopes).any():
        worth = np.maximum(savings(left)[places], np.finfo(np.float64).tiny)
        with np.errstate(over="ignore"):
            prices = slopes / worth
        best = int(np.argmin(np.where(np.isfinite(slopes), prices, np.inf)))
        if not np.isfinite(prices[best]):  # nothing that is left saves anything
            best = int(np.flatnonzero(np.isfinite(slopes))[0])
        length = hulls[best][at[best]][0]
        order += [best] * length
        left[places[best]] -= length
        at[best] += 1
        slopes[best] = hulls[best][at[best]][1] if at[best] < len(hulls[best]) else np.inf
    return np.asarray(order, np.int64)


def counts_and_curves(
    allocation: Allocation | None, scores: object
) -> tuple[Mapping[str, int] | None, Mapping[str, torch.Tensor] | None]:
    """What an allocation says: how many units groups keep, or by which curves the budget is spent.

    Raises:
        PlanError: The scores that are to have curves have none.
        UnknownNameError: It is a name, and not ``"error"``.
    """
    if isinstance(allocation, str) and allocation != "error":
        raise UnknownNameError("allocation", allocation, ["error"])
    if allocation is None or (not isinstance(allocation, str) and not hasattr(allocation, "curves")):
        return allocation, None
    source = scores if isinstance(allocation, str) else allocation
    curves: Mapping[str, torch.Tensor] | None = getattr(source, "curves", None)
    if not curves:
        name = getattr(source, "criterion", None) or type(source).__name__
        raise PlanError(
            f"an allocation by error needs error curves, and the scores of {name!r} have none",
            fix="score with 'reconstruction', and pass its scores as allocation=",
        )
    return None, curves


def _curve(group: Group, curves: Mapping[str, torch.Tensor]) -> Numbers:
    if group.name not in curves:
        raise PlanError(
            f"there is no error curve for group {group.name!r}",
            fix="score the same graph with criterion 'reconstruction'",
        )
    curve = np.asarray(torch.as_tensor(curves[group.name]).detach().cpu(), np.float64)
    if curve.shape != (group.size,):
        raise PlanError(
            f"group {group.name!r} has {group.size} units, so its error curve has as many values, "
            f"got shape {curve.shape}"
        )
    if not np.isfinite(curve).all():
        raise PlanError(
            f"the error curve of group {group.name!r} is not finite", fix="check data and weights"
        )
    return curve


def _hull(curve: Numbers, multiple: int, least: int) -> list[tuple[int, float]]:
    """The lower convex hull of a curve as stretches: how many units leave, and the error of each of them."""
    size, most = len(curve), len(curve) - least
    allowed = [removed for removed in range(most + 1) if not removed or (size - removed) % multiple == 0]
    corners: list[int] = []
    for point in allowed:
        while len(corners) > 1 and _slope(curve, corners[-1], point) <= _slope(curve, *corners[-2:]):
            corners.pop()
        corners.append(point)
    found = [(b - a, _slope(curve, a, b)) for a, b in pairwise(corners)]
    rest = most - corners[-1]  # below one multiple; no count that fits lies there
    return found + ([(rest, _NEVER)] if rest else [])


def _slope(curve: Numbers, start: int, end: int) -> float:
    return float(curve[end] - curve[start]) / (end - start)


def marginal_savings(graph: Graph, quantity: str) -> Savings:
    """What one unit fewer of each group saves, for any numbers of units that are left.

    The derivative of the closed form; exact for a group that no product contains twice.

    Args:
        graph: The graph.
        quantity: ``"macs"``, ``"params"``, ``"bytes"`` or ``"units"``.

    Returns:
        A function of ``(groups,)`` kept units, which gives the savings, same shape.

    Example:
        >>> from torch import nn
        >>> import secateurs
        >>> net = nn.Sequential(nn.Linear(5, 4, bias=False), nn.Linear(4, 3, bias=False), nn.Linear(3, 2))
        >>> graph = secateurs.trace(net, torch.zeros(1, 5))
        >>> savings = marginal_savings(graph, "macs")
        >>> savings(np.array([4.0, 3.0])), savings(np.array([4.0, 1.0]))
        (array([8., 6.]), array([6., 6.]))
    """
    if quantity == "units":
        return np.ones_like
    costs: CostModel = graph.costs
    return product_savings(graph, costs.lengths, getattr(costs, quantity))


def product_savings(graph: Graph, lengths: Sequence[Length], terms: Sequence[Term]) -> Savings:
    """What one unit fewer of each group saves of a sum of products of lengths.

    Args:
        graph: The graph.
        lengths: The dimensions that the products are of.
        terms: The products.

    Returns:
        As `marginal_savings`.
    """
    sizes = np.asarray([group.size for group in graph.groups], np.int64)
    owner = np.repeat(np.arange(len(sizes)), sizes)
    counted = [Counted.of(size, factors, owner, sizes) for size, factors in lengths]
    fixed = np.asarray([each.fixed for each in counted], np.float64)
    owners = [place for place, each in enumerate(counted) for _ in each.terms]
    of_counts = _Products([term for each in counted for term in each.terms], len(sizes))
    total = _Products(terms, len(counted))

    def savings(kept: Numbers) -> Numbers:
        now = fixed + np.bincount(owners, of_counts.values(kept), len(counted))
        return of_counts.gradient(kept, total.gradient(now, np.ones(len(total.scale)))[owners])

    return savings


class _Products:
    """Products of some variables each, ``scale x_a x_b ...``, and the gradient of their weighted sum."""

    def __init__(self, terms: Sequence[Term], variables: int) -> None:
        widest = max((len(places) for _, places in terms), default=0)
        self.scale = np.asarray([scale for scale, _ in terms], np.float64)
        padded = [(*places, *[variables] * (widest - len(places))) for _, places in terms]
        self._places = np.asarray(padded, np.int64).reshape(len(terms), widest)  # one more variable, always 1
        self._variables = variables

    def values(self, x: Numbers) -> Numbers:
        """``(terms,)`` the products."""
        product: Numbers = self.scale * np.append(x, 1.0)[self._places].prod(1)
        return product

    def gradient(self, x: Numbers, weights: Numbers) -> Numbers:
        """``(variables,)`` the derivative of ``sum weights * products``."""
        factors = np.append(x, 1.0)[self._places]
        total = np.zeros(self._variables + 1)
        for column in range(factors.shape[1]):
            others = np.delete(factors, column, axis=1).prod(1)
            total += np.bincount(self._places[:, column], weights * self.scale * others, len(total))
        return total[:-1]
