"""Weights that layers compute from parameters, and how these follow where the weights are refitted.

Weight normalisation (Salimans and Kingma 2016) keeps a weight as ``g v / |v|``, with one length for each
index of a dimension. Every weight has such a form, so what a fit finds can be written into the two.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True, eq=False)
class WeightNorm:
    """What a weight is computed from.

    Args:
        direction: ``v``, of the weight's shape.
        length: ``g``, with the same number of dimensions, of which all but one are 1.
        dim: That one; -1 for a single length.

    Example:
        >>> layer = torch.nn.utils.parametrizations.weight_norm(torch.nn.Linear(3, 2))
        >>> parts, weight = layer.parametrizations.weight, torch.randn(2, 3)
        >>> WeightNorm(parts.original1, parts.original0, 0).take(weight)
        >>> torch.allclose(layer.weight, weight)
        True
    """

    direction: Tensor
    length: Tensor
    dim: int

    @property
    def parameters(self) -> tuple[Tensor, ...]:
        """What the weight is computed from; the first has its shape."""
        return self.direction, self.length

    @classmethod
    def of(cls, func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> WeightNorm | None:
        """What a torch function call computes a weight from, if it is of this kind."""
        if getattr(func, "__name__", "") != "_weight_norm":
            return None
        found = {"dim": 0, **dict(zip(("v", "g", "dim"), args, strict=False)), **kwargs}
        return cls(found["v"], found["g"], int(found["dim"]))

    def take(self, weight: Tensor) -> None:
        """Change the parameters so that they give a weight; a row of zeros keeps its direction."""
        length = torch.norm_except_dim(weight.detach(), 2, self.dim)
        self.length.data.copy_(length)
        self.direction.data.copy_(torch.where(length == 0, self.direction.data, weight.detach()))
