"""Every unit of a model with its importance and what it costs, the least important first."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.nn.functional import cross_entropy

from secateurs import files
from secateurs.criteria import Scores, names, normalization_names, score
from secateurs.data import loader
from secateurs.errors import DataError, RunError, UnknownNameError
from secateurs.graph import Graph, trace
from secateurs.jobs.compare import as_csv
from secateurs.jobs.subjects import SubjectSettings, model_and_images
from secateurs.jobs.workplace import some_images, threads
from secateurs.judging import ORACLES, oracle
from secateurs.progress import Event, Observer, ignore


@dataclass(frozen=True, slots=True, kw_only=True)
class RankSettings(SubjectSettings):
    """What :func:`rank_job` is asked to do.

    Attributes:
        criterion: Name of a criterion, or of an oracle, which measures every unit.
        normalization: What makes layers comparable; the criterion's own if ``None``.
        images: Training images to rank on; all if ``None``.
    """

    criterion: str = "taylor"
    normalization: str | None = None
    images: int | None = 512

    def __post_init__(self) -> None:
        self._check()
        if self.images is not None and self.images < 1:
            raise DataError(f"`images >= 1` must hold, got images={self.images}")
        known = [*names(), *ORACLES]
        if self.criterion not in known:
            raise UnknownNameError("criterion", self.criterion, known)
        if self.normalization is not None and self.normalization not in normalization_names():
            raise UnknownNameError("normalization", self.normalization, normalization_names())
        if self.normalization is not None and self.criterion in ORACLES:
            raise DataError(f"{self.criterion} is the change of the loss and takes no normalization")


def rank_job(
    settings: RankSettings, out: str | Path | None = None, *, observer: Observer = ignore
) -> list[dict[str, Any]]:
    """Rank every unit of a model.

    Args:
        settings: Which model, on what, and how.
        out: A file to write, ``.csv`` or ``.json``; it appears whole or not at all.
        observer: Called with an :class:`~secateurs.progress.Event` for all that happens.

    Returns:
        A row a unit with ``layer``, ``unit``, ``score``, ``macs_saved`` and ``params_saved``, lowest first.

    Raises:
        DataError: The images are missing, or of other classes than the model's.
        RunError: There is no such model, the file has another ending, or its folder is not there.
        ScoreError: The criterion cannot be computed for this model.
    """
    settings = settings.resolved()
    place = None if out is None else Path(out)
    if place is not None and place.suffix not in (".csv", ".json"):
        raise RunError(f"{place} must end in .csv or .json", where=str(place), fix=f"--out {place.stem}.csv")
    if place is not None and not place.parent.is_dir():
        raise RunError(
            f"there is no folder {place.parent.resolve()} to write {place.name} to",
            where=str(place),
            fix="make it first, or pass another --out",
        )
    with threads(settings.threads):
        rows = _ranked(settings, observer)
    if place is not None:
        files.write_text(place, as_csv(rows) if place.suffix == ".csv" else json.dumps(rows, indent=2) + "\n")
    return rows


def _ranked(settings: RankSettings, observer: Observer) -> list[dict[str, Any]]:
    model, source, _ = model_and_images(settings)
    if not source.is_labelled:
        observer(Event("noted", {"notes": list(source.notes)}))
    model.to(torch.device("cuda" if torch.cuda.is_available() else "cpu")).eval()
    images = some_images(source.ranking, settings.images, settings.seed)
    batches = loader(images, batch_size=settings.batch_size, shuffle=False, seed=0, workers=settings.workers)
    graph = trace(model, next(iter(batches))[0])
    observer(Event("doing", {"what": f"rank {graph.units} units by {settings.criterion}"}))
    if settings.criterion in ORACLES:
        found = oracle(model, graph, data=batches, loss_fn=cross_entropy, observer=observer)
        return unit_rows(graph, found.scores(settings.criterion))
    scores = score(
        model,
        graph,
        settings.criterion,
        data=batches,
        loss_fn=cross_entropy,
        normalization=settings.normalization,
    )
    return unit_rows(graph, scores)


def unit_rows(graph: Graph, scores: Scores) -> list[dict[str, Any]]:
    """A row for each unit that has a score, lowest first; what a unit saves is what it alone would.

    Args:
        graph: The graph.
        scores: Importances by group.
    """
    rows = []
    for name, values in scores.items():
        saved = graph.group_cost(graph.by_name[name])
        for unit, value in enumerate(values.tolist()):
            facts = {"layer": name, "unit": unit, "score": value}
            rows.append({**facts, "macs_saved": saved.macs, "params_saved": saved.params})
    return sorted(rows, key=lambda row: row["score"])
