"""What went wrong, in a few words that group well: exceptions with their place, locks with their reasons."""

from __future__ import annotations

import traceback
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch

import secateurs
from secateurs.graph import Graph

_HOME = str(Path(secateurs.__file__).parent)
_NOT_MODELS = (_HOME, str(Path(__file__).parent), str(Path(torch.__file__).parent), "torch_pruning")
_EXPECTED = (  # of any model: what it takes and gives, and the pixels of its kernels
    "it is an output of the model",
    "it is an input of the model",
    "a convolution slides along it",
)
_SHOWN = 3


def failure(error: BaseException) -> dict[str, Any]:
    """The type and text of an exception, and the innermost lines in it: Secateurs', the model's, and any."""
    frames: list[traceback.FrameSummary] = []
    root: BaseException | None = error
    while root is not None:  # the cause knows the place better than what was raised from it
        frames = [*frames, *traceback.extract_tb(root.__traceback__)]
        root = root.__cause__
    models = [frame for frame in frames if not any(part in frame.filename for part in _NOT_MODELS)]
    ours = [frame for frame in frames if frame.filename.startswith(_HOME)]
    return {
        "type": type(error).__name__,
        "message": str(error)[:600],
        "secateurs_line": _place(ours[-1]) if ours else None,
        "model_line": _place(models[-1]) if models else None,
        "line": _place(frames[-1]) if frames else None,
    }


def _place(frame: traceback.FrameSummary) -> str:
    parts = Path(frame.filename).parts
    start = parts.index("site-packages") + 1 if "site-packages" in parts else max(len(parts) - 3, 0)
    return f"{'/'.join(parts[start:])}:{frame.lineno} in {frame.name}"


def lock_summary(graph: Graph) -> dict[str, Any]:
    """How many parameter dimensions are locked, and the reasons that hold the most parameters.

    The weight of a reason is the number of parameters in the tensors that it locks a dimension of. That
    outputs and the pixels of kernels keep their length is not counted among the reasons.
    """
    counts: dict[tuple[str, str], int] = defaultdict(int)
    weights: dict[tuple[str, str], int] = defaultdict(int)
    for lock in graph.locked:
        if lock.reason in _EXPECTED:
            continue
        numbers = 1
        for length in graph.parameters[lock.parameter]:
            numbers *= length
        counts[lock.reason, lock.source] += 1
        weights[lock.reason, lock.source] += numbers
    first = sorted(weights, key=lambda key: -weights[key])[:_SHOWN]
    return {
        "dims": len(graph.locked),
        "dims_not_outputs": sum(counts.values()),
        "reasons": [
            {
                "reason": reason,
                "source": source,
                "dims": counts[reason, source],
                "params": weights[reason, source],
            }
            for reason, source in first
        ],
    }
