"""Whole jobs, from a folder of images to a run directory; resumable at any point."""

from __future__ import annotations

from secateurs.jobs.compare import CompareSettings, compare_job
from secateurs.jobs.demo import demo_job
from secateurs.jobs.prune import prune_job
from secateurs.jobs.rank import RankSettings, rank_job
from secateurs.jobs.recover import RecoverSettings, recover_job
from secateurs.jobs.sensitivity import SensitivitySettings, sensitivity_job
from secateurs.jobs.settings import DataSettings, PruneSettings, TrainSettings
from secateurs.jobs.sparsify import SparsifySettings, sparsify_job
from secateurs.jobs.train import train_job
from secateurs.jobs.workplace import JobResult

__all__ = [
    "CompareSettings",
    "DataSettings",
    "JobResult",
    "PruneSettings",
    "RankSettings",
    "RecoverSettings",
    "SensitivitySettings",
    "SparsifySettings",
    "TrainSettings",
    "compare_job",
    "demo_job",
    "prune_job",
    "rank_job",
    "recover_job",
    "sensitivity_job",
    "sparsify_job",
    "train_job",
]
