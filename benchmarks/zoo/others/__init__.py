"""Models of libraries that are tried less often, each library's in a file of its own."""

from __future__ import annotations

import importlib
import sys
from importlib.util import find_spec

from benchmarks.zoo.example import Case

LIBRARIES = [
    "vit_pytorch",
    "x_transformers",
    "diffusers",
    "open_clip",
    "monai",
    "segmentation_models_pytorch",
    "pytorchcv",
]


def cases() -> dict[str, Case]:
    """The cases of every library that is installed, as ``library.model``."""
    found: dict[str, Case] = {}
    for library in LIBRARIES:
        if find_spec(library) is None:
            print(f"others: {library} is not installed, its models are left out", file=sys.stderr)
            continue
        models = importlib.import_module(f"{__name__}.{library}_models")
        found |= {f"{library}.{name}": case for name, case in models.cases().items()}
    return found
