"""The demonstration: a network far too large for the digits, trained, and pruned in one cut."""

from __future__ import annotations

from pathlib import Path

from secateurs.errors import RunError
from secateurs.jobs.prune import prune_job
from secateurs.jobs.settings import PruneSettings, TrainSettings
from secateurs.jobs.train import train_job
from secateurs.jobs.workplace import JobResult
from secateurs.progress import Event, Observer, ignore
from secateurs.recovery.recipe import Recipe
from secateurs.runs import contents

_TRAINED = "trained"


def demo_job(
    out: str | Path,
    *,
    seed: int = 0,
    threads: int | None = None,
    resume: bool = False,
    observer: Observer = ignore,
) -> JobResult:
    """Train the bundled network on the bundled digits, and prune it to a tenth of its MACs in one cut.

    Args:
        out: The run directory of the pruned model; the trained one lies in its folder ``trained``.
        seed: What every random number follows from.
        threads: CPU threads; as many as torch takes if ``None``.
        resume: Continue a demonstration that was stopped.
        observer: Called with an :class:`~secateurs.progress.Event` for all that happens.

    Returns:
        Where the run is, its metrics, and a row for each iteration.

    Raises:
        RunError: ``out`` is not empty.
    """
    folder = Path(out)
    if not resume and folder.exists() and contents(folder):
        raise RunError(f"{folder} is not empty", where=str(folder), fix="pass another --out, or --resume")
    training = TrainSettings(
        recipe=Recipe(epochs=8, lr=0.002, optimizer="adamw", weight_decay=0.01, warmup_epochs=0.5),
        batch_size=64,
        seed=seed,
        threads=threads,
    )
    observer(Event("section", {"title": "1. Train a network that is larger than it need be"}))
    train_job(training, folder / _TRAINED, resume=resume, observer=observer)
    pruning = PruneSettings(
        source=str(folder / _TRAINED),
        target=("macs", 0.1),
        iterations=1,
        recipe=Recipe(epochs=0),
        batch_size=64,
        seed=seed,
        threads=threads,
    )
    observer(Event("section", {"title": "2. Prune it: rank, cut, prove and repair, without training"}))
    return prune_job(pruning, folder, resume=resume, observer=observer, beside=(_TRAINED,))
