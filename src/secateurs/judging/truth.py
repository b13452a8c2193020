"""The oracle: the true change of the loss when one unit alone is silenced, for every unit."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias

import numpy as np
import torch
from torch import Tensor, nn

from secateurs.criteria.batches import LossFunction
from secateurs.criteria.protocol import Scores
from secateurs.errors import ScoreError, UnknownNameError
from secateurs.graph.groups import Graph
from secateurs.judging.ledger import Entry, Ledger
from secateurs.planning.limits import no_match
from secateurs.progress import Observer, derive_seed, ignore

OracleKind: TypeAlias = Literal["oracle-abs", "oracle-loss"]
ORACLES: tuple[OracleKind, ...] = ("oracle-abs", "oracle-loss")
_LEAST = 4  # units of a group in a sample, as far as the sample's size allows


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Oracle:
    """What silencing each unit alone does to the loss.

    Args:
        changes: By group, the loss without each unit minus the loss: ``(units,)`` in float64, the mean over
            all examples; not a number where a unit was not measured.
        loss: The loss of the model as it is.
        examples: Examples in the data.
        ways: By group, how it was measured: ``replayed``, ``one by one`` (replayed, each unit in a pass of
            its own) or ``brute force`` (the whole model for each unit), with the reason for the latter two.
        left_out: Groups that cannot be silenced, with the reason.
        silent: Pairs of unit and batch for which nothing was run, since the unit was zero in the whole batch.
        pairs: Pairs of unit and batch in all.
        seconds: What the passes took, those of a ledger's earlier entries too.
    """

    changes: Mapping[str, Tensor]
    loss: float
    examples: int
    ways: Mapping[str, str]
    left_out: Mapping[str, str] = field(default_factory=dict)
    silent: int = 0
    pairs: int = 0
    seconds: float = 0.0

    @property
    def is_complete(self) -> bool:
        """Whether every unit of these groups was measured."""
        return not any(bool(values.isnan().any()) for values in self.changes.values())

    def values(self, kind: OracleKind = "oracle-abs") -> dict[str, Tensor]:
        """By group ``|C(W') - C(W)|`` or, for ``"oracle-loss"``, ``C(W') - C(W)``; larger means keep.

        Raises:
            UnknownNameError: There is no such oracle.
        """
        if kind not in ORACLES:
            raise UnknownNameError("oracle", kind, ORACLES)
        return {name: v.abs() if kind == "oracle-abs" else v for name, v in self.changes.items()}

    def scores(self, kind: OracleKind = "oracle-abs") -> Scores:
        """The same as scores that `plan` takes.

        Raises:
            ScoreError: Some units were not measured.
        """
        if not self.is_complete:
            raise ScoreError(
                f"{kind} was measured for a sample of the units, and a ranking needs all of them",
                fix="call secateurs.oracle without units=",
            )
        return Scores(kind, self.values(kind))

    def __repr__(self) -> str:
        units = sum(int((~values.isnan()).sum()) for values in self.changes.values())
        of = f"{len(self.changes)} groups, {units} units, {self.examples} examples"
        return f"Oracle({of}, loss {self.loss:.4g})"


def oracle(
    model: nn.Module,
    graph: Graph,
    *,
    data: Iterable[Any],
    loss_fn: LossFunction,
    units: Mapping[str, Sequence[int]] | None = None,
    memory_mb: float = 512,
    ledger: Ledger | None = None,
    observer: Observer = ignore,
) -> Oracle:
    """The change of the loss when a unit alone is silenced, measured and not estimated, for every unit.

    Silenced means what it means to `verify`: whatever reads the unit reads zero. For a batch the model runs
    once as it is; what was computed before the first reader of a unit is kept, and only what follows is run
    again, for many units at once. Nothing is run for units that are zero in the whole batch. For each group
    the unit with the largest change on the first batch is measured by brute force too; where the two differ
    by more than rounding, or the model cannot be replayed, the whole group is measured by brute force, and
    `Oracle.ways` says so.

    Runs in evaluation mode and leaves no trace in the model. The same random numbers are drawn in every pass.

    Args:
        model: The model that the graph was traced from.
        graph: The graph.
        data: Batches ``(inputs, targets)``, the same in every pass; the first dimension counts examples.
        loss_fn: ``loss_fn(outputs, targets)``, the mean over the batch.
        units: By group the units to measure; all if None. See `sample_units`.
        memory_mb: What activations that are kept may take, and again what a pass with several units may make;
            one layer on one batch may need more. The model itself is not counted.
        ledger: Where results are kept as they are found; what it holds already is not measured again.
        observer: Called with an event ``silenced`` after each group of each batch.

    Returns:
        The changes, and how they were found.

    Raises:
        ScoreError: There is no data, a loss is not one finite number, or no unit can be silenced.
        UnknownNameError: `units` names a group that the graph has not.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> import secateurs
        >>> net = nn.Sequential(nn.Linear(2, 3, bias=False), nn.ReLU(), nn.Linear(3, 1, bias=False))
        >>> _ = net[0].weight.data.copy_(torch.tensor([[1., 0.], [0., 1.], [-1., 0.]]))
        >>> _ = net[2].weight.data.copy_(torch.tensor([[2., 1., 5.]]))
        >>> graph = secateurs.trace(net, torch.ones(1, 2))
        >>> batch = torch.ones(1, 2), torch.tensor([[3.]])
        >>> found = secateurs.oracle(net, graph, data=[batch], loss_fn=nn.functional.mse_loss)
        >>> found.loss, found.changes["0"].tolist()
        (0.0, [4.0, 1.0, 0.0])

    References:
        Molchanov et al., Pruning Convolutional Neural Networks for Resource Efficient Inference,
        https://arxiv.org/abs/1611.06440: the oracle of each single removed map, oracle-loss and oracle-abs.
    """
    from secateurs.judging.measuring import Measuring

    chosen = _chosen(graph, units)
    book = Ledger() if ledger is None else ledger
    measuring = Measuring(
        model, graph, loss_fn, chosen, memory=int(memory_mb * 1e6), ledger=book, observer=observer
    )
    measuring.run(data)
    entries = book.of(measuring.chosen)
    return _summed(graph, entries, measuring.left_out)


def sample_units(
    graph: Graph, count: int | None = None, *, layers: Sequence[str] = ("*",), seed: int = 0
) -> dict[str, list[int]]:
    """A random choice of units: four of each layer as far as that goes, the rest by the sizes of the layers.

    Args:
        graph: The graph.
        count: Units in all; every unit of the layers if None.
        layers: Glob patterns of the names of groups.
        seed: What the choice follows from.

    Returns:
        By group the ascending indices of its units.

    Raises:
        PatternError: A pattern of `layers` matches no group.
        ScoreError: `count` is less than one.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> import secateurs
        >>> net = nn.Sequential(nn.Linear(2, 90), nn.Linear(90, 30), nn.Linear(30, 1))
        >>> graph = secateurs.trace(net, torch.zeros(1, 2))
        >>> {name: len(units) for name, units in sample_units(graph, 24).items()}
        {'0': 16, '1': 8}
    """
    groups = [group for group in graph.groups if any(fnmatch.fnmatch(group.name, glob) for glob in layers)]
    names = [group.name for group in graph.groups]
    for glob in layers:
        if not fnmatch.filter(names, glob):
            raise no_match("layers", glob, graph)
    if count is not None and count < 1:
        raise ScoreError(f"`units >= 1` must hold, got units={count}")
    sizes = np.array([group.size for group in groups])
    shares = sizes if count is None else _shares(sizes, min(count, int(sizes.sum())))
    found = {}
    for group, share in zip(groups, shares, strict=True):
        chance = torch.Generator().manual_seed(derive_seed(seed, "sample", group.name))
        found[group.name] = sorted(torch.randperm(group.size, generator=chance)[: int(share)].tolist())
    return {name: chosen for name, chosen in found.items() if chosen}


def _shares(sizes: Any, count: int) -> Any:
    """How many units each group gives."""
    least = np.minimum(sizes, min(_LEAST, count // len(sizes)))
    left = sizes - least
    exact = left * ((count - least.sum()) / max(left.sum(), 1))
    shares = np.floor(exact).astype(int)
    short = count - int(least.sum() + shares.sum())
    shares[np.argsort(shares - exact, kind="stable")[:short]] += 1
    return least + shares


def _chosen(graph: Graph, units: Mapping[str, Sequence[int]] | None) -> dict[str, list[int]]:
    if units is None:
        return {group.name: list(range(group.size)) for group in graph.groups}
    for name, indices in units.items():
        if name not in graph.by_name:
            raise UnknownNameError("group", name, graph.by_name)
        size = graph.by_name[name].size
        if any(not 0 <= unit < size for unit in indices):
            raise ScoreError(
                f"group {name!r} has units 0 to {size - 1}, got {min(indices)} to {max(indices)}"
            )
    return {name: sorted(set(indices)) for name, indices in units.items() if len(indices)}


def _summed(graph: Graph, entries: Sequence[Entry], left_out: Mapping[str, str]) -> Oracle:
    """The means over all examples, from what was found on each batch."""
    sums = {each.group: torch.zeros(graph.by_name[each.group].size).double() for each in entries}
    counted = {each.group: torch.zeros(graph.by_name[each.group].size).double() for each in entries}
    ways: dict[str, str] = {}
    batches = {each.batch: (each.examples, each.loss) for each in entries}
    for each in entries:
        places = torch.tensor(each.units)
        sums[each.group][places] += (
            torch.tensor(each.losses, dtype=torch.float64) - each.loss
        ) * each.examples
        counted[each.group][places] += each.examples
        if ways.setdefault(each.group, each.way) == "replayed":
            ways[each.group] = each.way
    examples = sum(count for count, _ in batches.values())
    return Oracle(
        changes={
            group.name: sums[group.name] / counted[group.name]  # nothing over nothing is not a number
            for group in graph.groups
            if group.name in sums
        },
        loss=sum(count * loss for count, loss in batches.values()) / examples,
        examples=examples,
        ways={group.name: ways[group.name] for group in graph.groups if group.name in ways},
        left_out=left_out,
        silent=sum(each.silent for each in entries),
        pairs=sum(len(each.units) for each in entries),
        seconds=sum(each.seconds for each in entries),
    )
