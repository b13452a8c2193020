"""The best weights that can be attained where they are computed from parameters.

Ridge regression gives the weights ``T`` that are wanted, and every other ``W`` leaves ``(W - T) M (W - T)'``
more, with the covariance ``M`` of what is read and the ridge on its diagonal. So no data are needed any more
to find the parameters whose weight leaves least: a smooth problem in as many unknowns as the weight has
values, in coordinates in which the error is a plain sum of squares. Where a batch norm takes the outputs, it
may multiply each of them by anything.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from secateurs.recovery.computed import Computed
from secateurs.recovery.moments import Moments, solved
from secateurs.recovery.samples import Samples

if TYPE_CHECKING:
    from secateurs.recovery.fitting import Link

_STEPS = 50  # iterations of L-BFGS
_HISTORY = 5
_ENOUGH = 1e-4  # change of the error, as a share of what it was
_ROUNDING = 1e-9
_TINY = 1e-30
Values = Sequence[Sequence[Tensor]]  # of the parameters of each layer


def attained(
    links: Sequence[Link], wanted: Sequence[Tensor], missing: Moments | Samples, *, centred: bool
) -> tuple[list[Tensor], dict[int, tuple[Tensor, ...]]]:
    """The corrections that layers can take, where the weights of some are computed from parameters.

    Args:
        links: The layers that are fitted together.
        wanted: The best correction of each at their point, ``(G, C, K)``.
        missing: What it was solved from; `Samples` where the weights of all are computed.
        centred: Whether a bias takes up the means.

    Returns:
        The correction of each that leaves least, and for those that are computed the new values of their
        parameters, by number. A layer whose weight is a parameter makes up for what the others miss.
    """
    made = [place for place, link in enumerate(links) if isinstance(link.made_of, Computed)]
    some = [links[place] for place in made], [wanted[place] for place in made]
    if isinstance(missing, Samples):
        found, values = _Problem(*some, _FewRows.of(missing, centred)).solve()
        return found, dict(zip(made, values, strict=True))
    widths = [link.reader.columns for link in links]
    owners = torch.arange(len(links)).repeat_interleave(torch.tensor(widths))
    spread = _with_pull(missing.covariance(centred=centred), missing.pull)
    inner = torch.isin(owners, torch.tensor(made)).to(spread.device)
    own, shared, others = (
        spread[:, one][:, :, two] for one, two in ((inner, inner), (~inner, inner), (~inner, ~inner))
    )
    taken = solved(others, shared) if shared.numel() else shared  # (G, K of the others, K of these)
    found, values = _Problem(*some, _Factor.of(own - shared.mT @ taken)).solve()
    better = dict(zip(made, found, strict=True))
    changed = torch.cat([better[place] - wanted[place] for place in made], 2)
    left = [place for place in range(len(links)) if place not in better]
    moved = (changed @ taken.mT).split([widths[place] for place in left], 2)
    better |= {place: wanted[place] - more for place, more in zip(left, moved, strict=False)}
    return [better[place] for place in range(len(links))], dict(zip(made, values, strict=True))


def _with_pull(spread: Tensor, pull: Tensor) -> Tensor:
    """A covariance with a pull added; where that has no end the unit matrix: then nothing is to change."""
    even = torch.eye(spread.shape[-1]).to(spread)
    pulls = pull[:, None, None]
    return torch.where(pulls.isinf(), even, spread + pulls * even)


@dataclass(frozen=True, slots=True, eq=False)
class _Factor:
    """A root of ``M``, so that an error ``D`` costs ``|D root|^2``: its Cholesky factor, ``(G, K, K)``."""

    lower: Tensor

    @classmethod
    def of(cls, matrix: Tensor) -> _Factor:
        """The factor of a matrix that rounding may have made indefinite."""
        lower, failed = torch.linalg.cholesky_ex(matrix)
        if bool(failed.any()):
            size = matrix.diagonal(dim1=1, dim2=2).mean(1)[:, None, None]
            lower = torch.linalg.cholesky(matrix + _ROUNDING * size * torch.eye(matrix.shape[-1]).to(matrix))
        return cls(lower)

    def times(self, rows: Tensor, columns: slice) -> Tensor:
        """``rows @ root`` for rows, ``(G, C, k)``, that belong to some columns; ``(G, C, K)``."""
        return rows @ self.lower[:, columns]

    def over(self, rows: Tensor) -> Tensor:
        """``rows @ inv(root)``."""
        solution: Tensor = torch.linalg.solve_triangular(self.lower, rows, upper=False, left=False)
        return solution


@dataclass(frozen=True, slots=True, eq=False)
class _FewRows:
    """The symmetric root of the covariance of few rows and a pull.

    Args:
        vectors: ``(G, K, n)``, its principal directions.
        values: ``(G, n)``, the variances along them.
        pull: ``(G,)``.
    """

    vectors: Tensor
    values: Tensor
    pull: Tensor

    @classmethod
    def of(cls, samples: Samples, centred: bool) -> _FewRows:
        """The root for some rows."""
        vectors, values = samples.principal(centred=centred)
        is_all = samples.pull.isinf()
        return cls(vectors, torch.where(is_all[:, None], 0.0, values), torch.where(is_all, 1.0, samples.pull))

    def times(self, rows: Tensor, columns: slice) -> Tensor:
        """As `_Factor.times`."""
        along = rows @ self.vectors[:, columns]
        given = (along * (self._lengths() - self._least())) @ self.vectors.mT
        given[:, :, columns] += self._least() * rows
        return given

    def over(self, rows: Tensor) -> Tensor:
        """As `_Factor.over`."""
        along = rows @ self.vectors
        return rows / self._least() + (along * (1 / self._lengths() - 1 / self._least())) @ self.vectors.mT

    def _lengths(self) -> Tensor:
        return (self.values + self.pull[:, None]).sqrt()[:, None]

    def _least(self) -> Tensor:
        return self.pull.sqrt()[:, None, None]


class _Problem:
    """The layers whose weights are computed, and what is wanted of them together.

    Args:
        links: The layers.
        wanted: The best correction of each at their point, ``(G, C, K)``.
        root: Of what an error in their columns costs, once the other layers make up for it.
    """

    def __init__(self, links: Sequence[Link], wanted: Sequence[Tensor], root: _Factor | _FewRows) -> None:
        self.links, self.root = links, root
        self.widths = [link.reader.columns for link in links]
        self.made_of = [link.made_of for link in links if isinstance(link.made_of, Computed)]
        self.gains = [
            link.chain.scale.view(len(each), -1, 1) for link, each in zip(links, wanted, strict=True)
        ]
        self.before = [
            gain * link.reader.matrix().detach().double()
            for link, gain in zip(links, self.gains, strict=True)
        ]
        self.whole = torch.cat([old + each for old, each in zip(self.before, wanted, strict=True)], 2)
        self.target = root.times(self.whole, slice(None))

    def solve(self) -> tuple[list[Tensor], list[tuple[Tensor, ...]]]:
        """The corrections at the point, and the parameters that give them."""
        start = [[each.detach().double() for each in made.parameters] for made in self.made_of]
        with torch.no_grad():
            first = min(start, self._aimed(start), key=self._error_of)
        found = self._descended(first)
        with torch.no_grad():
            best = min(start, found, key=self._error_of)  # the first where both are the same
            written = [
                tuple(value.to(own) for value, own in zip(each, made.parameters, strict=True))
                for each, made in zip(best, self.made_of, strict=True)
            ]
            weights = [each.double() for each in self._weights(written)]  # as the model will compute them
            gains = zip(self._gains(self._rows(weights)), weights, self.before, strict=True)
            return [gain * weight - old for gain, weight, old in gains], written

    def _aimed(self, start: Values) -> list[list[Tensor]]:
        """Parameters in the direction of what is wanted, each row as long as it is."""
        found = []
        wanted = self.whole.split(self.widths, 2)
        for link, gain, own, rows in zip(self.links, self.gains, start, wanted, strict=True):
            before = link.reader.matrix(own[0])
            aim = rows * torch.where(gain < 0, -1.0, 1.0)
            length = aim.norm(dim=2, keepdim=True)
            scaled = aim * before.norm(dim=2, keepdim=True) / length.clamp(min=_TINY)
            found.append([link.reader.unfolded(torch.where(length > 0, scaled, before)), *own[1:]])
        return found

    def _weights(self, values: Values) -> list[Tensor]:
        """``(G, C, K)`` of each layer for some parameters."""
        each = zip(self.links, self.made_of, values, strict=True)
        return [link.reader.matrix(made.of(own)) for link, made, own in each]

    def _rows(self, weights: Sequence[Tensor]) -> list[Tensor]:
        """Weights in coordinates in which an error costs the sum of its squares."""
        ends = [0, *accumulate(self.widths)]
        columns = [slice(first, end) for first, end in pairwise(ends)]
        return [self.root.times(weight, each) for weight, each in zip(weights, columns, strict=True)]

    def _gains(self, rows: Sequence[Tensor]) -> list[Tensor]:
        """What outputs are multiplied by until the point, ``(G, C, 1)``: the best that norms can do."""
        gains = list(self.gains)
        free = [place for place, link in enumerate(self.links) if link.chain.norm is not None]
        if not free:
            return gains
        missing = self.target
        for place, (gain, row) in enumerate(zip(gains, rows, strict=True)):
            missing = missing if place in free else missing - gain * row
        some = torch.stack([rows[place] for place in free], 2)  # (G, C, n, K)
        products = some @ some.mT
        least = products.detach().diagonal(dim1=2, dim2=3).mean(2).clamp(min=_TINY) * _ROUNDING
        products = products + least[..., None, None] * torch.eye(len(free)).to(products)
        best = torch.linalg.solve(products, some @ missing[..., None])  # (G, C, n, 1)
        for place, gain in zip(free, best.unbind(2), strict=True):
            gains[place] = gain
        return gains

    def _error(self, values: Values) -> Tensor:
        """What parameters leave beyond what the wanted weights do."""
        rows = self._rows(self._weights(values))
        missing = self.target
        for gain, row in zip(self._gains(rows), rows, strict=True):
            missing = missing - gain * row
        return missing.square().sum()

    def _error_of(self, values: Values) -> float:
        return float(self._error(values))

    def _descended(self, start: Values) -> list[list[Tensor]]:
        """Parameters that leave less, from some others on."""
        with torch.no_grad():
            whole, steps = self._error(start).clamp(min=_TINY), self._steps(start)
        turned = torch.zeros_like(self.target, requires_grad=True)
        others = [[torch.zeros_like(each, requires_grad=True) for each in own[1:]] for own in start]

        def moved() -> list[list[Tensor]]:
            back = self.root.over(turned)
            each = zip(self.links, start, steps, back.split(self.widths, 2), others, strict=True)
            return [
                [
                    own[0] + link.reader.unfolded(step[0] * part),
                    *(value + by * more for value, by, more in zip(own[1:], step[1:], rest, strict=True)),
                ]
                for link, own, step, part, rest in each
            ]

        search = torch.optim.LBFGS(
            [turned, *(each for rest in others for each in rest)],
            max_iter=_STEPS,
            history_size=_HISTORY,
            tolerance_grad=0.0,
            tolerance_change=_ENOUGH,
            line_search_fn="strong_wolfe",
        )

        def closure() -> float:
            search.zero_grad()
            error = self._error(moved()) / whole
            error.backward()
            return float(error.detach())

        with torch.enable_grad():
            search.step(closure)
        return [[value.detach() for value in own] for own in moved()]

    def _steps(self, start: Values) -> list[list[Tensor]]:
        """How far each parameter goes where an unknown goes by one: so that the error is one then."""
        weights = self._weights(start)
        rows = self._rows(weights)
        size = (self._error(start).clamp(min=_TINY) / self.target.shape[1]).sqrt()
        found = []
        for link, own, gain, weight, row in zip(
            self.links, start, self._gains(rows), weights, rows, strict=True
        ):
            before, given = (
                each.norm(dim=2, keepdim=True) for each in (link.reader.matrix(own[0]), gain * weight)
            )
            first = torch.where(given > 0, before / given.clamp(min=_TINY), 1.0)
            cost = (gain * row).square().sum(2).mean().sqrt().clamp(min=_TINY)
            found.append([size * first, *(size * each.square().mean().sqrt() / cost for each in own[1:])])
        return found
