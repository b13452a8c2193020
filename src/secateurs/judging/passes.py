"""The forward passes of the oracle over a batch: clean, replayed with units silenced, by brute force."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map_only, tree_unflatten

from secateurs.errors import ScoreError
from secateurs.graph.copying import copy_model, drop_foreign_hooks, tensors_of
from secateurs.graph.exchange import write_out
from secateurs.graph.groups import Graph, Group
from secateurs.graph.packed import tensors_in
from secateurs.graph.running import call_model, plain_kernels
from secateurs.judging.replay import Reads, Record, Recording, Replay, kept_places
from secateurs.judging.silencing import Silencing
from secateurs.judging.tape import CallMode, OtherPathError, Tape, Taping
from secateurs.surgery.wide import same_numbers


class NotStackedError(Exception):
    """The outputs of several units at once cannot be told apart."""


class Passes:
    """Runs a private copy of a model, in evaluation mode and without gradients.

    Args:
        model: The model; it is read only, and its tensors are shared.
        graph: Its graph.
    """

    def __init__(self, model: nn.Module, graph: Graph) -> None:
        self._twin = copy_model(model, share=True).eval()
        drop_foreign_hooks(self._twin)
        write_out(self._twin)
        self._graph = graph
        self._weights = tensors_of(model)
        self.silencing = Silencing(graph)
        self._tape: Tape | None = None

    def run(self, inputs: Any, *, mode: CallMode | None = None, model: nn.Module | None = None) -> Any:
        """The outputs of the model, or of another, on a batch; a mode sees what the model calls, no more.

        Every pass has a copy of the model to itself: what `forward` keeps for its next call would make passes
        differ.
        """
        own = model or copy_model(self._twin, share=True)
        with plain_kernels(), same_numbers(), mode or nullcontext():
            return call_model(own, inputs)

    def tape(self, inputs: Any) -> Tape:
        """What the model calls; made on the first batch."""
        if self._tape is None:
            copied = cloned(inputs)  # the model may write into them
            given = [leaf for leaf in tree_leaves(copied) if isinstance(leaf, Tensor)]
            mode = Taping([*given, *self._weights.values()])
            self._tape = mode.finish(self.run(copied, mode=mode))
        return self._tape

    def reads(self, tape: Tape, groups: Sequence[Group]) -> Reads:
        """For each call that reads units of these groups: argument, dimension, and the unit at each index."""
        found: dict[int, list[tuple[int, int, Any]]] = {}
        for read in {id(read): read for group in groups for read in self.silencing.reads(group)}.values():
            if read.call >= len(tape.places):
                raise OtherPathError("the model makes fewer calls than in the trace")
            found.setdefault(tape.places[read.call], []).append((read.argument, read.dim, read.units))
        return found

    def record(self, inputs: Any, groups: Sequence[Group], starts: Sequence[int]) -> tuple[Record, Any]:
        """One clean pass that keeps what replays of these groups need, and its outputs."""
        tape = self.tape(inputs)
        record = Record(loud=torch.zeros(self._graph.units + 1, dtype=torch.bool, device=self._device))
        mode = Recording(tape, starts, self.reads(tape, groups), record)
        return record, self.run(inputs, mode=mode)

    def start(self, tape: Tape, group: Group) -> int:
        """The first call that reads the group's units."""
        return min(self.reads(tape, [group]))

    def replay(
        self, inputs: Any, record: Record, group: Group, units: Sequence[int], *, stacked: bool
    ) -> list[Any]:
        """The outputs with each of these units silenced, all from one pass if `stacked`."""
        tape = self.tape(inputs)
        chosen = torch.tensor(units, device=self._device) + group.first
        reads = self.reads(tape, [group])
        start = min(reads)
        keeps = {
            place: [(argument, dim, kept_places(where, chosen)) for argument, dim, where in places]
            for place, places in reads.items()
        }
        masks = [keep for places in keeps.values() for _, _, keep in places]

        def changed(*rows: Tensor) -> Any:
            remaining = iter(rows)
            silent = {
                place: [(argument, dim, next(remaining)) for argument, dim, _ in places]
                for place, places in keeps.items()
            }
            return self.run(inputs, mode=Replay(tape, record, start, silent))

        if stacked:
            return _stacked(changed, masks)
        return [changed(*(mask[row] for mask in masks)) for row in range(len(units))]

    def brute_force(self, inputs: Any, group: Group, unit: int) -> Any:
        """The outputs of a copy of the model in which the weights that read the unit are zero."""
        changed = self.silencing.zeroed(self._weights, group, unit)
        silent = copy_model(self._twin, changed, share=True)
        return self.run(cloned(inputs), model=silent)

    @property
    def _device(self) -> torch.device:
        return next((tensor.device for tensor in self._weights.values()), torch.device("cpu"))


def _stacked(changed: Callable[..., Any], masks: Sequence[Tensor]) -> list[Any]:
    """The outputs for each row of the masks, computed together."""
    layout: list[tuple[list[Any], Any]] = []

    def tensors(*rows: Tensor) -> list[Tensor]:
        leaves, structure = tree_flatten(changed(*rows))
        if any(tensors_in(leaf) for leaf in leaves if not isinstance(leaf, Tensor)):
            raise NotStackedError("its outputs are packed in an object of a class of their own")
        layout.append((leaves, structure))
        return [leaf for leaf in leaves if isinstance(leaf, Tensor)]

    together = torch.vmap(tensors, randomness="same")(*masks)
    leaves, structure = layout[0]
    outputs = []
    for row in range(len(masks[0])):
        mine = iter([tensor[row] for tensor in together])
        filled = [next(mine) if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        outputs.append(tree_unflatten(filled, structure))
    return outputs


def cloned(inputs: Any) -> Any:
    """Inputs that a model may change in place."""
    return tree_map_only(Tensor, Tensor.clone, inputs)


def finite(loss: float, group: Group, unit: int) -> float:
    """The loss without a unit.

    Raises:
        ScoreError: It is not finite.
    """
    if loss - loss != 0:
        raise ScoreError(
            f"with unit {unit} of group {group.name!r} silenced the loss is {loss}",
            fix="check the data, or leave the layer out",
        )
    return loss


def segments(tape: Tape, starts: Mapping[str, int], memory: int) -> list[list[str]]:
    """Groups in the order of their first calls, in runs whose snapshots fit in memory together.

    Args:
        tape: The tape.
        starts: For each group the call at which its replays start.
        memory: Bytes; one group alone may need more.
    """
    runs: list[list[str]] = []
    held: set[int] = set()
    for name in sorted(starts, key=lambda name: starts[name]):
        needed = held | set(tape.frontier(starts[name]))
        if not runs or sum(tape.bytes[k] for k in needed) > memory:
            runs.append([])
            needed = set(tape.frontier(starts[name]))
        held = needed
        runs[-1].append(name)
    return runs
