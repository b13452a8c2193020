"""Train a model for sparsity, and leave it in a run directory to be pruned."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Self

import torch
from torch import nn

from secateurs.errors import TrainingError
from secateurs.graph import Graph, trace
from secateurs.jobs.measuring import sizes, speeds, top1
from secateurs.jobs.settings import JobSettings, absolute_data, check_kinds, check_untaught
from secateurs.jobs.workplace import (
    Job,
    JobResult,
    StageCheckpoint,
    data_of,
    finish,
    images_for,
    open_run,
    threads,
)
from secateurs.progress import Event, Observer, State, derive_seed, ignore
from secateurs.recovery import finetune
from secateurs.recovery.batch_norm import reestimate
from secateurs.recovery.sparsify import Growing, SoftPruning, Sparsifier, check_options, sparsifier
from secateurs.runs import Run

NORM_IMAGES = 2000  # enough for the statistics of batch norms


@dataclass(frozen=True, slots=True, kw_only=True)
class SparsifySettings(JobSettings):
    """What :func:`secateurs.jobs.sparsify_job` is asked to do.

    Attributes:
        source: The run directory of the trained model.
        method: The name of a method of training for sparsity.
        options: What the method takes: ``{"strength": 1e-4}``, ``{"rate": 0.4}``; its usual values if empty.
        data: Another folder of images; those that the model was trained on if ``None``.
        kinds: Kinds of groups to act on; every kind but ``"position"`` if ``None``.
        skip: Glob patterns of groups to leave alone.

    Example:
        >>> SparsifySettings(source="runs/train-vgg16", method="sfp", options={"rate": 0.4}).recipe.epochs
        10
    """

    source: str
    method: str = "group-lasso"
    options: dict[str, float] = field(default_factory=dict)
    data: str | None = None
    kinds: tuple[str, ...] | None = None
    skip: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        self._check()
        check_options(self.method, self.options)
        check_kinds(self.kinds)
        if self.recipe.epochs < 1:
            raise TrainingError(f"`1 <= epochs` must hold, got epochs={self.recipe.epochs}")
        check_untaught(self.recipe, "sparsify")

    def resolved(self) -> Self:
        """The same with paths that mean the same from every folder."""
        data = None if self.data is None else absolute_data(self.data)
        return replace(self, source=str(Path(self.source).resolve()), data=data)


def sparsify_job(
    settings: SparsifySettings, out: str | Path, *, resume: bool = False, observer: Observer = ignore
) -> JobResult:
    """Train the model of a finished run so that units empty, and leave it in a run directory of its own.

    Nothing is cut: the model keeps its shapes, and :func:`secateurs.jobs.prune_job` takes the run; what to
    rank by then is under ``prune`` in its ``config.json``. All parameters are trained, and the weights of the
    last epoch are kept; after ``sfp`` and ``fpgm`` batch norms are re-estimated on training images. The test
    images are read once before and once after.

    Args:
        settings: Which model, which method, and how long.
        out: The run directory: absent or empty, unless ``resume``.
        resume: Continue a job that was killed, from its last finished epoch. On a CPU it ends with the same
            weights as one that was not.
        observer: Called with an :class:`~secateurs.progress.Event` for all that happens.

    Returns:
        Where the run is, and its metrics.

    Raises:
        DataError: The images are missing, or of other classes than the model's.
        RunError: The run to start from is not finished, or ``out`` is taken.
        TrainingError: Training diverged, or the model has nothing that the method acts on.
    """
    settings = settings.resolved()
    origin = Run(settings.source)
    data = data_of(origin).at(settings.data)
    with threads(settings.threads):
        model = origin.model().requires_grad_(True)
        source = images_for(origin, data, model, settings)
        method = method_of(settings, trace(model, torch.zeros(1, *source.input_size)))
        config = {
            "command": "sparsify",
            "architecture": origin.config.get("architecture"),
            "data": asdict(data),
            "class_names": list(source.class_names),
            "settings": settings.to_dict(),
            "prune": {"criterion": method.criterion, "scope": method.scope, "rate": method.rate},
        }
        with open_run(Path(out), config, resume=resume) as run:
            if not run.is_finished:
                _sparsify(Job(run, source, settings, observer), settings, origin, model, method)
            return JobResult(path=run.path, metrics=run.metrics())


def method_of(settings: SparsifySettings, graph: Graph) -> Sparsifier:
    """The method that the settings name, for the epochs that they train."""
    more = {"epochs": settings.recipe.epochs} if settings.method == Growing.name else {}
    return sparsifier(
        settings.method, graph, **settings.options, **more, kinds=settings.kinds, skip=settings.skip
    )


def _sparsify(
    job: Job, settings: SparsifySettings, origin: Run, model: nn.Module, method: Sparsifier
) -> None:
    """Measure, train, measure, save; what a resumed job has done already is taken from its state."""
    state, plans = job.run.load_state(), origin.plans()
    model.to(job.device)
    job.tell_start(str(job.run.config["architecture"]["name"]))
    if state is None:
        for number, plan in enumerate(plans, 1):
            job.run.save_plan(number, plan)
        job.doing("measure the model on the test images")
        before = {**top1(model, job.test_batches()), **sizes(model, job.example(1))}
        state = State({"before": before}, {})
        job.run.save_state(state)
        job.tell(Event("measured", {"when": "before", **before, **job.labels}))
    facts = {"before": state.facts["before"]}
    history = finetune(
        model,
        job.training_batches(),
        job.validation_batches(),
        recipe=replace(settings.recipe, seed=derive_seed(settings.seed, "sparsify")),
        regularizer=method,
        observer=job.tell,
        checkpoint=StageCheckpoint(job.run, facts, state),
    )
    validated = history.kept.score
    if isinstance(method, SoftPruning):
        validated = _settle(job, model)
    job.doing("measure the model")
    after = {**top1(model, job.test_batches()), **sizes(model, job.example(1))}
    after |= {"val_accuracy": validated}
    before = {**facts["before"], "val_accuracy": history.start.score}
    speed = speeds({"both": model}, job.example(1))["both"]  # nothing is cut, so both are as fast
    finish(job, model, before | speed, after | speed, plans=len(plans))


def _settle(job: Job, model: nn.Module) -> float:
    """Statistics of batch norms as the filters are now, not as before the last were set to zero."""
    job.doing("re-estimate the batch norms behind what was set to zero")
    inputs = (images.to(job.device) for images, _ in job.ranking_batches(NORM_IMAGES))
    reestimate(model, model.buffers(), inputs)
    accuracy: float = top1(model, job.validation_batches())["accuracy"]
    return accuracy
