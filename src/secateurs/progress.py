"""What a long job tells while it runs, and what it keeps so that it can be continued."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from torch import Tensor


@dataclass(frozen=True, slots=True)
class Event:
    """Something that happened in a job.

    Attributes:
        name: What happened: ``"epoch"``, ``"cut"``, ...
        facts: Its numbers and names, as JSON can hold them.
    """

    name: str
    facts: Mapping[str, Any] = field(default_factory=dict)


Observer = Callable[[Event], None]


@dataclass(frozen=True, slots=True)
class State:
    """Where an unfinished job stands: facts as JSON can hold them, and tensors."""

    facts: Mapping[str, Any]
    tensors: Mapping[str, Tensor]


class Checkpoint(Protocol):
    """Where a training loop keeps its state after each epoch."""

    def load(self) -> State | None:
        """The state to continue from, or ``None`` to start at the beginning."""

    def save(self, state: State) -> None:
        """Keep ``state`` in place of the one before."""


def derive_seed(seed: int, *path: object) -> int:
    """A seed for one part of a job, which depends on ``seed`` and on the names in ``path`` alone.

    Random numbers that follow from where the job is, and not from what ran before, are the same in a job
    that was killed and resumed.

    Args:
        seed: The seed of the whole job.
        path: What the random numbers are for, such as ``"iteration", 2, "epoch", 5``.

    Returns:
        A number in [0, 2**62).

    Example:
        >>> derive_seed(0, "epoch", 1) == derive_seed(0, "epoch", 1)
        True
        >>> derive_seed(0, "epoch", 1) == derive_seed(0, "epoch", 2)
        False
    """
    digest = hashlib.sha256(repr((seed, *path)).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 2


def ignore(event: Event) -> None:
    """The observer that does nothing."""
