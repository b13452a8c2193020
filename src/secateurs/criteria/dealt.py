"""How many rows experts are dealt: a share of what an error in one of them costs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from secateurs.criteria.processes import add_up
from secateurs.recovery.recording import Recorder


class Dealt:
    """The rows that calls pick out of an activation, one call for each expert.

    An error of an expert's output counts for the rows that it is dealt, of all that are dealt out there.

    Args:
        device: Where sums are kept.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._origins: dict[int, int] = {}  # of each call that picks, what it picks from
        self._picks: dict[int, int] = {}  # of each reader, the call that has picked what it reads
        self._rows: dict[int, int] = {}

    def follow(self, recorder: Recorder, numbers: Sequence[int]) -> None:
        """Take in what a pass picks.

        Args:
            recorder: The pass.
            numbers: What its calls are numbered by here.
        """
        for call, origin in recorder.origins.items():
            self._origins[numbers[call]] = numbers[origin] if origin >= 0 else origin
        for call in recorder.readers:
            if call in recorder.picks:
                self._picks[numbers[call]] = numbers[recorder.picks[call]]

    def arrive(self, call: int, result: Any) -> None:
        """Take in what a call gave on a batch."""
        if call in self._origins and isinstance(result, Tensor):
            self._rows[call] = self._rows.get(call, 0) + len(result)

    def share(self, reader: int) -> float:
        """Of all rows that are dealt out where a reader's are, the share of its own; 1 where none are."""
        pick = self._picks.get(reader)
        if pick is None:
            return 1.0
        others = [call for call, origin in self._origins.items() if origin == self._origins[pick]]
        return self._rows.get(pick, 0) / max(sum(self._rows.get(call, 0) for call in others), 1)

    def combine(self, keys: Sequence[Any]) -> None:
        """Add up what several processes have seen.

        Args:
            keys: What each call is known by in all of them.
        """
        for call in sorted(self._origins, key=keys.__getitem__):
            rows = torch.tensor(self._rows.get(call, 0), device=self._device)
            add_up(rows)
            self._rows[call] = int(rows)
