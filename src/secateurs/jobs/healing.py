"""What heals a model in a job without training, after each cut or later."""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce
from typing import Any

from torch import nn

from secateurs.jobs.measuring import top1
from secateurs.jobs.workplace import Job
from secateurs.planning import Plan
from secateurs.recovery import repair
from secateurs.recovery.surroundings import weights_of


def repaired(
    job: Job,
    whole: nn.Module,
    smaller: nn.Module,
    plan: Plan,
    *,
    how: str,
    images: int | None,
    accuracy: float,
) -> dict[str, Any]:
    """Repair a model in place, unless that costs validation accuracy: then it is as it was.

    Args:
        job: Gives the images.
        whole: The network before the cut.
        smaller: The one after it.
        plan: The cut between them.
        how: See :func:`secateurs.recovery.repair`.
        images: Training images to look at; all if ``None``.
        accuracy: The validation accuracy of ``smaller`` as it is.

    Returns:
        What to tell of it: ``accuracy_repaired`` is that of the model as it is left; nothing for ``"none"``.
    """
    if how == "none":
        return {}
    job.doing(f"repair: {how}")
    before = weights_of(smaller)
    done = repair(whole, smaller, plan, job.ranking_batches(images), how=how, seed=job.settings.seed)
    found = top1(smaller, job.validation_batches())["accuracy"]
    if found < accuracy:
        smaller.load_state_dict(before)
    return {
        "repair": str(done),
        "repair_images": done.images,
        "repair_seconds": round(done.seconds, 3),
        "repair_kept": found >= accuracy,
        "accuracy_repaired": max(found, accuracy),
    }


def composed(plans: Sequence[Plan]) -> Plan | None:
    """Several cuts as one; ``None`` for none."""
    return reduce(Plan.then, plans) if plans else None
