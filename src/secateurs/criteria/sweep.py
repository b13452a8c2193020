"""One pass over the data that shows several criteria all they need; nothing is kept from batch to batch."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from secateurs.channels_last import ChannelsLast
from secateurs.criteria.batches import LossFunction, batch_on
from secateurs.criteria.layouts import find_layouts
from secateurs.criteria.observed import Batch, Reading
from secateurs.criteria.processes import add_up, are_several
from secateurs.criteria.protocol import Criterion
from secateurs.criteria.readings import Gates, scoring_mode
from secateurs.errors import ScoreError
from secateurs.graph.copying import tensors_of
from secateurs.graph.groups import Graph
from secateurs.graph.running import device_of


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
    passes = _Passes(model, graph, criteria, loss_fn, device)
    seen = torch.zeros((), dtype=torch.float64, device=device)
    gradients = any(needs_loss(criterion) for criterion in criteria)
    with scoring_mode(model, gradients=gradients), ChannelsLast(device) as channels_last:
        for item in data:
            seen += passes.run(item, channels_last)
    add_up(seen)
    if not seen:
        raise ScoreError("the data has no batches", fix="pass a loader that yields (inputs, targets)")
    if are_several():
        for criterion in criteria:
            criterion.combine()


class _Passes:
    """Runs the model on one batch after the other."""

    def __init__(
        self,
        model: nn.Module,
        graph: Graph,
        criteria: Sequence[Criterion],
        loss_fn: LossFunction | None,
        device: torch.device,
    ) -> None:
        self._model, self._graph, self._device = model, graph, device
        self._criteria, self._loss_fn = criteria, loss_fn
        self._needs_loss = any(needs_loss(criterion) for criterion in criteria)
        self._looking = [each for each in criteria if each.readings == "activations"]
        self._observing = [each for each in criteria if each.readings == "gradients"]
        self._of_weights = [each for each in criteria if each.weight_gradients]
        self._gates = Gates(
            graph,
            device,
            self._tell(self._observing) if self._observing else None,
            look=self._tell(self._looking) if self._looking else None,
        )
        self._knows_layouts = False

    @staticmethod
    def _tell(criteria: Sequence[Criterion]) -> Any:
        def tell(reading: Reading) -> None:
            for criterion in criteria:
                criterion.observe(reading)

        return tell

    def run(self, item: Any, channels_last: ChannelsLast) -> int:
        """One batch; gives its number of examples."""
        inputs, targets, examples = batch_on(item, self._device, labelled=self._needs_loss)
        channels_last.choose(inputs, self._model)
        if examples > 1 and not self._knows_layouts:
            self._gates.layouts = find_layouts(self._model, self._graph, self._device, inputs, examples)
            self._knows_layouts = True
        batch = Batch(
            model=self._model,
            inputs=inputs,
            targets=targets,
            examples=examples,
            loss_fn=self._loss_fn,
            layouts=self._gates.layouts,
        )
        for criterion in self._criteria:
            criterion.begin_batch(batch)
        if self._looking or self._observing or self._of_weights:
            self._pass(batch)
        for criterion in self._criteria:
            criterion.end_batch(batch.examples)
        return batch.examples

    def _pass(self, batch: Batch) -> None:
        self._gates.begin(batch.examples)
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
