"""The numbers before and after: size, latency, accuracy."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn

from secateurs.graph.running import Inputs
from secateurs.measure.accuracy import Accuracy, accuracy
from secateurs.measure.latency import Latency, compare_latency, latency_ms, latency_share
from secateurs.measure.size import file_bytes, macs, parameters

__all__ = [
    "Accuracy",
    "Latency",
    "accuracy",
    "compare_latency",
    "file_bytes",
    "latency_ms",
    "latency_share",
    "macs",
    "measure",
    "parameters",
]


def measure(
    model: nn.Module, inputs: Inputs, batches: Iterable[Any] | None = None
) -> dict[str, float | None]:
    """Everything that is measured of a model, by the same code before and after pruning.

    Args:
        model: The model.
        inputs: Example inputs of batch one.
        batches: Labelled data for the accuracy; none is measured without.

    Returns:
        ``accuracy`` (share), ``params``, ``macs``, ``file_bytes`` and ``latency_ms`` (median).
    """
    return {
        "accuracy": accuracy(model, batches).top1 if batches is not None else None,
        "params": parameters(model),
        "macs": macs(model, inputs),
        "file_bytes": file_bytes(model),
        "latency_ms": latency_ms(model, inputs).median_ms,
    }
