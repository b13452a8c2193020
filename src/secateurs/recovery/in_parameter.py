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
        index: Which of several matrices it is, one for each dimension that comes before those of a matrix.
    """

    reading: tuple[int, ...]
    outputs: tuple[int, ...]
    first: int = 0
    index: tuple[int, ...] = ()


def place_in(reader: Reader, parameter: Tensor) -> InParameter | None:
    """Where a reader's weight lies in a parameter.

    A weight may be the parameter itself, some of its rows, its transpose, a matrix that one of more
    dimensions is reshaped to, or one of several matrices that a parameter of more dimensions holds; else
    there is no such place.

    Example:
        >>> import torch
        >>> experts = torch.zeros(3, 4, 5)
        >>> place_in(Reader(source=torch.zeros(2, 5), weight=experts[1], bias=None), experts)
        InParameter(reading=(2,), outputs=(1,), first=0, index=(1,))

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
    if weight.dim() == 2 < parameter.dim():
        return _one_of_matrices(reader, shape, steps, offset)
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


def _one_of_matrices(
    reader: Reader, shape: Sequence[int], steps: Sequence[int], offset: int
) -> InParameter | None:
    """The place of a matrix, or of its transpose, that is picked out of all but two dimensions."""
    weight, last = reader.weight, len(shape) - 2
    is_turned = (tuple(weight.shape), weight.stride()) == (shape[: last - 1 : -1], steps[: last - 1 : -1])
    if not is_turned and (tuple(weight.shape), weight.stride()) != (shape[last:], steps[last:]):
        return None
    index = []
    for step in steps[:last]:
        index.append(offset // step if step else 0)
        offset -= index[-1] * step
    is_inside = all(0 <= at < size for at, size in zip(index, shape[:last], strict=True))
    if offset or not is_inside:
        return None
    sides = (last + 1, last) if is_turned else (last, last + 1)  # of the parameter, as those of the weight
    reading, outputs = reader.reading_dim, 1 - reader.reading_dim
    return InParameter((sides[reading],), (sides[outputs],), index=tuple(index))


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
