"""The work of the oracle: on each batch, which groups are replayed and which need brute force."""

from __future__ import annotations

import time
import warnings
from collections.abc import Iterable, Mapping, Sequence, Sized
from typing import Any

import torch
from torch import nn

from secateurs.criteria.batches import LossFunction, batch_on, loss_of
from secateurs.errors import ScoreError
from secateurs.graph.copying import tensors_of
from secateurs.graph.groups import Graph, Group
from secateurs.judging.ledger import Entry, Ledger
from secateurs.judging.passes import Passes, cloned, finite, segments
from secateurs.judging.replay import Record, SharedMemoryError
from secateurs.judging.tape import OtherPathError
from secateurs.progress import Event, Observer

REPLAYED, ONE_BY_ONE, BRUTE_FORCE = "replayed", "one by one", "brute force"
_ROUNDING = 1e-4  # of the loss, or of one where that is larger: what replay and brute force may differ by
_STACK = 64  # units in one pass at most; more gain nothing


class Measuring:
    """Measures chosen units on batch after batch.

    Args:
        model: The model.
        graph: Its graph.
        loss_fn: The mean loss of a batch.
        chosen: The units of each group.
        memory: Bytes that kept activations may take, and again those of a pass with several units.
        ledger: Where results go.
        observer: Told of each group of each batch.
    """

    def __init__(
        self,
        model: nn.Module,
        graph: Graph,
        loss_fn: LossFunction,
        chosen: Mapping[str, Sequence[int]],
        *,
        memory: int,
        ledger: Ledger,
        observer: Observer,
    ) -> None:
        self._passes = Passes(model, graph)
        self._graph, self._loss_fn, self._memory = graph, loss_fn, memory
        self._ledger, self._observer = ledger, observer
        self._device = next((t.device for t in tensors_of(model).values()), torch.device("cpu"))
        groups = [graph.by_name[name] for name in chosen]
        reasons = {group.name: self._passes.silencing.cannot(group) for group in groups}
        self.left_out = {name: reason for name, reason in reasons.items() if reason}
        self.chosen = {name: tuple(units) for name, units in chosen.items() if not reasons[name]}
        if not self.chosen:
            raise ScoreError(
                f"none of the {len(groups)} groups can be silenced",
                where=next((f"{name}: {reason}" for name, reason in self.left_out.items()), None),
                fix="call secateurs inspect to see what the model's units are",
            )
        self._ways: dict[str, str] = {}
        self._checked: set[str] = set()
        for name in self.chosen:
            if reason := self._passes.silencing.not_replayed(graph.by_name[name]):
                self._ways[name] = f"{BRUTE_FORCE}: {reason}"

    def run(self, data: Iterable[Any]) -> None:
        """Measure on every batch what the ledger has not."""
        batches, batch = len(data) if isinstance(data, Sized) else None, -1
        for batch, (inputs, targets, examples) in enumerate(batch_on(each, self._device) for each in data):
            left = {n: u for n, u in self.chosen.items() if not self._ledger.has(batch, n, u)}
            _OneBatch(self, inputs, targets, examples, (batch, batches)).run(left)
        if batch < 0:
            raise ScoreError("the data has no batches", fix="pass a loader that yields (inputs, targets)")

    # -- what one batch asks for ------------------------------------------------------------------

    def way(self, name: str) -> str:
        """How a group is measured: one of the three ways, with the reason."""
        return self._ways.get(name, REPLAYED)

    def brute(self, names: Iterable[str], reason: object) -> None:
        """Measure these groups by brute force from now on."""
        for name in names:
            self._ways[name] = f"{BRUTE_FORCE}: {reason}"


class _OneBatch:
    """The oracle on one batch."""

    def __init__(
        self, work: Measuring, inputs: Any, targets: Any, examples: int, place: tuple[int, int | None]
    ) -> None:
        self._work, self._passes = work, work._passes
        self._inputs, self._targets, self._examples = inputs, targets, examples
        self._place = place
        self._loss: float | None = None
        self._begun = time.perf_counter()

    def run(self, left: Mapping[str, tuple[int, ...]]) -> None:
        """Measure these units."""
        done = len(self._work.chosen) - len(left)
        for name in self._order(left):
            self._work._ledger.add(self._measured(self._work._graph.by_name[name], left[name]))
            done += 1
            facts = {"batch": self._place[0] + 1, "batches": self._place[1], "group": name}
            total = len(self._work.chosen)
            self._work._observer(Event("silenced", {**facts, "done": done, "groups": total}))

    def _order(self, left: Mapping[str, tuple[int, ...]]) -> Iterable[str]:
        """The groups one by one, each with the record that its replays need made before."""
        replayed = [name for name in left if not self._work.way(name).startswith(BRUTE_FORCE)]
        for names in self._segments(replayed):
            self._make_record(names)
            yield from names
        self._record: Record | None = None
        yield from (name for name in left if name not in replayed)

    def _segments(self, names: Sequence[str]) -> list[list[str]]:
        if not names:
            return []
        try:
            tape = self._passes.tape(self._inputs)
            if tape.foreign is not None:
                self._work.brute(names, "forward changes its inputs or buffers in place")
                return [list(names)]
            starts = {name: self._passes.start(tape, self._work._graph.by_name[name]) for name in names}
        except OtherPathError as reason:
            self._work.brute(names, reason)
            return [list(names)]
        return segments(tape, starts, self._work._memory)

    def _make_record(self, names: Sequence[str]) -> None:
        self._record = None
        groups = [self._work._graph.by_name[name] for name in names]
        if any(self._work.way(name).startswith(BRUTE_FORCE) for name in names):
            return
        tape = self._passes.tape(self._inputs)
        starts = sorted({self._passes.start(tape, group) for group in groups})
        try:
            self._record, outputs = self._passes.record(self._inputs, groups, starts)
        except (OtherPathError, SharedMemoryError) as reason:
            self._work.brute(names, reason)
        else:
            self._loss = self._loss_of(outputs)

    def _measured(self, group: Group, units: tuple[int, ...]) -> Entry:
        if self._loss is None:
            self._loss = self._loss_of(self._passes.run(cloned(self._inputs)))
        silent: set[int] = set()
        losses: dict[int, float] = {}
        if not self._work.way(group.name).startswith(BRUTE_FORCE):
            assert self._record is not None
            loud = self._record.loud[group.first : group.first + group.size].tolist()
            silent = {unit for unit in units if not loud[unit]}
            losses = self._replayed(group, [unit for unit in units if unit not in silent])
        if self._work.way(group.name).startswith(BRUTE_FORCE):
            silent, losses = set(), {unit: self._brute_force(group, unit) for unit in units}
        return Entry(
            batch=self._place[0],
            examples=self._examples,
            group=group.name,
            loss=self._loss,
            units=units,
            losses=tuple(self._loss if unit in silent else losses[unit] for unit in units),
            silent=len(silent),
            way=self._work.way(group.name),
            seconds=self._lap(),
        )

    def _lap(self) -> float:
        """Seconds since this was asked before."""
        begun, self._begun = self._begun, time.perf_counter()
        return self._begun - begun

    def _replayed(self, group: Group, units: list[int]) -> dict[int, float]:
        losses: dict[int, float] = {}
        try:
            for some in self._stacks(group, units):
                outputs = self._outputs(group, some)
                losses |= {u: self._loss_of(out, group, u) for u, out in zip(some, outputs, strict=True)}
        except OtherPathError as reason:
            self._work.brute([group.name], reason)
            return {}
        if losses and group.name not in self._work._checked:
            self._check(group, losses)
        return losses

    def _stacks(self, group: Group, units: list[int]) -> list[list[int]]:
        """Units that go through one pass together: as many as the memory allows."""
        tape = self._passes.tape(self._inputs)
        each = 4 * tape.largest(self._passes.start(tape, group))  # a few results are alive at once
        size = max(1, min(_STACK, self._work._memory // each))
        return [units[place : place + size] for place in range(0, len(units), size)]

    def _outputs(self, group: Group, units: list[int]) -> list[Any]:
        """The outputs without each of these units; all from one pass, where the model's code allows it."""
        assert self._record is not None
        if self._work.way(group.name) == REPLAYED and len(units) > 1:
            try:
                with warnings.catch_warnings():
                    warnings.filterwarnings("ignore", "There is a performance drop", UserWarning)
                    return self._passes.replay(self._inputs, self._record, group, units, stacked=True)
            except OtherPathError:
                raise
            except Exception as error:  # whatever a call of the user's model says to several units at once
                reason = str(error).partition("\n")[0] or type(error).__name__
                self._work._ways[group.name] = f"{ONE_BY_ONE}: {reason}"
        return self._passes.replay(self._inputs, self._record, group, units, stacked=False)

    def _check(self, group: Group, losses: Mapping[int, float]) -> None:
        """The second way, for the unit with the largest change."""
        assert self._loss is not None
        clean = self._loss
        self._work._checked.add(group.name)
        unit = max(losses, key=lambda each: abs(losses[each] - clean))
        truth = self._brute_force(group, unit)
        if abs(truth - losses[unit]) > _ROUNDING * max(1.0, abs(clean)):
            change = f"{losses[unit] - clean:.6g} and {truth - clean:.6g}"
            self._work.brute([group.name], f"replay and brute force found {change} for unit {unit}")

    def _brute_force(self, group: Group, unit: int) -> float:
        return self._loss_of(self._passes.brute_force(self._inputs, group, unit), group, unit)

    def _loss_of(self, outputs: Any, group: Group | None = None, unit: int = 0) -> float:
        with torch.no_grad():
            if group is None:
                return float(loss_of(self._work._loss_fn, outputs, self._targets, self._examples))
            return finite(float(self._work._loss_fn(outputs, self._targets)), group, unit)
