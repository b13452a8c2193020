"""Least squares in the space of the samples, for layers that read more values than there are samples.

The first linear layer behind a flattened image reads ten thousand values and more, at some thousand images.
The products of its columns would take gigabytes, and hold no more than the rows themselves do. By

    (X'X + r I)^-1 X'T  =  X' (X X' + r I)^-1 T

the same ridge regression follows from the products of the rows, which are few.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from secateurs.errors import TrainingError
from secateurs.recovery.moments import MOST_TURNED, WIDEST, better_pulls, grouped, solved

if TYPE_CHECKING:
    from accelerate import Accelerator

MOST_ROWS = 8192  # of one fit: 512 MiB of their products
_CHUNK = 1024  # columns that are in float64 at once
_ALL = slice(None)
_TINY = 1e-12  # of the largest variance, below which a direction is rounding


def are_few(rows: int, columns: int) -> bool:
    """Whether rows are kept, and not the products of columns: they take less, or those would take too much.

    Example:
        >>> are_few(rows=2000, columns=25088), are_few(rows=2000, columns=512)
        (True, False)
    """
    return columns > WIDEST or 2 * rows <= columns


class Samples:
    """The rows themselves, and what they are to give; answers as `Moments` does, to rounding.

    Memory is ``4 n K`` bytes for ``n`` rows of ``K`` columns in float32, and ``16 n (n + C)`` while they are
    solved for ``C`` targets. All products are in float64, some columns at a time.

    Args:
        columns: Length of a row (of each group, for a grouped convolution).
        outputs: Number of targets for each row (of each group).
        groups: Independent sets of equations with the same number of rows.

    Attributes:
        pull: ``(G,)``, what the last `solve` has added to the variances.

    Example:
        >>> samples, x = Samples(columns=30, outputs=1), torch.randn(20, 30)
        >>> for part in x.split(7):
        ...     samples.add(part, part[:, :1] + 4)
        >>> weights, bias = samples.solve(ridge=1e-9)  # twenty rows leave nothing over for thirty columns
        >>> samples.error(weights, bias).item() < 1e-9
        True
    """

    def __init__(self, columns: int, outputs: int, *, groups: int = 1) -> None:
        self._columns, self._outputs, self._groups = columns, outputs, groups
        self.pull = torch.zeros(groups, dtype=torch.float64)
        self._rows: list[Tensor] = []
        self._targets: list[Tensor] = []

    @property
    def count(self) -> int:
        """Rows taken in."""
        return sum(each.shape[1] for each in self._rows)

    @property
    def nbytes(self) -> int:
        """Bytes that rows, targets and the products of the rows take."""
        kept = sum(each.nbytes for each in (*self._rows, *self._targets))
        return kept + 8 * self._groups * self.count * (2 * self.count + self._outputs)

    def add(self, rows: Tensor, targets: Tensor) -> None:
        """Take in rows, which are kept as they are given, and what they are to give.

        Args:
            rows: ``(n, K)``, or ``(G, n, K)`` for several groups.
            targets: ``(n, C)`` or ``(G, n, C)``.
        """
        self._rows.append(grouped(rows).detach())
        self._targets.append(grouped(targets).detach().double())

    def reduce(self, accelerator: Accelerator) -> None:
        """Take over the rows of all processes, so that each of them has those of all the data."""
        if accelerator.num_processes > 1:
            self._rows = [_of_all(torch.cat(self._rows, 1), accelerator)]
            self._targets = [_of_all(torch.cat(self._targets, 1), accelerator)]

    def given(self, weights: Tensor, columns: slice = _ALL) -> tuple[Tensor, Tensor]:
        """Mean and variance of ``weights @ row``, both ``(G, C)``.

        Args:
            weights: ``(G, C, k)``.
            columns: The ``k`` columns that they belong to.
        """
        values = self._values(weights, columns)
        return values.mean(1), values.var(1, correction=0)

    def constants(self, weights: Tensor) -> Tensor:
        """``(G, C)``: the best bias beside ``weights``, which are ``(G, C, K)``."""
        through = [
            weights[:, :, columns].double() @ x.mean(1)[:, :, None] for columns, x in self._chunks(_ALL)
        ]
        return torch.cat(self._targets, 1).mean(1) - torch.stack(through).sum(0)[:, :, 0]

    def solve(
        self, ridge: float = 0.0, *, intercept: bool = True, is_least: bool = False
    ) -> tuple[Tensor, Tensor]:
        """The weights and the bias that give the targets best; those of `Moments.solve`.

        ``V' = X' (X X' + ridge s n I)^-1 T``, of centred rows and targets where there is an intercept, with
        the mean ``s`` of the diagonal of ``X'X / n``.

        Args:
            ridge: The pull towards zero, relative to the mean variance of the columns.
            intercept: Whether a bias can take over the means.
            is_least: Whether the pull may be stronger, as cross-validation says; see `better_pulls`.

        Returns:
            ``(G, C, K)`` in the precision of the rows and ``(G, C)``; the bias is zero without an intercept.
        """
        targets = torch.cat(self._targets, 1) if self._targets else torch.empty(self._groups, 0, 0)
        if not self.count:
            raise TrainingError("the data gave no batch", fix="pass batches of inputs, a few hundred images")
        aim = targets - targets.mean(1, keepdim=True) if intercept else targets  # (G, n, C)
        products = self._products(centred=intercept)
        pull = (ridge * products.diagonal(dim1=1, dim2=2).sum(1) / self._columns).clamp(min=1e-30)  # s n
        if is_least and self.count <= MOST_TURNED:
            values, turns = torch.linalg.eigh(products)
            along, count = turns.mT @ aim, self.count  # (G, n, C)
            shared = values.clamp(min=0) / count * along.square().sum(2) / count
            power = aim.square().mean(1).sum(1)
            pull = count * better_pulls(values / count, shared, power, pull / count, count)
            shares = turns @ (along / (values.clamp(min=0) + pull[:, None])[:, :, None])
        else:
            products.diagonal(dim1=1, dim2=2).add_(pull[:, None])
            shares = solved(products, aim)  # (G, n, C)
        self.pull = pull / self.count
        kind = torch.promote_types(self._rows[0].dtype, torch.float32)
        weights = targets.new_empty(self._groups, self._outputs, self._columns, dtype=kind)
        for columns, x in self._chunks(_ALL, centred=intercept):
            weights[:, :, columns] = (shares.mT @ x).to(kind)
        return weights, self.constants(weights) if intercept else torch.zeros_like(targets[:, 0])

    def error(self, weights: Tensor, bias: Tensor) -> Tensor:
        """``(G, C)``: the mean squared error of ``weights @ row + bias``.

        Args:
            weights: ``(G, C, K)``.
            bias: ``(G, C)``.
        """
        return (torch.cat(self._targets, 1) - self._values(weights, _ALL) - bias[:, None]).square().mean(1)

    def principal(self, *, centred: bool) -> tuple[Tensor, Tensor]:
        """Principal directions of the rows, ``(G, K, n)``, and the variances along them, ``(G, n)``.

        Args:
            centred: Whether the mean is taken off, so that one direction is of no variance.
        """
        values, turns = torch.linalg.eigh(self._products(centred=centred) / self.count)
        shares = turns / (self.count * values.clamp(min=_TINY * values.amax())).sqrt()[:, None]
        parts = [x.mT @ shares for _, x in self._chunks(_ALL, centred=centred)]
        return torch.cat(parts, 1), values.clamp(min=0)

    def _products(self, *, centred: bool) -> Tensor:
        """``(G, n, n)``: the products of the rows."""
        parts = (x @ x.mT for _, x in self._chunks(_ALL, centred=centred))
        total = next(parts)
        for part in parts:
            total += part
        return total

    def _values(self, weights: Tensor, columns: slice) -> Tensor:
        """``(G, n, C)``: ``weights @ row``."""
        first = columns.start or 0
        values = torch.zeros((), dtype=torch.float64, device=weights.device)
        for part, x in self._chunks(columns):
            values = values + x @ weights[:, :, part.start - first : part.stop - first].double().mT
        return values

    def _chunks(self, columns: slice, *, centred: bool = False) -> Iterator[tuple[slice, Tensor]]:
        """Some columns of all rows at a time, ``(G, n, k)`` in float64."""
        first, last, _ = columns.indices(self._columns)
        for start in range(first, last, _CHUNK):
            part = slice(start, min(start + _CHUNK, last))
            x = torch.cat([rows[:, :, part] for rows in self._rows], 1).double()
            yield part, x - x.mean(1, keepdim=True) if centred else x


def _of_all(values: Tensor, accelerator: Accelerator) -> Tensor:
    """``(G, n, length)`` of all processes, one after the other; each may have another ``n``."""
    own = values.movedim(1, 0).contiguous().to(accelerator.device)
    counts = accelerator.gather(torch.tensor([len(own)], device=accelerator.device)).tolist()
    whole = accelerator.gather(accelerator.pad_across_processes(own, dim=0)).split(max(counts))
    parts = [part[:count] for part, count in zip(whole, counts, strict=True)]
    return torch.cat(parts).movedim(0, 1).to(values.device)
