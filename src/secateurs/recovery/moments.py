"""Streamed normal equations: all that least squares needs to know of the data, in a size that does not grow.

For rows ``x`` (what weights read at one position) and targets ``t`` (what they are to give there), the best
``t ~ V x + c`` follows from sums over all positions: the count, the sums of ``x`` and ``t``, and the products
``x x^T`` and ``x t^T``. They add up over batches and processes, in float64.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from secateurs.errors import TrainingError

if TYPE_CHECKING:
    from accelerate import Accelerator

ROWS = 4096  # positions of one batch that enter one set of normal equations
_LEAST = 1 << 15  # positions of all batches, where they are read for a fit
A_COLUMN = 16  # the same for each column: what a fit errs by falls with its inverse
WIDEST = 8192  # columns of normal equations: 512 MiB of products, and minutes to solve
MOST_TURNED = 4608  # columns, or rows, whose products are brought to a diagonal: half a minute of one core
_STRONGER = 10.0 ** (torch.arange(11, dtype=torch.float64) / 2)  # than the least pull
_ALL = slice(None)


class Moments:
    """The sums that least squares needs, of rows and of what they are to give; in float64.

    Memory is ``8 * groups * columns * (columns + outputs)`` bytes, however many rows are taken in.

    Args:
        columns: Length of a row (of each group, for a grouped convolution).
        outputs: Number of targets for each row (of each group); 0 where only the rows count.
        groups: Independent sets of equations with the same number of rows.
        device: Where the sums are kept; products are taken there.

    Attributes:
        count: Rows taken in.
        rows: ``(G, K)``, the sum of the rows.
        products: ``(G, K, K)``, the sum of their outer products.
        targets: ``(G, C)``, the sum of the targets.
        cross: ``(G, K, C)``, the sum of the products of rows and targets.
        squares: ``(G, C)``, the sum of the squared targets.
        pull: ``(G,)``, what the last `solve` has added to the variances.

    Example:
        >>> moments = Moments(3, 1)
        >>> x = torch.randn(50, 3)
        >>> for part in x.split(20):
        ...     moments.add(part, part @ torch.tensor([[1.0], [2.0], [3.0]]) + 4)
        >>> weights, bias = moments.solve()
        >>> [round(value, 3) for value in weights.flatten().tolist()], round(bias.item(), 3)
        ([1.0, 2.0, 3.0], 4.0)
    """

    def __init__(
        self, columns: int, outputs: int = 0, *, groups: int = 1, device: torch.device | str = "cpu"
    ) -> None:
        def zeros(*shape: int) -> Tensor:
            return torch.zeros(groups, *shape, dtype=torch.float64, device=device)

        self.count = 0
        self.rows, self.products = zeros(columns), zeros(columns, columns)
        self.targets, self.cross, self.squares = zeros(outputs), zeros(columns, outputs), zeros(outputs)
        self.pull = zeros()

    @property
    def nbytes(self) -> int:
        """Bytes that the sums take."""
        return sum(each.nbytes for each in self._sums())

    def add(self, rows: Tensor, targets: Tensor | None = None) -> None:
        """Take in rows and what they are to give.

        Args:
            rows: ``(n, K)``, or ``(G, n, K)`` for several groups.
            targets: ``(n, C)`` or ``(G, n, C)``; only where there are outputs.
        """
        x = grouped(rows).to(self.rows)  # (G, n, K)
        self.count += x.shape[1]
        self.rows += x.sum(1)
        self.products += x.mT @ x
        if targets is not None:
            t = grouped(targets).to(self.rows)  # (G, n, C)
            self.targets += t.sum(1)
            self.cross += x.mT @ t
            self.squares += t.square().sum(1)

    def reduce(self, accelerator: Accelerator) -> None:
        """Add up the sums of all processes, so that each of them has those of all the data."""
        if accelerator.num_processes == 1:
            return
        count = torch.tensor([float(self.count)], dtype=torch.float64, device=self.rows.device)
        self.count = int(accelerator.reduce(count.to(accelerator.device), "sum").item())
        for each in self._sums():
            each.copy_(accelerator.reduce(each.to(accelerator.device), "sum"))

    def mean(self) -> Tensor:
        """``(G, K)``: the mean of the rows."""
        return self.rows / self._counted()

    def covariance(self, *, centred: bool = True) -> Tensor:
        """``(G, K, K)``: the covariance of the rows, divided by their count; else their mean products."""
        spread, mean = self.products / self._counted(), self.mean()
        return spread.sub_(mean[:, :, None] * mean[:, None, :]) if centred else spread

    def given(self, weights: Tensor, columns: slice = _ALL) -> tuple[Tensor, Tensor]:
        """Mean and variance of ``weights @ row``, both ``(G, C)``.

        Args:
            weights: ``(G, C, k)``.
            columns: The ``k`` columns that they belong to.
        """
        spread = self.covariance()[:, columns, columns]
        mean = (weights @ self.mean()[:, columns, None])[:, :, 0]
        return mean, ((weights @ spread) * weights).sum(2).clamp(min=0)

    def constants(self, weights: Tensor) -> Tensor:
        """``(G, C)``: the best bias beside ``weights``, which are ``(G, C, K)``."""
        return self.targets / self._counted() - (weights @ self.mean()[:, :, None])[:, :, 0]

    def solve(
        self, ridge: float = 0.0, *, intercept: bool = True, is_least: bool = False
    ) -> tuple[Tensor, Tensor]:
        """The weights and the bias that give the targets best.

        ``V = (X^T X + ridge s I)^-1 X^T T``, of centred rows and targets where there is an intercept, with
        the mean ``s`` of the diagonal of ``X^T X``. With targets that say what is missing, the ridge pulls
        towards weights as they are, and the error is never above that of no change.

        Args:
            ridge: The pull towards zero, relative to the mean variance of the columns.
            intercept: Whether a bias can take over the means.
            is_least: Whether the pull may be stronger, as cross-validation says; see `better_pulls`.

        Returns:
            ``(G, C, K)`` and ``(G, C)``; the bias is zero without an intercept.
        """
        spread, wanted = self.covariance(centred=intercept), self._shared(centred=intercept)
        pull = (ridge * spread.diagonal(dim1=1, dim2=2).mean(1)).clamp(min=1e-30)  # (G,)
        if is_least and spread.shape[1] <= MOST_TURNED:
            values, turns = torch.linalg.eigh(spread)
            shared = turns.mT @ wanted  # (G, K, C)
            power = self.squares / self._counted()
            power = power - (self.targets / self._counted()).square() if intercept else power
            pull = better_pulls(values, shared.square().sum(2), power.sum(1), pull, self._counted())
            self.pull = pull
            weights = (turns @ (shared / (values.clamp(min=0) + pull[:, None])[:, :, None])).mT
            return weights, self.constants(weights) if intercept else torch.zeros_like(self.targets)
        self.pull = pull
        spread.diagonal(dim1=1, dim2=2).add_(pull[:, None])
        weights = solved(spread, wanted).mT  # (G, C, K)
        return weights, self.constants(weights) if intercept else torch.zeros_like(self.targets)

    def error(self, weights: Tensor, bias: Tensor) -> Tensor:
        """``(G, C)``: the mean squared error of ``weights @ row + bias``.

        Args:
            weights: ``(G, C, K)``.
            bias: ``(G, C)``.
        """
        spread = self.squares / self._counted() - (self.targets / self._counted()).square()
        both = (weights * self._shared(centred=True).mT).sum(2)
        off = self.constants(weights) - bias
        return (spread - 2 * both + self.given(weights)[1] + off.square()).clamp(min=0)

    def _shared(self, *, centred: bool) -> Tensor:
        """``(G, K, C)``: the covariance of rows and targets; their mean products otherwise."""
        shared, aim = self.cross / self._counted(), self.targets / self._counted()
        return shared.sub_(self.mean()[:, :, None] * aim[:, None, :]) if centred else shared

    def _sums(self) -> tuple[Tensor, ...]:
        return (self.rows, self.products, self.targets, self.cross, self.squares)

    def _counted(self) -> int:
        if not self.count:
            raise TrainingError("the data gave no batch", fix="pass batches of inputs, a few hundred images")
        return self.count


def better_pulls(values: Tensor, shared: Tensor, power: Tensor, pull: Tensor, count: int) -> Tensor:
    """The pull of a ridge regression that leaves the least error on rows which it has not seen.

    By generalized cross-validation (Golub, Heath and Wahba 1979): of ``n`` rows the mean squared error on the
    rows themselves, divided by ``(1 - f / n)^2`` for the ``f`` degrees of freedom that the pull leaves.

    Args:
        values: ``(G, K)`` variances of the rows along their principal directions.
        shared: ``(G, K)`` squared covariances of the targets with these, summed over the targets.
        power: ``(G,)`` variance of the targets, summed.
        pull: ``(G,)`` the least.
        count: ``n``.

    Returns:
        ``(G,)``; infinite where no regression is best.

    Example:
        >>> values, none = torch.ones(1, 50), torch.zeros(1, 50)
        >>> better_pulls(values, none, torch.ones(1), torch.tensor([1e-3]), 60)  # the targets are noise
        tensor([inf])
    """
    pulls = pull * _STRONGER[:, None].to(pull)  # (P, G)
    pulls = torch.cat([pulls, torch.full_like(pulls[:1], torch.inf)])
    values, each = values.clamp(min=0), pulls[:, :, None]
    told = (values + 2 * each) / (values + each).square() * shared  # (P, G, K)
    freedom = (values / (values + each)).sum(2) + 1
    missed = (power - torch.where(each.isinf(), 0.0, told).sum(2)).clamp(min=0)
    errors = missed / (1 - freedom / count).square()
    errors = torch.where(freedom < count, errors, torch.inf)
    return pulls.gather(0, errors.argmin(0)[None])[0]


def shrunk(covariance: Tensor, count: int) -> Tensor:
    """A covariance of few rows, drawn towards a multiple of the unit matrix, so that it holds for others too.

    In the covariance of ``n`` rows any ``n`` columns say all about the others, by chance alone. How far it is
    drawn is the oracle approximating shrinkage (Chen, Wiesel, Eldar and Hero 2010, arXiv 0907.4698).

    Args:
        covariance: ``(..., K, K)``.
        count: How many rows it is of.

    Returns:
        ``(..., K, K)`` with the same trace.

    Example:
        >>> rows = torch.randn(10, 40, dtype=torch.float64)
        >>> drawn = shrunk(rows.T @ rows / 10, 10)
        >>> bool(torch.linalg.matrix_rank(drawn) == 40), bool((drawn - torch.eye(40)).norm() < 4)
        (True, True)
    """
    width = covariance.shape[-1]
    trace, squares = covariance.diagonal(dim1=-2, dim2=-1).sum(-1), covariance.square().sum((-2, -1))
    spread = (count + 1 - 2 / width) * (squares - trace.square() / width)
    above = (1 - 2 / width) * squares + trace.square()
    share = (above / spread.clamp(min=1e-30)).clamp(max=1.0)[..., None, None]
    even = torch.eye(width).to(covariance) * (trace / width)[..., None, None]
    return (1 - share) * covariance + share * even


def rows_wanted(columns: int, batches: int) -> int:
    """Positions to read of each batch, so that all together suffice for equations of so many columns.

    Example:
        >>> rows_wanted(columns=100, batches=8), rows_wanted(columns=4000, batches=8)
        (4096, 8000)
    """
    return -(-max(_LEAST, A_COLUMN * columns) // batches)


def sampled(count: int, chance: torch.Generator, rows: int = ROWS) -> Tensor:
    """Which of ``count`` positions are read: all, or ``rows`` of them drawn without repetition."""
    if count <= rows:
        return torch.arange(count)
    return torch.randperm(count, generator=chance)[:rows]


def grouped(values: Tensor) -> Tensor:
    """``(G, n, length)``, also of the ``(n, length)`` of a single group."""
    return values if values.dim() == 3 else values[None]


def solved(matrix: Tensor, right: Tensor) -> Tensor:
    """Solve a positive system; one that rounding made indefinite is solved in the least-squares sense."""
    if not matrix.numel():
        return right
    factor, failed = torch.linalg.cholesky_ex(matrix)
    if not bool(failed.any()):
        return torch.cholesky_solve(right, factor)
    inverse: Tensor = torch.linalg.pinv(matrix, hermitian=True)
    return inverse @ right
