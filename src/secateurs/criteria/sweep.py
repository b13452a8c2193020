"""One pass over the data that shows several criteria all they need; nothing is kept from batch to batch."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from secateurs.channels_last import ChannelsLast
from secateurs.criteria.batches import LossFunction, batch_on
from secateurs.criteria.layouts import find_layouts
from secateurs.criteria.observed import Batch, Layout, Reading
from secateurs.criteria.processes import add_up, are_several
from secateurs.criteria.protocol import Criterion
from secateurs.criteria.readings import Gates, Place, scoring_mode
from secateurs.errors import ScoreError
from secateurs.graph.copying import tensors_of
from secateurs.graph.groups import Graph
from secateurs.graph.running import device_of
from secateurs.recovery.batches import examples_in


def needs_loss(criterion: Criterion) -> bool:
    """Whether a criterion needs a loss, or gradients that come from one."""
    asks = criterion.readings == "gradients" or criterion.weight_gradients or criterion.needs_loss
    return criterion.needs_data and asks


def sweep(
    model: nn.Module,
    graph: Graph,
    criteria: Sequence[Criterion],
    data: Iterable[Any],
    loss_fn: LossFunction | None,
) -> None:
    """Show all batches to all criteria, and add up what several processes saw.

    There is a backward pass only if a criterion needs gradients.

    Raises:
        ScoreError: There is no batch, a batch is of the wrong form, or the loss is no finite number.
    """
    device = device_of(model)
    for criterion in criteria:
        criterion.start(graph, device)
    batches = _Sweep(model, graph, criteria, loss_fn, device)
    seen = torch.zeros((), dtype=torch.float64, device=device)
    gradients = any(needs_loss(criterion) for criterion in criteria)
    with scoring_mode(model, gradients=gradients), ChannelsLast(device) as channels_last:
        for item in data:
            seen += batches.run(item, channels_last)
    add_up(seen)
    if not seen:
        raise ScoreError("the data has no batches", fix="pass a loader that yields (inputs, targets)")
    if are_several():
        for criterion in criteria:
            criterion.combine()


class _Sweep:
    """Makes batches of the data, and shows each to all criteria."""

    def __init__(
        self,
        model: nn.Module,
        graph: Graph,
        criteria: Sequence[Criterion],
        loss_fn: LossFunction | None,
        device: torch.device,
    ) -> None:
        self._model, self._graph, self._device, self._loss_fn = model, graph, device, loss_fn
        self._needs_loss = any(needs_loss(criterion) for criterion in criteria)
        self._of_batches, self._of_examples = (
            _Passes(model, graph, [each for each in criteria if _is_of_examples(each) == of_examples], device)
            for of_examples in (False, True)
        )
        self._all = _Passes(model, graph, criteria, device)
        self._layouts: Mapping[Place, Layout | None] | None = None

    def run(self, item: Any, channels_last: ChannelsLast) -> int:
        """One batch; gives its number of examples.

        Where these cannot be told apart, as behind a mixture that deals them out to experts, criteria that go
        by examples see one after the other.
        """
        inputs, targets, examples = batch_on(item, self._device, labelled=self._needs_loss)
        channels_last.choose(inputs, self._model)
        if examples > 1 and self._layouts is None:
            self._layouts = find_layouts(self._model, self._graph, self._device, inputs, examples)
        are_told_apart = None not in (self._layouts or {}).values()
        if are_told_apart or not self._of_examples.criteria or examples_in(inputs) != examples:
            self._all.run(self._batch(inputs, targets, examples))
            return examples
        if self._of_batches.criteria:
            self._of_batches.run(self._batch(inputs, targets, examples))
        for number in range(examples):
            one, target = tree_map_only(Tensor, partial(_example, number, examples), (inputs, targets))
            self._of_examples.run(self._batch(one, target, 1))
        return examples

    def _batch(self, inputs: Any, targets: Any, examples: int) -> Batch:
        return Batch(
            model=self._model,
            inputs=inputs,
            targets=targets,
            examples=examples,
            loss_fn=self._loss_fn,
            layouts=self._layouts or {},
            numbers=self._graph.numbers_in(self._model, inputs),
        )


def _is_of_examples(criterion: Criterion) -> bool:
    """Whether a criterion looks at single examples, and not at sums over a batch."""
    return criterion.readings != "none" or (needs_loss(criterion) and not criterion.weight_gradients)


def _example(number: int, examples: int, tensor: Tensor) -> Tensor:
    """One example of a batch, as a batch; what does not count examples is the same for all."""
    return tensor[number : number + 1] if tensor.dim() and len(tensor) == examples else tensor


class _Passes:
    """Runs the model on one batch after the other, for some criteria."""

    def __init__(
        self, model: nn.Module, graph: Graph, criteria: Sequence[Criterion], device: torch.device
    ) -> None:
        self.criteria = criteria
        self._model, self._graph = model, graph
        self._looking = [each for each in criteria if each.readings == "activations"]
        self._observing = [each for each in criteria if each.readings == "gradients"]
        self._of_weights = [each for each in criteria if each.weight_gradients]
        self._gates = Gates(
            graph,
            device,
            self._tell(self._observing) if self._observing else None,
            look=self._tell(self._looking) if self._looking else None,
        )

    @staticmethod
    def _tell(criteria: Sequence[Criterion]) -> Any:
        def tell(reading: Reading) -> None:
            for criterion in criteria:
                criterion.observe(reading)

        return tell

    def run(self, batch: Batch) -> None:
        """Show a batch to the criteria."""
        for criterion in self.criteria:
            criterion.begin_batch(batch)
        if self._looking or self._observing or self._of_weights:
            self._pass(batch)
        for criterion in self.criteria:
            criterion.end_batch(batch.examples)

    def _pass(self, batch: Batch) -> None:
        self._gates.layouts = dict(batch.layouts)
        self._gates.begin(batch.examples, batch.numbers)
        if not (self._observing or self._of_weights):
            with torch.no_grad(), self._gates:
                batch.outputs()
            return
        wanted = _makers(self._model, self._graph) if self._of_weights else {}
        with _asking(wanted):
            with self._gates:
                outputs = batch.outputs()
            (batch.loss(outputs) * batch.examples).backward()
            gradients = {
                name: torch.zeros_like(weight) if weight.grad is None else weight.grad / batch.examples
                for name, weight in wanted.items()
            }
        for criterion in self._of_weights:
            criterion.observe_gradients(gradients, wanted, batch)


def _makers(model: nn.Module, graph: Graph) -> dict[str, Tensor]:
    """The parameters in which units live, by name."""
    tensors = tensors_of(model)
    names = dict.fromkeys(part.parameter for group in graph.groups for part in group.slices)
    return {name: tensors[name] for name in names if isinstance(tensors[name], nn.Parameter)}


@contextmanager
def _asking(weights: dict[str, Tensor]) -> Iterator[None]:
    """These parameters take gradients meanwhile; the gradients that they had are theirs again afterwards."""
    kept = {name: (weight.requires_grad, weight.grad) for name, weight in weights.items()}
    try:
        for weight in weights.values():
            weight.requires_grad_(True)
            weight.grad = None
        yield
    finally:
        for name, weight in weights.items():
            flag, gradient = kept[name]
            weight.requires_grad_(flag)
            weight.grad = gradient
