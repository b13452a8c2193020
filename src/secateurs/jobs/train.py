"""Train a model on a folder of images, and leave it in a run directory."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path

import torch
from torch import nn

from secateurs.jobs.answers import with_classes
from secateurs.jobs.measuring import sizes, speeds, top1
from secateurs.jobs.settings import TrainSettings
from secateurs.jobs.workplace import Job, JobResult, StageCheckpoint, finish, open_run, threads
from secateurs.models import Architecture, build
from secateurs.progress import Event, Observer, State, derive_seed, ignore
from secateurs.recovery import finetune


def train_job(
    settings: TrainSettings, out: str | Path, *, resume: bool = False, observer: Observer = ignore
) -> JobResult:
    """Train a model and leave it in a run directory, with its accuracy before and after.

    The weights kept are those of the epoch that was best on the validation images. The test images are
    read once before and once after.

    Args:
        settings: What to train, on what, and how.
        out: The run directory: absent or empty, unless ``resume``.
        resume: Continue a job that was killed. On a CPU it ends with the same weights as one that was not.
        observer: Called with an :class:`~secateurs.progress.Event` for all that happens.

    Returns:
        Where the run is, and its metrics.

    Raises:
        DataError: The images are missing or inconsistent.
        ModelError: The model cannot be built, or the weights do not fit.
        RunError: The directory is taken, or belongs to a job with other settings.
        TrainingError: Training diverged.

    Example:
        >>> import tempfile
        >>> from secateurs.recovery import Recipe
        >>> settings = TrainSettings(recipe=Recipe(epochs=0), threads=1)
        >>> result = train_job(settings, Path(tempfile.mkdtemp()) / "run")
        >>> sorted(result.metrics["after"])[:3]
        ['accuracy', 'file_bytes', 'latency_ms']
    """
    settings = settings.resolved()
    with threads(settings.threads):
        source = with_classes(settings.data.load(), "training")
        architecture = Architecture(
            name=settings.model,
            num_classes=len(source.class_names),
            head=settings.head,
            input_size=source.input_size,
        )
        config = {
            "command": "train",
            "architecture": architecture.to_dict(),
            "data": asdict(settings.data),
            "class_names": list(source.class_names),
            "settings": settings.to_dict(),
        }
        model = _first_model(settings, architecture)  # what is wrong with it is known before a file is made
        with open_run(Path(out), config, resume=resume) as run:
            if not run.is_finished:
                _train(Job(run, source, settings, observer), settings, model)
            return JobResult(path=run.path, metrics=run.metrics())


def _train(job: Job, settings: TrainSettings, model: nn.Module) -> None:
    """Measure, train, measure, save; what a resumed job has done already is taken from its state."""
    state = job.run.load_state()
    model.to(job.device)
    job.tell_start(settings.model)
    if state is None:
        job.doing("measure the model on the test images")
        before = {**top1(model, job.test_batches()), **sizes(model, job.example(1))}
        state = State({"before": before}, {})
        job.run.save_state(state)
        job.tell(Event("measured", {"when": "before", **before}))
    facts = {"before": state.facts["before"]}
    history = finetune(
        model,
        job.training_batches(),
        job.validation_batches(),
        recipe=replace(settings.recipe, seed=derive_seed(settings.seed, "train")),
        observer=job.tell,
        checkpoint=StageCheckpoint(job.run, facts, state),
    )
    job.doing("measure the model")
    after = {**top1(model, job.test_batches()), **sizes(model, job.example(1))}
    after |= {"val_accuracy": history.kept.score}
    before = {**facts["before"], "val_accuracy": history.start.score}
    speed = speeds({"both": model}, job.example(1))["both"]  # training leaves the architecture as it is
    finish(job, model, before | speed, after | speed, plans=0)


def _first_model(settings: TrainSettings, architecture: Architecture) -> nn.Module:
    """The model before training: the same for the same seed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive_seed(settings.seed, "weights"))
        return build(
            architecture.name,
            num_classes=architecture.num_classes,
            weights=settings.weights,
            head=architecture.head,
            input_size=architecture.input_size,
        )
