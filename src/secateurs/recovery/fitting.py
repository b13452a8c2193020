"""One fit: the layers whose outputs meet in one point, by one set of normal equations, and how it is written.

At the point the smaller network gives ``p = s * (W x + b) + rest`` and the original ``q``. Ridge regression
of ``q - p`` on ``x`` gives what is missing, ``V x + c``: an error in ``rest``, such as that of a residual
stream, is made up for as well. Then ``W`` becomes ``W + V / s``, and ``c`` goes where a constant can be held.

A weight that several calls share is fitted for all of them: their positions enter one set of equations, of
what is missing divided by ``s``, which may differ from call to call.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from secateurs.recovery.chains import Chain, Norm
from secateurs.recovery.derived import WeightNorm
from secateurs.recovery.moments import A_COLUMN, Moments, rows_wanted, sampled
from secateurs.recovery.moves import positions_of, values_at
from secateurs.recovery.passes import Reading
from secateurs.recovery.readers import Reader
from secateurs.recovery.samples import MOST_ROWS, Samples, are_few

if TYPE_CHECKING:
    from accelerate import Accelerator

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
    made_of: WeightNorm | None = None

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
        before: Share of the variance of the original's values that the smaller network missed.
        after: The same with the solution.
    """

    weights: tuple[Tensor, ...]
    bias: Tensor
    before: float
    after: float


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
        if fit.weights and are_few(min(positions, rows * batches), fit.columns):
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

    def reduce(self, accelerator: Accelerator) -> None:
        """Add up the sums of all processes."""
        self.missing.reduce(accelerator)
        self._values.reduce(accelerator)

    def solve(self, ridge: float) -> Solution:
        """The best correction; never worse than none, on the positions that were read."""
        links = self.fit.links
        few = A_COLUMN * self.fit.columns / max(self.missing.count, 1)  # positions that are not there
        weights, bias = self.missing.solve(ridge * max(1.0, few), intercept=self.fit.can_shift)
        parts = weights.split([link.reader.columns for link in links], 2) if self.fit.weights else ()
        for part, link in zip(parts, links, strict=False):
            part.mul_((link.gain != 0).view(part.shape[0], -1, 1))  # nothing comes through a scale of zero
        if self.fit.can_shift:  # for the weights that are left
            bias = self.missing.constants(weights)
        power = (self._values.squares / self._values.count).view(2, -1)
        spread = power[0] - (self._values.targets / self._values.count).view(2, -1)[0].square()
        whole = max(float(spread.sum()), 1e-30)
        before = float(power[1].sum()) / whole
        after = float(self.missing.error(weights, bias).sum()) / whole
        return Solution(weights=parts, bias=bias.flatten(), before=before, after=after)


def write(equations: Equations, solution: Solution) -> None:
    """Change the weights, and what holds the constant; evaluation then gives the solution at the point."""
    home = next((link for link in equations.fit.links if link.chain.homes), None)
    start = 0
    for place, link in enumerate(equations.fit.links):
        constant = solution.bias if link is home else torch.zeros_like(solution.bias)
        is_written = False
        if solution.weights:
            columns = slice(start, start + link.reader.columns)
            start += link.reader.columns
            is_written = link.chain.norm is not None
            if link.chain.norm is not None:
                _write_with_norm(
                    link, link.chain.norm, solution.weights[place], constant, equations.missing, columns
                )
            else:
                _write_plainly(link, solution.weights[place])
        if link is home and not is_written:
            _shift(link, constant)


def _write_plainly(link: Link, missing: Tensor) -> None:
    gain = torch.where(link.gain == 0, 1.0, link.gain).view(missing.shape[0], -1, 1)
    _set(link, link.reader.weight.data + link.reader.unfolded(missing / gain.to(missing)))


def begin(link: Link, original: Reader, rows: Tensor, columns: Tensor) -> None:
    """Give a layer combinations of the original's weights, from which its fit goes on.

    Args:
        link: The layer, alone at its point where `rows` are combinations.
        original: Its call in the original.
        rows: ``(C, C of the original)``: what it is to give of the original's outputs.
        columns: ``(K, K of the original)``: what it reads of the original's inputs, or combinations of them.
    """
    old = original.matrix()[0].detach().double().unflatten(1, (-1, original.kernel))  # (C, K, kernel)
    new = torch.einsum("ro,oik,ji->rjk", rows.to(old), old, columns.to(old)).flatten(1)
    _set(link, link.reader.unfolded(new[None].to(link.reader.weight.dtype)))
    if link.reader.bias is not None and original.bias is not None:
        link.reader.bias.data.copy_(rows.to(old) @ original.bias.detach().double())


def _set(link: Link, weight: Tensor) -> None:
    link.reader.weight.data.copy_(weight)
    if link.made_of is not None:
        link.made_of.take(link.reader.weight)


def _write_with_norm(
    link: Link, norm: Norm, missing: Tensor, constant: Tensor, rows: Moments | Samples, columns: slice
) -> None:
    """A layer and the batch norm behind it, whose statistics become those of the layer's new outputs.

    The norm is to give ``V x + c``. The layer gets ``W = V / s``, the norm gets the mean and variance of
    ``W x + b``, and such a scale and shift that in evaluation it multiplies by ``s`` and gives ``c`` at
    ``x = 0``. A pass in training mode finds the same statistics, and so computes the same.
    """
    old = link.reader.matrix().double()  # (G, C, K)
    shape = (old.shape[0], -1, 1)
    onward = torch.where(link.gain == 0, 1.0, link.gain)
    whole = norm.scale.view(shape) * old + missing / onward.view(shape)  # V
    length, before = whole.norm(dim=2).flatten(), old.norm(dim=2).flatten()
    # a row keeps its length, so that weight decay and learning rate act on it as before
    sign = torch.where(norm.scale < 0, -1.0, 1.0)
    inner = torch.where((length > 0) & (before > 0), sign * length / before, norm.scale)  # s
    inner = torch.where(inner == 0, 1.0, inner)
    new = whole / inner.view(shape)  # W
    bias = torch.zeros_like(constant) if link.reader.bias is None else link.reader.bias.detach().double()
    assert norm.weight is not None and norm.bias is not None
    gives = norm.bias.detach().double() + norm.scale * (bias - norm.mean.double()) + constant / onward  # c
    mean, var = (each.flatten() for each in rows.given(new, columns))
    _set(link, link.reader.unfolded(new))
    norm.mean.copy_(mean + bias)
    norm.var.copy_(var * rows.count / max(rows.count - 1, 1))
    norm.weight.data.copy_(inner * (norm.var.double() + norm.eps).sqrt())
    norm.bias.data.copy_(gives + inner * (norm.mean.double() - bias))


def _shift(link: Link, constant: Tensor) -> None:
    """Add a constant at the point: in the first place that can hold it for every channel, or the best."""
    home, gain = max(link.chain.homes, key=lambda each: int((each[1] != 0).sum()))
    more = torch.where(gain == 0, 0.0, constant / torch.where(gain == 0, 1.0, gain))
    home.data += more.to(home.dtype).view_as(home)


def correct(equations: Equations, solution: Solution, smaller: Tensor, readings: dict[int, Reading]) -> None:
    """Change the smaller network's value at the point, in place, as the new weights would have."""
    fit = equations.fit
    weights, bias = solution.weights, solution.bias
    if fit.others:  # the solution is that of the weight itself
        gain = fit.gains[0].to(bias)
        weights = tuple(each * gain.view(each.shape[0], -1, 1) for each in weights)
        bias = bias * gain
    for part, link in zip(weights, fit.links, strict=False):
        reader = link.reader
        more = readings[link.chain.call].at_point(reader.unfolded(part.to(reader.weight.dtype)))
        smaller += more.to(smaller.dtype)
    shape = [1] * smaller.dim()
    shape[fit.links[0].chain.channel] = len(bias)
    smaller += bias.to(smaller.dtype).view(shape)
