"""Where the weight of a reader lies in a parameter, so that a cut tells which rows and columns it loses."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

from torch import Tensor

from secateurs.recovery.readers import Reader


@dataclass(frozen=True, slots=True)
class InParameter:
    """Where the weight of a reader lies in a parameter.

    Args:
        reading: The dimensions of the parameter that are summed over, together the reader's inputs.
        outputs: Those that together are its outputs.
        first: Its first output, where it is some rows of a larger parameter.
    """

    reading: tuple[int, ...]
    outputs: tuple[int, ...]
    first: int = 0


def place_in(reader: Reader, parameter: Tensor) -> InParameter | None:
    """Where a reader's weight lies in a parameter.

    A weight may be the parameter itself, some of its rows, its transpose, or a matrix that one of more
    dimensions is reshaped to; else there is no such place.

    Args:
        reader: The reader.
        parameter: The parameter that its weight is, or is a view of.
    """
    weight, shape, steps = reader.weight, tuple(parameter.shape), parameter.stride()
    reading, outputs = reader.reading_dim, 1 - reader.reading_dim
    offset = int(weight.storage_offset()) - int(parameter.storage_offset())
    if tuple(weight.shape) != shape and weight.is_contiguous() and parameter.is_contiguous():
        wide = _dims_of_sides(reader, shape) if offset == 0 and weight.numel() == parameter.numel() else None
        if wide is not None:
            return wide
    if weight.dim() != parameter.dim():
        return None
    if weight.stride() == steps:
        row = offset // steps[outputs] if steps[outputs] else 0
        rest = [size for dim, size in enumerate(weight.shape) if dim != outputs]
        is_whole = rest == [size for dim, size in enumerate(shape) if dim != outputs]
        is_there = is_whole and offset == row * steps[outputs]
        return InParameter((reading,), (outputs,), row) if is_there else None
    is_turned = weight.dim() == 2 and weight.stride() == steps[::-1] and tuple(weight.shape) == shape[::-1]
    return InParameter((outputs,), (reading,)) if is_turned and offset == 0 else None


def _dims_of_sides(reader: Reader, shape: Sequence[int]) -> InParameter | None:
    """Which dimensions of a parameter make up those of a weight that it is reshaped to.

    Its first ones are the groups of a convolution, the next ones the first side of the weight.
    """
    counts = [prod(shape[:count]) for count in range(len(shape))]
    if reader.groups not in counts or len(reader.weight) not in counts:
        return None
    groups, first = counts.index(reader.groups), counts.index(len(reader.weight))
    sides = (*range(groups, first),), (*range(first, len(shape)),)
    outputs, reading = sides[::-1] if reader.turned else sides
    return InParameter(reading, (*range(groups), *outputs))
