"""The dry run: a cut is tried on tensors without data, and every operator must give the length predicted.

The trace knows the lengths that every operator's results will have after any cut. So the dry run needs no
bisection: it applies a cut to an empty copy of the model, runs it, compares each result with the
prediction, and at a difference knows the operator, the line of source and the groups involved. It then
goes on with the predicted shape, so that one run finds every fault.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from secateurs.graph.attributes import restate_sizes
from secateurs.graph.building import GroupBuilder
from secateurs.graph.groups import Graph, Group, Indices, group_names, removed_places
from secateurs.graph.labels import Dim
from secateurs.graph.memos import memos_opened
from secateurs.graph.operators import canonical
from secateurs.graph.origins import set_integer
from secateurs.graph.outputs import Returned
from secateurs.graph.packed import results_of
from secateurs.graph.records import Pass, Record
from secateurs.graph.rewriting import write_sizes
from secateurs.graph.running import (
    Inputs,
    MetaMode,
    TracedCalls,
    call_model,
    empty_copy,
    numbers_of,
    plain_kernels,
    source_line,
    without_data,
)
from secateurs.graph.settling import CountSystem
from secateurs.graph.values import Answers, Everything, compute

_MOST_ROUNDS = 40
_PATIENCE = 6  # groups blamed at one line before all of their form are


@dataclass(frozen=True, slots=True)
class Fault:
    """A place where the model cannot follow a cut.

    Args:
        groups: Names of the groups to blame; none where the builder was told what must stay instead.
        reason: What happened, in words.
        where: The line of the model's source.
    """

    groups: tuple[str, ...]
    reason: str
    where: str


def prove(model: nn.Module, inputs: Inputs, builder: GroupBuilder, passes: Sequence[Pass]) -> Graph:
    """The graph with every group locked that the model's own forward cannot follow.

    Args:
        model: The model; it is read only.
        inputs: The example inputs of the trace.
        builder: Makes the graph of what is not locked.
        passes: The operator calls of each pass of the trace.

    Returns:
        A graph whose groups passed a dry run in which every one of them lost about half of its units.
    """
    blamed: dict[str, list[Any]] = {}
    for _ in range(_MOST_ROUNDS):
        graph = builder.build()
        if not graph.groups:
            return graph
        masks = [graph.mask(trial) for trial in trials(graph)]
        faults = [fault for gone in masks for fault in dry_run(model, inputs, graph, builder, passes, gone)]
        if not faults and not builder.is_stale:
            faults = _faults_of_attributes(model, inputs, graph, builder, passes)
        if not faults and not builder.is_stale:
            return graph
        for fault in faults:
            forms = blamed.setdefault(fault.where, [])
            forms += [_form(graph.by_name[name]) for name in fault.groups]
            is_common = len(forms) > _PATIENCE  # the same line of many blocks: theirs would all follow
            for group in graph.groups:
                if group.name in fault.groups or (is_common and _form(group) in forms):
                    builder.lock(group, fault.reason, fault.where)
    for group in graph.groups:
        builder.lock(group, "no cut of this model passed a dry run", "")
    return builder.build()


def _faults_of_attributes(
    model: nn.Module, inputs: Inputs, graph: Graph, builder: GroupBuilder, passes: Sequence[Pass]
) -> list[Fault]:
    """Try a cut that no constraint holds together for which attributes can stand in.

    Faults that attributes may have brought are answered by doing without them, which makes the graph stale.
    """
    if not graph.counts.is_loose:
        return []
    tied = [each for each in graph.constraints if each.instead]
    refused: set[Any] = set()
    left = []
    for trial in trials(graph, graph.counts.bound()):
        for fault in dry_run(model, inputs, graph, builder, passes, graph.mask(trial)):
            places = {graph.groups.index(graph.by_name[name]) for name in fault.groups}
            spots = {tie.spot for each in tied if each.groups & places for tie in each.instead}
            left += [] if spots else [fault]
            refused |= spots
    builder.refuse(refused)
    return left


def _form(group: Group) -> Any:
    """What a group is made of, without the numbers of blocks: equal for the same place of every block."""
    return group.kind, frozenset((re.sub(r"\d+", "", p.parameter), p.dim, p.role) for p in group.slices)


def trials(graph: Graph, counts: CountSystem | None = None) -> list[dict[str, Indices]]:
    """Cuts of about half of every group, by counts that differ, so that no fault hides behind equal lengths.

    One cut for all groups; two where the counts of groups that cross are tied to others.

    Args:
        graph: The graph.
        counts: The constraints to respect; those of the graph if not given.
    """
    kept = []
    for place, group in enumerate(graph.groups):
        count = group.size // 2 + (place % 3 - 1 if group.size > 5 else 0)
        kept.append(group.size - max(1, min(count, group.size - 1)))
    found = []
    for free in graph.freedoms(counts or graph.counts):
        system = counts or graph.counts.loosened(free)
        settled = system.settle(kept, free, [1] * len(kept), lower=True)
        found.append(
            {
                group.name: np.arange(group.size - count)
                for group, count in zip(graph.groups, settled, strict=True)
                if count < group.size
            }
        )
    return found


def dry_run(
    model: nn.Module,
    inputs: Inputs,
    graph: Graph,
    builder: GroupBuilder,
    passes: Sequence[Pass],
    gone: Any,
) -> list[Fault]:
    """Run the model without data as if the units in the mask were gone; where it cannot follow.

    All passes of the trace are run on one copy, as they were in the trace: the first may leave something
    behind that the next one uses, such as a table that is made at the first call.
    """
    trial = empty_copy(model, cut_shapes(graph, gone))
    ties = [*graph.ties, *graph.stand_ins(gone)]
    write_sizes(trial, (tie.written for tie in ties if tie.written is not None))
    for tie in ties:
        set_integer(trial, tie.module, tie.attribute, tie.position, tie.after(gone))
    restate_sizes(trial)
    faults: list[Fault] = []
    outputs: Any = None
    for each in passes:
        state = Returned.by(trial, outputs).state if each.takes_state else None
        if trial.training != each.training:
            trial.train(each.training)
        answers = Everything() if each.takes_all else Answers(builder.values)
        mode = _Comparison(graph, builder, each.records, gone, answers)
        empty_inputs = without_data(inputs)
        try:
            calls = TracedCalls(builder.device) if builder.acts_on_calls else nullcontext()
            with plain_kernels(), memos_opened(trial), calls, mode:
                outputs = call_model(trial, empty_inputs, state)
        except Exception as error:
            if not mode.faults:  # after a fault the model may go astray; another round will tell
                mode.fault_outside(error)
        faults += mode.faults
    return faults


def cut_shapes(graph: Graph, gone: Any) -> dict[str, tuple[int, ...]]:
    """The shapes of the parameters and buffers that a cut changes."""
    shapes: dict[str, list[int]] = {}
    for name, dim, units in graph.axes:
        shape = shapes.setdefault(name, list(graph.parameters[name]))
        shape[dim] -= int(np.count_nonzero(removed_places(units, gone, shape[dim])))
    return {name: tuple(shape) for name, shape in shapes.items()}


class _Comparison(MetaMode):
    """Compares every operator's result with the prediction, and goes on with the prediction."""

    def __init__(
        self,
        graph: Graph,
        builder: GroupBuilder,
        records: Sequence[Record],
        gone: Any,
        answers: Answers,
    ) -> None:
        super().__init__(answers)
        self._graph, self._builder, self._records, self._gone = graph, builder, records, gone
        self._lengths: dict[tuple[int, ...], int] = {}
        self._next = 0
        self.faults: list[Fault] = []

    def run(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Carry out one operator and check the shapes of its results."""
        name = canonical(func)
        if name is None:
            return compute(func, args, kwargs, self.answers)
        if self._next >= len(self._records) or self._records[self._next].operator is not name:
            raise RuntimeError(f"the model takes another path after the cut, at {func}")
        record = self._records[self._next]
        self._next += 1
        wanted = [[self._length(dim) for dim in result] for result in record.outputs]
        if record.numbers is not None and (numbers := numbers_of(func, args, kwargs)) != record.numbers:
            self._blame_number(record, record.numbers, numbers)
        try:
            out = compute(func, args, kwargs, self.answers)
        except Exception as error:
            self._blame(record, wanted, args, None, error)
            return self._stand_in(record, wanted)
        got = [list(result.shape) for result in results_of(out)]
        if got == wanted:
            return out
        self._blame(record, wanted, args, got, None)
        return self._stand_in(record, wanted)

    def fault_outside(self, error: Exception) -> None:
        """An exception in the model's own code, between two operators."""
        for record in reversed(self._records[: self._next + 1]):
            names = self._changed([*record.inputs, *(dim for dims in record.outputs for dim in dims)])
            if names:
                self.faults.append(
                    Fault(tuple(names), f"forward raised {_brief(error)} after the cut", _raised_at(error))
                )
                return
        names = [group.name for group in self._graph.groups]
        self.faults.append(
            Fault(tuple(names), f"forward raised {_brief(error)} after the cut", _raised_at(error))
        )

    def _length(self, dim: Dim) -> int:
        if not dim.factors:
            return dim.size
        key = tuple(id(factor) for factor in dim.factors)
        if key not in self._lengths:
            places = removed_places(self._builder.unit_factors(dim), self._gone, dim.size)
            self._lengths[key] = dim.size - int(np.count_nonzero(places))
        return self._lengths[key]

    def _stand_in(self, record: Record, shapes: Sequence[Sequence[int]]) -> Any:
        made = [
            torch.empty(tuple(shape), dtype=dtype, device="meta")
            for shape, dtype in zip(shapes, record.dtypes, strict=True)
        ]
        return made[0] if record.is_single else made

    def _changed(self, dims: Sequence[Dim]) -> list[str]:
        factors = [
            factor
            for dim in dims
            if self._length(dim) != dim.size
            for factor in self._builder.unit_factors(dim)
        ]
        return group_names(self._graph.groups, factors)

    def _blame(
        self,
        record: Record,
        wanted: Sequence[Sequence[int]],
        args: tuple[Any, ...],
        got: Sequence[Sequence[int]] | None,
        error: Exception | None,
    ) -> None:
        """Blame the dimensions whose old length is asked for still; else all that take part."""
        stated = got if got is not None else [_stated(args)] * len(wanted)
        literal = [
            dim
            for dims, new, asked in zip(record.outputs, wanted, stated, strict=False)
            if len(dims) == len(asked)
            for dim, length, ask in zip(dims, new, asked, strict=True)
            if length != dim.size and ask == dim.size
        ]
        if literal:
            reason = f"{record.operator} is given the fixed length {literal[0].size}"
            names = self._changed(literal)
        else:
            happened = f"raised {_brief(error)}" if error else f"gave shape {got} instead of {list(wanted)}"
            reason = f"{record.operator} {happened} after the cut"
            names = self._changed([*record.inputs, *(dim for dims in record.outputs for dim in dims)])
        if names:
            self.faults.append(Fault(tuple(names), reason, source_line()))
        else:
            raise RuntimeError(reason) from error

    def _blame_number(self, record: Record, expected: Sequence[float], numbers: Sequence[float]) -> None:
        """A number that is computed from a length changed with it, and so would what the model computes."""
        pairs = zip(expected, numbers, strict=False)
        before, after = next(pair for pair in pairs if pair[0] != pair[1])
        where = source_line()
        if self._builder.pin(before, where):
            self.faults.append(Fault((), f"{record.operator} is given another number", where))
            return
        names = self._changed([*record.inputs, *(dim for dims in record.outputs for dim in dims)])
        if not names:
            raise RuntimeError(f"{record.operator} is given {after:.6g} instead of {before:.6g}")
        reason = f"{record.operator} is given the number {before:.6g}, which is computed from its length"
        self.faults.append(Fault(tuple(names), reason, where))


def _stated(args: tuple[Any, ...]) -> list[int]:
    """The lengths that a call asks for, where one of its arguments is a shape."""
    for value in args:
        if isinstance(value, (list, tuple)) and value and all(isinstance(item, int) for item in value):
            return [int(item) for item in value]
    return []


def _brief(error: BaseException | None) -> str:
    text = str(error).split("\n", 1)[0]
    return f"{type(error).__name__}: {text[:120]}"


def _raised_at(error: BaseException) -> str:
    trace = error.__traceback__
    line = ""
    while trace is not None:
        module = trace.tb_frame.f_globals.get("__name__", "")
        if not module.startswith(("torch", "secateurs.")) or module.startswith("torchvision"):
            line = f"{module.replace('.', '/')}.py:{trace.tb_lineno} in {trace.tb_frame.f_code.co_name}"
        trace = trace.tb_next
    return line


def shapes_of(tensors: dict[str, Tensor]) -> dict[str, tuple[int, ...]]:
    """The shapes of named tensors."""
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}
