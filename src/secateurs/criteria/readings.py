"""One forward and backward pass that shows what is read of every unit, and its gradient."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_flatten, tree_unflatten

from secateurs.criteria.observed import EXAMPLES_FIRST, Layout, Reading, UnitIndex
from secateurs.errors import ScoreError
from secateurs.graph.attributes_kept import as_traced, passes_alike
from secateurs.graph.calls import is_numbered
from secateurs.graph.copying import foreign_hooks_unseen
from secateurs.graph.exchange import attention_written_out
from secateurs.graph.groups import NO_UNIT, Graph, UnitRead
from secateurs.graph.running import attention_as_written, frozen, modes_kept

Place: TypeAlias = tuple[int, int]  # number of the torch function call, position among its tensors


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
        observe: Called in the backward pass with every reading; None where there is to be none.
        look: Called in the forward pass with every reading, without gradients.
        layouts: Where the examples lie in what is read, by call and argument.
    """

    def __init__(
        self,
        graph: Graph,
        device: torch.device,
        observe: Callable[[Reading], None] | None = None,
        *,
        look: Callable[[Reading], None] | None = None,
        layouts: Mapping[Place, Layout | None] | None = None,
    ) -> None:
        super().__init__()
        self._observe, self._look = observe, look
        self._reads: dict[int, dict[int, list[tuple[int, UnitIndex]]]] = {}
        for read in graph.reads:
            units = torch.from_numpy(read.units).to(device)
            index = UnitIndex(torch.where(units == NO_UNIT, graph.units, units), graph.units)
            self._reads.setdefault(read.call, {}).setdefault(read.argument, []).append((read.dim, index))
        self._names = {read.call: _where(read) for read in graph.reads}
        self.layouts = dict(layouts or {})
        self._call = 0
        self._numbers: Sequence[int] | None = None
        self.examples = 0

    def begin(self, examples: int, numbers: Sequence[int] | None = None) -> None:
        """A forward pass on a batch of that many examples follows.

        Args:
            examples: How many.
            numbers: Those that its calls have in the trace, where it makes others.
        """
        self._call, self.examples, self._numbers = 0, examples, numbers

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if not is_numbered(func):
            return func(*args, **(kwargs or {}))
        number = self._call if self._numbers is None else self._numbers[self._call]
        self._call += 1
        reads = self._reads.get(number)
        if reads:
            args, kwargs = self._gated(number, reads, args, kwargs or {})
        return func(*args, **(kwargs or {}))

    def _gated(
        self, number: int, reads: dict[int, list[tuple[int, UnitIndex]]], args: Any, kwargs: Any
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        leaves, structure = tree_flatten((args, kwargs))
        places = [place for place, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]
        for argument, dims in reads.items():
            if argument >= len(places) or not self._fits(leaves[places[argument]], dims):
                raise ScoreError(
                    "the model takes another path on this data than in the trace",
                    where=self._names[number],
                    fix="trace with inputs like the data, and pass data of one shape",
                )
            here = (number, argument)
            leaves[places[argument]] = self.gate(leaves[places[argument]], here, dims)
        gated: tuple[tuple[Any, ...], dict[str, Any]] = tree_unflatten(leaves, structure)
        return gated

    def gate(self, value: Tensor, place: Place, dims: Sequence[tuple[int, UnitIndex]]) -> Tensor:
        """What the weights read in place of a value; the value itself, unless a subclass says otherwise."""
        if self._look is not None:
            with torch.no_grad():
                self._show(self._look, value, None, place, dims)
        if self._observe is None:
            return value
        if not value.requires_grad:
            value = value.detach().requires_grad_()
        observe = self._observe
        gated: Tensor = _Gate.apply(value, lambda z, g: self._show(observe, z, g, place, dims))
        return gated

    def _fits(self, tensor: Tensor, dims: Sequence[tuple[int, UnitIndex]]) -> bool:
        return all(tensor.dim() > dim and tensor.shape[dim] == len(index.units) for dim, index in dims)

    def _show(
        self,
        to: Callable[[Reading], None],
        value: Tensor,
        gradient: Tensor | None,
        place: Place,
        dims: Sequence[tuple[int, UnitIndex]],
    ) -> None:
        layout = self.layouts.get(place, EXAMPLES_FIRST)
        for dim, index in dims:
            to(Reading(value, gradient, dim, index, self.examples, layout))


def _where(read: UnitRead) -> str:
    return f"torch function call {read.call} of the forward pass"


@contextmanager
def scoring_mode(model: nn.Module, *, gradients: bool = True) -> Iterator[None]:
    """Evaluation mode, no gradients of parameters, attention as traced; everything put back afterwards.

    All passes find what modules keep in plain attributes as the trace did.

    Args:
        model: The model.
        gradients: Whether activations are to have gradients.
    """
    with (
        modes_kept(model),
        as_traced(model),
        frozen(model),
        foreign_hooks_unseen(model),
        attention_as_written(),
        attention_written_out(model),
        torch.set_grad_enabled(gradients),
        passes_alike(model),
    ):
        model.eval()
        yield
