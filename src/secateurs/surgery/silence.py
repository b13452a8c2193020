"""Units silenced in a model of the same size: their consumers read zero."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Literal, TypeAlias

import torch
from torch import Tensor, nn

from secateurs.graph.copying import copy_model, tensors_of
from secateurs.graph.groups import Indices
from secateurs.planning.parts import AxisCut
from secateurs.planning.plan import Plan
from secateurs.surgery.apply import apply, axes_present, check_fits

Place: TypeAlias = tuple[str, int, Indices | tuple[int, ...]]


def silenced(model: nn.Module, plan: Plan) -> nn.Module:
    """A copy of the model in which the units that a plan removes are silent.

    Where all that lies between a unit and its readers works per channel, the copy computes what the pruned
    model does; where an operator mixes units (`GroupCut.mixed_by`), it does not.

    Args:
        model: The model; it is not changed, and the copy shares its other tensors.
        plan: The plan.

    Returns:
        The copy.

    Raises:
        ApplyError: The plan does not fit.

    Example:
        >>> import secateurs
        >>> net = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 1))
        >>> x = torch.randn(4, 2)
        >>> plan = secateurs.Plan.of(secateurs.trace(net, x), {"0": [1]})
        >>> quiet, small = silenced(net, plan), secateurs.apply(net, plan)
        >>> quiet[0].weight is net[0].weight, quiet[2].weight[0, 1].item()
        (True, 0.0)
        >>> torch.allclose(quiet(x), small(x))
        True
    """
    tensors = tensors_of(model)
    check_fits(model, plan)
    return copy_model(model, zeroed(tensors, silencing(tensors, plan.axes)), share=True)


def without(model: nn.Module, plan: Plan) -> tuple[nn.Module, Literal["silenced", "cut"]]:
    """The model without the units of a plan: silenced where that computes the same, or else cut."""
    if all(group.mixed_by is None for group in plan.groups):
        return silenced(model, plan), "silenced"
    return apply(model, plan), "cut"


def silencing(tensors: Mapping[str, Tensor], axes: Iterable[AxisCut]) -> list[Place]:
    """The places that are zeroed to silence the units of a cut: in consumers' weights above all."""
    present = axes_present(tensors, list(axes))
    return [(axis.parameter, axis.dim, axis.silenced) for axis in present if axis.silenced]


def zeroed(tensors: Mapping[str, Tensor], places: Iterable[Place]) -> dict[str, Tensor]:
    """Copies of the tensors that have one of the places, with zeros there.

    Args:
        tensors: All tensors by name.
        places: Name, dimension and indices; a name may come again.

    Returns:
        The copies by name.
    """
    changed: dict[str, Tensor] = {}
    for name, dim, indices in places:
        tensor = changed.get(name, tensors[name]).detach()
        index = torch.as_tensor(indices, dtype=torch.long, device=tensor.device)
        changed[name] = tensor.index_fill(dim, index, 0)  # a copy
    return changed
