"""What a mask is made of: feature maps, which can be cut; kernels and strided parts of them, which cannot."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping, Sequence
from math import prod
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from secateurs.errors import PlanError
from secateurs.graph.copying import copy_model, tensors_of
from secateurs.graph.groups import Graph
from secateurs.graph.running import Inputs, call_model, modes_kept
from secateurs.planning.exact import Mask
from secateurs.planning.limits import Least, Limits, candidates
from secateurs.planning.plan import Plan
from secateurs.surgery.silence import without

Convolution: TypeAlias = nn.Conv1d | nn.Conv2d | nn.Conv3d
_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


class Granularity(ABC):
    """The units of a mask, which is True where one is kept, side by side in groups.

    Attributes:
        names: Names of the groups.
        owners: ``(units,)`` the number of the group of each unit.
        least: ``(groups,)`` how many units of a group are kept at least.
    """

    names: tuple[str, ...]
    owners: npt.NDArray[np.int64]
    least: tuple[int, ...]

    @abstractmethod
    def masked(self, model: nn.Module, mask: Mask) -> nn.Module:
        """A copy of the model in which all that is not kept is silent."""

    @abstractmethod
    def macs(self, mask: Mask) -> float:
        """Multiply-accumulates of a sample that are not with zeros."""

    def of_group(self, number: int) -> npt.NDArray[np.int64]:
        """The places of a group's units in a mask."""
        found: npt.NDArray[np.int64] = np.flatnonzero(self.owners == number)
        return found


class FeatureMaps(Granularity):
    """Units as `secateurs.plan` removes them: a mask is a physical cut.

    Args:
        graph: The graph.
        kinds: See `secateurs.plan`.
        skip: See `secateurs.plan`.
        min_units: See `secateurs.plan`.
        allocation: Groups whose numbers are given; others whose counts are tied are left out.

    Raises:
        PlanError: No group is left.

    Example:
        >>> import secateurs
        >>> net = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 1))
        >>> maps = FeatureMaps(secateurs.trace(net, torch.zeros(1, 2)))
        >>> mask = np.array([True, False, True])
        >>> maps.names, maps.plan(mask).groups[0].removed, maps.macs(mask)
        (('0',), (1,), 6.0)
    """

    def __init__(
        self,
        graph: Graph,
        *,
        kinds: Collection[str] | None = None,
        skip: Sequence[str] = (),
        min_units: Least = 1,
        allocation: Mapping[str, int] | None = None,
    ) -> None:
        groups = candidates(graph, kinds=kinds, skip=skip)
        limits = Limits.of(graph, min_units=min_units, kinds=kinds, skip=skip)
        given = allocation or {}
        self._graph = graph
        self._groups = [group for group in groups if group.name in given or not graph.tied(group)]
        self.left_out = tuple(group.name for group in groups if group not in self._groups)
        if not self._groups:
            raise PlanError("the counts of all groups are tied, so that masks cannot choose units freely")
        self.names = tuple(group.name for group in self._groups)
        self.owners = np.repeat(np.arange(len(self._groups)), [group.size for group in self._groups])
        self.least = tuple(limits.least[group.name] for group in self._groups)

    def plan(self, mask: Mask, source: Mapping[str, Any] | None = None) -> Plan:
        """The plan that removes what is not kept."""
        return Plan.of(self._graph, self._removed(mask), source)

    def masked(self, model: nn.Module, mask: Mask) -> nn.Module:
        """See `Granularity.masked`; cut where silence would not be the same."""
        return without(model, self.plan(mask))[0]

    def macs(self, mask: Mask) -> float:
        """See `Granularity.macs`; of the model that is cut."""
        return float(self._graph.cost(self._removed(mask)).macs)

    def mask_of(self, plan: Plan) -> Mask:
        """The mask of a plan; groups that are left out here stay out of it."""
        mask = np.ones(len(self.owners), np.bool_)
        for cut in plan.groups:
            if cut.name in self.names:
                mask[self.of_group(self.names.index(cut.name))[list(cut.removed)]] = False
        return mask

    def _removed(self, mask: Mask) -> dict[str, list[int]]:
        gone = {
            group.name: np.flatnonzero(~mask[self.of_group(number)]).tolist()
            for number, group in enumerate(self._groups)
        }
        return {name: units for name, units in gone.items() if units}


class _WeightMasks(Granularity):
    """Masks on the weights of convolutions.

    Args:
        model: The model; its convolutions that are modules count.
        inputs: Example inputs, for the number of positions.

    Raises:
        PlanError: It has no convolution.
    """

    def __init__(self, model: nn.Module, inputs: Inputs) -> None:
        self._layers = _convolutions(model)
        if not self._layers:
            raise PlanError("the model has no convolutions whose kernels could be masked")
        self._positions = positions(model, inputs)
        self.names = tuple(self._layers)
        self._shapes = [self._shape(layer) for layer in self._layers.values()]
        self.owners = np.repeat(np.arange(len(self._shapes)), [prod(shape) for shape in self._shapes])
        self.least = (1,) * len(self._shapes)

    @abstractmethod
    def _shape(self, layer: Convolution) -> tuple[int, ...]:
        """The shape of the layer's part of a mask."""

    @abstractmethod
    def _spread(self, layer: Convolution, kept: Tensor) -> Tensor:
        """For each weight whether it is kept; ``(C_out, C_in / groups, positions of a kernel)``."""

    def weights_kept(self, mask: Mask) -> dict[str, Tensor]:
        """For each layer which of its weights are kept; as bool, of the weight's shape."""
        found = {}
        for number, (name, layer) in enumerate(self._layers.items()):
            part = torch.from_numpy(mask[self.of_group(number)]).reshape(self._shapes[number])
            found[name] = self._spread(layer, part).reshape(layer.weight.shape)
        return found

    def masked(self, model: nn.Module, mask: Mask) -> nn.Module:
        """See `Granularity.masked`."""
        tensors = tensors_of(model)
        changed = {}
        for name, kept in self.weights_kept(mask).items():
            weight = tensors[f"{name}.weight"].detach()
            changed[f"{name}.weight"] = weight * kept.to(weight.device)
        return copy_model(model, changed, share=True)

    def macs(self, mask: Mask) -> float:
        """See `Granularity.macs`; of the convolutions alone."""
        return float(
            sum(int(kept.sum()) * self._positions[name] for name, kept in self.weights_kept(mask).items())
        )


class Kernels(_WeightMasks):
    """A unit is one kernel: the weights between one input map and one output map of a convolution.

    A plain convolution computes all of its kernels, so a mask saves nothing by itself; `lowering` says what
    it would save as a product of matrices.

    Example:
        >>> net = nn.Sequential(nn.Conv2d(2, 3, 3))
        >>> kernels = Kernels(net, torch.zeros(1, 2, 5, 5))
        >>> mask = np.array([True] * 5 + [False])
        >>> len(kernels.owners), kernels.masked(net, mask)[0].weight[2, 1].abs().sum().item()
        (6, 0.0)
    """

    def _shape(self, layer: Convolution) -> tuple[int, ...]:
        return int(layer.weight.shape[0]), int(layer.weight.shape[1])

    def _spread(self, layer: Convolution, kept: Tensor) -> Tensor:
        return kept[..., None].expand(*kept.shape, prod(layer.kernel_size))


class Strided(_WeightMasks):
    """A unit is every `stride`-th weight, from one offset on, of all kernels on one input map.

    All kernels on a map share stride and offset, so a unit that is not kept takes whole rows from the matrix
    that a lowered convolution multiplies with. Kernels of fewer places than `stride` have a unit a place.

    Args:
        model: The model.
        inputs: Example inputs.
        stride: Weights from one to the next.

    Raises:
        PlanError: The stride is less than two.

    Example:
        >>> net = nn.Sequential(nn.Conv2d(1, 1, 3))
        >>> strided = Strided(net, torch.zeros(1, 1, 5, 5), stride=2)
        >>> strided.weights_kept(np.array([True, False]))["0"].int().flatten().tolist()
        [1, 0, 1, 0, 1, 0, 1, 0, 1]
    """

    def __init__(self, model: nn.Module, inputs: Inputs, stride: int = 3) -> None:
        if stride < 2:
            raise PlanError(f"`stride >= 2` must hold, got stride={stride}")
        self._stride = stride
        super().__init__(model, inputs)

    def _shape(self, layer: Convolution) -> tuple[int, ...]:
        return layer.in_channels, min(self._stride, prod(layer.kernel_size))

    def _spread(self, layer: Convolution, kept: Tensor) -> Tensor:
        count, outputs = prod(layer.kernel_size), layer.out_channels // layer.groups
        rows = kept[:, torch.arange(count) % kept.shape[1]]  # (C_in, positions of a kernel)
        by_group = rows.reshape(layer.groups, -1, count)
        return by_group.repeat_interleave(outputs, 0)


def positions(model: nn.Module, inputs: Inputs) -> dict[str, int]:
    """For each convolution that is a module, at how many places of a sample it is evaluated."""
    found: dict[str, int] = {}
    hooks, layers = [], _convolutions(model)
    for name, layer in layers.items():

        def count(_: nn.Module, __: Any, output: Tensor, name: str = name) -> None:
            found[name] = found.get(name, 0) + prod(output.shape[2 - layers[name].weight.dim() :])

        hooks.append(layer.register_forward_hook(count))
    try:
        with modes_kept(model), torch.no_grad():
            model.eval()
            call_model(model, inputs)
    finally:
        for hook in hooks:
            hook.remove()
    return {name: found.get(name, 0) for name in layers}


def _convolutions(model: nn.Module) -> dict[str, Convolution]:
    shared = tensors_of(model)  # a layer with two names has one
    return {
        name: layer
        for name, layer in model.named_modules()
        if isinstance(layer, _CONVOLUTIONS) and f"{name}.weight" in shared
    }
