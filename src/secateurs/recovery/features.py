"""Distillation inside the network: what is given where a cut group ends, against what was given before."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils.hooks import RemovableHandle

from secateurs.graph.attributes_kept import passes_alike
from secateurs.graph.copying import foreign_hooks_unseen, modules_of, tensors_of
from secateurs.graph.exchange import attention_written_out
from secateurs.graph.packed import first_tensor
from secateurs.graph.running import Inputs, call_model, modes_kept, plain_kernels
from secateurs.planning.plan import Plan
from secateurs.recovery.combining import exchangeable
from secateurs.recovery.in_parameter import place_in
from secateurs.recovery.kept import outputs_kept
from secateurs.recovery.points import way_of
from secateurs.recovery.readers import Reader
from secateurs.recovery.recording import Recorder


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Boundary:
    """A module that gives what a reader of a cut group is for.

    Args:
        module: Its name.
        channel: The dimension of the reader's outputs in what it gives, counted from the end.
        kept: Those of the original's outputs that both networks have; ``(kept,)`` indices.
    """

    module: str
    channel: int
    kept: Tensor


def boundaries(teacher: nn.Module, model: nn.Module, plan: Plan, inputs: Inputs) -> list[Boundary]:
    """Where cut groups end: the modules whose outputs tell what the layers that read them are for.

    A linear layer or convolution sums over the units that it reads, so that what was lost can be told, and
    made good, in its outputs. They are followed through a batch norm, a residual sum and an activation, as
    far as what they become is read once; of the modules whose results lie on that way it is the last.

    Args:
        teacher: The network before the cut.
        model: The network after it.
        plan: The cut.
        inputs: A batch of inputs.

    Returns:
        The modules, in the order of the forward pass; none for layers with rescaled rows, nor where other
        dimensions are cut as well, nor for queries and keys with fewer dimensions, which a repair exchanges,
        nor for experts, to which each network deals rows of its own.

    Example:
        >>> import secateurs
        >>> net = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
        >>> inputs = torch.zeros(1, 3)
        >>> cut = secateurs.Plan.of(secateurs.trace(net, inputs), {"0": [1], "2": [0, 3]})
        >>> places = boundaries(net, secateurs.apply(net, cut), cut, inputs)
        >>> [(each.module, each.kept.tolist()) for each in places]
        [('3', [1, 2]), ('4', [0, 1])]
    """
    teacher, model = as_named(plan, teacher), as_named(plan, model)
    tensors, watched = tensors_of(teacher), _watchable(teacher)
    with (
        modes_kept(teacher),
        foreign_hooks_unseen(teacher),
        plain_kernels(),
        attention_written_out(teacher),
        passes_alike(teacher),
    ):
        record = Recorder(teacher.eval(), inputs, watched)
        combined = _combined(teacher, plan, inputs, tensors)
    ways: dict[str, dict[int, tuple[int, int]]] = {}  # of each weight: calls, how far they are, the channels
    kept: dict[str, Tensor] = {}
    for call, reader in record.readers.items():
        name = record.name_of(reader.weight)
        if name is None or name in combined or call in record.picks:  # the other picks rows of its own
            continue
        common = _kept(reader, name, tensors[name], plan)
        if common is not None:
            kept[name] = common
            for far, (number, channel) in enumerate(way_of(record, call)):
                ways.setdefault(name, {})[number] = far, channel
    found: dict[str, Boundary] = {}
    for name, way in ways.items():
        told = {
            module: min(way[number] for number in numbers)
            for module, numbers in record.givers.items()
            if all(number in way for number in numbers)
        }
        if told:
            last = max(told, key=lambda module: told[module][0])  # the innermost of several: it ended first
            found.setdefault(last, Boundary(module=last, channel=told[last][1], kept=kept[name]))
    return _comparable(list(found.values()), teacher, model, inputs)


def _combined(
    teacher: nn.Module, plan: Plan, inputs: Inputs, tensors: Mapping[str, Tensor]
) -> set[str | None]:
    """The weights of layers that a repair may let give combinations of what they gave."""
    record = Recorder(teacher, inputs, written_out=True)
    found = exchangeable(teacher, plan, inputs, record, tensors)
    calls = {call for places in found.values() for call, is_weight in places if not is_weight}
    return {record.name_of(record.readers[call].weight) for call in calls}


def _comparable(
    places: list[Boundary], teacher: nn.Module, model: nn.Module, inputs: Inputs
) -> list[Boundary]:
    """Those where both networks give as much: a token mixer's outputs, for one, are cut in two dimensions."""
    given = Features(teacher, model, places)
    try:
        with modes_kept(teacher, model), plain_kernels():
            for network in (teacher, model):
                call_model(network.eval(), inputs)
        return [place for place in places if given.shapes_agree(place)]
    finally:
        given.close()


def as_named(plan: Plan, model: nn.Module) -> nn.Module:
    """The model, or what ``torch.compile`` has wrapped, whichever has the plan's names."""
    inner = getattr(model, "_orig_mod", None)
    names = {axis.parameter for axis in plan.axes}
    return inner if isinstance(inner, nn.Module) and names <= tensors_of(inner).keys() else model


def _watchable(model: nn.Module) -> dict[str, nn.Module]:
    """Modules that run as such in training too; the parts of torch's attention do not."""
    hidden = [f"{path}." for path, each in modules_of(model) if isinstance(each, nn.MultiheadAttention)]
    return {path: each for path, each in modules_of(model) if not path.startswith(tuple(hidden))}


def _kept(reader: Reader, name: str, parameter: Tensor, plan: Plan) -> Tensor | None:
    """The outputs of a reader that a cut leaves; None if it reads no cut group, or its rows are rescaled."""
    place = place_in(reader, parameter)
    cuts = {axis.dim: axis.removed for axis in plan.axes if axis.parameter == name}
    if place is None or not any(cuts.get(dim) for dim in place.reading):
        return None
    kept = outputs_kept(reader, plan, name, parameter)
    return kept.indices if kept is not None and bool((kept.factors == 1).all()) else None


class Features:
    """Reads what the same modules give in two networks.

    Args:
        teacher: The network before the cut.
        model: The network after it.
        places: Where the two are compared; see `boundaries`.
    """

    def __init__(self, teacher: nn.Module, model: nn.Module, places: Sequence[Boundary]) -> None:
        self._places = tuple(places)
        self._taught: dict[str, list[Tensor]] = {}
        self._said: dict[str, list[Tensor]] = {}
        self._handles: list[RemovableHandle] = [
            network.get_submodule(each.module).register_forward_hook(_keeper(each.module, outputs))
            for network, outputs in ((teacher, self._taught), (model, self._said))
            for each in self._places
        ]

    def __len__(self) -> int:
        return len(self._places)

    def difference(self) -> Tensor:
        """The squared difference as a share of the mean square of both, the mean over all boundaries.

        Modules that one network ran in another number of times, as where training drops layers, or on other
        rows, do not count.
        """
        shares: list[Tensor] = []
        for place in self._places:
            told, said = self._told_at(place), self._said.get(place.module, ())
            if [each.shape for each in told] == [each.shape for each in said]:
                shares += map(_Share.apply, said, told)
        self.forget()
        return torch.stack(shares).mean() if shares else torch.zeros(())

    def shapes_agree(self, place: Boundary) -> bool:
        """Whether both networks gave values of the same shapes at a place, in the pass that was read."""
        said = self._said.get(place.module, ())
        return [each.shape for each in said] == [each.shape for each in self._told_at(place)] != []

    def _told_at(self, place: Boundary) -> list[Tensor]:
        """What the teacher gave there, of what both networks have."""
        return [
            told
            if len(place.kept) == told.shape[place.channel]
            else told.index_select(place.channel, place.kept.to(told.device))
            for told in self._taught.get(place.module, ())
        ]

    def forget(self) -> None:
        """Drop what was read: a pass without a lesson."""
        self._taught.clear()
        self._said.clear()

    def close(self) -> None:
        """Stop reading."""
        self.forget()
        for handle in self._handles:
            handle.remove()


class _Share(torch.autograd.Function):
    """``|said - target|^2`` as a share of the mean of ``|said|^2`` and ``|target|^2``; at most 4.

    Where the teacher gives next to nothing, a share of its square alone would outweigh all other boundaries.
    In few passes over memory; no gradient of the target.
    """

    @staticmethod
    def forward(ctx: Any, said: Tensor, target: Tensor) -> Tensor:
        wide = torch.promote_types(said.dtype, torch.float32)
        one, other = said.to(wide), target.to(wide)
        apart = one - other
        mean = ((_square(one) + _square(other)) / 2).clamp_min(1e-12 * target.numel())
        share = _square(apart) / mean
        ctx.save_for_backward(said, apart, mean, share)
        return share

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        said, apart, mean, share = ctx.saved_tensors
        scale = gradient / mean
        return torch.add(apart * (2 * scale), said * (scale * share), alpha=-1).to(said.dtype), None


def _square(values: Tensor) -> Tensor:
    """The sum of squares."""
    length: Tensor = torch.linalg.vector_norm(values)
    return length.square()


def _keeper(name: str, outputs: dict[str, list[Tensor]]) -> Callable[..., None]:
    def hook(_: nn.Module, inputs: Any, output: Any) -> None:
        given = first_tensor(output)
        if given is not None:
            outputs.setdefault(name, []).append(given)

    return hook
