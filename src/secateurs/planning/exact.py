"""Random masks at an exact budget: drawn, and mended after they were changed."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from secateurs.errors import BudgetError

Mask: TypeAlias = npt.NDArray[np.bool_]
Owners: TypeAlias = npt.NDArray[np.int64]


class MaskBudget(ABC):
    """What every mask has to meet. A mask is True where a unit is kept.

    Args:
        owners: ``(units,)`` the number of the group of each unit.
        least: ``(groups,)`` how many units of a group are kept at least.
    """

    def __init__(self, owners: Owners, least: Sequence[int]) -> None:
        self.owners, self.least = owners, np.asarray(least, np.int64)

    @property
    def size(self) -> int:
        """Units in a mask."""
        return len(self.owners)

    @abstractmethod
    def mend(self, mask: Mask, chance: np.random.Generator) -> Mask:
        """A mask near this one that meets the budget: units at random leave or come back."""

    def draw(self, chance: np.random.Generator) -> Mask:
        """A mask that meets the budget, at random."""
        return self.mend(np.ones(self.size, np.bool_), chance)

    def leaving(self, mask: Mask, chance: np.random.Generator, among: Owners | None = None) -> Owners:
        """Kept units that may leave one after another, in random order: no group falls below its least."""
        kept = np.flatnonzero(mask) if among is None else among[mask[among]]
        return self._able(mask, chance.permutation(kept))

    @abstractmethod
    def lowest_leave(self, values: npt.NDArray[np.float64]) -> Mask:
        """The mask that meets the budget without the units of the lowest values."""

    def _able(self, mask: Mask, order: Owners) -> Owners:
        """Of kept units in some order those that may leave one after another."""
        owners = self.owners[order]
        sort = np.argsort(owners, kind="stable")
        firsts = np.searchsorted(owners[sort], owners[sort])
        rank = np.empty(len(order), np.int64)
        rank[sort] = np.arange(len(order)) - firsts
        spare = np.bincount(self.owners[mask], minlength=len(self.least)) - self.least
        able: Owners = order[rank < spare[owners]]
        return able


@dataclass(frozen=True, slots=True)
class Stratum:
    """Units of which an exact number is kept.

    Args:
        units: Their places in the mask.
        kept: How many are kept.
    """

    units: Owners
    kept: int


class ExactCounts(MaskBudget):
    """An exact number of units is kept of each stratum: of all units together, or of every group.

    Args:
        owners: See `MaskBudget`.
        least: See `MaskBudget`.
        strata: They cover every unit once.

    Raises:
        BudgetError: So few units cannot be kept.

    Example:
        >>> owners = np.array([0, 0, 0, 1, 1, 1])
        >>> budget = ExactCounts(owners, [1, 1], [Stratum(np.arange(6), 3)])
        >>> int(budget.draw(np.random.default_rng(0)).sum())
        3
    """

    def __init__(self, owners: Owners, least: Sequence[int], strata: Sequence[Stratum]) -> None:
        super().__init__(owners, least)
        self._strata = tuple(strata)
        for stratum in self._strata:
            sizes = np.bincount(owners[stratum.units], minlength=len(self.least))
            fewest = int(np.minimum(sizes, self.least).sum())
            if not fewest <= stratum.kept <= len(stratum.units):
                raise BudgetError(
                    f"of {len(stratum.units)} units between {fewest} and all can be kept, not {stratum.kept}",
                    fix=f"Remove({len(stratum.units) - fewest}), or a smaller min_units",
                )

    def mend(self, mask: Mask, chance: np.random.Generator) -> Mask:
        """See `MaskBudget.mend`."""
        mended = mask.copy()
        for stratum in self._strata:
            excess = int(mended[stratum.units].sum()) - stratum.kept
            if excess > 0:
                mended[self.leaving(mended, chance, stratum.units)[:excess]] = False
            elif excess < 0:
                gone = stratum.units[~mended[stratum.units]]
                mended[chance.permutation(gone)[:-excess]] = True
        return self._with_least(mended, chance)

    def lowest_leave(self, values: npt.NDArray[np.float64]) -> Mask:
        """See `MaskBudget.lowest_leave`."""
        mask = np.ones(self.size, np.bool_)
        for stratum in self._strata:
            order = self._able(mask, stratum.units[np.argsort(values[stratum.units], kind="stable")])
            mask[order[: len(stratum.units) - stratum.kept]] = False
        return mask

    def _with_least(self, mask: Mask, chance: np.random.Generator) -> Mask:
        """Groups that a change has left below their least get units back, and others of the stratum leave."""
        short = self.least - np.bincount(self.owners[mask], minlength=len(self.least))
        if not (short > 0).any():
            return mask
        for group in np.flatnonzero(short > 0):
            gone = np.flatnonzero(~mask & (self.owners == group))
            mask[chance.permutation(gone)[: short[group]]] = True
        return self.mend(mask, chance)


class ExactCost(MaskBudget):
    """The cost stays within a limit, and one unit more would break it.

    Args:
        owners: See `MaskBudget`.
        least: See `MaskBudget`.
        cost: The cost of a mask; it never falls when a unit is added.
        limit: The most that a mask may cost.

    Raises:
        BudgetError: The limit is out of reach.
    """

    def __init__(
        self, owners: Owners, least: Sequence[int], cost: Callable[[Mask], float], limit: float
    ) -> None:
        super().__init__(owners, least)
        self._cost, self._limit = cost, limit
        smallest = np.ones(self.size, np.bool_)
        smallest[self.leaving(smallest, np.random.default_rng(0))] = False
        if cost(smallest) > limit:
            raise BudgetError(
                f"a cost of {limit:.4g} is out of reach: {cost(smallest):.4g} is the least",
                fix="raise the budget, or lower min_units",
            )

    def mend(self, mask: Mask, chance: np.random.Generator) -> Mask:
        """See `MaskBudget.mend`; bisection, since cost rises with the mask."""
        mended = self._with_least(mask.copy(), chance)
        if self._cost(mended) > self._limit:
            return self._cut(mended, self.leaving(mended, chance))
        return self._filled(mended, chance.permutation(np.flatnonzero(~mended)))

    def lowest_leave(self, values: npt.NDArray[np.float64]) -> Mask:
        """See `MaskBudget.lowest_leave`."""
        mask = np.ones(self.size, np.bool_)
        return self._cut(mask, self._able(mask, np.argsort(values, kind="stable")))

    def _cut(self, mask: Mask, order: Owners) -> Mask:
        low, high = 0, len(order)
        while low < high:
            middle = (low + high) // 2
            within = self._cost(_changed(mask, order[:middle], False)) <= self._limit
            low, high = (low, middle) if within else (middle + 1, high)
        return _changed(mask, order[:low], False)

    def _filled(self, mask: Mask, order: Owners) -> Mask:
        low, high = 0, len(order)
        while low < high:
            middle = (low + high + 1) // 2
            within = self._cost(_changed(mask, order[:middle], True)) <= self._limit
            low, high = (middle, high) if within else (low, middle - 1)
        return _changed(mask, order[:low], True)

    def _with_least(self, mask: Mask, chance: np.random.Generator) -> Mask:
        short = self.least - np.bincount(self.owners[mask], minlength=len(self.least))
        for group in np.flatnonzero(short > 0):
            gone = np.flatnonzero(~mask & (self.owners == group))
            mask[chance.permutation(gone)[: short[group]]] = True
        return mask


def _changed(mask: Mask, places: Owners, value: bool) -> Mask:
    changed = mask.copy()
    changed[places] = value
    return changed
