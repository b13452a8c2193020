"""Adding up what several processes have seen, such as those that `accelerate launch` starts."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor


def are_several() -> bool:
    """Whether this program runs as one of several processes that know of each other."""
    return bool(dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1)


def add_up(tensor: Tensor) -> None:
    """Put the sum over all processes in place of a tensor."""
    if are_several():
        dist.all_reduce(tensor)


def largest(number: int, device: torch.device) -> int:
    """The largest of a number over all processes."""
    value = torch.tensor(number, device=device)
    if are_several():
        dist.all_reduce(value, dist.ReduceOp.MAX)
    return int(value)
