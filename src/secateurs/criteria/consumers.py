"""What the consumers of units read, as sums that do not grow with the data, and where their outputs matter.

For each call in which weights read units there are the mean products of what they read. An error in one of
its outputs counts at the *point*: after the batch norm and the residual sum that take the output, if any do
(`secateurs.recovery.points`), as a share of the variance of the value there.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from secateurs.criteria.elimination import Regression
from secateurs.criteria.observed import Batch
from secateurs.criteria.places import Place, WidePlace
from secateurs.criteria.processes import largest
from secateurs.criteria.products import ProductPlace, with_combinations
from secateurs.criteria.readings import scoring_mode
from secateurs.errors import UnrankedError
from secateurs.graph.calls import is_numbered
from secateurs.graph.groups import NO_UNIT, Graph, Group, UnitProduct, UnitRead
from secateurs.graph.products import operands_of
from secateurs.recovery.chains import Chain
from secateurs.recovery.factor_search import factors_in
from secateurs.recovery.factors import Factors
from secateurs.recovery.low_rank import LowRank
from secateurs.recovery.moments import ROWS, sampled
from secateurs.recovery.points import chain_of, next_reader
from secateurs.recovery.readers import Reader, Watching
from secateurs.recovery.recording import Recorder
from secateurs.recovery.written_out import WrittenOut

_WIDEST = 4608  # columns whose products are kept, 162 MiB; of wider readers those of the units are
_ROWS = 1024  # positions of a batch that are read, at least; twice the columns of wide readers


class Consumers:
    """All calls of a graph in which weights read units, or activations of units are multiplied.

    Args:
        graph: The graph of the model.
        device: Where sums are kept.
        at_points: Whether errors are those at the points, as shares of the variance there; else they are
            those of each reader's own outputs, as shares of their mean square.
        seed: Which positions of large maps are read.
    """

    def __init__(self, graph: Graph, device: torch.device, *, at_points: bool, seed: int = 0) -> None:
        self._graph, self._reads = graph, Reads({}, graph.reads)
        self._device, self._at_points = device, at_points
        self._chance = torch.Generator().manual_seed(seed)
        self._is_followed, self._chains = False, dict[int, Chain]()
        self._behind: dict[int, int] = {}
        self._passages: dict[int, Factors] = {}
        self.places: dict[int, Place] = {}
        self.products: dict[int, ProductPlace] = {}

    def read(self, batch: Batch) -> None:
        """Run the model on a batch; in evaluation mode, see `scoring_mode`."""
        if not self._is_followed:
            self._follow(batch)
        points: dict[int, list[int]] = {}
        for call, chain in self._chains.items():
            points.setdefault(chain.point, []).append(call)

        ranks = [place.rank for place in self.products.values() if place.rank is not None]

        def see(call: int, reader: Reader, result: Tensor) -> None:
            if call in self._reads.of_calls:
                most, count = min(max(_ROWS, 2 * reader.columns), ROWS), reader.positions(result.shape)
                self._place(call, reader).take(reader, sampled(count, self._chance, most))
            for rank in ranks:
                rank.see(call, reader, result)

        def arrive(call: int, result: Any) -> None:
            for reader in points.get(call, ()):
                self.places[reader].arrive(result)

        def meet(call: int, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            both = operands_of(func, args, kwargs) if call in self.products else None
            if both is not None:
                self.products[call].take(*both)

        with torch.no_grad(), _WatchingAll(see, arrive, meet), WrittenOut():
            batch.outputs()

    def _follow(self, batch: Batch) -> None:
        """See what reads units, and where its outputs matter; from one pass, by what it calls."""
        self._is_followed = True
        recorder = Recorder(batch.model, batch.inputs, written_out=True)
        self._reads = reads_of(self._graph, recorder)
        numbers = {plain: number for number, plain in enumerate(recorder.plain)}
        found = factors_in(batch.model, batch.inputs, recorder, agree=self._do_all) if self._at_points else ()
        ranks = {each.call: LowRank(each, self._device) for each in found if not each.is_read}
        self._passages = {each.call: each for each in found if each.is_read}
        self.products = {
            numbers[each.call]: ProductPlace(each, self._device, ranks.get(numbers[each.call]))
            for each in self._graph.products
        }
        if self._at_points:
            for call in self.products:
                reader = next_reader(recorder, call)
                if reader is not None and reader in self._reads.of_calls:
                    self._behind[call] = reader
            self._chains = {call: chain_of(recorder, call) for call in self._reads.of_calls}

    def _do_all(self, here: bool) -> bool:
        """Whether something holds in all processes."""
        return not largest(int(not here), self._device)

    def _place(self, call: int, reader: Reader) -> Place:
        if call not in self.places:
            kind = WidePlace if reader.columns > _WIDEST else Place
            reads = self._reads.of_calls[call]
            self.places[call] = kind(reads, reader, self._device, self._chains.get(call))
        return self.places[call]

    def regressions(self, group: Group, *, centred: bool) -> list[Regression]:
        """The least-squares problems in which a group's units take part.

        Raises:
            UnrankedError: No call that is understood reads the units.
        """
        unseen = self._reads.unseen_of(group)
        if unseen is not None:
            raise _not_understood(group, _where(group, unseen.call))
        found: list[Regression] = []
        for call, reads in self._reads.of_calls.items():
            for read in reads:
                if _has(read, group):
                    factors = self._passages.get(call)
                    problems = self.places[call].regressions(read, group, centred=centred)
                    found += [with_combinations(each, factors) for each in problems]
        for call, product in self.products.items():
            share = self.places[self._behind[call]].share() if call in self._behind else 1.0
            found += product.regressions(group, centred=centred, share=share)
        if not found:
            raise _not_understood(group, _where(group, None))
        return found

    def combine(self) -> None:
        """Add up what several processes have seen."""
        for call in sorted(self.places):
            self.places[call].combine()
        for call in sorted(self.products):
            self.products[call].combine()


class _WatchingAll(Watching):
    """Shows what all numbered calls are given, and their results, as well."""

    def __init__(
        self,
        see: Callable[[int, Reader, Tensor], None],
        arrive: Callable[[int, Any], None],
        meet: Callable[[int, Any, tuple[Any, ...], dict[str, Any]], None],
    ) -> None:
        super().__init__(see)
        self._arrive, self._meet = arrive, meet

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        before = self._call
        if is_numbered(func):
            self._meet(before, func, args, kwargs or {})
        out = super().__torch_function__(func, types, args, kwargs)
        if self._call > before:
            self._arrive(before, out)
        return out


def unrankable(model: nn.Module, graph: Graph, inputs: Any) -> dict[str, UnrankedError]:
    """The groups that have units which no understood call reads, and why; from one forward pass.

    Args:
        model: The model.
        graph: Its graph.
        inputs: What it is called on; a tensor, or a tuple or dictionary of arguments.
    """
    with scoring_mode(model, gradients=False), torch.no_grad():
        reads = reads_of(graph, Recorder(model, inputs, written_out=True))
    found = {}
    for group in graph.groups:
        unseen = reads.unseen_of(group)
        each: list[UnitRead | UnitProduct] = [*graph.reads, *graph.products]
        if unseen is not None or not any(_has(one, group) for one in each):
            found[group.name] = _not_understood(group, _where(group, None if unseen is None else unseen.call))
    return found


@dataclass(frozen=True, slots=True)
class Reads:
    """The reads of units, as far as they are understood.

    Args:
        of_calls: Those of each reader, by its number where recurrent layers are written out.
        unseen: Those of calls that are no readers, or read along other dimensions.
    """

    of_calls: Mapping[int, Sequence[UnitRead]]
    unseen: Sequence[UnitRead]

    def unseen_of(self, group: Group) -> UnitRead | None:
        """The first that has units of a group and is not understood."""
        return next((read for read in self.unseen if _has(read, group)), None)


def reads_of(graph: Graph, recorder: Recorder) -> Reads:
    """Tell which readers of a pass are the reads of a graph.

    Args:
        graph: The graph.
        recorder: One pass of its model, with recurrent layers written out.
    """
    by_call: dict[int, list[UnitRead]] = {}
    for read in graph.reads:
        by_call.setdefault(read.call, []).append(read)
    parts = Counter(recorder.plain)
    products = {recorder.plain[number] for number in recorder.units}
    layers = {call for call in by_call if parts[call] > 1 and call not in products}
    seen = {read for call in layers for read in by_call[call] if read.argument}  # else the state is constant
    found: dict[int, list[UnitRead]] = {}
    for number, reader in recorder.readers.items():
        call = recorder.plain[number]
        reads = by_call.get(call, [])
        if number in recorder.units:
            of_call = _of_product(reads, recorder.units[number], reader.groups)
            seen.update(each for each in reads if each.dim in recorder.units[number])
        elif call in layers:
            one = _of_layer(reads, reader, of_inputs=recorder.reads_inputs(number))
            of_call = [] if one is None else [one]
            seen.update(each for each in reads if not each.argument)
        else:
            of_call = [read for read in reads if _along(read, reader)]
            seen.update(of_call)
        if of_call:
            found[number] = of_call
    return Reads(found, [read for read in graph.reads if read not in seen])


def _of_layer(reads: Sequence[UnitRead], reader: Reader, *, of_inputs: bool) -> UnitRead | None:
    """What a reader inside of a recurrent layer reads.

    The units of its states are those that the layer, one call of the graph, reads in the state before the
    first step. A later level reads those of all directions of the level below.

    Args:
        reads: The reads of the layer's call.
        reader: The reader.
        of_inputs: Whether it reads the inputs of the layer, and not its states.
    """
    read = next((read for read in reads if (read.argument == 0) == of_inputs), None)
    if read is None or of_inputs:
        return read
    units = np.tile(read.units, reader.columns // len(read.units))
    return replace(read, units=units, dim=reader.source.dim() - 1)


def _of_product(
    reads: Sequence[UnitRead], units: Mapping[int, tuple[int, int]], groups: int
) -> list[UnitRead]:
    """What the columns of a product read whose weight has more than two dimensions.

    Args:
        reads: The reads of the call.
        units: For each dimension that it sums over its length, and how far apart its indices are.
        groups: Matrices that read the same units each.
    """
    columns = np.arange(groups * math.prod(length for length, _ in units.values()))
    found = []
    for read in reads:
        if read.dim in units:
            length, apart = units[read.dim]
            found.append(replace(read, units=read.units[columns // apart % length]))
    return found


def _along(read: UnitRead, reader: Reader) -> bool:
    """Whether a reader sums over the dimension in which the units lie."""
    return read.dim == reader.source.dim() + reader.source_dim and (
        len(read.units) == reader.source.shape[-1 - len(reader.windows)]
    )


def _has(read: UnitRead | UnitProduct, group: Group) -> bool:
    units = read.units[read.units != NO_UNIT]
    return bool(((units >= group.first) & (units < group.first + group.size)).any())


def _where(group: Group, call: int | None) -> str:
    """The call that reads the units and is not understood; without one the parameters that hold them."""
    if call is not None:
        return f"torch function call {call} of the forward pass"
    return ", ".join(part.parameter for part in group.slices)


def _not_understood(group: Group, where: str) -> UnrankedError:
    return UnrankedError(
        f"reconstruction needs weights that read the units of group {group.name!r} in a linear layer, "
        "a convolution or a product with a matrix, and there are none",
        where=where,
        fix=f"plan with skip=[{group.name!r}], or use a criterion such as 'l2' or 'taylor'",
    )
