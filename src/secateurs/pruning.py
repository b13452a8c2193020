"""Iterative pruning as a generator of steps: the caller owns the training loop."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any, Literal, TypeAlias

from torch import Tensor, nn

from secateurs.aiming import Trial, aim
from secateurs.criteria.batches import LossFunction
from secateurs.criteria.greedy import greedy
from secateurs.criteria.normalizations import Normalization
from secateurs.criteria.protocol import Scores, resolve
from secateurs.criteria.scoring import AnyCriterion, score
from secateurs.errors import BudgetError, TrainingError, UnknownNameError
from secateurs.graph import Graph, Inputs, trace
from secateurs.measure import latency_ms, latency_share
from secateurs.planning.budgets import AtMost, Budget, Remove, nothing_said
from secateurs.planning.families import Scope
from secateurs.planning.limits import Least, Limits, candidates, still_there
from secateurs.planning.plan import Plan
from secateurs.planning.ranking import plan
from secateurs.planning.schedules import Pace, paced_share
from secateurs.recovery.repair import WAYS, Repair
from secateurs.recovery.repair import repair as heal
from secateurs.surgery.apply import apply
from secateurs.surgery.verify import VerifyReport, verify
from secateurs.timing import latency_model

Selector: TypeAlias = Callable[[nn.Module, Graph, Plan], Plan]
Selection: TypeAlias = Literal["independent", "greedy"] | Selector
SELECTIONS = ("greedy", "independent")


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
        repaired: What the repair did, if one was asked for.
    """

    number: int
    model: nn.Module
    plan: Plan
    scores: Scores
    graph: Graph
    verified: VerifyReport
    repaired: Repair | None = None


def prune_steps(
    model: nn.Module,
    inputs: Inputs,
    *,
    criterion: AnyCriterion = "taylor",
    budget: Budget | AtMost | Remove | None = None,
    steps: int = 1,
    data: Iterable[Any] | None = None,
    loss_fn: LossFunction | None = None,
    scope: Scope = "global",
    round_to: int = 1,
    kinds: Collection[str] | None = None,
    skip: Sequence[str] = (),
    shares: Mapping[str, float] | None = None,
    min_units: Least = 1,
    allocation: Mapping[str, int] | Literal["error"] | None = None,
    curves: AnyCriterion | None = None,
    selection: Selection = "independent",
    normalization: Normalization = None,
    pace: Pace = "geometric",
    repair: str = "none",
    repair_data: Iterable[Any] | None = None,
    timed_on: Inputs | None = None,
) -> Iterator[Step]:
    """Prune in steps: rank, cut, verify, hand over; and again when the caller asks for the next.

    Args:
        model: The model; it is not changed.
        inputs: Example inputs, with real values for the verification.
        criterion: How units are ranked; ranked anew in every step.
        budget: A `Budget` is what remains of the *first* model after the last step, and the steps in between
            follow `pace`; an `AtMost` is the same in numbers, of a time as it is measured here; a `Remove` is
            the number of units that leave in *each* step. None where `shares` or `allocation` say it. For a
            budget in latency every step times some cuts, fits a `LatencyModel` to them, and cuts again until
            the share that is *measured* here is met.
        steps: Number of steps.
        data: Batches for criteria that need data.
        loss_fn: Loss for criteria that need data.
        scope: See `plan`.
        round_to: See `plan`.
        kinds: See `plan`.
        skip: See `plan`.
        shares: See `plan`; of the first model's units, after the last step.
        min_units: See `plan`; of the first model's units.
        allocation: See `plan`; after the last step. ``"error"`` takes the error curves of the criterion, or
            where it has none those of ``"reconstruction"``, from the same pass over the data.
        curves: A criterion whose error curves the budget is spent by, where `allocation` holds numbers for
            some groups.
        selection: Which units of a group leave, where the ranking has decided how many: its lowest, ranked
            ``"independent"`` of other groups or ``"greedy"`` (see `secateurs.criteria.greedy`); or a function
            ``(model, graph, plan) -> plan`` that chooses again.
        normalization: See `score`.
        pace: How a `Budget`, and what is given for single groups, is spread over the steps: ``"geometric"``,
            ``"linear"``, ``"cubic"`` or ``"one-shot"``; see `secateurs.planning.paced_share`.
        repair: What heals each cut before it is handed over, as `secateurs.recovery.repair` takes it.
        repair_data: Batches that the repair looks at, labelled or not; `data` if None.
        timed_on: What a forward pass is timed on for a budget in latency; `inputs` if None.

    Yields:
        A `Step`; whatever is done to ``step.model`` before the next one counts.

    Raises:
        BudgetError: The budget is out of reach, or `steps` is not positive.
        VerifyError: A cut was wrong.
        TrainingError: There are no images to repair with.

    Example:
        >>> import torch
        >>> from torch import Tensor, nn
        >>> net = nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 2))
        >>> goal = Budget(macs=0.25)
        >>> for step in prune_steps(net, torch.randn(1, 4), criterion="l2", budget=goal, steps=2):
        ...     print(step.number, step.model[0].out_features)
        1 8
        2 4
    """
    if steps < 1:
        raise BudgetError(f"steps >= 1 must hold, got steps={steps}")
    if repair not in WAYS:
        raise UnknownNameError("repair", repair, WAYS)
    examples = data if repair_data is None else repair_data
    if repair != "none" and examples is None:
        raise TrainingError(f"repair={repair!r} needs images", fix="prune_steps(..., repair_data=batches)")
    if pace == "one-shot" and steps > 1:
        raise BudgetError(f"one-shot is one step, got steps={steps}", fix="steps=1")
    if isinstance(selection, str) and selection not in SELECTIONS:
        raise UnknownNameError("selection", selection, SELECTIONS)
    if budget is None and shares is None and (allocation is None or allocation == "error"):
        raise nothing_said()
    current, graph = model, trace(model, inputs)
    if allocation == "error":
        allocation, curves = None, with_curves(criterion)
    elif isinstance(allocation, str):
        raise UnknownNameError("allocation", allocation, ["error"])
    limits = Limits.of(
        graph, shares=shares, min_units=min_units, allocation=allocation, kinds=kinds, skip=skip
    )
    whole = Amounts.of(graph, kinds=kinds, skip=skip)
    if isinstance(budget, AtMost):
        budget = budget.of(_amount(budget, whole, model, inputs if timed_on is None else timed_on))
    now = whole
    for number in range(1, steps + 1):
        scores, errors = _scored(current, graph, criterion, curves, data, loss_fn, normalization)
        left = still_there(graph, skip) if number > 1 else skip
        kept, least = limits.within(candidates(graph, kinds=kinds, skip=left), number / steps, pace)
        decide = partial(
            plan,
            graph,
            scores,
            scope=scope,
            round_to=round_to,
            kinds=kinds,
            skip=left,
            allocation=kept if budget is None or kept else None,
            curves=errors,
            min_units=least,
        )
        here, found = budget, None
        if isinstance(budget, Budget):
            goal = paced_share(pace, number / steps, budget.share)
            if budget.latency is None:
                here = now.budget_for(budget.quantity, goal, whole)
            else:
                timed = inputs if timed_on is None else timed_on
                decide.keywords["latency"] = latency_model(current, graph, timed)
                found = _aimed(model, current, decide, timed, goal)
                here = Budget(latency=found.forecast)
        if found is None or selection == "greedy":
            rescore = greedy(current, graph, criterion) if selection == "greedy" else None
            decided = decide(here, rescore=rescore)
        else:
            decided = found.plan
        if callable(selection):
            decided = selection(current, graph, decided)
        if found is not None:
            timing = {"forecast": round(found.forecast, 4), "measured": round(found.measured, 4)}
            decided = replace(decided, source={**decided.source, "latency": {**timing, "goal": goal}})
        smaller = apply(current, decided)
        report = verify(current, smaller, decided, inputs).raise_if_failed()
        healed = None
        if repair != "none":
            healed = heal(current, smaller, decided, examples or (), how=repair)
        yield Step(
            number=number,
            model=smaller,
            plan=decided,
            scores=scores,
            graph=graph,
            verified=report,
            repaired=healed,
        )
        current = smaller
        if number < steps:
            graph = trace(current, inputs)
            now = Amounts.of(graph, kinds=kinds, skip=skip, units=now.units - len(decided))


def _amount(limit: AtMost, whole: Amounts, model: nn.Module, timed: Inputs) -> float:
    """How much a model has of what is limited; a time is measured."""
    if limit.latency_ms is None:
        return float(getattr(whole, limit.limited))
    return latency_ms(model, timed, repeats=None).median_ms


def _aimed(
    model: nn.Module, current: nn.Module, decide: Callable[[Budget], Plan], inputs: Inputs, goal: float
) -> Trial:
    """A cut of the current model that takes a share of the first model's time."""

    def cut(share: float) -> tuple[Plan, nn.Module]:
        decided = decide(Budget(latency=share))
        return decided, apply(current, decided)

    def measured(smaller: nn.Module, plan: Plan) -> float:
        nothing_left = current is model and not plan.groups
        return 1.0 if nothing_left else latency_share(model, smaller, inputs)

    start = goal if current is model else goal / latency_share(model, current, inputs)
    return aim(cut, measured, goal, start)


def with_curves(criterion: AnyCriterion) -> AnyCriterion:
    """The criterion itself if it has error curves, or else reconstruction."""
    return criterion if resolve(criterion)[1].has_curves else "reconstruction"


def _scored(
    model: nn.Module,
    graph: Graph,
    criterion: AnyCriterion,
    curves: AnyCriterion | None,
    data: Iterable[Any] | None,
    loss_fn: LossFunction | None,
    normalization: Normalization,
) -> tuple[Scores, Mapping[str, Tensor] | None]:
    """Importances, and the error curves by which the budget is spent, in one pass over the data."""
    wanted = [criterion] if curves is None or curves == criterion else [criterion, curves]
    found = list(
        score(model, graph, wanted, data=data, loss_fn=loss_fn, normalization=normalization).values()
    )
    return found[0], None if curves is None else found[-1].curves


@dataclass(frozen=True, slots=True, kw_only=True)
class Amounts:
    """What a model has of each quantity that can be budgeted.

    Args:
        units: Units that may be cut, counted by what has left: a group that is down to its last unit
            is no longer in the graph.
        cuttable: Those of them that are still in the graph.
        params: Parameters.
        macs: Multiply-accumulates a sample.
        bytes: Bytes of the tensors of the ``state_dict``.
    """

    units: int
    cuttable: int
    params: int
    macs: int
    bytes: int

    @classmethod
    def of(
        cls,
        graph: Graph,
        *,
        kinds: Collection[str] | None = None,
        skip: Sequence[str] = (),
        units: int | None = None,
    ) -> Amounts:
        """The amounts of a graph; give `units` where the graph is that of an already pruned model."""
        cuttable = sum(group.size for group in candidates(graph, kinds=kinds, skip=skip))
        cost = graph.cost()
        return cls(units=cuttable if units is None else units, cuttable=cuttable, **asdict(cost))

    def budget_for(self, quantity: str, share: float, whole: Amounts) -> Budget:
        """What is to remain of this model, so that a share of the whole one does."""
        if quantity == "units":
            lost = self.units - self.cuttable
            return Budget(units=min(1.0, max((share * whole.units - lost) / self.cuttable, 1e-9)))
        return Budget(**{quantity: min(1.0, share * getattr(whole, quantity) / getattr(self, quantity))})
