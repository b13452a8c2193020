"""One cut to a budget and its repair: no labels, no training, no setting."""

from __future__ import annotations

import glob
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only

from secateurs.criteria.batches import batch_on
from secateurs.criteria.unit_reads import unrankable
from secateurs.errors import BudgetError, ScoreError, TraceError, some
from secateurs.graph import Inputs, trace
from secateurs.graph.groups import Graph
from secateurs.graph.inference import outside_inference_mode
from secateurs.graph.running import device_of
from secateurs.planning.budgets import AtMost, Budget
from secateurs.planning.limits import Least
from secateurs.pruning import Step, prune_steps
from secateurs.recovery.batches import examples_in

_SHOWN = 2  # examples of the first batch that the model is traced and proved with


@outside_inference_mode
def prune(
    model: nn.Module,
    data: Iterable[Any],
    budget: Budget | AtMost | None = None,
    *,
    inputs: Inputs | None = None,
    images: int = 2000,
    kinds: Collection[str] | None = None,
    skip: Sequence[str] = (),
    shares: Mapping[str, float] | None = None,
    min_units: Least = 1,
    round_to: int = 1,
) -> Step:
    """Cut a model to a budget and heal it, on data without labels and without training.

    What ``secateurs prune --target`` does, in one process and on any model: the units leave that those who
    read them can do without best (`Reconstruction`), each group loses as many as cost least for what they
    save (``allocation="error"``), the cut is proved (`verify`), and what reads the rest is refitted to what
    the model gave before (:func:`secateurs.recovery.repair`). Whatever else is wanted, such as another
    criterion, several rounds or training in between, is `prune_steps`.

    Args:
        model: The model; it is not changed.
        data: Batches of what the model was trained on, without augmentation: inputs, or pairs of inputs and
            targets, which are not read. Their first dimension counts examples.
        budget: What remains, in MACs, parameters, bytes, units or latency: a share, or with `AtMost` a
            number; None where `shares` say it.
        inputs: Example inputs that the model is traced, proved and timed with; the first two examples of the
            first batch if None.
        images: Examples to rank and repair on: batches are taken until there are as many, and kept meanwhile.
        kinds: See `plan`.
        skip: See `plan`.
        shares: See `plan`.
        min_units: See `plan`.
        round_to: See `plan`.

    Returns:
        The smaller model (``.model``), with the plan, the proof and what the repair did. Groups that cannot
        be ranked so, such as what only makes biases of positions, stay whole: ``.scores.missing`` has them.

    Raises:
        ScoreError: There is no batch, or `data` is no iterable of batches.
        BudgetError: The budget is out of reach.
        VerifyError: The cut was wrong.

    Example:
        >>> import torch
        >>> net = nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 2))
        >>> step = prune(net, torch.randn(64, 4).split(16), Budget(macs=0.5))
        >>> step.model[0].out_features, step.repaired.images
        (8, 64)
    """
    if isinstance(data, Tensor):
        raise ScoreError(
            f"data is one tensor of shape {tuple(data.shape)}, and batches are needed", fix="data.split(32)"
        )
    chosen = list(_first(data, images))
    if not chosen:
        raise ScoreError("the data has no batches", fix="pass a loader that yields inputs")
    device = device_of(model)
    whole = batch_on(chosen[0], device, labelled=False)[0] if inputs is None else inputs
    example = _few(whole) if inputs is None else inputs
    graph, example = _traced(model, example, whole)
    batches = (batch_on(batch, device, labelled=False)[0] for batch in chosen)
    unread = unrankable(model, graph, example, batches)
    try:
        (step,) = prune_steps(
            model,
            example,
            criterion="reconstruction",
            budget=budget,
            data=chosen,
            kinds=kinds,
            skip=(*skip, *map(glob.escape, unread)),
            shares=shares,
            min_units=min_units,
            round_to=round_to,
            allocation="error",
            repair="reconstruct",
        )
    except BudgetError as error:
        if not unread or (budget is None and shares is None):
            raise
        message = f"{error.message}, as reconstruction ranks no units of {some(list(unread))}"
        fix = (
            f"secateurs.prune_steps(..., criterion='l2', repair='reconstruct') ranks them too; or {error.fix}"
        )
        raise BudgetError(message, where=error.where, fix=fix) from error
    return step


def _first(data: Iterable[Any], images: int) -> Iterator[Any]:
    """Whole batches, until they hold as many examples."""
    seen = 0
    for batch in data:
        yield batch
        tensors = (leaf for leaf in tree_leaves(batch) if isinstance(leaf, Tensor) and leaf.dim())
        seen += next((len(tensor) for tensor in tensors), 0)
        if seen >= images:
            return


def _traced(model: nn.Module, few: Inputs, whole: Inputs) -> tuple[Graph, Inputs]:
    """The graph, and what it was traced on: a few examples, or all of them where these do not suffice."""
    try:
        graph = trace(model, few)
    except TraceError:  # such as sequences whose first dimension counts steps
        return trace(model, whole), whole
    if graph.path and few is not whole:  # which experts the examples come to, and what these cost
        return trace(model, whole), whole
    return graph, few


def _few(inputs: Inputs) -> Inputs:
    """The first examples of a batch; the whole one where it cannot be told what counts them."""
    if examples_in(inputs) is None:
        return inputs
    few: Inputs = tree_map_only(Tensor, lambda tensor: tensor[:_SHOWN], inputs)
    return few
