"""timm's architectures: one of each model file, or all of them."""

from __future__ import annotations

import json
import tempfile
import warnings
from functools import partial
from pathlib import Path

import timm
import torch

from benchmarks.zoo.example import Case, Example

_LARGEST = 150_000_000  # parameters, in the list of all


def families() -> dict[str, Case]:
    """The smallest architecture of each model file."""
    sizes = parameter_counts()
    smallest: dict[str, str] = {}
    for module in timm.list_modules():
        names = [name for name in timm.list_models(module=module) if name in sizes]
        if names:
            smallest[module] = min(names, key=lambda name: (sizes[name], name))
    return {smallest[module]: partial(_example, smallest[module]) for module in sorted(smallest)}


def everything() -> dict[str, Case]:
    """Every architecture of fewer than 150 million parameters, the smallest first."""
    sizes = parameter_counts()
    names = sorted((name for name in sizes if sizes[name] < _LARGEST), key=lambda name: (sizes[name], name))
    return {name: partial(_example, name) for name in names}


def _example(name: str) -> Example:
    model = timm.create_model(name)
    shape = model.default_cfg["input_size"]
    return Example(model=model, inputs=torch.randn(1, *shape), training_inputs=torch.randn(2, *shape))


def parameter_counts() -> dict[str, int]:
    """The parameters of every architecture; counted once a version, and kept in a temporary file."""
    kept = Path(tempfile.gettempdir()) / f"secateurs-zoo-timm-{timm.__version__}.json"
    if kept.exists():
        counts: dict[str, int] = json.loads(kept.read_text())
        return counts
    counts = {name: _count(name) for name in timm.list_models()}
    kept.write_text(json.dumps(counts))
    return counts


def _count(name: str) -> int:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            with torch.device("meta"):
                model = timm.create_model(name)
        except Exception:  # some compute tables when they are built
            model = timm.create_model(name)
    return sum(parameter.numel() for parameter in model.parameters())
