"""Finding where the examples of a batch lie in what weights read.

Images and rows count examples in their first dimension. A sequence may count them in its second, and an
attention layer may lay positions and examples out in one dimension, in either order. No shape tells these
apart, but two examples do: run in one order and in the other, they change places where they lie, and nothing
else changes.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from secateurs.criteria.observed import EXAMPLES_FIRST, Layout
from secateurs.criteria.readings import Gates, Place
from secateurs.graph.groups import Graph
from secateurs.graph.running import call_model

_AGREES = 1e-2  # of the largest value; low precision may round two orders differently


def find_layouts(
    model: nn.Module, graph: Graph, device: torch.device, inputs: Any, examples: int
) -> dict[Place, Layout | None]:
    """The layouts that are not certain from the trace.

    Args:
        model: The model, in evaluation mode.
        graph: Its graph.
        device: Where it runs.
        inputs: A batch of at least two examples.
        examples: How many.

    Returns:
        For each place that is read its layout; None where the examples cannot be told apart.
    """
    unsure = {(read.call, read.argument) for read in graph.reads if not read.examples_first}
    if not unsure:
        return {}
    pair = tree_map_only(Tensor, lambda t: t[:2] if t.dim() and len(t) == examples else t, inputs)
    count = min(examples, 2)
    try:
        one = _activations(model, graph, device, pair, count)
    except Exception:  # a model that is written for one size of batch
        pair, count = inputs, examples
        one = _activations(model, graph, device, pair, count)
    turned = tree_map_only(Tensor, lambda t: t.flip(0) if t.dim() and len(t) == count else t, pair)
    other = _activations(model, graph, device, turned, count)
    both = one.keys() & other.keys()
    return {
        place: _layout(*one[place], other[place][0], count) if place in both else None for place in unsure
    }


class _Keep(Gates):
    """Keeps what is read, and along which dimensions its units lie."""

    def __init__(self, graph: Graph, device: torch.device) -> None:
        super().__init__(graph, device)
        self.kept: dict[Place, tuple[Tensor, set[int]]] = {}

    def gate(self, value: Tensor, place: Place, dims: Any) -> Tensor:
        """Keep the value and let it pass."""
        self.kept[place] = value.detach().clone(), {dim for dim, _ in dims}
        return value


def _activations(
    model: nn.Module, graph: Graph, device: torch.device, inputs: Any, examples: int
) -> dict[Place, tuple[Tensor, set[int]]]:
    keep = _Keep(graph, device)
    keep.begin(examples, graph.numbers_in(model, inputs))
    with torch.no_grad(), keep:
        call_model(model, inputs)
    return keep.kept


def _layout(one: Tensor, of_units: set[int], other: Tensor, examples: int) -> Layout | None:
    """The layout under which turning the examples round is what happened."""
    found: list[tuple[float, Layout]] = []
    if one.shape == other.shape and one.numel():
        scale = float(one.abs().max().clamp(min=1e-30))
        for layout in _candidates(one, of_units, examples):
            at = layout.dim
            parts = one.unflatten(at, layout.parts(one.shape[at], examples))
            turned = parts.flip(at + 1).reshape(one.shape)
            found.append((float((turned - other).abs().max()) / scale, layout))
    best = min(found, key=lambda each: each[0], default=(1.0, EXAMPLES_FIRST))  # the first of equals
    return best[1] if best[0] < _AGREES else None


def _candidates(tensor: Tensor, of_units: set[int], examples: int) -> Iterator[Layout]:
    for dim in range(tensor.dim()):
        if dim in of_units or tensor.shape[dim] % examples:
            continue
        each = tensor.shape[dim] // examples
        yield Layout(dim)
        yield from (Layout(dim, inner) for inner in range(1, each) if each % inner == 0)
