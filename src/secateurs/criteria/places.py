"""One call in which weights read units: the sums that its least-squares problems need.

A `Place` keeps the products of all columns. A `WidePlace` has too many for that, as the first layer behind a
flattened image has; it keeps the products of what the units contribute to the outputs.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from secateurs.criteria.elimination import Regression
from secateurs.criteria.processes import add_up
from secateurs.errors import ScoreError
from secateurs.graph.groups import Group, UnitRead
from secateurs.recovery.chains import Chain
from secateurs.recovery.moments import Moments, shrunk
from secateurs.recovery.readers import Reader

_SKETCH = 64  # random combinations of a wide reader's outputs, drawn anew for each batch
_FEW = 2  # positions for each column below which covariances are shrunk
_CHUNK = 2**24  # values in memory at once, of a wide reader
_TINY = torch.finfo(torch.float64).tiny
_MOST_UNITS = 8192  # units whose products are kept, 512 MiB


class Place:
    """One call that reads units: sums over all batches.

    Args:
        reads: Which units it reads, along the dimension that it sums over.
        reader: The call in the first batch.
        device: Where sums are kept.
        chain: The way to the point where its outputs matter; None if errors are to be those of the outputs
            themselves, as shares of their mean square.
    """

    def __init__(
        self,
        reads: Sequence[UnitRead],
        reader: Reader,
        device: torch.device,
        chain: Chain | None = None,
    ) -> None:
        self.reads, self._channel = list(reads), reader.channel if chain is None else chain.channel
        self._kernel, self._groups = reader.kernel, reader.groups
        self._width = reader.columns // reader.kernel  # channels of each group
        weight = reader.matrix().detach()  # (G, outputs of a group, columns)
        scale = None if chain is None else chain.scale.to(weight).view(*weight.shape[:2], 1)
        self.weight = weight if scale is None else weight * scale
        self._at_point = chain is not None
        self._seen = torch.zeros(2, dtype=torch.float64, device=device)  # positions, sum of squares
        self._sums = torch.zeros(reader.outputs, dtype=torch.float64, device=device)
        self._start(reader, device)

    def _start(self, reader: Reader, device: torch.device) -> None:
        self._moments = Moments(reader.columns, groups=reader.groups, device=device)

    def take(self, reader: Reader, positions: Tensor) -> None:
        """Take in what is read at some positions."""
        self._moments.add(reader.rows(positions).detach())

    def arrive(self, value: Tensor) -> None:
        """Take in the value at the point where the outputs matter."""
        values = value.movedim(self._channel, -1).reshape(-1, len(self._sums))
        self._sums += values.sum(0, dtype=torch.float64)
        self._seen[0] += len(values)
        self._seen[1] += values.square().sum(dtype=torch.float64)

    def combine(self) -> None:
        """Add up what several processes have seen."""
        for tensor in (self._seen, self._sums):
            add_up(tensor)
        _add_up(self._moments)

    def variance(self) -> Tensor:
        """The variance of the value at the point, over all its channels together."""
        count = self._seen[0].clamp(min=1)
        return (self._seen[1] / count - (self._sums / count).square().sum()).cpu()

    def share(self) -> float:
        """The share of the value at the point that varies with what is read; 1 for errors of the outputs."""
        if not self._at_point:
            return 1.0
        weight = self.weight.double().cpu()
        own = ((weight @ self.moments(True).cpu()) * weight).sum()
        return min(float(own / self.variance().clamp(min=_TINY)), 1.0)

    def moments(self, centred: bool) -> Tensor:
        """``(G, K, K)`` mean products of the columns."""
        return self._moments.covariance(centred=centred)

    def regressions(self, read: UnitRead, group: Group, *, centred: bool) -> list[Regression]:
        """The problems of one group of units, one for each group of a convolution that reads any.

        Args:
            read: Which units are where.
            group: The group.
            centred: Whether a bias takes up the means.
        """
        units = torch.from_numpy(read.units).view(self._groups, self._width) - group.first
        moments, weight = self.moments(centred).cpu(), self.weight.double().cpu()
        if self._at_point and self._moments.count < _FEW * moments.shape[-1]:
            moments = shrunk(moments, self._moments.count)
        whole = self.variance() if self._at_point else ((weight @ moments) * weight).sum()
        weight = weight / whole.clamp(min=_TINY).sqrt()
        found = []
        for place, own in enumerate(units):
            channels = ((own >= 0) & (own < group.size)).nonzero().flatten()
            if not len(channels):
                continue
            names, order = own[channels].sort(stable=True)
            distinct = names.unique()
            if len(channels) == self._width and len(distinct) == 1 < self._groups:
                continue  # a whole group of a convolution: its outputs leave with it
            columns = channels[order, None] * self._kernel + torch.arange(self._kernel)
            found.append(
                Regression(
                    moments=moments[place],
                    weight=weight[place],
                    units=distinct,
                    columns=columns.view(len(distinct), -1),
                )
            )
        return found


class WidePlace(Place):
    """The same for more columns than products can be kept of.

    Each unit's contribution ``W_u x_u`` stays as it is but for one factor, which is what can be refitted: an
    error never below that of free weights. Products of contributions are means over random combinations
    of the outputs.
    """

    def _start(self, reader: Reader, device: torch.device) -> None:
        if reader.groups > 1:
            raise ScoreError(
                f"a convolution of {reader.groups} groups reads {reader.columns} columns in each, too many",
                fix="use a criterion on weights or gradients such as 'l2' or 'taylor'",
            )
        self._chance = torch.Generator().manual_seed(0)
        self._rows = torch.zeros(reader.columns, dtype=torch.float64, device=device)
        self._count = torch.zeros((), dtype=torch.float64, device=device)
        self._slots, self._products = {}, {}
        for read in self.reads:
            names, slots = torch.from_numpy(read.units).unique(return_inverse=True)
            if len(names) > _MOST_UNITS:
                raise ScoreError(
                    f"{len(names)} units are read in one place, at most {_MOST_UNITS} can be compared",
                    fix="use a criterion on weights or gradients such as 'l2' or 'taylor'",
                )
            self._slots[id(read)] = names, slots.repeat_interleave(self._kernel).to(device)
            self._products[id(read)] = Moments(len(names), device=device)

    def take(self, reader: Reader, positions: Tensor) -> None:
        """Take in what the units contribute at some positions."""
        signs = random_signs((_SKETCH, self.weight.shape[1]), self._chance).to(self.weight)
        sketch = (signs @ self.weight[0]).to(reader.source.dtype).T  # (columns, combinations)
        for few in positions.split(max(_CHUNK // sketch.numel(), 1)):
            rows = reader.rows(few)[0].detach()  # (n, columns)
            self._rows += rows.sum(0)
            self._count += len(rows)
            parts = rows.T[:, :, None] * sketch[:, None]  # (columns, n, combinations)
            for key, (names, slots) in self._slots.items():
                sums = parts.new_zeros(len(names), *parts.shape[1:]).index_add_(0, slots, parts)
                self._products[key].add(sums.flatten(1).T)

    def combine(self) -> None:
        """Add up what several processes have seen."""
        for tensor in (self._seen, self._sums, self._rows, self._count):
            add_up(tensor)
        for products in self._products.values():
            _add_up(products)

    def share(self) -> float:
        """1: what so wide a reader gives varies by is not known."""
        return 1.0

    def regressions(self, read: UnitRead, group: Group, *, centred: bool) -> list[Regression]:
        """One problem, with a column for each unit that is read here."""
        (names, slots), sums = self._slots[id(read)], self._products[id(read)]
        products = sums.products[0] / sums.count
        if centred:
            each = self.weight[0] * (self._rows / self._count).to(self.weight)  # (outputs, columns)
            means = each.new_zeros(len(names), len(each)).index_add_(0, slots, each.T).double()
            products = products - means @ means.T
        whole = self.variance() if self._at_point else products.sum().cpu()
        own = ((names >= group.first) & (names < group.first + group.size)).nonzero().flatten()
        return [
            Regression(
                moments=products.cpu(),
                weight=(1 / whole.clamp(min=_TINY)).sqrt().expand(1, len(names)),
                units=names[own] - group.first,
                columns=own[:, None],
            )
        ]


def random_signs(shape: Sequence[int], chance: torch.Generator) -> Tensor:
    """Independent signs, +1 or -1."""
    return torch.randint(2, tuple(shape), generator=chance) * 2 - 1


def _add_up(moments: Moments) -> None:
    count = torch.tensor(float(moments.count), dtype=torch.float64, device=moments.rows.device)
    for tensor in (count, moments.rows, moments.products):
        add_up(tensor)
    moments.count = int(count)
