"""One model with inputs that it runs on: what every list of models consists of."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from secateurs.graph import Inputs


@dataclass(frozen=True, slots=True, kw_only=True)
class Example:
    """A model and what to call it on.

    Args:
        model: The model, with random weights.
        inputs: What it is traced, measured and verified on.
        training_inputs: What one training step runs on, where that differs: two samples for batch norms,
            targets for detectors. The inputs by default.
        varying: Whether the outputs' first dimension is a number of detections, which the weights decide.
    """

    model: nn.Module
    inputs: Inputs
    training_inputs: Inputs | None = None
    varying: bool = False


Case: TypeAlias = Callable[[], Example]


def tensors_in(value: Any, path: str = "") -> Iterator[tuple[str, Tensor]]:
    """Every tensor of an output with its place: tensors, mappings, sequences and dataclasses, nested."""
    if isinstance(value, Tensor):
        yield path, value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from tensors_in(item, f"{path}.{key}")
    elif is_dataclass(value) and not isinstance(value, type):
        for each in fields(value):
            yield from tensors_in(getattr(value, each.name), f"{path}.{each.name}")
    elif isinstance(value, Sequence) and not isinstance(value, str):
        for place, item in enumerate(value):
            yield from tensors_in(item, f"{path}[{place}]")


def output_shapes(value: Any, *, varying: bool = False) -> dict[str, tuple[int, ...]]:
    """The shape of every tensor of an output; -1 stands for a number of detections."""
    return {
        path: (-1, *tensor.shape[1:]) if varying and tensor.dim() else tuple(tensor.shape)
        for path, tensor in tensors_in(value)
    }


def seasoned(model: nn.Module) -> nn.Module:
    """The model with every constant parameter made varied, so that forgetting to cut one is seen.

    A fresh network has norms of ones and zeros, and often branches whose last scale is 0: an index more or
    less of these would change nothing.
    """
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for tensor in model.parameters():
            if (
                tensor.numel() > 1
                and tensor.is_floating_point()
                and bool((tensor == tensor.view(-1)[0]).all())
            ):
                tensor.add_(0.05 * torch.randn(tensor.shape, generator=generator))
        for module in model.modules():
            mean, variance = getattr(module, "running_mean", None), getattr(module, "running_var", None)
            if isinstance(mean, Tensor) and isinstance(variance, Tensor):
                mean.add_(0.1 * torch.randn(mean.shape, generator=generator))
                variance.mul_(0.75 + 0.5 * torch.rand(variance.shape, generator=generator))
    return model
