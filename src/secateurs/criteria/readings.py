"""One forward and backward pass that shows what is read of every unit, and its gradient."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_flatten, tree_unflatten

from secateurs.criteria.protocol import Reading
from secateurs.errors import ScoreError
from secateurs.graph.exchange import attention_written_out
from secateurs.graph.groups import NO_UNIT, Graph, UnitRead
from secateurs.graph.running import attention_as_written, frozen, modes_kept
from secateurs.graph.tracing import is_numbered


class _Gate(torch.autograd.Function):
    """The identity, which shows the value and the gradient of what passes in the backward pass."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, show: Callable[[Tensor, Tensor], None]) -> Tensor:
        ctx.save_for_backward(value)
        ctx.show = show
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        (value,) = ctx.saved_tensors
        with torch.no_grad():
            ctx.show(value, gradients[0])
        return gradients[0], None


class Gates(TorchFunctionMode):
    """Puts a gate in front of every place of the graph where weights read units.

    Args:
        graph: The graph of the model.
        device: Where the model runs.
        observe: Called in the backward pass with every reading.
    """

    def __init__(self, graph: Graph, device: torch.device, observe: Callable[[Reading], None]) -> None:
        super().__init__()
        self._observe = observe
        self._unit_count = graph.units
        self._reads: dict[int, dict[int, list[tuple[int, Tensor]]]] = {}
        for read in graph.reads:
            units = torch.from_numpy(read.units).to(device)
            units = torch.where(units == NO_UNIT, graph.units, units)
            self._reads.setdefault(read.call, {}).setdefault(read.argument, []).append((read.dim, units))
        self._names = {read.call: _where(read) for read in graph.reads}
        self._call = 0
        self.examples = 0

    def begin(self, examples: int) -> None:
        """A forward pass on a batch of that many examples follows."""
        self._call, self.examples = 0, examples

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if not is_numbered(func):
            return func(*args, **(kwargs or {}))
        reads = self._reads.get(self._call)
        self._call += 1
        if reads:
            args, kwargs = self._gated(reads, args, kwargs or {})
        return func(*args, **(kwargs or {}))

    def _gated(
        self, reads: dict[int, list[tuple[int, Tensor]]], args: Any, kwargs: Any
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        leaves, structure = tree_flatten((args, kwargs))
        places = [place for place, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]
        for argument, dims in reads.items():
            if argument >= len(places) or not self._fits(leaves[places[argument]], dims):
                raise ScoreError(
                    "the model takes another path on this data than in the trace",
                    where=self._names[self._call - 1],
                    fix="trace with inputs like the data, and pass data of one shape",
                )
            value = leaves[places[argument]]
            if not value.requires_grad:
                value = value.detach().requires_grad_()
            leaves[places[argument]] = _Gate.apply(value, self._show(dims))
        gated: tuple[tuple[Any, ...], dict[str, Any]] = tree_unflatten(leaves, structure)
        return gated

    def _fits(self, tensor: Tensor, dims: Sequence[tuple[int, Tensor]]) -> bool:
        return all(tensor.dim() > dim and tensor.shape[dim] == len(units) for dim, units in dims)

    def _show(self, dims: Sequence[tuple[int, Tensor]]) -> Callable[[Tensor, Tensor], None]:
        def show(value: Tensor, gradient: Tensor) -> None:
            for dim, units in dims:
                self._observe(Reading(value, gradient, dim, units, self._unit_count, self.examples))

        return show


def _where(read: UnitRead) -> str:
    return f"torch function call {read.call} of the forward pass"


@contextmanager
def scoring_mode(model: nn.Module) -> Iterator[None]:
    """Evaluation mode, no gradients of parameters, attention as traced; everything put back afterwards."""
    with (
        modes_kept(model),
        frozen(model),
        attention_as_written(),
        attention_written_out(model),
        torch.enable_grad(),
    ):
        model.eval()
        yield
