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
import numpy.typing as npt
import torch
from torch import Tensor, nn

from secateurs.graph.labels import Dim, Labels
from secateurs.graph.running import call_tensors, results_of

Rows: TypeAlias = npt.NDArray[np.int64]
Places: TypeAlias = "tuple[tuple[str, int, Rows], ...]"
_Side: TypeAlias = tuple[int, int]  # number of a call; 0 for its queries, 1 for its keys
_SHADOW = "_secateurs_rows"
_LARGEST = 1 << 22
_FIXED = 1  # the reason that `Labels` has from the start

aten = torch.ops.aten


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
            _cast(tensor, _spread(torch.from_numpy(rows), 0, tensor.shape))

    def follow(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
        """An operator has run: give its results their shadows, or fix the rows that it reads."""
        operands = [tensor for tensor in call_tensors(args, kwargs) if _shadow(tensor) is not None]
        if not operands or func.overloadpacket in _SHAPE_ALONE:
            return
        way = None if func._schema.is_mutable else _WAYS.get(func.overloadpacket)
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
            fits = shadow.shape == tensor.shape and _size(shadow) <= _LARGEST
            if fits and (tensor.is_floating_point() or tensor.is_complex()):
                _cast(tensor, shadow)
            else:
                self._fix_rows(shadow)

    def attend(self, query: Tensor, key: Tensor, others: Sequence[Any], length: Dim, where: str) -> None:
        """An attention kernel derives its scale from the length of the queries' last dimension.

        The shadows are looked at later: here every operator would be a part of the trace.
        """
        for tensor in (query, key, *call_tensors((*others,), {})):
            self._note(tensor)
        fixed = [shadow for other in call_tensors((*others,), {}) if (shadow := _shadow(other)) is not None]
        self._calls.append(ScaledCall(length, (_shadow(query), _shadow(key)), tuple(fixed), where))

    def fix(self, tensor: Tensor, *, by_rows: bool = True) -> None:
        """What a tensor's values are used for does not allow to scale them."""
        shadow = _shadow(tensor)
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
        return np.unique(self._rows.find(_distinct(shadow)))

    def _note(self, tensor: Tensor) -> None:
        """A parameter that is read by its rows cannot be scaled by its columns."""
        if id(tensor) in self._names:
            self._read_by_rows.add(self._names[id(tensor)])

    def _fix_rows(self, shadow: Tensor) -> None:
        self._rows.lock_labels(_distinct(shadow), _FIXED)

    def unite(self, one: Tensor, other: Tensor) -> Tensor:
        """Two shadows that are spread out to one shape, element by element."""
        a, b = _narrowed(torch.broadcast_tensors(one, other))
        if a.numel() > _LARGEST:
            self._fix_rows(a)
            self._fix_rows(b)
        else:
            self._rows.join(a.reshape(-1).numpy(), b.reshape(-1).numpy())
        return one.expand(torch.broadcast_shapes(one.shape, other.shape))

    def is_table(self, tensor: Tensor) -> bool:
        """Whether a tensor scales with a buffer, such as a table of sines."""
        shadow = _shadow(tensor)
        return shadow is not None and shadow.numel() > 0 and int(shadow[(0,) * shadow.dim()]) in self._tables

    def columns(self, tensor: Tensor) -> Tensor | None:
        """The columns of a parameter that is multiplied as it is, ``x @ weight``, as rows; else None."""
        name = self._names.get(id(tensor))
        if name is None or tensor.dim() != 2:
            return None
        if name not in self._columns:
            self._columns[name] = self._number(name, 1, tensor.shape[1])
        return torch.from_numpy(self._columns[name])


# -- what operators do to shadows ------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Made:
    """Shadows of an operator's results, and the operands that they come from."""

    shadows: Sequence[Tensor]
    read: Sequence[Tensor | None]
    by_columns: Tensor | None = None


_Way: TypeAlias = Callable[[Provenance, Any, tuple[Any, ...], dict[str, Any], Any], "_Made | None"]
_WAYS: dict[Any, _Way] = {}


def _way(*names: str) -> Callable[[_Way], _Way]:
    def register(each: _Way) -> _Way:
        for name in names:
            if (packet := getattr(aten, name, None)) is not None:
                _WAYS[packet] = each
        return each

    return register


@_way("view", "_unsafe_view", "_reshape_alias", "reshape")
def _view(p: Provenance, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> _Made | None:
    shadow = _shadow(args[0])
    if shadow is None or isinstance(args[1], torch.dtype):
        return None
    return _Made((shadow.reshape(out.shape),), args[:1])


@_way("clone", "contiguous", "detach", "alias", "_to_copy", "neg", "lift_fresh")
def _same(p: Provenance, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> _Made | None:
    shadow = _shadow(args[0])
    return None if shadow is None else _Made((shadow,), args[:1])


@_way("permute", "t", "transpose", "slice", "select", "unbind", "split", "split_with_sizes", "unsafe_split",
      "chunk", "squeeze", "unsqueeze", "expand", "flip")  # fmt: skip
def _moved(p: Provenance, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> _Made | None:
    """What only moves elements moves their shadows."""
    shadow = _shadow(args[0])
    return None if shadow is None else _Made(results_of(func(shadow, *args[1:], **kwargs)), args[:1])


@_way("cat", "stack")
def _joined(
    p: Provenance, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any
) -> _Made | None:
    shadows = [_shadow(tensor) for tensor in args[0]]
    known = [shadow for shadow in shadows if shadow is not None]
    if len(known) < len(shadows):
        return None
    place = int(kwargs.get("dim", args[1] if len(args) > 1 else 0)) % out.dim()
    if func.overloadpacket is aten.stack:
        known = [shadow.unsqueeze(place) for shadow in known]
    narrow = torch.cat(_narrowed(known, but=place), place)
    return _Made((narrow.expand(out.shape),), args[0])


@_way("mul", "div")
def _product(
    p: Provenance, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any
) -> _Made | None:
    """A product scales with either factor: with the activation times a table, else with the weight."""
    factors = [value for value in args[:2] if isinstance(value, Tensor) and _shadow(value) is not None]
    if len(factors) > 1:
        factors = [factor for factor in factors if not p.is_table(factor)]
    if len(factors) > 1:
        factors = [factor for factor in factors if p.is_weight(factor)]
    if len(factors) != 1 or kwargs.get("rounding_mode") is not None:
        return None
    shadow, is_divisor = _shadow(factors[0]), func.overloadpacket is aten.div and factors[0] is not args[0]
    return None if shadow is None or is_divisor else _Made((shadow.expand(out.shape),), factors)


@_way("add", "sub")
def _sum(p: Provenance, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> _Made | None:
    if not all(isinstance(value, Tensor) for value in args[:2]):
        return None
    one, other = _shadow(args[0]), _shadow(args[1])
    if one is None or other is None:
        return None
    return _Made((p.unite(one, other),), args[:2])


@_way("mm", "bmm", "matmul")
def _matrices(
    p: Provenance, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any
) -> _Made | None:
    """A product sums over rows' elements: of ``x @ weight.T``, or of ``weight @ x``."""
    a, b = args[:2]
    for factor, summed in ((b, -2), (a, -1)):
        shadow = _constant(_shadow(factor), summed)
        if shadow is not None:
            return _Made((shadow.unsqueeze(summed).expand(out.shape),), (factor,))
    columns = p.columns(b)
    return None if columns is None else _Made((columns.expand(out.shape),), (), by_columns=b)


@_way("addmm", "baddbmm")
def _matrices_and_bias(
    p: Provenance, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any
) -> _Made | None:
    made = _matrices(p, func, args[1:3], {}, out)
    bias = _shadow(args[0])
    if made is None or bias is None:
        return None
    return _Made((p.unite(made.shadows[0], bias),), (*made.read, args[0]), made.by_columns)


@_way("linear")
def _linear(
    p: Provenance, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any
) -> _Made | None:
    shadow = _constant(_shadow(args[1]), -1)
    return _per_channel(p, shadow, args[1], args[2] if len(args) > 2 else None, out, out.dim() - 1)


@_way("convolution")
def _convolution(
    p: Provenance, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any
) -> _Made | None:
    x, weight = args[:2]
    shadow = _shadow(weight)
    while shadow is not None and shadow.dim() > 1:
        shadow = _constant(shadow, -1)
    channel = x.dim() - weight.dim() + 1
    return None if args[6] else _per_channel(p, shadow, weight, args[2], out, channel)


@_way("native_batch_norm", "_native_batch_norm_legit", "_native_batch_norm_legit_no_training",
      "_batch_norm_no_update", "batch_norm", "native_group_norm")  # fmt: skip
def _channel_norm(
    p: Provenance, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any
) -> _Made | None:
    return _per_channel(p, _shadow(args[1]), args[1], args[2], results_of(out)[0], 1)


@_way("native_layer_norm", "_fused_rms_norm", "rms_norm")
def _last_norm(
    p: Provenance, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any
) -> _Made | None:
    """Normalisation over the last dimensions, whose weight has their shape."""
    weight, bias = args[2], args[3] if func.overloadpacket is aten.native_layer_norm else None
    shadow, first = _shadow(weight), results_of(out)[0]
    if shadow is None:
        return None
    if bias is not None:
        offset = _shadow(bias)
        if offset is None:
            return None
        shadow = p.unite(shadow, offset)
    return _Made((shadow.expand(first.shape),), (weight, bias))


@_way("view_as_complex")
def _complex(
    p: Provenance, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any
) -> _Made | None:
    shadow = _shadow(args[0])
    return None if shadow is None else _Made((p.unite(shadow[..., 0], shadow[..., 1]),), args[:1])


@_way("view_as_real")
def _real(p: Provenance, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> _Made | None:
    shadow = _shadow(args[0])
    return None if shadow is None else _Made((shadow.unsqueeze(-1).expand(out.shape),), args[:1])


def _per_channel(
    p: Provenance, rows: Tensor | None, weight: Tensor | None, bias: Tensor | None, out: Tensor, place: int
) -> _Made | None:
    """A weight and perhaps a bias make each index of one dimension of a result."""
    if rows is None:
        return None
    if bias is not None:
        offset = _shadow(bias)
        if offset is None:
            return None
        rows = p.unite(rows, offset)
    return _Made((_spread(rows, place, out.shape),), (weight, bias))


_SHAPE_ALONE = frozenset(
    getattr(aten, name)
    for name in ("empty_like", "zeros_like", "ones_like", "full_like", "new_empty", "new_zeros", "new_ones",
                 "new_full", "rand_like", "randn_like")
)  # fmt: skip


# -- shadows ---------------------------------------------------------------------------------------


def _shadow(tensor: Any) -> Tensor | None:
    found: Tensor | None = getattr(tensor, _SHADOW, None)
    return found


def _cast(tensor: Tensor, shadow: Tensor) -> None:
    if shadow.shape != tensor.shape:
        raise AssertionError(f"a shadow of shape {tuple(shadow.shape)} for {tuple(tensor.shape)}")
    setattr(tensor, _SHADOW, shadow)


def _spread(rows: Tensor, place: int, shape: Sequence[int]) -> Tensor:
    """One row for each index of one dimension, the same along all others."""
    return rows.reshape([-1 if axis == place else 1 for axis in range(len(shape))]).expand(*shape)


def _constant(shadow: Tensor | None, dim: int) -> Tensor | None:
    """A shadow without a dimension along which it does not change; None where it does."""
    if shadow is None or shadow.shape[dim] == 0:
        return None
    first = shadow.select(dim, 0)
    same = shadow.stride(dim) == 0 or bool((shadow == first.unsqueeze(dim)).all())
    return first if same else None


def _narrowed(shadows: Sequence[Tensor], but: int | None = None) -> list[Tensor]:
    """Shadows without the extent of dimensions along which all of them are merely spread out."""
    result = list(shadows)
    for axis in range(result[0].dim()):
        if axis != but and all(each.stride(axis) == 0 for each in result):
            result = [each.narrow(axis, 0, min(each.shape[axis], 1)) for each in result]
    return result


def _size(shadow: Tensor) -> int:
    return _narrowed([shadow])[0].numel()


def _distinct(shadow: Tensor) -> Rows:
    distinct: Rows = _narrowed([shadow])[0].unique().numpy()
    return distinct


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
