"""What the consumers of units read, as sums that do not grow with the data, and where their outputs matter.

For each call in which weights read units there are the mean products of what they read. An error in one of
its outputs counts at the *point*: after the batch norm and the residual sum that take the output, if any do
(`secateurs.recovery.points`), as a share of the variance of the value there.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from secateurs.criteria.dealt import Dealt
from secateurs.criteria.elimination import Regression
from secateurs.criteria.observed import Batch
from secateurs.criteria.places import Place, WidePlace
from secateurs.criteria.processes import largest
from secateurs.criteria.products import ProductPlace, with_combinations
from secateurs.criteria.routes import Routes
from secateurs.criteria.unit_reads import Reads, has_units, not_reached, not_understood, reads_of
from secateurs.errors import ScoreError
from secateurs.graph.calls import is_numbered
from secateurs.graph.groups import Graph, Group
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
        self._routes, self._dealt = Routes(), Dealt(device)
        self._device, self._at_points = device, at_points
        self._chance = torch.Generator().manual_seed(seed)
        self._chains: dict[int, Chain] = {}
        self._behind: dict[int, int] = {}
        self._passages: dict[int, Factors] = {}
        self.places: dict[int, Place] = {}
        self.products: dict[int, ProductPlace] = {}

    def read(self, batch: Batch) -> None:
        """Run the model on a batch; in evaluation mode, see `scoring_mode`."""
        numbers = self._routes.numbers(batch, self._follow)
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
        if self._routes.is_first:
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
        unseen = [read for read in self._reads.unseen if has_units(read, group)]
        strange = next((read for read in unseen if self._routes.make(read.call)), None)
        if strange is not None:
            raise not_understood(group, strange.call)
        found: list[Regression] = []
        for call, reads in self._reads.of_calls.items():
            for read in reads:
                if has_units(read, group) and call in self.places:
                    factors = self._passages.get(call)
                    problems = self.places[call].regressions(read, group, centred=centred)
                    share = self._dealt.share(call)
                    found += [with_combinations(each, factors).times(share) for each in problems]
        for call, product in self.products.items():
            behind = self.places.get(self._behind.get(call, NOWHERE))
            share = 1.0 if behind is None else behind.share()
            found += product.regressions(group, centred=centred, share=share)
        if not found:
            known = [read for reads in self._reads.of_calls.values() for read in reads]
            are_read = any(has_units(read, group) for read in (*unseen, *known))
            raise (not_reached if are_read else not_understood)(group, None)
        return found

    def combine(self) -> None:
        """Add up what several processes have seen.

        Raises:
            ScoreError: What one of them has seen was on no way that another one's examples took.
        """
        keys = self._routes.keys
        places = {keys[call]: place for call, place in self.places.items()}
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
        self._dealt.combine(keys)


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
