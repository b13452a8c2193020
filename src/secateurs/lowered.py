"""What masked convolutions would save as products of matrices (im2col), counted exactly."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor, nn

from secateurs.errors import PlanError
from secateurs.graph.running import Inputs
from secateurs.masks import positions


@dataclass(frozen=True, slots=True, kw_only=True)
class Lowered:
    """A convolution as products of matrices, one for each of its groups.

    Args:
        name: The layer.
        rows: Rows of the matrix of input patches: an input map and a place in its kernels each.
        rows_kept: Those that some kept weight reads.
        filters: Output maps.
        filters_kept: Those with a weight that is kept.
        macs: Multiply-accumulates of one sample.
        macs_kept: Those of the smaller matrices: what a lowered convolution really saves is the difference.
        macs_nonzero: Those with kept weights alone: what no product of dense matrices reaches in general.
    """

    name: str
    rows: int
    rows_kept: int
    filters: int
    filters_kept: int
    macs: int
    macs_kept: int
    macs_nonzero: int


def lowering(model: nn.Module, kept: Mapping[str, Tensor], inputs: Inputs) -> list[Lowered]:
    """What each masked convolution would cost after lowering, without rows and filters that are zero.

    `torch.nn.Conv2d` cannot be given such matrices; this counts what a convolution that can would save.

    Args:
        model: The model.
        kept: For names of convolutions which weights are kept; bool, of the weight's shape.
        inputs: Example inputs.

    Returns:
        A line for each of them.

    Raises:
        PlanError: A name is no convolution, or a shape is not its weight's.

    Example:
        >>> import torch
        >>> net = nn.Sequential(nn.Conv2d(2, 4, 3))
        >>> kept = torch.ones(4, 2, 3, 3, dtype=torch.bool)
        >>> kept[:, 1, :, ::2] = False
        >>> line = lowering(net, {"0": kept}, torch.zeros(1, 2, 5, 5))[0]
        >>> line.rows, line.rows_kept, line.macs, line.macs_kept
        (18, 12, 648, 432)
    """
    places, layers = positions(model, inputs), dict(model.named_modules())
    lines = []
    for name, mask in kept.items():
        if name not in places or mask.shape != layers[name].weight.shape:
            shape = tuple(mask.shape)
            raise PlanError(f"{name!r} is no convolution with a weight of shape {shape}", where=name)
        lines.append(_lowered(name, mask, int(layers[name].groups), places[name]))
    return lines


def _lowered(name: str, mask: Tensor, groups: int, places: int) -> Lowered:
    filters = mask.shape[0]
    matrices = mask.reshape(groups, filters // groups, -1)  # (groups, filters, rows)
    rows, columns = matrices.any(1).sum(1), matrices.any(2).sum(1)
    return Lowered(
        name=name,
        rows=groups * matrices.shape[2],
        rows_kept=int(rows.sum()),
        filters=filters,
        filters_kept=int(columns.sum()),
        macs=mask.numel() * places,
        macs_kept=int((rows * columns).sum()) * places,
        macs_nonzero=int(mask.sum()) * places,
    )
