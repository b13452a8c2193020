"""What the consumers of units read, as sums that do not grow with the data, and where their outputs matter.

For each call in which weights read units there are the mean products of what they read. An error in one of
its outputs counts at the *point*: after the batch norm and the residual sum that take the output, if any do
(`secateurs.recovery.points`), as a share of the variance of the value there.
"""

from __future__ import annotations

import math
import zlib
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from secateurs.criteria.dealt import Dealt
from secateurs.criteria.elimination import Regression
from secateurs.criteria.observed import Batch
from secateurs.criteria.places import Place, WidePlace
from secateurs.criteria.processes import largest
from secateurs.criteria.products import ProductPlace, with_combinations
from secateurs.criteria.readings import scoring_mode
from secateurs.errors import ScoreError, UnrankedError
from secateurs.graph.calls import is_numbered
from secateurs.graph.groups import NO_UNIT, Graph, Group, UnitProduct, UnitRead
from secateurs.graph.paths import NOWHERE
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
        self._routes: dict[tuple[int, ...] | None, list[int] | None] = {}  # by what calls are in the trace
        self._known: dict[tuple[int, int], int] = {}  # by the call in the trace, and which part of it
        self._count = 0
        self._dealt = Dealt(device)
        self._device, self._at_points = device, at_points
        self._chance = torch.Generator().manual_seed(seed)
        self._chains: dict[int, Chain] = {}
        self._behind: dict[int, int] = {}
        self._passages: dict[int, Factors] = {}
        self.places: dict[int, Place] = {}
        self.products: dict[int, ProductPlace] = {}

    def read(self, batch: Batch) -> None:
        """Run the model on a batch; in evaluation mode, see `scoring_mode`."""
        numbers = self._route(batch)
        points: dict[int, list[int]] = {}
        for call, chain in self._chains.items():
            points.setdefault(chain.point, []).append(call)

        ranks = [place.rank for place in self.products.values() if place.rank is not None]

        def see(call: int, reader: Reader, result: Tensor) -> None:
            count = reader.positions(result.shape)
            if call in self._reads.of_calls and count:  # else no example comes to this expert
                most = min(max(_ROWS, 2 * reader.columns), ROWS)
                self._place(call, reader).take(reader, sampled(count, self._chance, most))
            for rank in ranks:
                rank.see(call, reader, result)

        def arrive(call: int, result: Any) -> None:
            self._dealt.arrive(call, result)
            for reader in points.get(call, ()):
                if reader in self.places:
                    self.places[reader].arrive(result)

        def meet(call: int, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            both = operands_of(func, args, kwargs) if call in self.products else None
            if both is not None:
                self.products[call].take(*both)

        with torch.no_grad(), _WatchingAll(see, arrive, meet, numbers), WrittenOut():
            batch.outputs()

    def _route(self, batch: Batch) -> list[int] | None:
        """What a batch's calls are numbered by here; None where it makes those of the first one.

        A network that chooses by its activations may call others on other batches. Each way that it goes is
        followed once.
        """
        way = None if batch.numbers is None else tuple(batch.numbers)
        if way not in self._routes:
            recorder = Recorder(batch.model, batch.inputs, written_out=True)
            in_trace = recorder.plain if way is None else [way[plain] for plain in recorder.plain]
            numbers = self._numbered(in_trace)
            self._follow(batch, recorder, in_trace, numbers)
            self._routes[way] = numbers if self._routes else None
        return self._routes[way]

    def _numbered(self, in_trace: Sequence[int]) -> list[int]:
        """Numbers of the calls of a pass: those that the same calls had before, else new ones."""
        parts: Counter[int] = Counter()
        numbers = []
        for call in in_trace:
            key = (call, parts[call])
            parts[call] += 1
            number = None if call == NOWHERE else self._known.get(key)
            if number is None:
                number, self._count = self._count, self._count + 1
                self._known[key] = number
            numbers.append(number)
        return numbers

    def _follow(
        self, batch: Batch, recorder: Recorder, in_trace: Sequence[int], numbers: Sequence[int]
    ) -> None:
        """See what reads units, and where its outputs matter; from one pass, by what it calls."""
        own = reads_of(self._graph, recorder, in_trace)
        new = {call: numbers[call] for call in own.of_calls if numbers[call] not in self._reads.of_calls}
        self._reads = Reads(
            {**self._reads.of_calls, **{number: own.of_calls[call] for call, number in new.items()}},
            [read for read in self._reads.unseen if read in own.unseen],
        )
        self._dealt.follow(recorder, numbers)
        if not self._routes:
            self._meet(batch, recorder, in_trace)
        if self._at_points:
            for call, number in new.items():
                chain = chain_of(recorder, call)
                self._chains[number] = replace(chain, point=numbers[chain.point])

    def _meet(self, batch: Batch, recorder: Recorder, in_trace: Sequence[int]) -> None:
        """See where activations of units are multiplied."""
        found = factors_in(batch.model, batch.inputs, recorder, agree=self._do_all) if self._at_points else ()
        ranks = {each.call: LowRank(each, self._device) for each in found if not each.is_read}
        self._passages = {each.call: each for each in found if each.is_read}
        numbers = {call: number for number, call in enumerate(in_trace)}
        self.products = {
            numbers[each.call]: ProductPlace(each, self._device, ranks.get(numbers[each.call]))
            for each in self._graph.products
            if each.call in numbers
        }
        for call in self.products if self._at_points else ():
            reader = next_reader(recorder, call)
            if reader is not None and reader in self._reads.of_calls:
                self._behind[call] = reader

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
            is_made = any(call == unseen.call for call, _ in self._known)
            raise (_not_understood if is_made else _not_reached)(group, _where(group, unseen.call))
        found: list[Regression] = []
        for call, reads in self._reads.of_calls.items():
            for read in reads:
                if _has(read, group) and call in self.places:
                    factors = self._passages.get(call)
                    problems = self.places[call].regressions(read, group, centred=centred)
                    share = self._dealt.share(call)
                    found += [with_combinations(each, factors).times(share) for each in problems]
        for call, product in self.products.items():
            behind = self.places.get(self._behind.get(call, NOWHERE))
            share = 1.0 if behind is None else behind.share()
            found += product.regressions(group, centred=centred, share=share)
        if not found:
            are_read = any(_has(read, group) for reads in self._reads.of_calls.values() for read in reads)
            raise (_not_reached if are_read else _not_understood)(group, _where(group, None))
        return found

    def combine(self) -> None:
        """Add up what several processes have seen.

        Raises:
            ScoreError: What one of them has seen was on no way that another one's examples took.
        """
        of_number = {number: key for key, number in self._known.items()}
        places = {of_number[call]: place for call, place in self.places.items()}
        names = zlib.crc32(repr(sorted(places)).encode())
        if largest(names, self._device) != -largest(-names, self._device):
            raise ScoreError(
                "the examples of one process take another path through the model than those of another",
                fix="give each process more examples, or score in a single process",
            )
        for key in sorted(places):
            places[key].combine()
        for call in sorted(self.products):
            self.products[call].combine()
        self._dealt.combine(of_number)


class _WatchingAll(Watching):
    """Shows what all numbered calls are given, and their results, as well."""

    def __init__(
        self,
        see: Callable[[int, Reader, Tensor], None],
        arrive: Callable[[int, Any], None],
        meet: Callable[[int, Any, tuple[Any, ...], dict[str, Any]], None],
        numbers: Sequence[int] | None = None,
    ) -> None:
        super().__init__(see, numbers)
        self._arrive, self._meet = arrive, meet

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        before, number = self.made, self.number
        if is_numbered(func) and number is not None:
            self._meet(number, func, args, kwargs or {})
        out = super().__torch_function__(func, types, args, kwargs)
        if self.made > before and number is not None:
            self._arrive(number, out)
        return out


def unrankable(model: nn.Module, graph: Graph, inputs: Any) -> dict[str, UnrankedError]:
    """The groups that have units which no understood call reads, and why; from one forward pass.

    Args:
        model: The model.
        graph: Its graph.
        inputs: What it is called on; a tensor, or a tuple or dictionary of arguments.
    """
    with scoring_mode(model, gradients=False), torch.no_grad():
        recorder = Recorder(model, inputs, written_out=True)
        reads = reads_of(graph, recorder, recorder.plain)
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


def reads_of(graph: Graph, recorder: Recorder, in_trace: Sequence[int]) -> Reads:
    """Tell which readers of a pass are the reads of a graph.

    Args:
        graph: The graph.
        recorder: One pass of its model, with recurrent layers written out.
        in_trace: The numbers of its calls in the trace.
    """
    by_call: dict[int, list[UnitRead]] = {}
    for read in graph.reads:
        by_call.setdefault(read.call, []).append(read)
    parts = Counter(in_trace)
    products = {in_trace[number] for number in recorder.units}
    layers = {call for call in by_call if parts[call] > 1 and call not in products}
    seen = {read for call in layers for read in by_call[call] if read.argument}  # else the state is constant
    found: dict[int, list[UnitRead]] = {}
    for number, reader in recorder.readers.items():
        call = in_trace[number]
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


def _not_reached(group: Group, where: str) -> UnrankedError:
    return UnrankedError(
        f"none of the examples comes to the weights that read the units of group {group.name!r}",
        where=where,
        fix=f"give more examples, plan with skip=[{group.name!r}], or use a criterion such as 'l2'",
    )


def _not_understood(group: Group, where: str) -> UnrankedError:
    return UnrankedError(
        f"reconstruction needs weights that read the units of group {group.name!r} in a linear layer, "
        "a convolution or a product with a matrix, and there are none",
        where=where,
        fix=f"plan with skip=[{group.name!r}], or use a criterion such as 'l2' or 'taylor'",
    )
