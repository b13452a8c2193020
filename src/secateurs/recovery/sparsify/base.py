"""What the methods of training for sparsity share: the groups they act on, and how they pull at units."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import ClassVar

import torch
from torch import Tensor, nn

from secateurs.criteria.protocol import unit_sums
from secateurs.errors import TrainingError
from secateurs.graph.copying import tensors_of
from secateurs.graph.groups import Graph, Group, Slice, fingerprint_of
from secateurs.planning.families import Scope
from secateurs.planning.limits import candidates, check_skip
from secateurs.recovery.regularizer import Regularizer

Parameters = Mapping[str, nn.Parameter]


class Sparsifier(Regularizer):
    """A method of training for sparsity, on the groups that a plan may cut.

    Args:
        graph: The graph of the model that is trained.
        kinds: Kinds of groups to act on; see :func:`secateurs.plan`.
        skip: Glob patterns of groups to leave alone.

    Attributes:
        name: What the method is called.
        criterion: The criterion that finds afterwards what the method has emptied.
        scope: The scope of the ranking that goes with it.
        rate: The share of the units of every group that is emptied, where the method has one.
    """

    name: ClassVar[str] = ""
    criterion: ClassVar[str] = "l2"
    scope: ClassVar[Scope] = "global"
    rate: float | None = None

    def __init__(
        self, graph: Graph, *, kinds: Collection[str] | None = None, skip: Sequence[str] = ()
    ) -> None:
        self.graph, self.kinds, self.skip = graph, kinds, skip
        check_skip(graph, skip)
        self.groups = candidates(graph, kinds=kinds, skip=skip)

    def start(self, model: nn.Module) -> None:
        """Refuse a model that the graph is not of.

        Raises:
            TrainingError: Names or shapes of the model's tensors are not those of the graph.
        """
        found = fingerprint_of(model)
        if found != self.graph.fingerprint:
            raise TrainingError(
                f"{self.name} was given the graph of another model: its fingerprint is "
                f"{self.graph.fingerprint}, that of this {type(model).__name__} is {found}",
                fix="graph = secateurs.trace(model, inputs)",
            )


def trained_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that require a gradient, by the names that a graph has for them."""
    return {
        name: tensor
        for name, tensor in tensors_of(model).items()
        if isinstance(tensor, nn.Parameter) and tensor.requires_grad
    }


def trained_slices(group: Group, parameters: Parameters) -> list[Slice]:
    """Where the group's units live in parameters that are trained, whatever their role."""
    return [part for part in group.slices if part.parameter in parameters]


def unit_norms(group: Group, parameters: Parameters) -> Tensor:
    """The Euclidean norm of all trained weights of each unit together; ``(units,)`` in float64."""
    parts = trained_slices(group, parameters)
    if not parts:
        return torch.zeros(group.size, dtype=torch.float64)
    return torch.stack([unit_sums(parameters[part.parameter], part, 2) for part in parts]).sum(0).sqrt()


def unit_size(group: Group, parameters: Parameters) -> int:
    """How many trained weights one unit of the group has."""
    return sum(
        parameters[part.parameter].numel()
        // parameters[part.parameter].shape[part.dim]
        * part.indices.shape[1]
        for part in trained_slices(group, parameters)
    )


def pull(group: Group, parameters: Parameters, factors: Tensor) -> None:
    """Add ``factor * weight`` to the gradient of every trained weight of each unit.

    A weight that belongs to two units, a row of one group and a column of another, is pulled by both.

    Args:
        group: The group.
        parameters: The trained parameters by name.
        factors: ``(units,)`` in float64.
    """
    for part in trained_slices(group, parameters):
        weight = parameters[part.parameter]
        units, count = part.indices.shape
        places = torch.from_numpy(part.indices.reshape(-1)).to(weight.device)
        spread = torch.zeros(weight.shape[part.dim], dtype=torch.float64, device=weight.device)
        spread.index_add_(0, places, factors.to(weight.device)[:, None].expand(units, count).reshape(-1))
        shape = [-1 if dim == part.dim else 1 for dim in range(weight.dim())]
        add_gradient(weight, weight.detach() * spread.to(weight.dtype).view(shape))


def add_gradient(weight: nn.Parameter, extra: Tensor) -> None:
    """Add to a gradient, also where the loss gave none."""
    weight.grad = extra if weight.grad is None else weight.grad.add_(extra)


def check_positive(name: str, value: float) -> None:
    """Refuse a strength that is none.

    Raises:
        TrainingError: It is not a positive number.
    """
    if not 0 < value < float("inf"):
        raise TrainingError(f"`0 < {name}` must hold, got {name}={value}")


def check_share(name: str, value: float) -> None:
    """Refuse a share that leaves no unit, or takes none.

    Raises:
        TrainingError: It is not inside (0, 1).
    """
    if not 0 < value < 1:
        raise TrainingError(f"`0 < {name} < 1` must hold, got {name}={value}")
