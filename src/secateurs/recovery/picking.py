"""Which calls of a pass choose by activations, and which work on rows that were picked."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from secateurs.graph.packed import results_of
from secateurs.recovery.choices import is_choice, is_told

_PICKING = frozenset(("__getitem__", "index_select", "gather", "take_along_dim"))


class Picking:
    """Notes, call by call, what a network chooses by its activations, and the rows that it picks by that.

    Whole numbers choose, and so do truth values that an index is made of or Python is told; those that
    activations are multiplied with are a part of an activation function.

    Attributes:
        choices: The calls that choose, such as the experts of a token; what they give is read.
        origins: Of each call that picks rows of an activation, as those of an expert, the call that made it.
        picks: Of each call that works on rows alone that a call has picked, that call.
    """

    def __init__(self) -> None:
        self.choices: set[int] = set()
        self.origins: dict[int, int] = {}
        self.picks: dict[int, int] = {}
        self._by_activations: set[int] = set()
        self._behind_activations: set[int] = set()

    def note(
        self,
        number: int,
        func: Any,
        operands: Sequence[Tensor],
        makers: Sequence[int],
        depend: Sequence[bool],
        out: Any,
        *,
        is_dealt_out: bool,
    ) -> None:
        """Note a call.

        Args:
            number: Its number.
            func: The torch function.
            operands: The tensors that it is given.
            makers: The calls that made them; negative for none.
            depend: Whether they depend on the inputs.
            out: What it gave.
            is_dealt_out: Whether it is a step of a product that deals out rows.
        """
        given = list(zip(operands, makers, depend, strict=True))
        values = [maker for tensor, maker, is_data in given if is_data and tensor.is_floating_point()]
        if values:
            self._by_activations.add(number)
        if values or not self._behind_activations.isdisjoint(makers):
            self._behind_activations.add(number)
        chosen = [(tensor, maker) for tensor, maker, _ in given if is_choice(tensor)]
        self._note_choices(number, func, chosen, out)
        are_chosen = any(maker in self._behind_activations for _, maker in chosen)
        if _name(func) in _PICKING and len(values) == 1 and (are_chosen or is_dealt_out):
            self.origins[number], self.picks[number] = values[0], number
        elif values and all(maker in self.picks for maker in values):
            self.picks[number] = self.picks[values[0]]

    def _note_choices(self, number: int, func: Any, chosen: Sequence[tuple[Tensor, int]], out: Any) -> None:
        """Note which calls chose what this one is given, and whether it is one of them."""
        results = results_of(out)
        if number in self._by_activations and is_told(func) and not results and not isinstance(out, float):
            self.choices.add(number)
        is_index = _name(func) == "__getitem__" or not any(map(torch.is_floating_point, results))
        for tensor, maker in chosen:
            if maker in self._by_activations and (is_index or tensor.dtype != torch.bool):
                self.choices.add(maker)


def _name(func: Any) -> str:
    return getattr(func, "__name__", "")
