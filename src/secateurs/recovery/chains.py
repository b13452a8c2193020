"""What lies between a layer and the point where its outputs matter: norms, scales, sums and moves."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from secateurs.recovery.moves import Move


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Norm:
    """A batch norm in evaluation, by its tensors.

    Args:
        mean: Running mean.
        var: Running variance.
        weight: Scale, if it has one.
        bias: Shift, if it has one.
        eps: What is added to the variance.
    """

    mean: Tensor
    var: Tensor
    weight: Tensor | None
    bias: Tensor | None
    eps: float

    @property
    def is_affine(self) -> bool:
        """Whether it has a scale and a shift."""
        return self.weight is not None and self.bias is not None

    @property
    def scale(self) -> Tensor:
        """What it multiplies each channel by; ``(C,)`` in float64."""
        scale = (self.var.double() + self.eps).rsqrt()
        return scale if self.weight is None else scale * self.weight.detach().double()


@dataclass(frozen=True, slots=True, eq=False)
class Step:
    """What one call does to one of its arguments, channel by channel: ``scale * t`` and something added.

    Args:
        scale: ``(C,)``, or one number in ``(1,)``.
        channel: The dimension that the scale or shift belongs to, counted from the end; None for any.
        norm: The batch norm that the step is, if it is one.
        shift: The parameter that is added, if the step is a sum with one.
        move: The call as a function of its argument, if all that it does is to move values.
        is_plain: Whether the values stay as they are, so that no chain need end behind the step.
        is_sum: Whether something else than a parameter is added.
    """

    scale: Tensor
    channel: int | None = None
    norm: Norm | None = None
    shift: Tensor | None = None
    move: Move | None = None
    is_plain: bool = False
    is_sum: bool = False

    def fits(self, channel: int, count: int) -> bool:
        """Whether it works along so many channels in a dimension, counted from the end."""
        return self.channel in (None, channel) and len(self.scale) in (1, count)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Chain:
    """From a layer to the point where its outputs matter.

    Args:
        call: Number of the layer's call.
        point: Number of the call that gives the point's value.
        channel: The dimension of the channels there, counted from the end.
        moves: Numbers of the calls on the way that only move values.
        scale: ``(C,)`` in float64: what the layer's outputs are multiplied by on the way.
        norm: The batch norm with scale and shift that takes the layer's outputs directly, and nothing else.
        onward: ``(C,)``: what they are multiplied by behind that norm.
        homes: What can hold a constant on the way, and what that is multiplied by until the point.
    """

    call: int
    point: int
    channel: int
    moves: tuple[int, ...]
    scale: Tensor
    norm: Norm | None
    onward: Tensor
    homes: tuple[tuple[Tensor, Tensor], ...]
