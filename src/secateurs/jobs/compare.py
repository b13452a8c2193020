"""Criteria judged by the oracle, in a run directory: correlations as JSON, CSV and pictures; resumable."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn
from torch.nn.functional import cross_entropy

from secateurs import files
from secateurs.criteria import names
from secateurs.errors import DataError, UnknownNameError
from secateurs.graph import Graph
from secateurs.jobs.subjects import SubjectSettings, model_and_images, traced
from secateurs.jobs.workplace import Job, open_run, threads
from secateurs.judging import Comparison, Ledger, compare, oracle, sample_units
from secateurs.progress import Observer, ignore
from secateurs.report import correlation_chart, ranks_chart
from secateurs.runs import Run

_LEDGER, _RESULT, _TABLE, _UNITS = "oracle.jsonl", "comparison.json", "comparison.csv", "units.csv"
_PICTURE, _RANKS = "comparison.png", "ranks.png"
MEASURES = ("per_layer", "all_layers", "all_layers_l2")


@dataclass(frozen=True, slots=True, kw_only=True)
class CompareSettings(SubjectSettings):
    """What :func:`secateurs.jobs.compare_job` is asked to do.

    Attributes:
        criteria: Names of criteria, or ``("all",)``.
        images: Training images that criteria and oracle see; all if ``None``.
        units: Units that the oracle measures; all if ``None``.
        layers: Glob patterns of the groups that it measures.
        memory_mb: What kept activations may take, and again those of a pass with several units.
    """

    criteria: tuple[str, ...] = ("all",)
    images: int | None = 512
    units: int | None = None
    layers: tuple[str, ...] = ("*",)
    memory_mb: float = 512.0

    def __post_init__(self) -> None:
        self._check()
        for name, value in (("images", self.images), ("units", self.units), ("memory_mb", self.memory_mb)):
            if value is not None and value < 1:
                raise DataError(f"`{name} >= 1` must hold, got {name}={value}")
        for name in self.criteria:
            if name != "all" and name not in names():
                raise UnknownNameError("criterion", name, ["all", *names()])
            if self.criteria.count(name) > 1:
                raise DataError(f"criterion {name!r} is named twice", fix="name each once")


def compare_job(
    settings: CompareSettings, out: str | Path, *, resume: bool = False, observer: Observer = ignore
) -> dict[str, Any]:
    """Measure the oracle on training images, and judge criteria by it.

    Args:
        settings: Which model, on what, and how.
        out: The run directory: absent or empty, unless ``resume``.
        resume: Go on with a job that was killed; what the oracle has measured is taken over.
        observer: Called with an :class:`~secateurs.progress.Event` for all that happens.

    Returns:
        What ``comparison.json`` in ``out`` holds. Beside it lie ``comparison.csv``, ``units.csv`` with the
        scores of each unit, the oracle's ``oracle.jsonl``, and two pictures.

    Raises:
        DataError: The images are missing, or of other classes than the model's.
        RunError: There is no such model, or ``out`` is taken.
        ScoreError: A criterion cannot be computed.
        PatternError: No group has such a name; nothing is written.
    """
    settings = settings.resolved()
    with threads(settings.threads):
        model, source, facts = model_and_images(settings)
        graph = traced(model, source)
        units = sample_units(graph, settings.units, layers=settings.layers, seed=settings.seed)
        config = {"command": "compare", **facts, "settings": settings.to_dict()}
        with open_run(Path(out), config, resume=resume) as run:
            if not (run.path / _RESULT).is_file():
                _write(run, _judged(Job(run, source, settings, observer), settings, model, graph, units))
            return files.read_json(run.path / _RESULT)


def _judged(
    job: Job, settings: CompareSettings, model: nn.Module, graph: Graph, units: dict[str, list[int]]
) -> Comparison:
    job.tell_start(str(job.run.config["architecture"]["name"]))
    batches = job.ranking_batches(settings.images)
    found = oracle(
        model,
        graph,
        data=batches,
        loss_fn=cross_entropy,
        units=units,
        memory_mb=settings.memory_mb,
        ledger=Ledger(job.run.path / _LEDGER),
        observer=job.tell,
    )
    return compare(
        model,
        graph,
        data=batches,
        loss_fn=cross_entropy,
        criteria="all" if "all" in settings.criteria else settings.criteria,
        found=found,
        seed=settings.seed,
        observer=job.tell,
    )


def _write(run: Run, judged: Comparison) -> None:
    """Tables and pictures first: the JSON says that the job is done."""
    facts = judged.to_dict()
    name = str(run.config["architecture"]["name"])
    files.write_text(run.path / _TABLE, as_csv(correlation_rows(facts)))
    files.write_text(run.path / _UNITS, as_csv(list(judged.units())))
    title = f"{name}: criteria against the oracle, {facts['units']} units, {facts['examples']} images"
    correlation_chart(facts["criteria"], run.path / _PICTURE, title=title)
    ranks_chart(
        list(judged.units()), run.path / _RANKS, title=f"{name}: rank by each criterion, by the oracle"
    )
    files.write_json(run.path / _RESULT, facts)


def correlation_rows(facts: dict[str, Any]) -> list[dict[str, Any]]:
    """A row for each criterion and oracle: every correlation with its interval, and the cost.

    Args:
        facts: What `secateurs.judging.Comparison.to_dict` gives.
    """
    rows = []
    for each in facts["criteria"]:
        for kind, found in each["agreement"].items():
            row = {"criterion": each["criterion"], "oracle": kind, "seconds": round(each["seconds"], 4)}
            for measure in MEASURES:
                row |= {f"{measure}{end}": found[measure][key] for end, key in _ENDS}
            layers = [value for value in found["layers"].values() if value is not None]
            rows.append({**row, "spread": found["spread"], "layers": len(layers)})
    return rows


_ENDS = (("", "value"), ("_low", "low"), ("_high", "high"))


def as_csv(rows: Sequence[dict[str, Any]]) -> str:
    """Rows as CSV with a header; what does not exist stays empty.

    Example:
        >>> print(as_csv([{"layer": "conv", "value": 0.123456789}, {"layer": "fc", "value": None}]), end="")
        layer,value
        conv,0.12345679
        fc,
    """
    text = io.StringIO()
    lines = csv.writer(text, lineterminator="\n")
    lines.writerow(rows[0] if rows else ())
    for row in rows:
        lines.writerow([f"{v:.8g}" if isinstance(v, float) else v for v in row.values()])
    return text.getvalue()
