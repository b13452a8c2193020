"""The ways that batches take through a network that chooses by its activations, and one numbering for all."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import TypeAlias

from secateurs.criteria.observed import Batch
from secateurs.graph.paths import NOWHERE
from secateurs.recovery.recording import Recorder

Follow: TypeAlias = Callable[[Batch, Recorder, Sequence[int], Sequence[int]], None]


class Routes:
    """Numbers the calls of all batches alike: those of the first one as they come, further ones behind.

    Attributes:
        keys: For each number the call in the trace, and which part of it, where one consists of several.
    """

    def __init__(self) -> None:
        self.keys: list[tuple[int, int]] = []
        self._numbers: dict[tuple[int, int], int] = {}
        self._of_ways: dict[tuple[int, ...] | None, list[int] | None] = {}

    @property
    def is_first(self) -> bool:
        """Whether no way has been followed to its end yet."""
        return not self._of_ways

    def make(self, call: int) -> bool:
        """Whether any batch so far has made a call of the trace."""
        return any(call == known for known, _ in self.keys)

    def numbers(self, batch: Batch, follow: Follow) -> list[int] | None:
        """What a batch's calls are numbered by; None where it makes those of the first one.

        Args:
            batch: The batch.
            follow: Called with it where no batch before went its way: with a pass, the numbers that its calls
                have in the trace, and those that they have here.
        """
        way = None if batch.numbers is None else tuple(batch.numbers)
        if way not in self._of_ways:
            recorder = Recorder(batch.model, batch.inputs, written_out=True)
            in_trace = recorder.plain if way is None else [way[plain] for plain in recorder.plain]
            numbers = self._numbered(in_trace)
            follow(batch, recorder, in_trace, numbers)
            self._of_ways[way] = None if self.is_first else numbers
        return self._of_ways[way]

    def _numbered(self, in_trace: Sequence[int]) -> list[int]:
        """Those that the same calls had before, else new ones."""
        parts: Counter[int] = Counter()
        numbers = []
        for call in in_trace:
            key = (call, parts[call])
            parts[call] += 1
            if call == NOWHERE or key not in self._numbers:
                self._numbers[key] = len(self.keys)
                self.keys.append(key)
            numbers.append(self._numbers[key])
        return numbers
