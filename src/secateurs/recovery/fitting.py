"""One fit: the layers whose outputs meet in one point, by one set of normal equations.

At the point the smaller network gives ``p = s * (W x + b) + rest`` and the original ``q``. Ridge regression
of ``q - p`` on ``x`` gives what is missing, ``V x + c``: an error in ``rest``, such as that of a residual
stream, is made up for as well. Then ``W`` becomes ``W + V / s``, and ``c`` goes where a constant can be held.

A weight that several calls share is fitted for all of them: their positions enter one set of equations, of
what is missing divided by ``s``, which may differ from call to call. `secateurs.recovery.writing` changes the
layers.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from secateurs.recovery.attaining import attained
from secateurs.recovery.chains import Chain
from secateurs.recovery.computed import Computed
from secateurs.recovery.derived import WeightNorm
from secateurs.recovery.moments import A_COLUMN, Moments, rows_wanted, sampled
from secateurs.recovery.moves import positions_of, values_at
from secateurs.recovery.passes import Reading
from secateurs.recovery.readers import Reader
from secateurs.recovery.samples import MOST_ROWS, Samples, are_few

if TYPE_CHECKING:
    from accelerate import Accelerator

_RIDGE = 1e-3
_ROUNDING = 1e-12  # of mean squares, below which a variance is none
_AT_ONCE = 1 << 22  # values that are copied from what layers read, 16 MiB, and twice that in float64


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Link:
    """A layer that is fitted.

    Args:
        name: Its weight's name.
        reader: Its call, without what is read.
        chain: Where its outputs matter.
        inputs: For a layer in a recurrence, which is fitted on what the original reads: which of that the
            smaller network has.
        made_of: What the weight is computed from, if it is no parameter.
    """

    name: str
    reader: Reader
    chain: Chain
    inputs: Tensor | None = None
    made_of: WeightNorm | Computed | None = None

    @property
    def gain(self) -> Tensor:
        """``(C,)``: what its outputs, or those of its own norm, are multiplied by until the point."""
        return self.chain.scale if self.chain.norm is None else self.chain.onward

    def rows(self, reading: Reading, places: Tensor) -> Tensor:
        """What the weights read at some positions; ``(G, n, columns)``."""
        rows = reading.rows(places)
        if self.inputs is None:
            return rows
        channels: Tensor = rows.unflatten(2, (-1, self.reader.kernel))
        return channels[:, :, self.inputs.to(rows.device)].flatten(2)

    def given(self, rows: Tensor) -> Tensor:
        """What the layer gives for rows, ``(1, n, columns)``, as it is now; ``(n, C)`` in float64."""
        given = rows[0].double() @ self.reader.matrix()[0].double().mT
        return given if self.reader.bias is None else given + self.reader.bias.double()


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Aim:
    """What of the original's values at a point the smaller network is to give.

    Args:
        kept: ``(C,)``: which of the original's channels it has.
        factors: ``(C,)``: what the cut multiplied them by.
        mix: ``(C, C of the original)``: the combinations that it is to give instead, if any.
    """

    kept: Tensor
    factors: Tensor
    mix: Tensor | None = None

    def of(self, values: Tensor) -> Tensor:
        """The aim for values of the original, ``(n, C of the original)``; ``(n, C)`` in float64."""
        if self.mix is not None:
            return values.double() @ self.mix.mT.to(values.device)
        chosen = values[:, self.kept.to(values.device)].double()
        return chosen * self.factors.to(chosen)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Fit:
    """Layers that are fitted together: their results meet in one point.

    Args:
        links: The layers; a single one where a convolution has groups or several calls share its weight.
        aim: What is to be given at the point.
        weights: Whether weights are refitted, or constants alone.
        positions: Positions that the first batch has at the point, or at those of all calls.
        others: The later calls that share the weight, each with its own point.
        gains: For a shared weight what the outputs of the layer and of the others are multiplied by until
            their points, ``(C,)`` each; of the links themselves it is 1.
    """

    links: tuple[Link, ...]
    aim: Aim
    weights: bool
    positions: int
    others: tuple[Link, ...] = ()
    gains: tuple[Tensor, ...] = ()

    @property
    def point(self) -> int:
        """Number of the call that gives the point's value."""
        return self.links[0].chain.point

    @property
    def is_of_original(self) -> bool:
        """Whether it is fitted on what the original reads."""
        return self.links[0].inputs is not None

    @property
    def is_attained(self) -> bool:
        """Whether some weights are computed from parameters, so that not all weights can be had."""
        return self.weights and any(isinstance(link.made_of, Computed) for link in self.links)

    @property
    def can_shift(self) -> bool:
        """Whether something on the way to the point can hold a constant."""
        return any(link.chain.homes for link in self.links)

    @property
    def groups(self) -> int:
        """Groups of the convolution; constants need none."""
        return self.links[0].reader.groups if self.weights else 1

    @property
    def columns(self) -> int:
        """Columns of the normal equations."""
        return sum(link.reader.columns for link in self.links) if self.weights else 0


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Solution:
    """What is missing at a point, ``V x + c``, and what that is worth.

    Args:
        weights: ``V``, one ``(G, C, K)`` for each layer.
        bias: ``c``, ``(C,)``.
        before: Share of the variance of the original's values that the smaller network missed; of constant
            ones, of their mean square and the error's together.
        after: The same with the solution.
        parameters: For the layers whose weights are computed, by number, what they are computed from.
    """

    weights: tuple[Tensor, ...]
    bias: Tensor
    before: float
    after: float
    parameters: Mapping[int, tuple[Tensor, ...]] = field(default_factory=dict)


class Equations:
    """What one fit knows of all batches: sums, or the rows themselves where columns are more than rows.

    Args:
        fit: What is fitted.
        device: Where the sums are kept.
        batches: How many batches there will be, of all processes.
        positions: How many positions they have, about.
    """

    def __init__(self, fit: Fit, device: torch.device, batches: int, positions: int) -> None:
        outputs, rows = len(fit.aim.kept), rows_wanted(fit.columns, batches)
        self.missing: Moments | Samples
        is_mixed = fit.is_attained and not all(isinstance(link.made_of, Computed) for link in fit.links)
        if fit.weights and not is_mixed and are_few(min(positions, rows * batches), fit.columns):
            rows = min(rows, max(MOST_ROWS // batches // (1 + len(fit.others)), 1))
            self.missing = Samples(fit.columns, outputs // fit.groups, groups=fit.groups)
        else:
            self.missing = Moments(fit.columns, outputs // fit.groups, groups=fit.groups, device=device)
        self._values = Moments(0, 2 * outputs, device=device)  # the original's, and what is missing of them
        self.fit, self._rows = fit, rows

    @property
    def nbytes(self) -> int:
        """Bytes that the sums take."""
        return self.missing.nbytes + self._values.nbytes

    def add(
        self,
        original: Tensor,
        smaller: Tensor | None,
        readings: dict[int, Reading],
        chance: torch.Generator,
        *,
        batches: int = 1,
        call: int = 0,
    ) -> None:
        """Take in one batch, or several that were put together.

        Args:
            original: The original's value at the point.
            smaller: The smaller network's; not needed where the fit is one of what the original reads.
            readings: What the layers read.
            chance: Draws the positions.
            batches: How many batches they are.
            call: Which of the calls of a shared weight it is, the first or one of the others.
        """
        channel = (self.fit.others[call - 1] if call else self.fit.links[0]).chain.channel
        count = positions_of(original.shape, channel)
        if not count:  # no token of the batch went to this expert
            return
        places = sampled(count, chance, batches * self._rows) if self.fit.weights else torch.arange(count)
        for some in places.split(max(_AT_ONCE // max(self.fit.columns, 1), 1)):
            self._add(original, smaller, readings, some, call)

    def _add(
        self,
        original: Tensor,
        smaller: Tensor | None,
        readings: dict[int, Reading],
        places: Tensor,
        call: int,
    ) -> None:
        """Take in some positions of a batch."""
        links = (self.fit.others[call - 1],) if call else self.fit.links
        channel = links[0].chain.channel
        aim = self.fit.aim.of(values_at(original, channel, places))
        read = [link.rows(readings[link.chain.call], places) for link in links if link.chain.call in readings]
        rows = torch.cat(read, 2) if read else aim[:, :0]  # (G, n, K)
        given = links[0].given(rows) if smaller is None else values_at(smaller, channel, places).double()
        missing = aim - given
        if self.fit.others:
            aim, missing = (each / self.fit.gains[call].to(each) for each in (aim, missing))
        self._values.add(aim[:, :0], torch.cat([aim, missing], 1))
        groups = self.fit.groups
        rows = rows if self.fit.weights else missing[:, :0]
        self.missing.add(rows, missing.reshape(len(missing), groups, -1).movedim(1, 0))

    @property
    def count(self) -> int:
        """Positions that were taken in."""
        return self._values.count

    def reduce(self, accelerator: Accelerator) -> None:
        """Add up the sums of all processes."""
        self.missing.reduce(accelerator)
        self._values.reduce(accelerator)

    def solve(self, ridge: float | None) -> Solution:
        """The best correction; never worse than none, on the positions that were read.

        Args:
            ridge: See `repair`.
        """
        links = self.fit.links
        few = A_COLUMN * self.fit.columns / max(self.missing.count, 1)  # positions that are not there
        weights, bias = self.missing.solve(
            (_RIDGE if ridge is None else ridge) * max(1.0, few),
            intercept=self.fit.can_shift,
            is_least=ridge is None and few > 1,
        )
        parts = weights.split([link.reader.columns for link in links], 2) if self.fit.weights else ()
        for part, link in zip(parts, links, strict=False):
            part.mul_((link.gain != 0).view(part.shape[0], -1, 1))  # nothing comes through a scale of zero
        parameters: Mapping[int, tuple[Tensor, ...]] = {}
        if self.fit.is_attained:
            parts, parameters = attained(links, parts, self.missing, centred=self.fit.can_shift)
            weights = torch.cat(parts, 2)
        if self.fit.can_shift:  # for the weights that are left
            bias = self.missing.constants(weights)
        power = (self._values.squares / self._values.count).view(2, -1)
        spread = power[0] - (self._values.targets / self._values.count).view(2, -1)[0].square()
        whole, most = float(spread.sum()), float(power.sum())
        if whole <= _ROUNDING * most:  # values that are constant have no variance to miss
            whole = most or 1.0
        before = float(power[1].sum()) / whole
        after = float(self.missing.error(weights, bias).sum()) / whole
        return Solution(
            weights=tuple(parts), bias=bias.flatten(), before=before, after=after, parameters=parameters
        )
