"""What a plan leaves of a layer's outputs and inputs, by the parameter that its weight lies in."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from secateurs.planning.plan import Plan
from secateurs.recovery.in_parameter import place_in
from secateurs.recovery.readers import Reader


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Kept:
    """What is left of a layer's outputs, or inputs.

    Args:
        indices: ``(C',)`` those that stay.
        factors: ``(C',)`` what the cut multiplied them by, in float64.
        count: ``C``: how many there were.
    """

    indices: Tensor
    factors: Tensor
    count: int

    @property
    def mask(self) -> Tensor:
        """``(C,)``: whether one stays."""
        mask = torch.zeros(self.count, dtype=torch.bool)
        mask[self.indices] = True
        return mask

    @property
    def matrix(self) -> Tensor:
        """``(C', C)``: those that stay, each for itself and with its factor."""
        matrix = torch.zeros(len(self.indices), self.count, dtype=torch.float64)
        matrix[torch.arange(len(self.indices)), self.indices] = self.factors
        return matrix


def outputs_kept(reader: Reader, plan: Plan, name: str, parameter: Tensor) -> Kept | None:
    """Which of a reader's outputs a plan leaves; None where its weight has no place in the parameter.

    Args:
        reader: The reader, in the network before the cut.
        plan: The cut.
        name: The parameter that its weight is, or is a view of.
        parameter: That parameter, before the cut.
    """
    place = place_in(reader, parameter)
    if place is None:
        return None
    stays = _stays(plan, name, parameter, place.outputs)
    factors = torch.ones([parameter.shape[dim] for dim in place.outputs], dtype=torch.float64)
    for each in plan.rescaled:
        if each.parameter == name and each.dim in place.outputs:
            factors.movedim(place.outputs.index(each.dim), 0)[list(each.indices)] *= each.factor
    shared = reader.turned and reader.windows  # the groups of a transposed convolution share its outputs
    rows = place.first + torch.arange(reader.outputs) % (len(stays) if shared else reader.outputs)
    indices = stays[rows].nonzero().flatten()
    return Kept(indices=indices, factors=factors.flatten()[rows[indices]], count=reader.outputs)


def inputs_kept(reader: Reader, plan: Plan, name: str, parameter: Tensor) -> Kept | None:
    """Which of the inputs that a reader's weight has a plan leaves; as `outputs_kept`."""
    place = place_in(reader, parameter)
    if place is None:
        return None
    stays = _stays(plan, name, parameter, place.reading)
    indices = stays.nonzero().flatten()
    return Kept(indices=indices, factors=torch.ones(len(indices), dtype=torch.float64), count=len(stays))


def _stays(plan: Plan, name: str, parameter: Tensor, dims: Sequence[int]) -> Tensor:
    """Whether a plan leaves an index of some dimensions of a parameter, which are one together."""
    stays = torch.ones([parameter.shape[dim] for dim in dims], dtype=torch.bool)
    for axis in plan.axes:
        if axis.parameter == name and axis.dim in dims:
            stays.movedim(dims.index(axis.dim), 0)[list(axis.removed)] = False
    return stays.flatten()
