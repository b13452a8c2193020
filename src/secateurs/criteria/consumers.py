"""What the consumers of units read, as sums that do not grow with the data, and where their outputs matter.

For each call in which weights read units there are the mean products of what they read. An error in one of
its outputs counts at the *point*: after the batch norm and the residual sum that take the output, if any do
(`secateurs.recovery.points`), as a share of the variance of the value there.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from secateurs.criteria.elimination import Regression
from secateurs.criteria.observed import Batch
from secateurs.criteria.places import Place, WidePlace
from secateurs.criteria.readings import scoring_mode
from secateurs.errors import UnrankedError
from secateurs.graph.groups import NO_UNIT, Graph, Group, UnitRead
from secateurs.graph.running import call_model
from secateurs.recovery.chains import Chain
from secateurs.recovery.moments import ROWS, sampled
from secateurs.recovery.points import Recorder
from secateurs.recovery.readers import Reader, Watching

_WIDEST = 4608  # columns whose products are kept, 162 MiB; of wider readers those of the units are
_ROWS = 1024  # positions of a batch that are read, at least; twice the columns of wide readers


class Consumers:
    """All calls of a graph in which weights read units.

    Args:
        graph: The graph of the model.
        device: Where sums are kept.
        at_points: Whether errors are those at the points, as shares of the variance there; else they are
            those of each reader's own outputs, as shares of their mean square.
        seed: Which positions of large maps are read.
    """

    def __init__(self, graph: Graph, device: torch.device, *, at_points: bool, seed: int = 0) -> None:
        self._reads = reads_by_call(graph)
        self._device, self._at_points = device, at_points
        self._chance = torch.Generator().manual_seed(seed)
        self._chains: dict[int, Chain] | None = None
        self.places: dict[int, Place] = {}

    def read(self, batch: Batch) -> None:
        """Run the model on a batch; in evaluation mode, see `scoring_mode`."""
        if self._chains is None:
            self._chains = self._followed(batch)
        points: dict[int, list[int]] = {}
        for call, chain in self._chains.items():
            points.setdefault(chain.point, []).append(call)

        def see(call: int, reader: Reader, result: Tensor) -> None:
            if call in self._reads:
                most, count = min(max(_ROWS, 2 * reader.columns), ROWS), reader.positions(result.shape)
                self._place(call, reader).take(reader, sampled(count, self._chance, most))

        def arrive(call: int, result: Any) -> None:
            for reader in points.get(call, ()):
                self.places[reader].arrive(result)

        with torch.no_grad(), _WatchingAll(see, arrive):
            batch.outputs()

    def _followed(self, batch: Batch) -> dict[int, Chain]:
        """For each reader of units where its outputs matter; from one pass, by what it calls."""
        if not self._at_points:
            return {}
        recorder = Recorder(batch.model, batch.inputs)
        return {call: recorder.chain(call) for call in self._reads if call in recorder.readers}

    def _place(self, call: int, reader: Reader) -> Place:
        if call not in self.places:
            reads = [read for read in self._reads[call] if _along(read, reader)]
            kind = WidePlace if reader.columns > _WIDEST else Place
            chain = (self._chains or {}).get(call)
            self.places[call] = kind(reads, reader, self._device, chain)
        return self.places[call]

    def regressions(self, group: Group, *, centred: bool) -> list[Regression]:
        """The least-squares problems in which a group's units take part.

        Raises:
            UnrankedError: No call that is understood reads the units.
        """
        found: list[Regression] = []
        for call, reads in self._reads.items():
            for read in reads:
                if not _has(read, group):
                    continue
                place = self.places.get(call)
                if place is None or read not in place.reads:
                    raise _not_understood(group, _where(group, call))
                found += place.regressions(read, group, centred=centred)
        if not found:
            raise _not_understood(group, _where(group, None))
        return found

    def combine(self) -> None:
        """Add up what several processes have seen."""
        for call in sorted(self.places):
            self.places[call].combine()


class _WatchingAll(Watching):
    """Shows the results of all numbered calls as well."""

    def __init__(
        self, see: Callable[[int, Reader, Tensor], None], arrive: Callable[[int, Any], None]
    ) -> None:
        super().__init__(see)
        self._arrive = arrive

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        before = self._call
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
    reads = reads_by_call(graph)
    understood: set[UnitRead] = set()

    def see(call: int, reader: Reader, result: Tensor) -> None:
        understood.update(read for read in reads.get(call, ()) if _along(read, reader))

    with scoring_mode(model, gradients=False), torch.no_grad(), Watching(see):
        call_model(model, inputs)
    found = {}
    for group in graph.groups:
        mine = [read for read in graph.reads if _has(read, group)]
        unseen = [read for read in mine if read not in understood]
        if unseen or not mine:
            found[group.name] = _not_understood(group, _where(group, unseen[0].call if unseen else None))
    return found


def reads_by_call(graph: Graph) -> dict[int, list[UnitRead]]:
    """The reads of units by the call that reads them."""
    found: dict[int, list[UnitRead]] = {}
    for read in graph.reads:
        found.setdefault(read.call, []).append(read)
    return found


def _along(read: UnitRead, reader: Reader) -> bool:
    """Whether a reader sums over the dimension in which the units lie."""
    return read.dim == reader.source.dim() - 1 - len(reader.windows) and (
        len(read.units) == reader.source.shape[read.dim]
    )


def _has(read: UnitRead, group: Group) -> bool:
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
