"""`score`: importances for every unit of a graph, by any number of criteria in one pass over the data."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any, TypeAlias, overload

import torch
from torch import Tensor, nn

from secateurs.criteria.batches import LossFunction
from secateurs.criteria.normalizations import Normalization, check_normalization, normalized
from secateurs.criteria.protocol import Criterion, Scores, WeightFunction, resolve
from secateurs.criteria.sweep import needs_loss, sweep
from secateurs.errors import ScoreError, UnrankedError
from secateurs.graph.copying import tensors_of
from secateurs.graph.groups import Graph, Group
from secateurs.graph.inference import outside_inference_mode
from secateurs.graph.running import has_values

AnyCriterion: TypeAlias = str | Criterion | WeightFunction


@overload
def score(  # type: ignore[overload-overlap]
    model: nn.Module,
    graph: Graph,
    criterion: AnyCriterion,
    *,
    data: Iterable[Any] | None = ...,
    loss_fn: LossFunction | None = ...,
    normalization: Normalization = ...,
) -> Scores: ...


@overload
def score(
    model: nn.Module,
    graph: Graph,
    criterion: Sequence[AnyCriterion],
    *,
    data: Iterable[Any] | None = ...,
    loss_fn: LossFunction | None = ...,
    normalization: Normalization = ...,
) -> dict[str, Scores]: ...


@outside_inference_mode
def score(
    model: nn.Module,
    graph: Graph,
    criterion: AnyCriterion | Sequence[AnyCriterion],
    *,
    data: Iterable[Any] | None = None,
    loss_fn: LossFunction | None = None,
    normalization: Normalization = None,
) -> Scores | dict[str, Scores]:
    """How much each unit matters, larger means keep.

    Runs in evaluation mode, whatever mode the model is in, and leaves no trace in it. All criteria share one
    pass over the data, which runs forward only where none of them needs gradients. Under ``torch.autocast``
    it runs in mixed precision. In several processes (``accelerate launch``), each with its share of the
    batches, all get the importances of the whole data.

    Args:
        model: The model that the graph was traced from.
        graph: The graph.
        criterion: A name of `secateurs.criteria.names`, a `Criterion`, or a function
            ``(group, weights) -> (units,)``; or a sequence of these, for one pass over the data.
        data: Batches ``(inputs, targets)``, for criteria that need data; the first dimension counts examples.
            Where no criterion needs a loss, a batch may be the inputs alone.
        loss_fn: ``loss_fn(outputs, targets)``, the mean over the batch.
        normalization: Per group: ``"none"``, ``"l2"``, ``"l1"``, ``"max"``, ``"mean"``; ``"kind"`` over all
            units of a kind; ``"flops"`` for `FlopsPenalty`. Each criterion's own by default: ``"l2"`` for the
            Taylor criteria, ``"kind"`` for sizes of weights.

    Returns:
        Importances by group name, ``(units,)`` in float64; for a sequence of criteria these by its name.
        Groups that a criterion has nothing to rank by are not in them; `Scores.missing` says why.

    Raises:
        ScoreError: Data, loss or gradients are missing, or the loss is not finite.
        UnknownNameError: A criterion or normalisation that is not known.

    Example:
        >>> import torch, secateurs
        >>> from torch import nn
        >>> net = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))
        >>> graph, data = secateurs.trace(net, torch.zeros(1, 4)), [torch.randn(8, 4)]
        >>> secateurs.score(net, graph, ["l2", "apoz"], data=data)  # forward only: no loss is needed
        {'l2': Scores('l2', 1 groups, 3 units), 'apoz': Scores('apoz', 1 groups, 3 units)}
    """
    several = isinstance(criterion, Sequence) and not isinstance(criterion, str)
    wanted = [resolve(item) for item in criterion] if several else [resolve(criterion)]  # type: ignore[union-attr, arg-type]
    check_normalization(normalization)
    observers = [item for _, item in wanted if item.needs_data]
    if observers and not has_values(model):
        raise _without_values(observers[0])
    if observers:
        sweep(model, graph, observers, _checked(wanted, data, loss_fn), loss_fn)
    weights = tensors_of(model)
    scores = {}
    for name, item in wanted:
        raw, missing = {}, {}
        for group in graph.groups:
            try:
                raw[group.name] = _importance(item, _without_tables(group, weights), weights)
            except UnrankedError as error:
                missing[group.name] = error
        if missing and not raw:
            raise next(iter(missing.values()))
        values = normalized(raw, normalization, item, graph)
        curves = {group: item.curve(graph.by_name[group]) for group in values} if item.has_curves else None
        scores[name] = Scores(name, values, curves=curves, remark=item.remark, missing=missing)
    return scores if several else scores[wanted[0][0]]


def _without_tables(group: Group, weights: dict[str, Tensor]) -> Group:
    """The group without tables of whole numbers, such as positions: their size says nothing."""
    parts = tuple(
        part
        for part in group.slices
        if part.parameter not in weights
        or weights[part.parameter].is_floating_point()
        or weights[part.parameter].is_complex()
    )
    return group if len(parts) == len(group.slices) else replace(group, slices=parts)


def _without_values(criterion: Criterion) -> ScoreError:
    message = f"{criterion.name} reads weights, and on the meta device they have no values"
    return ScoreError(message, fix="load the weights on a real device first; 'random' needs none")


def _importance(criterion: Criterion, group: Group, weights: dict[str, Tensor]) -> Tensor:
    found = torch.as_tensor(criterion.importance(group, weights)).detach()
    if found.is_meta:
        raise _without_values(criterion)
    values = found.cpu().double()
    if values.shape != (group.size,):
        raise ScoreError(
            f"a criterion gives one importance a unit: group {group.name!r} has {group.size} units, "
            f"got shape {tuple(values.shape)}"
        )
    return values


def _checked(
    wanted: Sequence[tuple[str, Criterion]], data: Iterable[Any] | None, loss_fn: LossFunction | None
) -> Iterable[Any]:
    """The data, if all that is needed was given."""
    needy = next((name for name, item in wanted if needs_loss(item)), None)
    missing = [name for name, given in (("data", data), ("loss_fn", loss_fn)) if given is None]
    if needy is not None and missing:
        raise ScoreError(
            f"{needy} needs gradients, but {' and '.join(missing)} was not given",
            fix="score(model, graph, criterion, data=loader, loss_fn=torch.nn.functional.cross_entropy)",
        )
    if data is None:
        needy = next(name for name, item in wanted if item.needs_data)
        raise ScoreError(
            f"{needy} needs activations, but data was not given",
            fix="score(model, graph, criterion, data=loader)",
        )
    return data
