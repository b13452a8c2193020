"""Fewer dimensions of queries and keys, or of values, that give nearly the same products.

Of a head's queries ``Q``, ``(n, d)``, and keys ``K``, ``(m, d)``, let ``(Q A)(K B)'`` with ``A`` and ``B`` of
``(d, r)`` be as near to ``Q K'`` as ``r`` dimensions allow. With the mean products ``C = Q'Q = L L'`` and
``D = K'K = N N'`` over all data the error is that of ``L' A B' N`` against ``L' N``, of which the best is
known (Eckart and Young): with ``L' N = U S V'``, and the first ``r`` columns of each,

    A = inv(L') U S^(1/2) = N V S^(-1/2),    B = inv(N') V S^(1/2) = L U S^(-1/2),

and what is missed is the sum of the other S^2.

Where a softmax takes the products, what all keys have in common does not matter, so keys are centred. It is
the same with values ``Q`` and the weight ``K`` that reads them, whose bias takes up their mean. Which units a
plan removes is then no matter, only how many. CORP (arXiv 2602.05243) lets the dimensions that stay
make up for the others by ridge regression; these combinations of all are at least as good.
"""

from __future__ import annotations

import torch
from torch import Tensor

from secateurs.recovery.factors import Factors
from secateurs.recovery.readers import Reader

_UNSEEN = 1e-6  # a share of the mean square that each dimension has at least, which few data do not show
_NOTHING = 1e-9  # a share of the largest value that is none
_TINY = 1e-30


class LowRank:
    """Sums over all data of what a call multiplies, and the best combinations.

    Args:
        factors: Which outputs of which layers are multiplied.
        device: Where sums are kept.

    Example:
        >>> from secateurs.recovery.factors import Factor
        >>> one = Factor(0, torch.tensor([[0, 1]]))
        >>> pair = Factors(call=2, first=one, second=Factor(1, torch.tensor([[0, 1]])),
        ...                heads=torch.tensor([[0, 0]]))
        >>> rank = LowRank(pair, torch.device("cpu"))
        >>> rank.take(0, torch.eye(2)[:, None], torch.tensor([0]))
        >>> rank.take(1, torch.tensor([[3.0, 3.0], [1.0, 1.0]])[:, None], torch.tensor([0]))
        >>> rank.missed().round(decimals=6).tolist()  # all keys have one direction: one dimension will do
        [0.0, 0.0, 1.0]
        >>> a, b = rank.combinations(1)
        >>> (a[0] @ b[0].T @ torch.tensor([[3.0], [3.0]]).double()).round(decimals=3).tolist()
        [[3.0], [3.0]]
    """

    def __init__(self, factors: Factors, device: torch.device) -> None:
        self.factors = factors
        parts, depth = int(factors.parts.max()) + 1, factors.depth
        self._products = torch.zeros(2, parts, depth, depth, dtype=torch.float64, device=device)
        self._sums = torch.zeros(2, parts, depth, dtype=torch.float64, device=device)
        self._counts = torch.zeros(2, parts, dtype=torch.float64, device=device)

    @property
    def sums(self) -> tuple[Tensor, ...]:
        """What is to be added up over processes."""
        return self._products, self._sums, self._counts

    def see(self, call: int, reader: Reader, result: Tensor) -> None:
        """Take in what a layer gives, or reads with its weight, if that is one of both factors."""
        (first, of_first), (second, of_second) = self.factors.sides()
        if self.factors.is_read:
            if call == second.call and (read := reader.vectors()) is not None:
                self.take(0, read.detach()[:, second.channels], of_second)
                self.take(1, reader.matrix()[0].detach()[:, second.channels], of_second)
            return
        for side, (factor, parts) in enumerate(((first, of_first), (second, of_second))):
            if factor.call == call:
                values = result.detach().movedim(reader.channel, -1).flatten(0, -2)
                self.take(side, values[:, factor.channels], parts)

    def take(self, side: int, values: Tensor, parts: Tensor) -> None:
        """Take in rows of one of the factors.

        Args:
            side: 0 for the first, 1 for the second.
            values: ``(n, heads, d)``.
            parts: ``(heads,)``: the part that each head is of.
        """
        heads, where = values.movedim(1, 0).to(self._products), parts.to(self._counts.device)
        self._products[side].index_add_(0, where, heads.mT @ heads)
        self._sums[side].index_add_(0, where, heads.sum(1))
        self._counts[side].index_add_(0, where, torch.full_like(where, len(values)).to(self._counts))

    def missed(self) -> Tensor:
        """``(d + 1,)``: the share of the products' mean square that is missed after 0, 1, ... have left."""
        pairs = torch.bincount(self.factors.parts).to(self._products)
        squares = (pairs[:, None] * self._roots()[2].square()).sum(0)  # (d,), falling
        missed = squares.flip(0).cumsum(0) / squares.sum().clamp(min=_TINY)
        return torch.cat([torch.zeros_like(missed[:1]), missed])

    def combinations(self, rank: int) -> tuple[Tensor, Tensor]:
        """``A`` and ``B``, ``(parts, d, rank)`` each."""
        return best_combinations(*self._roots(), rank)

    def _roots(self) -> tuple[Tensor, Tensor, Tensor]:
        """``N V``, ``L U`` and ``S``."""
        counts = self._counts.clamp(min=1)
        products, means = self._products / counts[..., None, None], self._sums / counts[..., None]
        if self.factors.is_centred:
            side = 0 if self.factors.is_read else 1
            products[side] -= means[side, :, :, None] * means[side, :, None, :]
        return best_roots(products)


def best_roots(products: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """``N V``, ``L U`` and ``S``, of which the best combinations follow.

    Args:
        products: ``(2, parts, d, d)`` mean products of the first and of the second factor; changed in place.
    """
    spread = products.diagonal(dim1=2, dim2=3)
    spread += _UNSEEN * spread.mean(2, keepdim=True)
    left, right = _root(products)
    u, values, v = torch.linalg.svd(left.mT @ right)
    first, second = right @ v.mT, left @ u
    largest = first.gather(1, first.abs().argmax(1, keepdim=True))
    signs = torch.where(largest < 0, -1.0, 1.0)  # rounding shall not decide
    return first * signs, second * signs, values


def best_combinations(first: Tensor, second: Tensor, values: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """``A`` and ``B``, ``(parts, d, rank)`` each, of what `best_roots` gave."""
    kept = values[:, None, :rank]
    scales = torch.where(kept > _NOTHING * values[:, None, :1], kept, torch.inf).rsqrt()
    return first[:, :, :rank] * scales, second[:, :, :rank] * scales


def missed_values(moments: Tensor, weight: Tensor, factors: Factors) -> Tensor:
    """What a weight gives less of after 0, 1, ... dimensions of each head that it reads have left.

    Args:
        moments: ``(K, K)`` mean products of what it reads, centred where a bias takes up the mean.
        weight: ``(C, K)``.
        factors: Which columns are of one head, and which heads have the same values.

    Returns:
        ``(d + 1,)`` mean squares, summed over the outputs.
    """
    (_, parts), heads = [*factors.sides()][1], factors.second.channels
    own = moments.double()[heads[:, :, None], heads[:, None, :]]  # (heads, d, d)
    columns = weight.double()[:, heads].movedim(0, 1)  # (heads, C, d)
    shape = (int(parts.max()) + 1, *own.shape[1:])
    values, grams = own.new_zeros(shape), own.new_zeros(shape)
    values.index_add_(0, parts, own).div_(torch.bincount(parts)[:, None, None])
    root = _root(values)
    squares = torch.linalg.eigvalsh(root.mT @ grams.index_add_(0, parts, columns.mT @ columns) @ root)
    missed = squares.clamp(min=0).sum(0).cumsum(0)  # of (parts, d), rising
    return torch.cat([torch.zeros_like(missed[:1]), missed])


def _root(products: Tensor) -> Tensor:
    """``R`` with ``R R'`` the products; ``(..., d, d)``."""
    squares, turns = torch.linalg.eigh(products)
    root: Tensor = turns * squares.clamp(min=0).sqrt()[..., None, :]
    return root
