"""diffusers: U-nets, transformers and autoencoders of pictures, videos and sound, each a few dozen wide."""

from __future__ import annotations

from functools import partial
from typing import Any

import diffusers
import torch

from benchmarks.zoo.example import Case, Example
from benchmarks.zoo.others.diffusers_table import TABLE


def cases() -> dict[str, Case]:
    """A case for each class of the table."""
    return {
        name: partial(_example, getattr(diffusers, name), sizes, inputs)
        for name, (sizes, inputs) in TABLE.items()
    }


def _example(kind: Any, sizes: dict[str, Any], inputs: dict[str, Any]) -> Example:
    one, two = ({name: _value(what, samples) for name, what in inputs.items()} for samples in (1, 2))
    return Example(model=kind(**sizes), inputs=one, training_inputs=two)


def _value(what: Any, samples: int) -> Any:
    if callable(what):
        return what(samples)
    if isinstance(what, int):
        return torch.randint(0, what, (samples,))
    return torch.randn(samples, *what)
