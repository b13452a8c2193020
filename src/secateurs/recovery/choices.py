"""What a network chooses by its activations, so that the smaller one does the same while they are compared.

A mixture of experts sends each token to the experts that score best, a detector keeps the boxes that score
best. After a cut some of these choices fall otherwise, and then the rows behind them are other tokens, or
other boxes, which nothing could be learned from. So passes of the smaller network take the original's
choices until the layers are fitted. What is chosen by is the smaller network's own: a token's weight for an
expert is what the smaller network gives for that expert.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

from secateurs.graph.packed import call_tensors

_ORDERED = {  # functions that give values and where they are; the argument that names the dimension
    "topk": 2, "sort": 1, "kthvalue": 2, "median": 1, "nanmedian": 1, "mode": 1, "max": 1, "min": 1,
}  # fmt: skip
OF_VALUES = frozenset(
    (
        *("item", "tolist", "numpy", "equal", "allclose", "is_nonzero"),
        *("__bool__", "__float__", "__int__", "__index__", "__array__", "__contains__"),
    )
)  # methods of tensors that tell values

Chooser = Callable[[int, Any, tuple[Any, ...], dict[str, Any], Any], Any]


class Choices:
    """What the original chose on one batch, call by call.

    Args:
        calls: The numbers of the calls that choose; None for all that give whole numbers or truth values.

    Example:
        >>> scores, other = torch.tensor([[0.1, 0.7, 0.2]]), torch.tensor([[0.2, 0.3, 0.5]])
        >>> choices = Choices()
        >>> _ = choices.note(0, torch.topk, (scores, 1), {}, scores.topk(1))
        >>> values, indices = choices.follow(0, torch.topk, (other, 1), {}, other.topk(1))
        >>> indices.item(), round(values.item(), 1)
        (1, 0.3)
    """

    def __init__(self, calls: Collection[int] | None = None) -> None:
        self._calls = calls
        self._made: dict[int, tuple[list[torch.Size], list[Any]]] = {}

    def note(self, number: int, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> Any:
        """Remember what a call of the original chose.

        Args:
            number: Its number in the pass.
            func: The torch function.
            args: Its positional arguments.
            kwargs: Its arguments by name.
            out: What it gave.

        Returns:
            The same.
        """
        if self._calls is None or number in self._calls:
            chosen = [each.clone() if isinstance(each, Tensor) else each for each in _chosen(func, out)]
            if chosen:
                self._made[number] = _shapes(args, kwargs), chosen
        return out

    def follow(self, number: int, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> Any:
        """What a call of the smaller network gives where it chooses as the original did; as `note`.

        A call that is given tensors of other shapes than the original's, such as one that looks for the
        largest of the channels that have stayed, chooses by itself.
        """
        shapes, chosen = self._made.get(number, (None, []))
        if shapes is None or shapes != _shapes(args, kwargs):
            return out
        waiting = [each.clone() if isinstance(each, Tensor) else each for each in chosen]
        leaves, tree = tree_flatten(out)
        name = getattr(func, "__name__", "")
        if name in _ORDERED and len(leaves) == 2:
            return tree_unflatten([_at(waiting[0], leaves[0], name, args, kwargs), waiting[0]], tree)
        if len(waiting) != sum(map(is_choice, leaves)) or _is_list(func, out):
            return waiting[0] if _is_list(func, out) else out
        return tree_unflatten([waiting.pop(0) if is_choice(each) else each for each in leaves], tree)

    def only(self, calls: Collection[int]) -> Choices:
        """Those of some calls alone."""
        few = Choices(calls)
        few._made = {call: made for call, made in self._made.items() if call in calls}
        return few


def is_choice(value: Any) -> bool:
    """Whether a result is whole numbers or truth values."""
    if isinstance(value, Tensor):
        return not (value.is_floating_point() or value.is_complex())
    return isinstance(value, (bool, int))


def is_told(func: Any) -> bool:
    """Whether a function tells Python values of a tensor, not its shape or the like."""
    return getattr(func, "__name__", "") in OF_VALUES


def _chosen(func: Any, out: Any) -> list[Any]:
    """The results of a call that are choices."""
    if not isinstance(out, (Tensor, tuple, list)) and not is_told(func):
        return []  # the length of a tensor
    if _is_list(func, out):
        return [out] if all(map(is_choice, tree_flatten(out)[0])) else []
    return [each for each in tree_flatten(out)[0] if is_choice(each)]


def _is_list(func: Any, out: Any) -> bool:
    """Whether a call gives a list of Python values, whose length is a choice as well."""
    return isinstance(out, list) and getattr(func, "__name__", "") == "tolist"


def _shapes(args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[torch.Size]:
    return [each.shape for each in call_tensors(args, kwargs)]


def _at(indices: Tensor, values: Tensor, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """The values of the smaller network where the original found its own."""
    x, place = args[0] if args else kwargs["input"], _ORDERED[name]
    dim = int(args[place] if len(args) > place else kwargs.get("dim", -1))
    if not x.dim():
        return values
    kept = indices.dim() == x.dim()
    found: Tensor = x.gather(dim, indices if kept else indices.unsqueeze(dim))
    return found if kept else found.squeeze(dim)
