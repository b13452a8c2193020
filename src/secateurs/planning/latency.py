"""The time of a forward pass as a function of what is kept: what a budget in latency is forecast with.

Each call of a torch function takes ``a + b x values + c x MACs`` milliseconds, with the numbers that it reads
and writes and its multiply-accumulates after the cut. Kernels compute in blocks: where a convolution takes as
long for 49 channels as for 64, lengths count as rounded up to the block, and groups keep whole blocks.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from secateurs.graph.cost import Term, kept_lengths
from secateurs.graph.groups import Graph, Removed, group_names

Numbers: TypeAlias = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True, kw_only=True)
class CallTime:
    """How long one call of a torch function takes.

    Args:
        name: The function.
        fixed_ms: Milliseconds that no cut saves.
        value_ms: Milliseconds for each number that it reads or writes.
        mac_ms: Milliseconds for each multiply-accumulate.
        block: What the lengths of its products are rounded up to.
    """

    name: str
    fixed_ms: float
    value_ms: float = 0.0
    mac_ms: float = 0.0
    block: int = 1


@dataclass(frozen=True, kw_only=True, eq=False)
class LatencyModel:
    """Forecasts the time of a forward pass on one machine; `secateurs.latency_model` measures one.

    Args:
        graph: The graph of the model that was timed.
        calls: A time for each of its calls, in their order.
        rest_ms: Milliseconds between the calls.
        error: How far forecasts were from what was measured of networks that the times were not fitted to:
            the median, as a share of the time.
        device: Where it was measured.
        threads: Threads that torch used on the CPU.
    """

    graph: Graph
    calls: Sequence[CallTime]
    rest_ms: float
    error: float
    device: str
    threads: int

    def ms(self, removed: Removed | None = None) -> float:
        """The forecast for a cut.

        Args:
            removed: Indices of removed units by group name; none for the model as it is.

        Returns:
            Milliseconds of a forward pass.
        """
        kept = kept_lengths(self.graph.work.lengths, self.graph.mask(removed or {}))
        total = self.rest_ms
        for call, work in zip(self.calls, self.graph.work.calls, strict=True):
            total += call.fixed_ms
            if call.value_ms:
                total += call.value_ms * products(work.values, kept)
            if call.mac_ms:
                total += call.mac_ms * products(work.macs, kept, call.block)
        return total

    def terms(self) -> list[Term]:
        """All that a cut can save, as products of the lengths of the graph's work; blocks do not count."""
        found = []
        for call, work in zip(self.calls, self.graph.work.calls, strict=True):
            for ms, terms in ((call.value_ms, work.values), (call.mac_ms, work.macs)):
                found += [(ms * fixed, places) for fixed, places in terms if ms and places]
        return found

    @property
    def blocks(self) -> Mapping[str, int]:
        """What the number of units that a group keeps is a multiple of, by group name.

        The block of the calls that take most of the time that a group's units can save; 1 for groups that
        are no larger.
        """
        votes: dict[str, dict[int, float]] = {group.name: {} for group in self.graph.groups}
        owners = [group_names(self.graph.groups, factors) for _, factors in self.graph.work.lengths]
        whole = kept_lengths(self.graph.work.lengths, self.graph.mask({}))
        for call, work in zip(self.calls, self.graph.work.calls, strict=True):
            for term in work.macs if call.mac_ms else ():
                ms = call.mac_ms * products([term], whole)
                for name in {name for place in term[1] for name in owners[place]}:
                    votes[name][call.block] = votes[name].get(call.block, 0.0) + ms
        sizes = {group.name: group.size for group in self.graph.groups}
        chosen = {
            name: max(found, key=lambda block: found[block], default=1) for name, found in votes.items()
        }
        return {name: block if block < sizes[name] else 1 for name, block in chosen.items()}


def products(terms: Sequence[Term], lengths: Numbers, block: int = 1) -> float:
    """The sum of some products of lengths, each rounded up to a block."""
    rounded = lengths if block == 1 else np.ceil(lengths / block) * block
    return float(sum(fixed * rounded[list(places)].prod() for fixed, places in terms))
