"""Iterative pruning as a generator of steps: the caller owns the training loop."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from secateurs.criteria.protocol import Scores
from secateurs.criteria.scoring import AnyCriterion, LossFunction, score
from secateurs.errors import BudgetError
from secateurs.graph import Cost, Graph, Inputs, trace
from secateurs.planning.budgets import Budget, Remove
from secateurs.planning.plan import Plan
from secateurs.planning.ranking import Scope, candidates, plan
from secateurs.surgery.apply import apply
from secateurs.surgery.verify import VerifyReport, verify


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Step:
    """One round of rank and cut.

    Args:
        number: 1 for the first step.
        model: The pruned model; train it before the next step.
        plan: What left in this step, as a plan for the previous step's model.
        scores: The importances that decided.
        graph: The graph that was cut.
        verified: The proof that the cut was right.
    """

    number: int
    model: nn.Module
    plan: Plan
    scores: Scores
    graph: Graph
    verified: VerifyReport


def prune_steps(
    model: nn.Module,
    inputs: Inputs,
    *,
    criterion: AnyCriterion = "taylor",
    budget: Budget | Remove,
    steps: int = 1,
    data: Iterable[Any] | None = None,
    loss_fn: LossFunction | None = None,
    scope: Scope = "global",
    round_to: int = 1,
    kinds: Collection[str] | None = None,
    skip: Sequence[str] = (),
) -> Iterator[Step]:
    """Prune in steps: rank, cut, verify, hand over; and again when the caller asks for the next.

    Args:
        model: The model; it is not changed.
        inputs: Example inputs, with real values for the verification.
        criterion: How units are ranked; ranked anew in every step.
        budget: A `Budget` is what remains of the *first* model after the last step, and the steps in between
            are spaced geometrically; a `Remove` is the number of units that leave in *each* step.
        steps: Number of steps.
        data: Batches for criteria that need data.
        loss_fn: Loss for criteria that need data.
        scope: See `plan`.
        round_to: See `plan`.
        kinds: See `plan`.
        skip: See `plan`.

    Yields:
        A `Step`; whatever is done to ``step.model`` before the next one counts.

    Raises:
        BudgetError: The budget is out of reach, or `steps` is not positive.
        VerifyError: A cut was wrong.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> net = nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 2))
        >>> goal = Budget(macs=0.25)
        >>> for step in prune_steps(net, torch.randn(1, 4), criterion="l2", budget=goal, steps=2):
        ...     print(step.number, step.model[0].out_features)
        1 8
        2 4
    """
    if steps < 1:
        raise BudgetError(f"steps >= 1 must hold, got steps={steps}")
    current, graph = model, trace(model, inputs)
    whole, total = graph.cost(), _units(graph, kinds, skip)
    left = total
    for number in range(1, steps + 1):
        scores = score(current, graph, criterion, data=data, loss_fn=loss_fn)
        here = budget
        if isinstance(budget, Budget):
            goal = budget.share ** (number / steps)
            here = _share_now(budget.quantity, goal, graph, whole, (total, left, _units(graph, kinds, skip)))
        decided = plan(graph, scores, here, scope=scope, round_to=round_to, kinds=kinds, skip=skip)
        smaller = apply(current, decided)
        report = verify(current, smaller, decided, inputs).raise_if_failed()
        yield Step(number=number, model=smaller, plan=decided, scores=scores, graph=graph, verified=report)
        current, left = smaller, left - len(decided)
        if number < steps:
            graph = trace(current, inputs)


def _units(graph: Graph, kinds: Collection[str] | None, skip: Sequence[str]) -> int:
    return sum(group.size for group in candidates(graph, kinds=kinds, skip=skip))


def _share_now(quantity: str, goal: float, graph: Graph, whole: Cost, units: tuple[int, int, int]) -> Budget:
    """The share of the current model that is to remain, from the share of the first one.

    Units are counted by what has left: a group that is down to its last unit is no longer in the graph.
    """
    if quantity == "units":
        total, left, here = units
        return Budget(units=min(1.0, max((goal * total - (left - here)) / here, 1e-9)))
    params, macs = graph.cost().share_of(whole)
    return Budget(**{quantity: min(1.0, goal / (params if quantity == "params" else macs))})
