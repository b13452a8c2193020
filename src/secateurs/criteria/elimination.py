"""Backward elimination of blocks of columns from least-squares problems, and the error after each removal.

What reads a unit multiplies a block of its columns with weights ``W``. Without the block, and with the
best weights for the columns that are left, the outputs differ by a least-squares error that follows from
``W`` and from the covariance of the columns alone. As in the optimal brain surgeon, with ``P`` the inverse
covariance of what is left, the removal of a block ``u`` raises that error by

    tr(W_u (P_uu)^-1 W_u')        W <- W - W_u (P_uu)^-1 P_u.        P <- P - P_.u (P_uu)^-1 P_u.

The unit that raises it least goes, weights and inverse follow, and so on. Each error is the exact minimum for
the units that are left; only the order is greedy.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from secateurs.errors import ScoreError

_RIDGE = 1e-6  # added to the covariance, as a share of its mean diagonal, so that it can be inverted
_HARDLY = 1e-9
_LAZY = 256  # columns that wait before they are subtracted from the whole inverse at once


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Regression:
    """One least-squares problem: what one place with weights reads of a group's units.

    Args:
        moments: ``(columns, columns)`` mean products of the columns that are read; centred where a bias
            takes up the mean.
        weight: ``(outputs, columns)``, each row multiplied by the square root of what an error in its output
            costs.
        units: ``(m,)`` the units that are read here; a grouped convolution gives a problem for each group.
        columns: ``(m, count)`` the columns of each of them. Columns of no unit stay.
        is_fixed: Whether nothing makes up for columns that leave, as in a product of activations.
        steps: ``(m,)`` what each removal adds to the error, the first one first, if that does not depend on
            which units leave: where they can be exchanged for combinations.

    Raises:
        ScoreError: The shapes do not fit together, or the moments are not finite.
    """

    moments: Tensor
    weight: Tensor
    units: Tensor
    columns: Tensor
    is_fixed: bool = False
    steps: Tensor | None = None

    def __post_init__(self) -> None:
        width = self.weight.shape[-1]
        if self.moments.shape != (width, width) or self.columns.shape[:1] != self.units.shape:
            shapes = {
                name: tuple(getattr(self, name).shape) for name in ("moments", "weight", "units", "columns")
            }
            raise ScoreError(f"the shapes of a regression do not fit together: {shapes}")
        if not torch.isfinite(self.moments).all():
            raise ScoreError(
                "what weights read has moments that are not finite", fix="check data and weights"
            )

    def times(self, share: float) -> Regression:
        """The same problem where errors cost a share of what they cost here."""
        steps = None if self.steps is None else self.steps * share
        return replace(self, weight=self.weight * share**0.5, steps=steps)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Elimination:
    """The order in which units leave, and what that costs.

    Args:
        order: ``(units,)`` units, the first to leave first.
        errors: ``(units + 1,)`` error of all outputs after 0, 1, ... units have left.
    """

    order: Tensor
    errors: Tensor

    def importance(self) -> Tensor:
        """``(units,)`` the error once a unit and all that leave before it are gone; larger means keep.

        Equal and falling errors grow by the last bit, so that sorting gives the order again.
        """
        rising = self.errors[1:].clone()
        for place in range(1, len(rising)):
            least = torch.nextafter(rising[place - 1], rising.new_tensor(torch.inf))
            rising[place] = torch.maximum(rising[place], least)
        return torch.empty_like(rising).scatter_(0, self.order, rising)


def eliminate(problems: Sequence[Regression], size: int, *, ridge: float = _RIDGE) -> Elimination:
    """Remove one unit after the other, each time the one that raises the refitted error least.

    The errors of several problems add up. In float64: ``K`` columns of ``n`` units and ``C`` outputs cost one
    inversion, ``K^3``; ``n`` updates of the inverse, together ``K^3 / 3``, as it shrinks on the way; and
    ``n`` updates of the weights, together ``n K C`` times the columns of a unit (of more than ``K`` outputs a
    QR decomposition leaves ``K``). Memory: three matrices of ``K^2``.

    Args:
        problems: What is read of the units, a problem for each place; see `Regression`.
        size: Number of units; those that nothing reads leave first, at no cost.
        ridge: Added to each covariance, as a share of its mean diagonal.

    Returns:
        The order and the errors.

    Raises:
        ScoreError: The ridge is not positive.

    Example:
        >>> x = torch.randn(100, 3, dtype=torch.float64)
        >>> x[:, 2] = x[:, 0] + x[:, 1]  # any two of the three say all
        >>> one = Regression(
        ...     moments=x.T @ x / 100,
        ...     weight=torch.tensor([[1.0, 2.0, 4.0]]),
        ...     units=torch.arange(3),
        ...     columns=torch.arange(3)[:, None],
        ... )
        >>> [round(error, 4) > 0 for error in eliminate([one], 3).errors.tolist()]
        [False, False, True, True]
    """
    if not ridge > 0:
        raise ScoreError(f"`0 < ridge` must hold, got ridge={ridge}")
    solvers = [_Missed(problem) if problem.is_fixed else _Solver(problem, ridge) for problem in problems]
    steps = [None if problem.steps is None else deque(problem.steps.tolist()) for problem in problems]
    left = torch.ones(size, dtype=torch.bool)
    order, errors = [], [0.0]
    for _ in range(size):
        costs = torch.zeros(size, dtype=torch.float64)
        for solver in solvers:
            costs.index_add_(0, solver.units, solver.costs())
        unit = int(torch.where(left, costs, torch.inf).argmin())
        left[unit] = False
        order.append(unit)
        error = errors[-1]
        for solver, rises in zip(solvers, steps, strict=True):
            cost = solver.remove(unit)
            if cost is not None:
                error += cost if rises is None else rises.popleft()
        errors.append(max(error, 0.0))
    return Elimination(order=torch.tensor(order), errors=torch.tensor(errors, dtype=torch.float64))


def drop(problems: Sequence[Regression], size: int) -> Elimination:
    """Remove one unit after the other, each time the one that is missed least in the outputs, with no refit.

    What the units ``S`` contributed to all outputs has the mean square ``sum_(u, v in S) G_uv``,
    with ``G_uv = tr(W_u C_uv W_v')`` and the moments ``C``. Errors fall where contributions cancel.

    Args:
        problems: What is read of the units, a problem for each place; see `Regression`.
        size: Number of units.

    Returns:
        The order and the errors.

    Example:
        >>> one = Regression(
        ...     moments=torch.eye(3),
        ...     weight=torch.tensor([[1.0, 3.0, 2.0]]),
        ...     units=torch.arange(3),
        ...     columns=torch.arange(3)[:, None],
        ... )
        >>> drop([one], 3).order, drop([one], 3).errors
        (tensor([0, 2, 1]), tensor([ 0.,  1.,  5., 14.], dtype=torch.float64))
    """
    products = torch.zeros(size, size, dtype=torch.float64)
    for problem in problems:
        products[problem.units[:, None], problem.units] += contributions(problem)
    rises = products.diagonal().clone()
    left = torch.ones(size, dtype=torch.bool)
    order, errors = [], [0.0]
    for _ in range(size):
        unit = int(torch.where(left, rises, torch.inf).argmin())
        left[unit] = False
        order.append(unit)
        errors.append(max(errors[-1] + float(rises[unit]), 0.0))
        rises += 2 * products[unit]
    return Elimination(order=torch.tensor(order), errors=torch.tensor(errors, dtype=torch.float64))


def contributions(problem: Regression) -> Tensor:
    """``(m, m)`` the mean product of what two units contribute to the outputs, summed over these."""
    own, (m, count) = problem.columns.flatten(), problem.columns.shape
    weight = problem.weight.detach().cpu().double()[:, own]
    products = problem.moments.double()[own][:, own] * (weight.T @ weight)
    return products.view(m, count, m, count).sum((1, 3))


class _Missed:
    """What the units of one problem contributed, for which no single other unit makes up."""

    def __init__(self, problem: Regression) -> None:
        self.units, self._products = problem.units, contributions(problem)
        self._weight = 1.0 if problem.steps is None else _HARDLY
        self._rises = self._products.diagonal().clone()

    def costs(self) -> Tensor:
        """What the removal of each unit would add to the error; 0 for units that are gone.

        Where steps say that, the contributions decide only between units that nothing else tells apart.
        """
        return self._rises * self._weight

    def remove(self, unit: int) -> float | None:
        """Count a unit to what is missing; what that adds to the error, or None if it is not here."""
        found = (self.units == unit).nonzero().flatten()
        if not len(found):
            return None
        cost = float(self._rises[found[0]])
        self._rises += 2 * self._products[found[0]]
        self._products[found[0]] = self._products[:, found[0]] = self._rises[found[0]] = 0
        return cost


class _Solver:
    """Weights and inverse of one problem, for the columns that are left.

    The inverse is ``P - U U'`` with the ``U`` of the last removals, which are subtracted when there are many;
    only its diagonal blocks are kept up to date. Columns are sorted by unit.
    """

    def __init__(self, problem: Regression, ridge: float) -> None:
        count = problem.columns.shape[1]
        own = problem.columns.flatten()
        moments = problem.moments.double()
        scale = float(moments.diagonal().mean())
        pull = max(ridge * scale, torch.finfo(torch.float64).tiny ** 0.5) * torch.eye(len(moments)).double()
        inverse = torch.cholesky_inverse(torch.linalg.cholesky(moments + pull))
        self._inverse = inverse[own][:, own]
        weight = problem.weight.detach().cpu().double()[:, own]
        if len(weight) > len(own):  # the error depends on W'W alone
            weight = torch.linalg.qr(weight, mode="r").R
        self.units = problem.units.clone()
        self._weight = weight.T.reshape(len(self.units), count, -1).contiguous()  # (units, count, outputs)
        self._settle(self._inverse)

    def _settle(self, inverse: Tensor) -> None:
        """Take an up-to-date inverse of the columns that are left."""
        m, count = self._weight.shape[:2]
        self._inverse = inverse
        blocks = inverse.view(m, count, m, count).diagonal(dim1=0, dim2=2).permute(2, 0, 1)
        self._blocks = blocks.clone()  # (units, count, count)
        self._alive = torch.ones(m, dtype=torch.bool)
        self._pending: list[Tensor] = []

    def costs(self) -> Tensor:
        """What the removal of each unit would add to the error; 0 for units that are gone."""
        products = self._weight @ self._weight.mT  # (units, count, count)
        costs: Tensor = (products * torch.linalg.inv(self._blocks)).sum((1, 2)) * self._alive
        return costs.clamp(min=0)

    def remove(self, unit: int) -> float | None:
        """Set the weights of a unit to zero, and the others to what is best then; what that adds."""
        found = (self.units == unit).nonzero().flatten()
        if not len(found):
            return None
        place, (m, count) = int(found[0]), self._weight.shape[:2]
        rows = slice(place * count, (place + 1) * count)
        across = self._inverse[rows].clone()  # (count, columns)
        for earlier in self._pending:
            across -= earlier[rows] @ earlier.T
        root = torch.linalg.cholesky(self._blocks[place])
        across = torch.linalg.solve_triangular(root, across, upper=False)  # across' across is what leaves P
        steps = torch.linalg.solve_triangular(root, self._weight[place], upper=False)
        self._weight.view(m * count, -1).addmm_(across.T, steps, alpha=-1)
        columns = across.T.reshape(m, count, count)
        self._blocks -= columns @ columns.mT
        self._pending.append(across.T)
        self._alive[place] = False
        self._weight[place] = 0
        self._blocks[place] = torch.eye(count, dtype=torch.float64)
        if len(self._pending) * count >= _LAZY:
            self._flush()
        return float(steps.square().sum())

    def _flush(self) -> None:
        """Subtract what is pending, and forget the columns of units that are gone."""
        count = self._weight.shape[1]
        kept = self._alive.repeat_interleave(count)
        factor = torch.cat([each[kept] for each in self._pending], dim=1)
        inverse = self._inverse[kept][:, kept].addmm_(factor, factor.T, alpha=-1)
        self.units, self._weight = self.units[self._alive], self._weight[self._alive]
        self._settle(inverse)
