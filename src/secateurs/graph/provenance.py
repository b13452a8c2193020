"""Which rows of which parameters a tensor scales with, for what has to be rescaled with a cut.

An attention kernel that is given no scale derives it from the length of a head, ``1 / sqrt(d)``. Where head
dimensions leave, ``d`` becomes ``d'``, and the queries must be multiplied by ``sqrt(d' / d)`` for the scores
to stay what they were. So the rows of parameters are looked for that make the queries, and nothing else.

Every row of every parameter has a number, and a tensor may carry a *shadow*: an array of its own shape that
holds for each element the row that it scales with. Multiply that row by a number, and the element is
multiplied by it. A bias must then be multiplied as well: rows that are added up are united. What reads a
tensor in any other way *fixes* its rows. Shadows are spread out, not copied, along dimensions where they do
not change, so that most cost nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor, nn

from secateurs.graph.labels import Dim, Labels
from secateurs.graph.operators import operator
from secateurs.graph.packed import call_tensors, results_of
from secateurs.graph.scaling import SHAPE_ALONE, WAYS
from secateurs.graph.shadows import (
    Rows,
    cast,
    distinct_rows,
    narrowed,
    shadow_of,
    size_of,
    spread,
)

Places: TypeAlias = "tuple[tuple[str, int, Rows], ...]"
_Side: TypeAlias = tuple[int, int]  # number of a call; 0 for its queries, 1 for its keys
_LARGEST = 1 << 22
_FIXED = 1  # the reason that `Labels` has from the start


class RowsNeededError(Exception):
    """A scale is derived from a length; the trace must start again and follow rows."""


@dataclass(frozen=True, slots=True, eq=False)
class ScaledCall:
    """A call that derives its scale from the length of its queries.

    Args:
        length: That dimension of the queries.
        sides: Shadows of the queries and of the keys; None where they have none.
        fixed: Shadows of everything else that the call is given.
        where: The line of the model's source.
    """

    length: Dim
    sides: tuple[Tensor | None, Tensor | None]
    fixed: tuple[Tensor, ...]
    where: str


class Provenance:
    """Follows rows of parameters through a trace, beside its labels.

    Args:
        is_weight: Whether a tensor was computed from parameters and buffers alone.
    """

    def __init__(self, is_weight: Callable[[Tensor], bool]) -> None:
        self.is_weight = is_weight
        self._rows = Labels()
        self._homes: list[tuple[str, int, int]] = []
        self._names: dict[int, str] = {}
        self._tables: set[int] = set()
        self._columns: dict[str, Rows] = {}
        self._read_by_rows: set[str] = set()
        self._calls: list[ScaledCall] = []

    def register(self, name: str, tensor: Tensor) -> None:
        """Number the rows of a parameter or buffer, which are the indices of its first dimension."""
        if tensor.dim() and tensor.is_floating_point():
            self._names[id(tensor)] = name
            rows = self._number(name, 0, len(tensor))
            if not isinstance(tensor, nn.Parameter):
                self._tables.update(rows.tolist())
            cast(tensor, spread(torch.from_numpy(rows), 0, tensor.shape))

    def follow(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
        """An operator has run: give its results their shadows, or fix the rows that it reads."""
        operands = [tensor for tensor in call_tensors(args, kwargs) if shadow_of(tensor) is not None]
        packet = getattr(func, "overloadpacket", None)  # operators that take functions have none
        if not operands or packet in SHAPE_ALONE:
            return
        way = None if operator(func).is_mutable else WAYS.get(packet)
        try:
            made = way(self, func, args, kwargs, out) if way else None
        except Exception:  # an unforeseen call costs reduction, not the trace
            made = None
        followed = list(made.read) if made else []
        for tensor in operands:
            place = next((n for n, each in enumerate(followed) if each is tensor), None)
            if place is not None:  # once: a product with itself does not scale with it
                del followed[place]
                self._note(tensor)
            else:
                self.fix(tensor, by_rows=made is None or made.by_columns is not tensor)
        for tensor, shadow in zip(results_of(out), made.shadows if made else (), strict=False):
            fits = shadow.shape == tensor.shape and size_of(shadow) <= _LARGEST
            if fits and (tensor.is_floating_point() or tensor.is_complex()):
                cast(tensor, shadow)
            else:
                self._fix_rows(shadow)

    def attend(self, query: Tensor, key: Tensor, others: Sequence[Any], length: Dim, where: str) -> None:
        """An attention kernel derives its scale from the length of the queries' last dimension.

        The shadows are looked at later: here every operator would be a part of the trace.
        """
        for tensor in (query, key, *call_tensors((*others,), {})):
            self._note(tensor)
        fixed = [shadow for other in call_tensors((*others,), {}) if (shadow := shadow_of(other)) is not None]
        self._calls.append(ScaledCall(length, (shadow_of(query), shadow_of(key)), tuple(fixed), where))

    def fix(self, tensor: Tensor, *, by_rows: bool = True) -> None:
        """What a tensor's values are used for does not allow to scale them."""
        shadow = shadow_of(tensor)
        if shadow is not None:
            self._fix_rows(shadow)
        if by_rows:
            self._note(tensor)

    def settle(self, labels: Labels) -> tuple[list[tuple[Dim, Places]], list[ScaledCall]]:
        """What to rescale with each length, and the calls for which there is nothing that could be.

        The rows of the queries are taken, where they are known and make nothing else; else those of the keys.

        Args:
            labels: The labels of the finished trace.
        """
        for name in self._read_by_rows & self._columns.keys():
            self._rows.lock_labels(self._columns[name], _FIXED)
        for call in self._calls:
            for shadow in call.fixed:
                self._fix_rows(shadow)
        lengths = [_form(labels, call.length) for call in self._calls]
        classes = {
            (number, at): self._classes(shadow)
            for number, call in enumerate(self._calls)
            for at, shadow in enumerate(call.sides)
            if shadow is not None
        }
        rivals = _rivals(classes)
        side: list[int | None] = [0] * len(self._calls)

        def is_free(number: int, at: int) -> bool:
            return (
                (number, at) in classes
                and not self._rows.why(classes[number, at]).any()
                and all(
                    which == at == side[other] and lengths[other] == lengths[number]
                    for other, which in rivals[number, at]
                )
            )

        while taken := [n for n, at in enumerate(side) if at is not None and not is_free(n, at)]:
            for number in taken:  # what one call gives up is fixed for the others
                side[number] = 1 if side[number] == 0 else None
        chosen: dict[Any, tuple[Dim, list[Rows]]] = {}
        for number, at in enumerate(side):
            if at is not None:
                entry = chosen.setdefault(lengths[number], (self._calls[number].length, []))
                entry[1].append(classes[number, at])
        roots = self._rows.find(np.arange(len(self._rows)))
        found = [(dim, self._places(np.concatenate(rows), roots)) for dim, rows in chosen.values()]
        return found, [call for call, at in zip(self._calls, side, strict=True) if at is None]

    def _places(self, classes: Rows, roots: Rows) -> Places:
        """Where the rows of some classes are, given the class of every row."""
        chosen = np.zeros(len(roots), np.bool_)
        chosen[classes] = True
        rows = np.flatnonzero(chosen[roots])
        starts = np.asarray([first for _, _, first in self._homes], np.int64)
        homes = np.searchsorted(starts, rows, "right") - 1
        found = []
        for home in np.unique(homes).tolist():
            name, dim, first = self._homes[home]
            found.append((name, dim, rows[homes == home] - first))
        return tuple(found)

    # -- rows -------------------------------------------------------------------------------------

    def _number(self, name: str, dim: int, size: int) -> Rows:
        rows = self._rows.new(size)
        self._homes.append((name, dim, int(rows[0]) if size else len(self._rows)))
        return rows

    def _classes(self, shadow: Tensor) -> Rows:
        """The rows of a shadow, one for each set of united ones."""
        return np.unique(self._rows.find(distinct_rows(shadow)))

    def _note(self, tensor: Tensor) -> None:
        """A parameter that is read by its rows cannot be scaled by its columns."""
        if id(tensor) in self._names:
            self._read_by_rows.add(self._names[id(tensor)])

    def _fix_rows(self, shadow: Tensor) -> None:
        self._rows.lock_labels(distinct_rows(shadow), _FIXED)

    def unite(self, one: Tensor, other: Tensor) -> Tensor:
        """Two shadows that are spread out to one shape, element by element."""
        a, b = narrowed(torch.broadcast_tensors(one, other))
        if a.numel() > _LARGEST:
            self._fix_rows(a)
            self._fix_rows(b)
        else:
            self._rows.join(a.reshape(-1).numpy(), b.reshape(-1).numpy())
        return one.expand(torch.broadcast_shapes(one.shape, other.shape))

    def is_table(self, tensor: Tensor) -> bool:
        """Whether a tensor scales with a buffer, such as a table of sines."""
        shadow = shadow_of(tensor)
        return shadow is not None and shadow.numel() > 0 and int(shadow[(0,) * shadow.dim()]) in self._tables

    def columns(self, tensor: Tensor) -> Tensor | None:
        """The columns of a parameter that is multiplied as it is, ``x @ weight``, as rows; else None."""
        name = self._names.get(id(tensor))
        if name is None or tensor.dim() != 2:
            return None
        if name not in self._columns:
            self._columns[name] = self._number(name, 1, tensor.shape[1])
        return torch.from_numpy(self._columns[name])


def _rivals(classes: Mapping[_Side, Rows]) -> dict[_Side, set[_Side]]:
    """For each side of each call the others that use some of its rows."""
    users: dict[int, list[_Side]] = {}
    for side, rows in classes.items():
        for row in rows.tolist():
            users.setdefault(row, []).append(side)
    found: dict[_Side, set[_Side]] = {side: set() for side in classes}
    for sides in users.values():
        for side in sides if len(sides) > 1 else ():
            found[side].update(other for other in sides if other != side)
    return found


def _form(labels: Labels, dim: Dim) -> Any:
    """Something that compares equal for dimensions that lose the same indices."""
    return dim.size, tuple(factor.tobytes() for factor in labels.resolve(dim).factors)
