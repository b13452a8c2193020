"""One round of a pruning job: rank the units of the model as it is now, and cut the lowest."""

from __future__ import annotations

from torch import nn
from torch.nn.functional import cross_entropy

from secateurs.graph import Graph, trace
from secateurs.jobs.cuts import (
    PARTICLE_IMAGES,
    amounts_of,
    criterion_for,
    curves_for,
    cuttable,
    selection_for,
    sparing,
)
from secateurs.jobs.settings import PruneSettings
from secateurs.jobs.workplace import Job
from secateurs.planning import Budget, Remove, paced_share
from secateurs.planning.limits import Limits, still_there
from secateurs.pruning import Amounts, Step, prune_steps


def next_step(
    job: Job,
    settings: PruneSettings,
    model: nn.Module,
    stage: int,
    *,
    limits: Limits,
    whole: Amounts,
    gone: int,
    speed: float = 1.0,
) -> Step:
    """Rank, cut and prove once.

    Args:
        job: Gives the images.
        settings: What the whole job is asked to do.
        model: The model as it is now; it is left in eval mode, with gradients wanted.
        stage: The number of the round, from 1.
        limits: What is asked of single groups, in units of the model before the first cut.
        whole: What that model had of each quantity that can be a target.
        gone: The units that the rounds before have taken.
        speed: The time of the model as it is now, as a share of that model's; for a target in latency.

    Returns:
        The smaller model, its plan and the proof.
    """
    job.doing(f"rank and cut, iteration {stage}/{settings.iterations}")
    graph = trace(model.eval(), job.example())
    settings = sparing(settings, graph, model, job.example())
    kept, least = limits.within(cuttable(graph, settings), stage / settings.iterations, settings.usual_pace)
    steps = prune_steps(
        model.eval().requires_grad_(True),
        job.example(),
        criterion=criterion_for(settings, stage),
        budget=_budget(settings, stage, graph, whole, gone, speed),
        data=job.ranking_batches(settings.rank_images),
        loss_fn=cross_entropy,
        scope="local" if settings.scope == "local" else "global",
        round_to=settings.round_to,
        kinds=settings.cut_kinds,
        skip=still_there(graph, settings.skip),
        allocation=kept or None,
        min_units=least,
        curves=curves_for(settings),
        selection=selection_for(settings, stage, job.validation_batches(PARTICLE_IMAGES), job.tell),
        normalization=settings.normalization,
        timed_on=job.example(1),
    )
    return next(steps)


def _budget(
    settings: PruneSettings, stage: int, graph: Graph, whole: Amounts, gone: int, speed: float
) -> Budget | Remove | None:
    """What is to remain of the model as it is now, so that the last round meets the target."""
    if settings.remove is not None:
        return Remove(settings.remove)
    if settings.target is None:
        return None
    quantity, share = settings.target
    goal = paced_share(settings.usual_pace, stage / settings.iterations, share)
    if quantity == "latency":
        return Budget(latency=min(1.0, goal / speed))
    now = amounts_of(graph, settings, units=whole.units - gone)
    return now.budget_for(quantity, goal, whole)
