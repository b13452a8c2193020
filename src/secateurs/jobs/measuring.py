"""The numbers of ``metrics.json``."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from secateurs.measure import accuracy, compare_latency, file_bytes, macs, parameters
from secateurs.measure.latency import repeats_for


def top1(model: nn.Module, batches: Iterable[Any]) -> dict[str, Any]:
    """``accuracy`` as a share, and ``loss``, on the device where the model is."""
    measured = accuracy(model, batches)
    return {"accuracy": measured.top1, "loss": measured.loss}


def sizes(model: nn.Module, image: Tensor) -> dict[str, Any]:
    """``params``, ``macs`` of one image, and ``file_bytes``."""
    return {"params": parameters(model), "macs": macs(model, image), "file_bytes": file_bytes(model)}


def speeds(models: Mapping[str, nn.Module], image: Tensor) -> dict[str, dict[str, Any]]:
    """``latency_ms`` of one image on the CPU with its spread, and ``latency_cuda_ms`` if there is a GPU.

    With each comes a share, such as ``latency_share``: of the time of the first model, by passes that follow
    each other.

    The models take turns, so that a change of the machine's clock or load meets them alike.

    Args:
        models: By name; they are moved to the CPU and, if there is one, the GPU, and back.
        image: ``(1, C, H, W)``.

    Returns:
        For each name its numbers.
    """
    homes = {name: next(model.parameters()).device for name, model in models.items()}
    numbers: dict[str, dict[str, Any]] = {name: {} for name in models}
    for device in ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",):
        for model in models.values():
            model.to(device)
        label = "latency" if device == "cpu" else "latency_cuda"
        repeats = repeats_for(models, image)
        for name, measured in compare_latency(models, image, repeats=repeats).items():
            numbers[name][f"{label}_ms"] = round(measured.median_ms, 4)
            numbers[name][f"{label}_share"] = round(measured.share, 4)
            if device == "cpu":
                numbers[name] |= {
                    "latency_p10_ms": round(measured.p10_ms, 4),
                    "latency_p90_ms": round(measured.p90_ms, 4),
                    "latency_repeats": measured.repeats,
                    "threads": measured.threads,
                }
    for name, model in models.items():
        model.to(homes[name])
    return numbers
