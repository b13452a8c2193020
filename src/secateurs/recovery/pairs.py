"""Batches on their way through both networks: which take part, which wait for room, which go together."""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten

from secateurs.graph.packed import tensors_in
from secateurs.graph.paths import NOWHERE
from secateurs.graph.running import Inputs, call_model
from secateurs.recovery.batches import examples_in
from secateurs.recovery.choices import Choices
from secateurs.recovery.fitting import Equations, Fit, Link, Solution
from secateurs.recovery.layout import Layout
from secateurs.recovery.passes import THREAD_BYTES, SuspendedPass
from secateurs.recovery.writing import correct

_MOST_PAIRS = 64  # of passes that all batches make, where they can be put together
_PARTS = 8  # of the room: no pair takes more than one of them, so that little stays empty
_ROUNDING = 1e-3  # by which outputs may differ that are computed in another order
_FEW_PAIRS = 64  # whose threads count for nothing


class Pairs:
    """The batches that take part in the fits so far, and those that wait until there is room for them.

    Many small batches go together: each pair of passes waits in two threads.

    Args:
        model: The original, in evaluation mode.
        smaller: The network after the cut, in evaluation mode.
        layout: The fits to come.
        inputs: All batches, which are taken out of it one after the other.
        memory: Bytes that all passes may hold, and as many for their threads.
        seed: Which positions of large maps are read.

    Attributes:
        batches: How many batches take part.
        examples: How many inputs these hold.
    """

    def __init__(
        self,
        model: nn.Module,
        smaller: nn.Module,
        layout: Layout,
        inputs: deque[Inputs],
        *,
        memory: int,
        seed: int,
    ) -> None:
        self._networks, self._layout, self._waiting = (model, smaller), layout, inputs
        self._memory, self._seed = memory, seed
        many = len(inputs) > _MOST_PAIRS and are_alike(inputs[0], inputs[1])
        joins = many and is_the_same_together(model, inputs[0], inputs[1])
        self._together = -(-len(inputs) // _MOST_PAIRS) if joins else 1
        self._pairs: list[Pair] = []
        self.batches = self.examples = 0

    def __iter__(self) -> Iterator[Pair]:
        return iter(self._pairs)

    @property
    def largest(self) -> int:
        """The batches of the pair that holds the most."""
        return max((pair.batches for pair in self._pairs), default=0)

    def join(self, place: int) -> None:
        """Let as many batches take part as there is room for from a fit on; who has come so far stays."""
        most = min(self._layout.held[: place + 1])  # bytes of a batch
        room = max(1, self._memory // max(most, 1))
        threads = max(_FEW_PAIRS, self._memory // (2 * THREAD_BYTES))
        together = max(1, min(room // _PARTS, self._together))
        while self._waiting and self.batches < room and len(self._pairs) < threads:
            some = [self._waiting.popleft()]
            while self._waiting and len(some) < min(together, room - self.batches):
                if not are_alike(some[0], self._waiting[0]):
                    break
                some.append(self._waiting.popleft())
            inputs = put_together(some)
            chance = torch.Generator().manual_seed(self._seed + self.batches)
            self._pairs.append(Pair(*self._networks, self._layout, inputs, batches=len(some), chance=chance))
            self.batches += len(some)
            self.examples += examples_of(inputs)

    def close(self) -> None:
        """Leave all passes."""
        for pair in self._pairs:
            pair.close()


class Pair:
    """A batch, or several, on its way through both networks, from the first fit that it is shown.

    Args:
        model: The original, in evaluation mode.
        smaller: The network after the cut, in evaluation mode.
        layout: All fits.
        inputs: What both are called with.
        batches: How many batches were put together.
        chance: Draws the positions that are read.
    """

    def __init__(
        self,
        model: nn.Module,
        smaller: nn.Module,
        layout: Layout,
        inputs: Inputs,
        *,
        batches: int,
        chance: torch.Generator,
    ) -> None:
        self._model, self._smaller, self._layout, self._inputs = model, smaller, layout, inputs
        self.batches, self._chance = batches, chance
        self._passes: tuple[SuspendedPass, SuspendedPass] | None = None
        self._numbers = layout.record.numbers_in(model, inputs)
        self._choices = Choices(self._own(layout.record.choices))
        self._is_shown = False  # the passes wait at the point of the fit at hand

    def _own(self, calls: Collection[int]) -> Collection[int]:
        """The numbers that calls have in these passes, and those of all that are not known."""
        if self._numbers is None:
            return calls
        return {own for own, call in enumerate(self._numbers) if call in calls or call == NOWHERE}

    def _makes(self, fit: Fit) -> bool:
        """Whether these passes make the calls of a fit."""
        if self._numbers is None:
            return True
        calls = {call for link in (*fit.links, *fit.others) for call in (link.chain.call, link.chain.point)}
        return calls.issubset(self._numbers)

    def show(self, equations: Equations, fits: Sequence[Fit]) -> None:
        """Let the equations see what both networks give at the point of the first of the fits to come."""
        fit = equations.fit
        self._is_shown = self._makes(fit)
        if not self._is_shown:
            return
        if self._passes is None:
            self._passes = self._start(fits)
        original, smaller = self._passes
        values = original.advance(fit.point), smaller.advance(fit.point)
        if fit.others:
            self._look_ahead(equations)
        elif fit.is_of_original:
            equations.add(values[0], None, original.readings, self._chance, batches=self.batches)
        else:
            equations.add(*values, smaller.readings, self._chance, batches=self.batches)

    def _look_ahead(self, equations: Equations) -> None:
        """Let the equations of a shared weight see all of its calls, in passes that do not wait for a fit."""
        fit = equations.fit
        links = sorted(enumerate((*fit.links, *fit.others)), key=lambda each: each[1].chain.point)
        read = [link for _, link in links] if fit.weights or fit.is_of_original else []
        stops = [link.chain.point for _, link in links]
        original = self._pass(self._model, stops, read if fit.is_of_original else ())
        smaller = None if fit.is_of_original else self._pass(self._smaller, stops, read)
        try:
            for call, link in links:
                one = original.advance(link.chain.point)
                other = None if smaller is None else smaller.advance(link.chain.point)
                reading = original if smaller is None else smaller
                equations.add(one, other, reading.readings, self._chance, batches=self.batches, call=call)
                reading.forget([link.chain.call])
        finally:
            original.close()
            if smaller is not None:
                smaller.close()

    def correct(self, equations: Equations, solution: Solution) -> None:
        """Give the waiting pass the values that it has with the new weights."""
        if self._passes is not None and self._is_shown:
            smaller = self._passes[1]
            correct(equations, solution, smaller.value, smaller.readings)
            self.forget(equations.fit)

    def forget(self, fit: Fit) -> None:
        """Give back the memory of what the layers of a fit have read."""
        for each in self._passes or ():
            each.forget([link.chain.call for link in fit.links])

    def close(self) -> None:
        """Leave both passes."""
        for each in self._passes or ():
            each.close()
        self._passes = None

    def _start(self, fits: Sequence[Fit]) -> tuple[SuspendedPass, SuspendedPass]:
        """Passes of both networks that wait at the points of fits, and keep what their layers read."""
        stops = {fit.point for fit in fits}
        own = [link for fit in fits if fit.weights for link in fit.links]
        forced = [link for fit in fits if fit.is_of_original and not fit.others for link in fit.links]
        return self._pass(self._model, stops, forced), self._pass(self._smaller, stops, own)

    def _pass(self, model: nn.Module, stops: Collection[int], links: Sequence[Link]) -> SuspendedPass:
        """A pass that waits at some calls, and keeps what some layers read."""
        reads = {link.chain.call for link in links}
        return SuspendedPass(
            model,
            self._inputs,
            stops=stops,
            reads=reads,
            copied=reads & self._layout.copied,
            moves={move: link.chain.call for link in links for move in link.chain.moves},
            names=self._layout.record.names,
            numbers=self._numbers,
            choose=self._choices.note if model is self._model else self._choices.follow,
        )


def examples_of(inputs: Inputs) -> int:
    """How many inputs a batch holds: the length of its first tensor."""
    first = next(leaf for leaf in tree_leaves(inputs) if isinstance(leaf, Tensor))
    return int(first.shape[0])


def are_alike(one: Inputs, other: Inputs) -> bool:
    """Whether two batches can be put together: they differ in the first dimension of tensors alone.

    Example:
        >>> image, wide = torch.zeros(2, 3, 8, 8), torch.zeros(2, 3, 8, 9)
        >>> are_alike(image, image[:1]), are_alike(image, wide), are_alike((image, True), (image, False))
        (True, False, False)
        >>> are_alike(([image[0]],), ([image[1]],))  # a list of images
        False
    """
    (leaves, tree), (others, other_tree) = tree_flatten(one), tree_flatten(other)
    if tree != other_tree or examples_in(one) is None or examples_in(other) is None:
        return False
    return all(_are_alike(leaf, match) for leaf, match in zip(leaves, others, strict=True))


def _are_alike(leaf: Any, match: Any) -> bool:
    if isinstance(leaf, Tensor) and isinstance(match, Tensor):
        kinds = [(each.shape[1:], each.dtype, each.device, each.layout) for each in (leaf, match)]
        return kinds[0] == kinds[1]
    return leaf is match or (isinstance(leaf, bool | int | float | str) and leaf == match)


def is_the_same_together(model: nn.Module, one: Inputs, other: Inputs) -> bool:
    """Whether a model gives for two batches together what it gives for each, one behind the other.

    It does not where their first dimension counts the steps of sequences, say.

    Args:
        model: The model, in evaluation mode.
        one: A batch.
        other: A batch that is alike.
    """
    try:
        both = tensors_in(call_model(model, put_together([one, other])))
    except Exception:  # it takes as many as it was made for
        return False
    firsts, seconds = tensors_in(call_model(model, one)), tensors_in(call_model(model, other))
    if not len(both) == len(firsts) == len(seconds):
        return False
    return all(_is_both(*each) for each in zip(both, firsts, seconds, strict=True))


def _is_both(both: Tensor, first: Tensor, second: Tensor) -> bool:
    if not first.dim() or first.shape[1:] != second.shape[1:]:
        return False
    apart = torch.cat([first, second])
    return both.shape == apart.shape and torch.allclose(both, apart, rtol=_ROUNDING, atol=_ROUNDING)


def put_together(batches: Sequence[Inputs]) -> Inputs:
    """One batch of several that are alike."""
    if len(batches) == 1:
        return batches[0]
    found = [tree_flatten(each) for each in batches]
    leaves = [
        torch.cat(each) if isinstance(each[0], Tensor) else each[0]
        for each in zip(*(leaves for leaves, _ in found), strict=True)
    ]
    together: Inputs = tree_unflatten(leaves, found[0][1])
    return together
