"""Heal the model of a finished pruning run later: repair, and fine-tune if asked to."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Self

from torch import nn

from secateurs.errors import RunError, TrainingError, UnknownNameError
from secateurs.jobs.healing import composed, repaired
from secateurs.jobs.measuring import sizes, speeds, top1
from secateurs.jobs.settings import JobSettings, absolute_data, recipe_for_images
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
from secateurs.planning import Plan
from secateurs.progress import Event, Observer, State, derive_seed, ignore
from secateurs.recovery import finetune
from secateurs.recovery.repair import WAYS
from secateurs.recovery.resuming import below
from secateurs.runs import Run


@dataclass(frozen=True, slots=True, kw_only=True)
class RecoverSettings(JobSettings):
    """What :func:`secateurs.jobs.recover_job` is asked to do.

    Attributes:
        source: The run directory of the pruned model.
        original: The run of the network before it was pruned; the one that the run names if ``None``.
        data: Another folder of images; those of the run if ``None``.
        repair: See :func:`secateurs.recovery.repair`.
        repair_images: Training images that the repair looks at; all if ``None``.

    Example:
        >>> from secateurs.recovery import Recipe
        >>> RecoverSettings(source="runs/vgg-pruned", recipe=Recipe(epochs=0)).repair
        'reconstruct'
    """

    source: str
    original: str | None = None
    data: str | None = None
    repair: str = "reconstruct"
    repair_images: int | None = 2000

    def __post_init__(self) -> None:
        self._check()
        if self.repair not in WAYS:
            raise UnknownNameError("repair", self.repair, WAYS)
        if self.repair_images is not None and self.repair_images < 1:
            raise RunError(f"`repair_images >= 1` must hold, got repair_images={self.repair_images}")

    def resolved(self) -> Self:
        """The same with paths that mean the same from every folder."""
        data = None if self.data is None else absolute_data(self.data)
        original = None if self.original is None else str(Path(self.original).resolve())
        return replace(self, source=str(Path(self.source).resolve()), original=original, data=data)


def recover_job(
    settings: RecoverSettings, out: str | Path, *, resume: bool = False, observer: Observer = ignore
) -> JobResult:
    """Heal the model of a finished pruning run, and leave it in a run directory of its own.

    The repair compares with the network before the cuts, which the run names. It is kept if the validation
    accuracy does not fall by it; a fine-tune follows if ``recipe.epochs`` is positive, with the same network
    as the teacher if the recipe asks for one. The test images are read once before and once after.

    Args:
        settings: Which run, and how.
        out: The run directory: absent or empty, unless ``resume``.
        resume: Continue a job that was killed. On a CPU it ends with the same weights as one that was not.
        observer: Called with an :class:`~secateurs.progress.Event` for all that happens.

    Returns:
        Where the run is, and its metrics.

    Raises:
        DataError: The images are missing, or of other classes than the model's.
        RunError: The run is not finished or cut nothing, its original is gone, or ``out`` is taken.
        TrainingError: The recipe asks for a teacher and for no epochs.
        TrainingStoppedError: The fine-tune went wrong.
    """
    if not resume and settings.recipe.epochs == 0 and settings.recipe.needs_teacher:
        recipe = settings.recipe
        given = f"distill={recipe.taught_share}, distill_features={recipe.distill_features or 0.0}"
        raise TrainingError(f"{given} has no effect without a fine-tune", fix="--epochs 5")
    settings = settings.resolved()
    run_of_model = Run(settings.source)
    original = original_of(run_of_model, settings.original)
    data = data_of(run_of_model).at(settings.data)
    with threads(settings.threads):
        model, whole = run_of_model.model(), original.model()
        source = images_for(run_of_model, data, whole, settings)
        recipe = recipe_for_images(settings.recipe, are_labelled=source.is_labelled)
        settings = replace(settings, recipe=recipe)
        plan = _cut_between(original, run_of_model)
        config = {
            "command": "recover",
            "architecture": run_of_model.config.get("architecture"),
            "data": asdict(data),
            "class_names": list(source.class_names),
            "settings": {**settings.to_dict(), "original": str(original.path)},
        }
        with open_run(Path(out), config, resume=resume) as run:
            if not run.is_finished:
                work = Job(run, source, settings, observer)
                _recover(work, settings, run_of_model.plans(), model, whole, plan)
            return JobResult(path=run.path, metrics=run.metrics())


def original_of(run: Run, given: str | None = None) -> Run:
    """The run of the network before the cuts of ``run``.

    Args:
        run: What ``prune`` made, or ``recover`` of it.
        given: Where it is now.

    Raises:
        RunError: ``run`` is of another command, or the original is not where it was.
    """
    settings = run.config.get("settings", {})
    place = given or settings.get("original" if run.config.get("command") == "recover" else "source")
    if run.config.get("command") not in ("prune", "recover") or place is None:
        raise RunError(
            f"{run.path} is of secateurs {run.config.get('command')}, which cuts nothing to recover from",
            where=str(run.path / "config.json"),
            fix="name a run of secateurs prune",
        )
    if not Path(place).exists():
        raise RunError(
            f"{run.path} was pruned from {place}, which does not exist", fix="--original RUN, where it is now"
        )
    return Run(place)


def _cut_between(original: Run, pruned: Run) -> Plan:
    """All cuts of ``pruned`` that ``original`` has not got, as one.

    Raises:
        RunError: There are none, or the two do not belong together.
    """
    before, after = original.plans(), pruned.plans()
    if after[: len(before)] != before:
        raise RunError(f"{pruned.path} was not pruned from {original.path}: their plans differ")
    plan = composed(after[len(before) :])
    if plan is None:
        raise RunError(f"{pruned.path} has lost no units since {original.path}: there is nothing to recover")
    return plan


def _recover(
    job: Job, settings: RecoverSettings, plans: list[Plan], model: nn.Module, whole: nn.Module, plan: Plan
) -> None:
    """Measure, repair, fine-tune, measure, save; what a resumed job has done already is in its state."""
    state = job.run.load_state()
    model.to(job.device)
    whole.to(job.device)
    job.tell_start(str(job.run.config["architecture"]["name"]))
    if state is None:
        state = _repair(job, settings, plans, model, whole, plan)
    model.load_state_dict(below("model.", state.tensors))
    facts = {key: value for key, value in state.facts.items() if key != "training"}
    history = finetune(
        model.requires_grad_(True),
        job.training_batches(),
        job.validation_batches(),
        recipe=replace(settings.recipe, seed=derive_seed(settings.seed, "recover")),
        teacher=whole if settings.recipe.needs_teacher else None,
        plan=plan,
        observer=job.tell,
        checkpoint=StageCheckpoint(job.run, facts, state),
    )
    kept = history.told(settings.recipe.patience)
    trained = {"epochs_trained": len(history.epochs), "accuracy_tuned": history.kept.score}
    job.tell(Event("healed", {**trained, "kept_epoch": history.best, "kept": kept}))
    job.doing("measure the model")
    after = {**top1(model, job.test_batches()), **sizes(model, job.example(1))}
    after |= {"val_accuracy": history.kept.score, "kept_epoch": history.best, "kept": kept, **facts["repair"]}
    speed = speeds({"both": model}, job.example(1))["both"]  # nothing is cut, so both are as fast
    finish(job, model, facts["before"] | speed, after | speed, plans=len(plans))


def _repair(
    job: Job, settings: RecoverSettings, plans: list[Plan], model: nn.Module, whole: nn.Module, plan: Plan
) -> State:
    """The first half: what is known after the repair."""
    for number, each in enumerate(plans, 1):
        job.run.save_plan(number, each)
    job.doing("measure the model on the test images")
    before: dict[str, Any] = {**top1(model, job.test_batches()), **sizes(model, job.example(1))}
    before["val_accuracy"] = top1(model, job.validation_batches())["accuracy"]
    job.tell(Event("measured", {"when": "before", **before, **job.labels}))
    how, images = settings.repair, settings.repair_images
    accuracy = before["val_accuracy"]
    done = repaired(job, whole, model, plan, how=how, images=images, accuracy=accuracy)
    if done:
        job.tell(Event("repaired", {"accuracy_before": accuracy, **done}))
    tensors = {f"model.{name}": tensor for name, tensor in model.state_dict().items()}
    state = State({"before": before, "repair": done, "training": None}, tensors)
    job.run.save_state(state)
    return state
