"""What the jobs share: an open run, the data, the device, and one stream of events."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Subset

from secateurs.data import DataSource, loader
from secateurs.errors import DataError, RunError
from secateurs.jobs.answers import OWN_ANSWERS, answered
from secateurs.jobs.settings import DataSettings, WorkSettings
from secateurs.progress import Event, Observer, State
from secateurs.runs import Run, has_begun

_NOT_KEPT = ("batch", "doing", "silenced")
_COMPARED = ("command", "architecture", "data", "settings")


@dataclass(frozen=True, slots=True, kw_only=True)
class JobResult:
    """What a job came to.

    Attributes:
        path: The run directory.
        metrics: ``{"before": {...}, "after": {...}}``, as ``metrics.json`` holds it.
        iterations: One entry for each cut and one for the fine-tune at the end; none for training.
    """

    path: Path
    metrics: dict[str, Any]
    iterations: tuple[dict[str, Any], ...] = ()


class Job:
    """A job at work: its run, its data and those who watch it."""

    def __init__(
        self,
        run: Run,
        source: DataSource,
        settings: WorkSettings,
        observer: Observer,
    ) -> None:
        self.run, self.source, self.settings = run, source, settings
        self._observer = observer
        self.device = device()

    def tell(self, event: Event) -> None:
        """Hand an event to the observer, and keep it unless it is one of very many."""
        if event.name not in _NOT_KEPT:
            self.run.log(event)
        self._observer(event)

    @property
    def labels(self) -> dict[str, str]:
        """Whose answers the labels are, for what is measured by them; nothing where the images have some."""
        return {} if self.source.is_labelled else {"labels": OWN_ANSWERS}

    def doing(self, what: str) -> None:
        """Say what will take a while, so that a terminal can show that something happens."""
        self.tell(Event("doing", {"what": what}))

    def training_batches(self) -> Callable[[int], DataLoader[Any]]:
        """Augmented, shuffled batches for the seed of an epoch."""
        return lambda seed: self._loader(self.source.train, shuffle=True, seed=seed)

    def ranking_batches(self, limit: int | None) -> DataLoader[Any]:
        """Training images as they are; a seeded choice of ``limit`` of them."""
        return self._loader(some_images(self.source.ranking, limit, self.settings.seed))

    def validation_batches(self, limit: int | None = None) -> DataLoader[Any]:
        """The held-out images; a seeded choice of ``limit`` of them."""
        return self._loader(some_images(self.source.val, limit, self.settings.seed))

    def test_batches(self) -> DataLoader[Any]:
        """The images that are read once before and once after."""
        return self._loader(self.source.test)

    def _loader(self, images: Any, *, shuffle: bool = False, seed: int = 0) -> DataLoader[Any]:
        size, workers = self.settings.batch_size, self.settings.workers
        return loader(images, batch_size=size, shuffle=shuffle, seed=seed, workers=workers)

    def example(self, count: int = 2) -> Tensor:
        """The first training images as one batch on the job's device."""
        return first_images(self.source, count).to(self.device)

    def tell_start(self, model: str, notes: Iterable[str] = ()) -> None:
        """Say what the job works on, and what else there is to note."""
        facts = {"run": str(self.run.path), "model": model, "data": str(self.source)}
        machine = {"device": str(self.device), "threads": torch.get_num_threads()}
        self.tell(Event("started", {**facts, "notes": [*self.source.notes, *notes], **machine}))


def device() -> torch.device:
    """Where jobs run: on the GPU if there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def first_images(source: DataSource, count: int = 2) -> Tensor:
    """The first training images, as they are, as one batch on the CPU."""
    images = source.ranking
    return torch.stack([images[index][0] for index in range(min(count, len(images)))])


def some_images(images: Any, limit: int | None, seed: int) -> Any:
    """A seeded choice of ``limit`` images of a set, in their order; the set itself if it has no more."""
    if limit is None or limit >= len(images):
        return images
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))
    return Subset(images, sorted(order[:limit].tolist()))


class StageCheckpoint:
    """Keeps the training state of one stage of a job, together with the job's own facts.

    Args:
        run: Where to keep it.
        facts: The job's own facts, kept beside the training's.
        state: The state that the job was resumed from, if it is of this stage.
    """

    def __init__(self, run: Run, facts: Mapping[str, Any], state: State | None) -> None:
        self._run, self._facts, self._state = run, dict(facts), state

    def load(self) -> State | None:
        """The training state to continue from."""
        if self._state is None or self._state.facts.get("training") is None:
            return None
        return State(self._state.facts["training"], self._state.tensors)

    def save(self, state: State) -> None:
        """Keep the training state of this stage."""
        self._run.save_state(State({**self._facts, "training": state.facts}, state.tensors))


@contextlib.contextmanager
def open_run(
    out: Path, config: Mapping[str, Any], *, resume: bool, beside: tuple[str, ...] = ()
) -> Iterator[Run]:
    """A new run, or the one to continue; locked, and released at the end.

    Call it inside :func:`threads`: a job is continued with the threads that it was started with.

    Raises:
        RunError: The directory is taken, or was made with other settings; or a launcher started several
            processes, which would all work on the one directory.
    """
    check_alone()
    if resume and has_begun(out):
        run = Run.resume(out)
        try:
            check_same_job(run, config)
        except RunError:
            run.release()
            raise
        if run.is_finished:
            run.drop_state()  # a kill came between the metrics and this
        else:
            run.log(Event("resumed"))
        torch.set_num_threads(run.config["threads"])  # another number could round differently
    else:
        run = Run.start(out, config, beside=beside)
    try:
        yield run
    finally:
        run.release()


def check_alone() -> None:
    """Refuse to work as one of several processes of a launcher.

    Raises:
        RunError: There is more than one.
    """
    processes = os.environ.get("WORLD_SIZE", "1")
    if processes != "1":
        raise RunError(
            f"a command works in one process, but a launcher started {processes}",
            where="WORLD_SIZE",
            fix="call it without the launcher; in a program, score, repair and finetune share work out",
        )


def check_same_job(run: Run, config: Mapping[str, Any]) -> None:
    """Refuse to continue a job with other settings than those that it was started with.

    Raises:
        RunError: A setting differs; the message names it.
    """
    asked = json.loads(json.dumps(config))
    for part in _COMPARED:
        old, new = run.config.get(part), asked.get(part)
        if old == new:
            continue
        if isinstance(old, dict) and isinstance(new, dict):
            key = next(key for key in {**old, **new} if old.get(key) != new.get(key))
            part, old, new = f"{part}.{key}", old.get(key), new.get(key)
        raise RunError(
            f"{run.path} was started with {part} = {old!r}, and cannot be resumed with {new!r}",
            where=str(run.path / "config.json"),
            fix="resume with the same arguments, or pass another --out",
        )


def finish(
    job: Job, model: nn.Module, before: Mapping[str, Any], after: Mapping[str, Any], *, plans: int
) -> None:
    """Save the model and the metrics; with these the run is finished, and its state is no longer needed."""
    job.run.save_model(model, plans)
    before, after = {**before, **job.labels}, {**after, **job.labels}
    job.tell(Event("finished", {"before": before, "after": after}))
    job.run.save_metrics(before, after)
    job.run.drop_state()


@contextlib.contextmanager
def threads(count: int | None) -> Iterator[None]:
    """Torch's threads during a block."""
    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def data_of(run: Run) -> DataSettings:
    """The data settings of a run.

    Raises:
        RunError: The configuration has none that can be read.
    """
    try:
        return DataSettings.from_dict(run.config["data"])
    except (KeyError, TypeError, ValueError) as error:
        raise RunError(f"{run.path}/config.json names no data", where=str(run.path)) from error


def images_for(origin: Run, data: DataSettings, model: nn.Module, work: WorkSettings) -> DataSource:
    """The images to work on the model of a finished run with.

    Args:
        origin: The run.
        data: Which images.
        model: Whose answers are the labels of images that come without.
        work: How to run it on them.

    Raises:
        DataError: They are missing, or of other classes than the model's.
    """
    source = data.load()
    names = origin.config.get("class_names")
    if not source.is_labelled:
        return answered(source, model, names or (), batch_size=work.batch_size, workers=work.workers)
    if names != list(source.class_names):
        raise DataError(
            f"the model knows the classes {names}, but {source.name} has {list(source.class_names)}",
            where=source.name,
            fix="name a folder of the same classes, or put the images into one folder without any",
        )
    return source
