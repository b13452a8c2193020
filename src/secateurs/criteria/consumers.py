"""What the consumers of units read, as sums that do not grow with the data, and what an error in them costs.

For each call in which weights read units there are the mean products of what they read, and for each of its
outputs the mean square of the gradient of the network's outputs, summed over positions: what an error in this
output comes to at the end, to first order, whatever norm, sum or activation lies between.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from secateurs.criteria.elimination import Regression
from secateurs.criteria.observed import Batch
from secateurs.criteria.places import Place, WidePlace
from secateurs.criteria.processes import add_up
from secateurs.errors import ScoreError, UnrankedError
from secateurs.graph.groups import NO_UNIT, Graph, Group, UnitRead
from secateurs.recovery.moments import ROWS, sampled
from secateurs.recovery.readers import Reader, Watching

_WIDEST = 4608  # columns whose products are kept, 162 MiB; of wider readers those of the units are
_ROWS = 1024  # positions of a batch that are read, at least; twice the columns of wide readers
_SENSED = 256  # examples whose gradients say what an error costs


class Consumers:
    """All calls of a graph in which weights read units.

    Args:
        graph: The graph of the model.
        device: Where sums are kept.
        senses: Whether gradients are to say what errors cost; else every reader's outputs count alike.
        seed: Which positions of large maps are read.
    """

    def __init__(self, graph: Graph, device: torch.device, *, senses: bool, seed: int = 0) -> None:
        self._reads: dict[int, list[UnitRead]] = {}
        for read in graph.reads:
            self._reads.setdefault(read.call, []).append(read)
        self._device, self._senses = device, senses
        self._chance = torch.Generator().manual_seed(seed)
        self.places: dict[int, Place] = {}
        self._examples = torch.zeros((), dtype=torch.float64, device=device)
        self._power = torch.zeros((), dtype=torch.float64, device=device)

    def read(self, batch: Batch) -> None:
        """Run the model on a batch; in evaluation mode, see `scoring_mode`."""
        sensing = self._senses and bool(self._examples < _SENSED)
        anchor = torch.zeros((), device=self._device, requires_grad=True)

        def see(call: int, reader: Reader, result: Tensor) -> Tensor | None:
            if call not in self._reads:
                return None
            place = self._place(call, reader)
            with torch.no_grad():
                most = min(max(_ROWS, 2 * reader.columns), ROWS)
                place.take(reader, sampled(reader.positions(result), self._chance, most))
            if not sensing or not result.is_floating_point():
                return None
            if not result.requires_grad:
                result = result + anchor.to(result.dtype)
            result.register_hook(lambda gradient: place.sense(gradient, reader))
            return result

        with torch.set_grad_enabled(sensing), Watching(see):
            outputs = batch.outputs()
        if sensing:
            self._sense(outputs, anchor)
            self._examples += batch.examples

    def _sense(self, outputs: object, anchor: Tensor) -> None:
        """Send signs back through the network: mean squares of what arrives add up over all outputs."""
        leaves = [leaf for leaf in tree_leaves(outputs) if isinstance(leaf, Tensor) and leaf.requires_grad]
        if not leaves:
            raise ScoreError("the model's outputs do not depend on any unit", fix="return them as tensors")
        self._power += sum(leaf.detach().double().square().sum() for leaf in leaves)
        torch.autograd.grad(leaves, [anchor], [_signs_of(leaf.detach()) for leaf in leaves])

    def _place(self, call: int, reader: Reader) -> Place:
        if call not in self.places:
            reads = [read for read in self._reads[call] if _along(read, reader)]
            kind = WidePlace if reader.columns > _WIDEST else Place
            self.places[call] = kind(reads, reader, self._device)
        return self.places[call]

    def regressions(self, group: Group, *, centred: bool) -> list[Regression]:
        """The least-squares problems in which a group's units take part.

        With gradients, errors are shares of the mean square of the network's outputs; else of the reader's.

        Raises:
            UnrankedError: No call that is understood reads the units.
        """
        power = self._power if self._senses else None
        found: list[Regression] = []
        for call, reads in self._reads.items():
            for read in reads:
                if not _has(read, group):
                    continue
                place = self.places.get(call)
                if place is None or read not in place.reads:
                    raise _not_understood(group, f"torch function call {call} of the forward pass")
                found += place.regressions(read, group, power, centred=centred)
        if not found:
            raise _not_understood(group, ", ".join(part.parameter for part in group.slices))
        return found

    def combine(self) -> None:
        """Add up what several processes have seen."""
        for tensor in (self._examples, self._power):
            add_up(tensor)
        for call in sorted(self.places):
            self.places[call].combine()


def _signs_of(values: Tensor) -> Tensor:
    """Signs, as good as random, that follow from the tenth binary digit of each value.

    So they are the same however the examples are dealt out to batches and processes.
    """
    digits = (torch.frexp(values.float()).mantissa.abs() * 1024).long()
    return (1 - 2 * (digits % 2)).to(values)


def _along(read: UnitRead, reader: Reader) -> bool:
    """Whether a reader sums over the dimension in which the units lie."""
    return read.dim == reader.source.dim() - 1 - len(reader.windows) and (
        len(read.units) == reader.source.shape[read.dim]
    )


def _has(read: UnitRead, group: Group) -> bool:
    units = read.units[read.units != NO_UNIT]
    return bool(((units >= group.first) & (units < group.first + group.size)).any())


def _not_understood(group: Group, where: str) -> UnrankedError:
    return UnrankedError(
        f"reconstruction needs weights that read the units of group {group.name!r} in a linear layer, "
        "a convolution or a product with a matrix, and there are none",
        where=where,
        fix=f"plan with skip=[{group.name!r}], or use a criterion such as 'l2' or 'taylor'",
    )
