"""The model that a job looks at, and its images: those of a run, or an architecture with weights."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Self

import torch
from torch import nn

from secateurs.data import DataSource
from secateurs.errors import RunError
from secateurs.graph import Graph, trace
from secateurs.jobs.answers import with_classes
from secateurs.jobs.settings import DataSettings, WorkSettings, absolute_data
from secateurs.jobs.workplace import data_of, first_images, images_for
from secateurs.models import Architecture, build
from secateurs.runs import Run


@dataclass(frozen=True, slots=True, kw_only=True)
class SubjectSettings(WorkSettings):
    """What every job has that looks at a model and leaves it as it is.

    Attributes:
        source: The run directory of a trained model, or an architecture such as ``"torchvision:resnet18"``.
        data: A folder of images; those that the run was trained on if ``None``.
        weights: For an architecture: a name of torchvision's or a file.
    """

    source: str
    data: str | None = None
    weights: str = "none"

    def resolved(self) -> Self:
        """The same with paths that mean the same from every folder."""
        data = None if self.data is None else absolute_data(self.data)
        source = str(Path(self.source).resolve()) if Path(self.source).exists() else self.source
        weights = str(Path(self.weights).resolve()) if Path(self.weights).is_file() else self.weights
        return replace(self, source=source, data=data, weights=weights)


def model_and_images(settings: SubjectSettings) -> tuple[nn.Module, DataSource, dict[str, Any]]:
    """The model, its images, and both as a run's configuration states them.

    Raises:
        DataError: The images are missing, or of other classes than the model's.
        RunError: There is no such model.
    """
    if Path(settings.source).exists():
        origin = Run(settings.source)
        data = data_of(origin).at(settings.data)
        model = origin.model()
        source = images_for(origin, data, model, settings)
        facts = {"architecture": origin.config.get("architecture"), "data": asdict(data)}
        return model, source, facts
    if ":" not in settings.source:
        raise RunError(
            f"{settings.source!r} is neither a run directory that exists nor the name of an architecture",
            fix="write a run directory, torchvision:NAME, timm:NAME or package.module:factory",
        )
    data = DataSettings(path=None if settings.data is None else absolute_data(settings.data))
    source = with_classes(data.load(), f"the architecture {settings.source}")
    architecture = Architecture(
        name=settings.source, num_classes=len(source.class_names), input_size=source.input_size
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.seed)
        model = build(
            architecture.name,
            num_classes=architecture.num_classes,
            weights=settings.weights,
            input_size=architecture.input_size,
        )
    return model, source, {"architecture": architecture.to_dict(), "data": asdict(data)}


def traced(model: nn.Module, source: DataSource) -> Graph:
    """The graph of a model, which is put on the job's device in evaluation mode.

    Call it before a run directory is made, so that patterns can be checked against the groups first.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return trace(model.to(device).eval(), first_images(source).to(device))
