"""`score`: importances for every unit of a graph, by any number of criteria in one pass over the data."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeAlias, overload

import torch
from torch import Tensor, nn

from secateurs.criteria.batches import LossFunction, batch_on, loss_of
from secateurs.criteria.protocol import Criterion, Reading, Scores, WeightFunction, resolve
from secateurs.criteria.readings import Gates, scoring_mode
from secateurs.errors import ScoreError, UnknownNameError
from secateurs.graph.copying import tensors_of
from secateurs.graph.groups import Graph
from secateurs.graph.running import call_model

AnyCriterion: TypeAlias = str | Criterion | WeightFunction

NORMALIZATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "none": lambda values: values,
    "l2": lambda values: values / values.norm().clamp(min=torch.finfo(torch.float64).tiny),
    "l1": lambda values: values / values.abs().sum().clamp(min=torch.finfo(torch.float64).tiny),
    "max": lambda values: values / values.abs().max().clamp(min=torch.finfo(torch.float64).tiny),
    "mean": lambda values: values / values.abs().mean().clamp(min=torch.finfo(torch.float64).tiny),
}


@overload
def score(  # type: ignore[overload-overlap]
    model: nn.Module,
    graph: Graph,
    criterion: AnyCriterion,
    *,
    data: Iterable[Any] | None = ...,
    loss_fn: LossFunction | None = ...,
    normalization: str | None = ...,
) -> Scores: ...


@overload
def score(
    model: nn.Module,
    graph: Graph,
    criterion: Sequence[AnyCriterion],
    *,
    data: Iterable[Any] | None = ...,
    loss_fn: LossFunction | None = ...,
    normalization: str | None = ...,
) -> dict[str, Scores]: ...


def score(
    model: nn.Module,
    graph: Graph,
    criterion: AnyCriterion | Sequence[AnyCriterion],
    *,
    data: Iterable[Any] | None = None,
    loss_fn: LossFunction | None = None,
    normalization: str | None = None,
) -> Scores | dict[str, Scores]:
    """How much each unit matters, larger means keep.

    Runs in evaluation mode, whatever mode the model is in, and leaves no trace in it.

    Args:
        model: The model that the graph was traced from.
        graph: The graph.
        criterion: A name (``"taylor"``, ``"taylor-signed"``, ``"l1"``, ``"l2"``, ``"random"``), a
            `Criterion`, or a function ``(group, weights) -> (units,)``; or a sequence of these, for one
            pass over the data.
        data: Batches ``(inputs, targets)``, for criteria that need data; the first dimension counts examples.
        loss_fn: ``loss_fn(outputs, targets)``, the mean over the batch.
        normalization: Per group: ``"none"``, ``"l2"``, ``"l1"``, ``"max"`` or ``"mean"``; each criterion's
            own by default (``"l2"`` for the Taylor criteria).

    Returns:
        Importances by group name, ``(units,)`` in float64; for a sequence of criteria these by its name.

    Raises:
        ScoreError: Data, loss or gradients are missing, or the loss is not finite.
        UnknownNameError: A criterion or normalisation that is not known.
    """
    several = isinstance(criterion, Sequence) and not isinstance(criterion, str)
    wanted = [resolve(item) for item in criterion] if several else [resolve(criterion)]  # type: ignore[union-attr, arg-type]
    if normalization is not None and normalization not in NORMALIZATIONS:
        raise UnknownNameError("normalization", normalization, NORMALIZATIONS)
    observers = [item for _, item in wanted if item.needs_data]
    if observers:
        _observe(model, graph, observers, wanted, data, loss_fn)
    weights = tensors_of(model)
    scores = {
        name: Scores(
            name, {group.name: _importance(item, group, weights, normalization) for group in graph.groups}
        )
        for name, item in wanted
    }
    return scores if several else scores[wanted[0][0]]


def _importance(
    criterion: Criterion, group: Any, weights: dict[str, Tensor], normalization: str | None
) -> Tensor:
    values = torch.as_tensor(criterion.importance(group, weights)).detach().cpu().double()
    if values.shape != (group.size,):
        raise ScoreError(
            f"a criterion gives one importance a unit: group {group.name!r} has {group.size} units, "
            f"got shape {tuple(values.shape)}"
        )
    return NORMALIZATIONS[normalization or criterion.normalization](values)


def _observe(
    model: nn.Module,
    graph: Graph,
    observers: Sequence[Criterion],
    wanted: Sequence[tuple[str, Criterion]],
    data: Iterable[Any] | None,
    loss_fn: LossFunction | None,
) -> None:
    if data is None or loss_fn is None:
        needy = next(name for name, item in wanted if item.needs_data)
        missing = " and ".join(
            name for name, given in (("data", data), ("loss_fn", loss_fn)) if given is None
        )
        raise ScoreError(
            f"{needy} needs gradients, but {missing} was not given",
            fix="score(model, graph, criterion, data=loader, loss_fn=torch.nn.functional.cross_entropy)",
        )
    device = next((tensor.device for tensor in tensors_of(model).values()), torch.device("cpu"))
    for observer in observers:
        observer.start(graph, device)

    def observe(reading: Reading) -> None:
        for observer in observers:
            observer.observe(reading)

    gates = Gates(graph, device, observe)
    seen = 0
    with scoring_mode(model):
        for batch in data:
            seen += _one_batch(model, gates, batch, loss_fn, device)
            for observer in observers:
                observer.end_batch(gates.examples)
    if not seen:
        raise ScoreError("the data has no batches", fix="pass a loader that yields (inputs, targets)")


def _one_batch(
    model: nn.Module, gates: Gates, batch: Any, loss_fn: LossFunction, device: torch.device
) -> int:
    inputs, targets, examples = batch_on(batch, device)
    gates.begin(examples)
    with gates:
        outputs = call_model(model, inputs)
    loss = loss_of(loss_fn, outputs, targets, examples)
    if not loss.requires_grad:
        raise ScoreError(
            "the loss does not depend on any unit", fix="pass a loss_fn that uses the model's outputs"
        )
    (loss * examples).backward()
    return examples
