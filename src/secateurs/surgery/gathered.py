"""The second way to prove a cut: the original itself, with the kept subset gathered where units are mixed.

Where an operator computes across units (a layer norm, a softmax over channels), zeros are not absence. So
the original runs at its full size, and only such an operator is given the kept indices of its operands; its
result is spread out again, with zeros where units left. Sums with weights get zeros at these places, which
is the same as leaving them out. All other operators run as they are: what they compute for a kept unit does
not depend on the others.

Two runs are needed, because labels are final only at the end of a trace: `Follower` traces the original on
the very tensors that are used, so that both runs call the same operators, and `Gathering` follows it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from math import prod
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from secateurs.errors import VerifyError
from secateurs.graph.groups import Indices
from secateurs.graph.labels import Dim
from secateurs.graph.memos import memos_opened
from secateurs.graph.operators import canonical
from secateurs.graph.packed import results_of
from secateurs.graph.running import Inputs, TracedCalls, call_model, device_of, plain_kernels
from secateurs.graph.tracing import Tracer
from secateurs.graph.unions import LOCKED, LabelArray
from secateurs.graph.values import without_masks
from secateurs.planning.parts import AxisCut
from secateurs.surgery.decisions import Decisions
from secateurs.surgery.following import Call, Follower
from secateurs.surgery.wide import WideMode, call_wide, run_wide

aten = torch.ops.aten


class NotGathered(VerifyError):
    """An operator that mixes units could not be evaluated on the kept ones alone.

    Args:
        reason: What happened, in words.
        homes: Where the units in question live: places of parameter dimensions.
    """

    def __init__(self, reason: str, homes: Mapping[tuple[str, int], list[int]]) -> None:
        super().__init__(reason)
        self.homes = homes


def run_gathered(
    model: nn.Module, axes: Sequence[AxisCut], inputs: Inputs, decisions: Decisions
) -> tuple[list[Tensor], list[Tensor]]:
    """The outputs of a model as it is, and of the model without what the axes lose.

    Args:
        model: The model at its full size; it is left as it is.
        axes: What each parameter dimension loses.
        inputs: Inputs with values.
        decisions: Takes down what the gathered run decides by value.

    Raises:
        NotGathered: An operator that mixes units could not be evaluated on the kept ones.
        VerifyError: The model could not be run.
    """
    follower = Follower()
    whole = run_wide(model, inputs, "the original", forward=follower.follow)
    places = Places(follower, axes)

    def forward(model: nn.Module, inputs: Inputs) -> Any:
        # as in the follower's run: torch and models look whether there is a mode for torch functions
        calls, gathering = TracedCalls(device_of(model)), Gathering(follower.followed, places, decisions)
        with plain_kernels(), memos_opened(model), calls, gathering:
            return call_model(model, inputs)

    return whole, run_wide(model, inputs, "the gathered original", forward=forward)


class Places:
    """Which indices of any dimension of the original's forward pass leave with the cut.

    Args:
        tracer: A finished trace.
        axes: What each parameter dimension loses.

    Raises:
        NotGathered: The labels of a parameter dimension do not explain what it loses.
    """

    def __init__(self, tracer: Tracer, axes: Sequence[AxisCut]) -> None:
        self._labels = tracer.labels
        self._dims = {(place.parameter, place.dim): place.labels for place in tracer.parameter_dims}
        self._lost = {key: np.zeros(dim.size, np.bool_) for key, dim in self._dims.items()}
        for axis in axes:
            lost = self._lost.get((axis.parameter, axis.dim))
            if lost is not None and len(lost) == axis.size:  # else a constant that is not made yet
                lost[list(axis.removed)] = True
        factors = {key: self._labels.resolve(dim).factors for key, dim in self._dims.items()}
        self._gone = np.zeros(len(self._labels), np.bool_)
        for key, each in factors.items():
            for factor in each:
                self._gone[factor[self._lost[key]]] = True
        for key, each in factors.items():  # a unit leaves where all of its places do
            for factor in each:
                self._gone[factor[~self._lost[key]]] = False
        self._gone[LOCKED] = False
        self._kept: dict[tuple[int, ...], Indices | None] = {}
        unexplained = {
            key: np.flatnonzero(lost).tolist()
            for key, lost in self._lost.items()
            if not np.array_equal(self._of(factors[key], len(lost)), lost)
        }
        for parameter, dim in unexplained:
            why = self._labels.reasons[self._locked(self._dims[parameter, dim])][0] or "no operator ties it"
            raise NotGathered(
                f"the forward pass does not explain what dimension {dim} of {parameter!r} loses ({why})",
                unexplained,
            )

    def kept(self, dim: Dim) -> Indices | None:
        """The indices of a dimension that stay; None where all do."""
        key = (dim.size, *(id(factor) for factor in dim.factors))  # the trace keeps these arrays alive
        if key not in self._kept:
            lost = self._of(self._labels.resolve(dim).factors, dim.size)
            self._kept[key] = np.flatnonzero(~lost) if lost.any() else None
        return self._kept[key]

    def homes(self, dims: Sequence[Dim]) -> dict[tuple[str, int], list[int]]:
        """Where in the parameters the lost units of some dimensions live."""
        here = np.zeros_like(self._gone)
        for dim in dims:
            for factor in self._labels.resolve(dim).factors:
                here[factor] = self._gone[factor]
        found = {}
        for key, dim in self._dims.items():
            places = np.zeros(dim.size, np.bool_)
            for factor in self._labels.resolve(dim).factors:
                places |= here[factor]
            if places.any():
                found[key] = np.flatnonzero(places).tolist()
        return found

    def _locked(self, dim: Dim) -> int:
        return max((int(self._labels.why(factor).max()) for factor in dim.factors), default=0)

    def _of(self, factors: Sequence[LabelArray], size: int) -> np.ndarray[Any, np.dtype[np.bool_]]:
        lost = np.zeros(size, np.bool_)
        for factor in factors:
            lost |= self._gone[factor]
        return lost


class Gathering(WideMode):
    """Runs the original at its full size, as if the lost places of every dimension were not there."""

    def __init__(self, calls: Sequence[Call], places: Places, decisions: Decisions) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._calls, self._places, self._decisions = iter(calls), places, decisions

    def run(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Carry out one operator: as it is, on the kept indices, or with zeros at the lost ones."""
        args = without_masks(func, args)
        return self._decisions.note(func, args, kwargs, self._without(func, args, kwargs))

    def _without(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if canonical(func) is None:
            return call_wide(func, args, kwargs)
        call = next(self._calls, None)
        if call is None or canonical(call.operator) is not canonical(func):
            raise NotGathered(f"the model takes another path the second time, at {func}", {})
        if any(self._places.kept(dim) is not None for dim, _ in call.mixed):
            return self._on_kept(call, args, kwargs)
        if not call.sums:
            return call_wide(func, args, kwargs)
        silent_args, silent_kwargs = self._exchange(call, args, kwargs, self._silence)
        out = call_wide(func, silent_args, silent_kwargs)
        return args[0].copy_(out) if _writes_first(func) else out

    def _on_kept(self, call: Call, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The operator on the kept indices of its operands, its results spread out to the full size."""
        few_args, few_kwargs = self._exchange(call, args, kwargs, self._gather)
        restate = _SIZE_ARGUMENTS.get(call.operator.overloadpacket)
        try:
            if restate is not None:
                few_args = restate(few_args, call, self._places)
            out = call_wide(call.operator, few_args, few_kwargs)
            results = [
                self._scatter(each, dims, is_first=place == 0)
                for place, (each, dims) in enumerate(zip(results_of(out), call.results, strict=True))
            ]
        except Exception as error:
            cut = [dim for dim, _ in call.mixed if self._places.kept(dim) is not None]
            raise NotGathered(
                f"{call.operator} ({call.mixed[0][1]}) cannot be evaluated on the kept indices: "
                f"{type(error).__name__}: {str(error)[:120]}",
                self._places.homes(cut),
            ) from error
        if _writes_first(call.operator):
            return args[0].copy_(results[0])
        whole = iter(results)
        return tree_map_only(Tensor, lambda _: next(whole), out)

    def _exchange(
        self,
        call: Call,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        change: Callable[[Tensor, Sequence[Dim]], Tensor],
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        dims = iter(call.operands)
        exchanged: tuple[tuple[Any, ...], dict[str, Any]] = tree_map_only(
            Tensor, lambda tensor: change(tensor, next(dims)), (args, kwargs)
        )
        return exchanged

    def _gather(self, tensor: Tensor, dims: Sequence[Dim]) -> Tensor:
        for axis, places in self._cut(tensor, dims):
            tensor = tensor.index_select(axis, places)
        return tensor

    def _silence(self, tensor: Tensor, dims: Sequence[Dim]) -> Tensor:
        for axis, places in self._cut(tensor, dims):
            lost = torch.ones(tensor.shape[axis], dtype=torch.bool, device=tensor.device)
            lost[places] = False
            tensor = tensor.index_fill(axis, lost.nonzero()[:, 0], 0)
        return tensor

    def _scatter(self, tensor: Tensor, dims: Sequence[Dim], *, is_first: bool) -> Tensor:
        wanted = [dim.size if (kept := self._places.kept(dim)) is None else len(kept) for dim in dims]
        if list(tensor.shape) != wanted:
            if is_first:
                raise ValueError(f"it gives shape {tuple(tensor.shape)} instead of {tuple(wanted)}")
            return tensor.new_zeros([dim.size for dim in dims])  # statistics that no one follows or reads
        for axis, places in self._cut(tensor, dims):
            shape = [*tensor.shape[:axis], dims[axis].size, *tensor.shape[axis + 1 :]]
            tensor = tensor.new_zeros(shape).index_copy_(axis, places, tensor)
        return tensor

    def _cut(self, tensor: Tensor, dims: Sequence[Dim]) -> list[tuple[int, Tensor]]:
        """The dimensions of a tensor that lose places, with those that stay."""
        kept = [(axis, self._places.kept(dim)) for axis, dim in enumerate(dims)]
        return [
            (axis, torch.from_numpy(places).to(tensor.device)) for axis, places in kept if places is not None
        ]


def _writes_first(operator: Any) -> bool:
    """Whether the operator works in place: what it returns is its first argument."""
    returns = operator._schema.returns
    return bool(returns and returns[0].alias_info is not None and returns[0].alias_info.is_write)


# -- arguments that state a length ----------------------------------------------------------------

Restate: TypeAlias = Callable[[tuple[Any, ...], Call, Places], tuple[Any, ...]]


def _normalized_shape(args: tuple[Any, ...], call: Call, places: Places) -> tuple[Any, ...]:
    return (args[0], list(args[0].shape[-len(args[1]) :]), *args[2:])


def _group_norm_sizes(args: tuple[Any, ...], call: Call, places: Places) -> tuple[Any, ...]:
    """``(x, weight, bias, N, C, HxW, groups, eps)``: whole groups leave, or the same places of each."""
    x, (channel, groups) = args[0], (call.operands[0][1], args[6])
    kept = places.kept(channel)
    left = groups
    if kept is not None:
        counts = np.bincount(kept // (channel.size // groups))
        left = int((counts > 0).sum())
        if len(set(counts[counts > 0].tolist())) > 1:
            raise ValueError(f"its groups keep {counts.tolist()} channels")
    return (*args[:3], x.shape[0], x.shape[1], prod(x.shape[2:]), left, *args[7:])


def _drawn_shape(args: tuple[Any, ...], call: Call, places: Places) -> tuple[Any, ...]:
    sizes = [dim.size if (kept := places.kept(dim)) is None else len(kept) for dim in call.results[0]]
    return (sizes, *args[1:])


_SIZE_ARGUMENTS: dict[Any, Restate] = {
    aten.native_layer_norm: _normalized_shape,
    aten._fused_rms_norm: _normalized_shape,
    aten.rms_norm: _normalized_shape,
    aten.native_group_norm: _group_norm_sizes,
    aten.rand: _drawn_shape,
    aten.randn: _drawn_shape,
}
