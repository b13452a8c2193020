"""A sensitivity analysis in a run directory: curves as JSON, CSV and picture; resumable."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path

from torch import nn
from torch.nn.functional import cross_entropy

from secateurs import files
from secateurs.criteria import names
from secateurs.errors import BudgetError, DataError, UnknownNameError
from secateurs.graph import Graph
from secateurs.jobs.settings import check_kinds
from secateurs.jobs.subjects import SubjectSettings, model_and_images, traced
from secateurs.jobs.workplace import Job, open_run, threads
from secateurs.planning.limits import candidates, check_skip
from secateurs.progress import Observer, ignore
from secateurs.report import measured_in, sensitivity_chart
from secateurs.runs import Run
from secateurs.sensitivities import Point, Sensitivity, sensitivity

_RESULT, _TABLE, _PICTURE = "sensitivity.json", "sensitivity.csv", "sensitivity.png"


@dataclass(frozen=True, slots=True, kw_only=True)
class SensitivitySettings(SubjectSettings):
    """What :func:`secateurs.jobs.sensitivity_job` is asked to do.

    Attributes:
        criterion: What decides which units of a group leave first.
        ratios: Shares of a group's units that leave.
        images: Validation images to measure on; all if ``None``.
        rank_images: Training images to rank on, for a criterion that needs data; all if ``None``.
        kinds: Kinds of groups to look at; every kind but ``"position"`` if ``None``.
        skip: Glob patterns of groups to leave out.
    """

    criterion: str = "l1"
    ratios: tuple[float, ...] = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
    images: int | None = None
    rank_images: int | None = None
    kinds: tuple[str, ...] | None = None
    skip: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        self._check()
        check_kinds(self.kinds)
        for name, value in (("images", self.images), ("rank_images", self.rank_images)):
            if value is not None and value < 1:
                raise DataError(f"`{name} >= 1` must hold, got {name}={value}")
        for ratio in self.ratios:
            if not 0 < ratio < 1:
                raise BudgetError(f"a ratio is the share that leaves, in (0, 1), got {ratio}")


def sensitivity_job(
    settings: SensitivitySettings,
    out: str | Path,
    *,
    resume: bool = False,
    observer: Observer = ignore,
) -> Sensitivity:
    """Measure how much accuracy each group costs when it alone is pruned, on the validation images.

    Args:
        settings: Which model, on what, and how.
        out: The run directory: absent or empty, unless ``resume``.
        resume: Go on with a job that was killed; points that were measured are taken over.
        observer: Called with an :class:`~secateurs.progress.Event` for all that happens.

    Returns:
        The curves; ``sensitivity.json``, ``.csv`` and ``.png`` in ``out`` hold them too.

    Raises:
        DataError: The images are missing, or of other classes than the model's.
        RunError: There is no such model, or ``out`` is taken.
        UnknownNameError: There is no such criterion.
        PatternError: A pattern of ``skip`` matches no group; nothing is written.
    """
    settings = settings.resolved()
    if settings.criterion not in names():
        raise UnknownNameError("criterion", settings.criterion, names())
    with threads(settings.threads):
        model, source, facts = model_and_images(settings)
        graph = traced(model, source)
        check_skip(graph, settings.skip)
        candidates(graph, kinds=settings.kinds, skip=settings.skip)
        config = {"command": "sensitivity", **facts, "settings": settings.to_dict()}
        with open_run(Path(out), config, resume=resume) as run:
            if not (run.path / _RESULT).is_file():
                job = Job(run, source, settings, observer)
                _write(run, _measure(job, settings, model, graph), job.labels)
            return Sensitivity.load(run.path / _RESULT)


def _measure(job: Job, settings: SensitivitySettings, model: nn.Module, graph: Graph) -> Sensitivity:
    job.tell_start(str(job.run.config["architecture"]["name"]))
    job.doing("rank the units and measure the whole model")
    return sensitivity(
        model,
        graph,
        job.validation_batches(settings.images),
        criterion=settings.criterion,
        ratios=settings.ratios,
        data=job.ranking_batches(settings.rank_images),
        loss_fn=cross_entropy,
        kinds=settings.kinds,
        skip=settings.skip,
        known=_known(job.run),
        observer=job.tell,
    )


def _known(run: Run) -> list[Point]:
    """The points that the run's events tell of: what a killed job had measured."""
    keys = [field.name for field in fields(Point)]
    return [
        Point(**{key: event[key] for key in keys} | {"along": tuple(event["along"])})
        for event in run.events()
        if event["event"] == "point"
    ]


def _write(run: Run, found: Sensitivity, labels: Mapping[str, str]) -> None:
    """Table and picture first: the JSON says that the job is done."""
    files.write_text(run.path / _TABLE, as_csv(found))
    curves = {
        name: [(point.ratio, point.accuracy) for point in points] for name, points in found.curves().items()
    }
    name = str(run.config["architecture"]["name"])
    title = f"{name}, each group pruned alone by {found.criterion}"
    sensitivity_chart(
        curves, run.path / _PICTURE, title=title, accuracy=found.accuracy, measure=measured_in(labels)
    )
    found.save(run.path / _RESULT)


def as_csv(found: Sensitivity) -> str:
    """A line a point: group, units, prune ratio, accuracy, its fall, loss, MACs, how it was measured."""
    text = io.StringIO()
    lines = csv.writer(text, lineterminator="\n")
    lines.writerow(("group", "units", "kept", "ratio", "accuracy", "drop", "loss", "macs", "way", "along"))
    for point in found.points:
        numbers = (point.ratio, point.accuracy, found.accuracy - point.accuracy, point.loss)
        shown = [f"{number:.6g}" for number in numbers]
        more = (point.macs, point.way, " ".join(point.along))
        lines.writerow((point.group, point.size, point.kept, *shown, *more))
    return text.getvalue()
