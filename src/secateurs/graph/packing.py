"""Sequences of several lengths, packed and padded in steps that are known on tensors without data.

Torch packs by a kernel that reads the lengths from memory. Here the values are picked by their places, as in
any other indexing, so that labels and lengths of dimensions follow. Lengths are integers that the inputs or
the code tell, and known.
"""

from __future__ import annotations

import torch
from torch import Tensor

from secateurs.graph.values import listed

ON_CPU = "_secateurs_on_cpu"  # such a tensor says so, whatever the device of the model


def pack(x: Tensor, lengths: Tensor, batch_first: bool = False) -> tuple[Tensor, Tensor]:
    """What ``torch._pack_padded_sequence`` gives.

    Args:
        x: The padded sequences, ``(T, B, ...)`` or ``(B, T, ...)``, the longest first.
        lengths: The lengths of all, on the CPU.
        batch_first: Whether the sequences come before the steps.

    Returns:
        All steps that are there, ``(sum of lengths, ...)``, one after another; how many sequences have each.

    Example:
        >>> pack(torch.tensor([[1, 2, 3], [4, 5, 0]]), torch.tensor([3, 2]), batch_first=True)
        (tensor([1, 4, 2, 5, 3]), tensor([2, 2, 1]))
    """
    counts: list[int] = listed(lengths)
    sizes = [sum(count > step for count in counts) for step in range(max(counts))]
    steps = torch.tensor([step for step, size in enumerate(sizes) for _ in range(size)])
    sequences = torch.tensor([place for size in sizes for place in range(size)])
    places = (sequences, steps) if batch_first else (steps, sequences)
    return x[tuple(each.to(x.device) for each in places)], _of_cpu(sizes)


def pad(
    data: Tensor, sizes: Tensor, batch_first: bool, value: float, total: int = 0
) -> tuple[Tensor, Tensor]:
    """What ``torch._pad_packed_sequence`` gives.

    Args:
        data: All steps, ``(sum of lengths, ...)``.
        sizes: How many sequences have each step, on the CPU.
        batch_first: Whether the sequences come before the steps in the result.
        value: What stands where a sequence has ended.
        total: The least number of steps of the result.

    Returns:
        The sequences, ``(T, B, ...)`` or ``(B, T, ...)``; and their lengths.

    Example:
        >>> pad(torch.tensor([1, 4, 2, 5, 3]), torch.tensor([2, 2, 1]), True, 0.0)
        (tensor([[1, 2, 3],
                [4, 5, 0]]), tensor([3, 2]))
    """
    counts: list[int] = listed(sizes)
    starts = [sum(counts[:step]) for step in range(len(counts))]
    rows = [
        [start + place if place < count else -1 for place in range(counts[0])]
        for start, count in zip(starts, counts, strict=True)
    ]
    rows += [[-1] * counts[0] for _ in range(total - len(counts))]
    table = torch.tensor(rows).to(data.device)
    table = table.T if batch_first else table
    is_there = (table >= 0).view(*table.shape, *[1] * (data.dim() - 1))
    padded = torch.where(is_there, data[table.clamp(min=0)], torch.full_like(data[:1, ...], value))
    return padded, _of_cpu([sum(count > place for count in counts) for place in range(counts[0])])


def _of_cpu(numbers: list[int]) -> Tensor:
    found = torch.tensor(numbers, dtype=torch.int64)
    setattr(found, ON_CPU, True)
    return found
