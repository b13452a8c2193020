"""Products of activations, such as queries with keys: what their units contribute to the results.

No weights read such units, so that nothing is refitted for one that leaves. Each contributes ``q_u k_u`` to
every result, and the mean products of these contributions follow from those of the factors alone:

    sum_nm (q_nu k_mu) (q_nv k_mv)  =  (Q'Q)_uv (K'K)_uv.

Where both factors come straight from two layers, a repair exchanges units for combinations of them
(`secateurs.recovery.low_rank`). Then the error is that of the best combinations, whichever units leave. So it
is with values that attention averages, whose second factor is the weight that reads them.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from secateurs.criteria.elimination import Regression
from secateurs.criteria.processes import add_up
from secateurs.graph.groups import Group, UnitProduct
from secateurs.recovery.factors import Factors
from secateurs.recovery.low_rank import LowRank, missed_values

_TINY = torch.finfo(torch.float64).tiny


def with_combinations(problem: Regression, factors: Factors | None) -> Regression:
    """The same problem with the errors of the best combinations, where a repair makes such of its columns.

    Args:
        problem: What a weight reads of a group's units.
        factors: The heads of what that weight reads, if they may be exchanged.
    """
    if factors is None:
        return problem
    heads, units = factors.second.channels, len(problem.units)
    own = problem.columns.flatten().sort().values
    if not torch.equal(own, heads.flatten().sort().values) or heads.shape[1] % units:
        return problem
    missed = missed_values(problem.moments.cpu(), problem.weight.detach().cpu(), factors)
    return replace(problem, steps=missed[:: heads.shape[1] // units].diff())


class ProductPlace:
    """One call that multiplies activations: sums over all batches.

    Args:
        product: Which units it sums over.
        device: Where sums are kept.
        rank: The best combinations, where a repair takes these.

    Example:
        >>> import numpy as np
        >>> place = ProductPlace(
        ...     UnitProduct(call=0, units=np.arange(2)), torch.device("cpu")
        ... )
        >>> place.take(torch.tensor([[[1.0, 2.0]]]), torch.tensor([[[3.0, 5.0]]]))
        >>> place.moments().tolist()  # contributions of 3 and 10
        [[9.0, 30.0], [30.0, 100.0]]
    """

    def __init__(self, product: UnitProduct, device: torch.device, rank: LowRank | None = None) -> None:
        self.product, self.rank = product, rank
        count = len(product.units)
        self._count = torch.zeros((), dtype=torch.float64, device=device)
        self._sum = torch.zeros(count, dtype=torch.float64, device=device)
        self._products = torch.zeros(count, count, dtype=torch.float64, device=device)

    def take(self, first: Tensor, second: Tensor) -> None:
        """Take in both factors, ``(..., n, units)`` and ``(..., m, units)``."""
        first, second = (each.detach().flatten(0, -3) for each in (first, second))
        self._products += ((first.mT @ first).double() * (second.mT @ second)).sum(0)
        self._sum += (first.sum(1).double() * second.sum(1)).sum(0)
        self._count += first.shape[0] * first.shape[1] * second.shape[1]

    def combine(self) -> None:
        """Add up what several processes have seen."""
        for tensor in (self._count, self._sum, self._products, *(self.rank.sums if self.rank else ())):
            add_up(tensor)

    def moments(self) -> Tensor:
        """``(units, units)`` mean products of what two units contribute to a result."""
        return (self._products / self._count.clamp(min=1)).cpu()

    def regressions(self, group: Group, *, centred: bool, share: float = 1.0) -> list[Regression]:
        """The problem of one group of units, whose weights, all 1, stay as they are.

        Args:
            group: The group.
            centred: Whether errors are shares of the variance of the results, and not of their mean square.
            share: What they are multiplied by, as the results are a part of something else.
        """
        own = torch.from_numpy(self.product.units) - group.first
        places = ((own >= 0) & (own < group.size)).nonzero().flatten()
        if not len(places):
            return []
        moments = self.moments()
        mean = float(self._sum.sum() / self._count.clamp(min=1)) if centred else 0.0
        whole = (moments.sum() - mean * mean).clamp(min=_TINY)
        names, order = own[places].sort(stable=True)
        distinct = names.unique()
        return [
            Regression(
                moments=moments,
                weight=torch.ones(1, len(moments), dtype=torch.float64) * (share / whole).sqrt(),
                units=distinct,
                columns=places[order].view(len(distinct), -1),
                is_fixed=True,
                steps=self._steps(len(distinct), share) if len(places) == len(own) else None,
            )
        ]

    def _steps(self, units: int, share: float) -> Tensor | None:
        """``(units,)`` what the best combinations miss more for each unit fewer."""
        if self.rank is None:
            return None
        missed = self.rank.missed().cpu()
        return share * missed[:: (len(missed) - 1) // units].diff()
