"""The batches of a training run: what one is, how they are drawn, gathered and mixed."""

from __future__ import annotations

from collections.abc import Generator, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.distributions import Beta
from torch.utils._pytree import tree_leaves, tree_map

from secateurs.errors import TrainingError


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """Some samples.

    Attributes:
        inputs: What the model is called with.
        targets: What it should say; ``None`` where nobody knows.
        others: The targets of the samples that these were mixed with, if they were.
        share: How much of each sample is its own.
    """

    inputs: Any
    targets: Any
    others: Any = None
    share: float = 1.0

    @classmethod
    def of(cls, data: Any) -> Batch:
        """A pair ``(inputs, targets)``, or inputs alone.

        Example:
            >>> Batch.of(torch.zeros(3, 2)).targets is None, len(Batch.of([torch.zeros(3, 2), [0, 1, 1]]))
            (True, 3)
        """
        if isinstance(data, (tuple, list)) and len(data) in (1, 2):
            return cls(inputs=data[0], targets=data[1] if len(data) == 2 else None)
        return cls(inputs=data, targets=None)

    def __len__(self) -> int:
        for leaf in (*tree_leaves(self.targets), *tree_leaves(self.inputs)):
            if isinstance(leaf, Tensor) and leaf.dim():
                return len(leaf)
        if isinstance(self.targets, (tuple, list)):
            return len(self.targets)
        raise TrainingError(
            "a batch is (inputs, targets) with tensors whose first dimension counts samples, got "
            f"{type(self.inputs).__name__} and {type(self.targets).__name__}"
        )

    def mixed(self, alpha: float) -> Batch:
        """Each sample mixed with another of the batch, by a share drawn from ``Beta(alpha, alpha)``."""
        share = float(Beta(alpha, alpha).sample())
        order = torch.randperm(len(self))

        def mix(leaf: Any) -> Any:
            if not isinstance(leaf, Tensor) or not leaf.is_floating_point():
                return leaf
            return torch.lerp(leaf[order.to(leaf.device)], leaf, share)

        def swap(leaf: Any) -> Any:
            return leaf[order.to(leaf.device)] if isinstance(leaf, Tensor) else leaf

        others = tree_map(swap, self.targets)
        return replace(self, inputs=tree_map(mix, self.inputs), others=others, share=share)


def examples_in(inputs: Any) -> int | None:
    """How many examples a model is called with: the first dimension that its tensors have in common.

    Returns:
        None where they have none in common, or where tensors lie deeper, as images of several sizes do in a
        list: their first dimension counts something else.

    Example:
        >>> image = torch.zeros(3, 8, 8)
        >>> examples_in(image[None]), examples_in({"image": image[None], "scale": 2.0})
        (1, 1)
        >>> examples_in(([image, image],)) is None
        True
    """
    if isinstance(inputs, Mapping):
        inputs = list(inputs.values())
    values = inputs if isinstance(inputs, (tuple, list)) else [inputs]
    lengths = set()
    for value in values:
        is_plain = isinstance(value, Tensor) and not value.is_nested and value.dim()
        if is_plain:
            lengths.add(len(value))
        elif any(isinstance(leaf, Tensor) for leaf in tree_leaves(value)):
            return None
    return lengths.pop() if len(lengths) == 1 else None


def gathered(batches: Iterable[Any], count: int) -> Iterator[list[Batch]]:
    """Lists of ``count`` batches; the last may be shorter.

    Example:
        >>> [len(some) for some in gathered([torch.zeros(2, 1)] * 5, 2)]
        [2, 2, 1]
    """
    some: list[Batch] = []
    for data in batches:
        some.append(Batch.of(data))
        if len(some) == count:
            yield some
            some = []
    if some:
        yield some


def drawn_apart(batches: Iterable[Any], seed: int) -> Generator[Any, None, None]:
    """The same batches, fetched with random numbers of their own.

    What fetching draws (an order, a crop) then follows from ``seed`` and the place in the epoch alone, and
    not from what the network drew in between: a resumed epoch skips batches and gets those that it missed.
    """
    own = torch.Generator().manual_seed(seed).get_state()
    source: Iterator[Any] | None = None
    while True:
        outer = torch.get_rng_state()
        torch.set_rng_state(own)
        try:
            source = iter(batches) if source is None else source
            data = next(source)
        except StopIteration:
            return
        finally:
            own = torch.get_rng_state()
            torch.set_rng_state(outer)
        yield data
