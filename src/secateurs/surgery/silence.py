"""Units silenced in a model of the same size: their consumers read zero."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Literal

import torch
from torch import Tensor, nn

from secateurs.graph.copying import copy_model, tensors_of
from secateurs.planning.plan import AxisCut, Plan
from secateurs.surgery.apply import apply, axes_present, check_fits


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
    return copy_model(model, zeroed(tensors, plan.axes), share=True)


def without(model: nn.Module, plan: Plan) -> tuple[nn.Module, Literal["silenced", "cut"]]:
    """The model without the units of a plan: silenced where that computes the same, or else cut."""
    if all(group.mixed_by is None for group in plan.groups):
        return silenced(model, plan), "silenced"
    return apply(model, plan), "cut"


def zeroed(tensors: Mapping[str, Tensor], axes: Iterable[AxisCut]) -> dict[str, Tensor]:
    """The tensors that are zeroed in part to silence the units: consumers' weights above all."""
    changed: dict[str, Tensor] = {}
    for axis in axes_present(tensors, list(axes)):
        if axis.silenced:
            tensor = changed.get(axis.parameter)
            tensor = tensors[axis.parameter].detach().clone() if tensor is None else tensor
            places = torch.tensor(axis.silenced, device=tensor.device)
            changed[axis.parameter] = tensor.index_fill(axis.dim, places, 0)
    return changed
