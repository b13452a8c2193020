"""How long one forward pass takes on this machine."""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only

from secateurs.graph.running import Inputs, call_model, modes_kept

_SECONDS = 1.0  # to time one model for
_LEAST, _MOST = 30, 300  # repeats


@dataclass(frozen=True, slots=True, kw_only=True)
class Latency:
    """The time of one forward pass, over repeated runs.

    Args:
        median_ms: Milliseconds, the median.
        p10_ms: The tenth percentile.
        p90_ms: The ninetieth percentile.
        share: The time as a share of the first model's that it was compared with: the median of the ratios of
            passes that follow each other. On a machine that does other work times fall into several
            clusters, and a ratio of medians hangs on which of them each median lies in; this does not.
        repeats: Runs that were timed.
        threads: Threads that torch used on the CPU.
        device: Where the model ran.
    """

    median_ms: float
    p10_ms: float
    p90_ms: float
    share: float
    repeats: int
    threads: int
    device: str


def latency_ms(
    model: nn.Module,
    inputs: Inputs,
    *,
    warmup: int = 5,
    repeats: int | None = 30,
    threads: int | None = None,
) -> Latency:
    """Time a model in evaluation mode, without gradients.

    Args:
        model: The model.
        inputs: Example inputs, usually a batch of one; moved to the model's device.
        warmup: Runs that are not timed.
        repeats: Runs that are; as many as take a second if None, 30 to 300.
        threads: Threads for the CPU; torch's current number if None.

    Returns:
        Median and percentiles in milliseconds.

    Example:
        >>> latency_ms(nn.Linear(4, 2), torch.zeros(1, 4), warmup=1, repeats=3).repeats
        3
    """
    count = repeats_for({"model": model}, inputs) if repeats is None else repeats
    only = compare_latency({"model": model}, inputs, warmup=warmup, repeats=count, threads=threads)
    return only["model"]


def compare_latency(
    models: Mapping[str, nn.Module],
    inputs: Inputs,
    *,
    warmup: int = 5,
    repeats: int = 30,
    threads: int | None = None,
) -> dict[str, Latency]:
    """Time several models in turns, so that a machine that slows down or speeds up does it to all.

    Args:
        models: The models by name.
        inputs: Example inputs for each of them.
        warmup: Rounds that are not timed.
        repeats: Rounds that are; one run of each model a round.
        threads: Threads for the CPU; torch's current number if None.

    Returns:
        Median and percentiles in milliseconds, by name.
    """
    if repeats < 1:
        raise ValueError(f"repeats >= 1 must hold, got repeats={repeats}")
    times: dict[str, list[float]] = {name: [] for name in models}
    with _threads(threads), modes_kept(*models.values()):
        for model in models.values():
            model.eval()
        placed = {name: _beside(model, inputs) for name, model in models.items()}
        used = torch.get_num_threads()
        with torch.no_grad():
            for number in range(warmup + repeats):
                for name, model in models.items():
                    elapsed = _once(model, placed[name])
                    if number >= warmup:
                        times[name].append(elapsed * 1000)
    first = next(iter(times.values()), [])
    return {name: _summary(values, first, used, str(_device(models[name]))) for name, values in times.items()}


def latency_share(
    model: nn.Module,
    smaller: nn.Module,
    inputs: Inputs,
    *,
    warmup: int = 5,
    repeats: int | None = None,
    threads: int | None = None,
) -> float:
    """The time of a forward pass of one model as a share of another's.

    The median of the ratios of two passes that follow each other, see `Latency`.

    Args:
        model: What the share is of.
        smaller: The other model.
        inputs: Example inputs for both.
        warmup: Pairs that are not timed.
        repeats: Pairs that are; as many as take the slower model a second if None, 30 to 300.
        threads: Threads for the CPU; torch's current number if None.

    Returns:
        The share.

    Example:
        >>> large, small = nn.Linear(2000, 2000), nn.Linear(2000, 20)
        >>> latency_share(large, small, torch.zeros(64, 2000)) < 0.5
        True
    """
    both = {"model": model, "smaller": smaller}
    count = repeats_for(both, inputs) if repeats is None else repeats
    found = compare_latency(both, inputs, warmup=warmup, repeats=count, threads=threads)
    return found["smaller"].share


def repeats_for(models: Mapping[str, nn.Module], inputs: Inputs) -> int:
    """How often to time models so that the slowest takes about a second: 30 to 300 times."""
    quick = compare_latency(models, inputs, warmup=2, repeats=3)
    slowest = max(measured.median_ms for measured in quick.values())
    return min(max(round(1000 * _SECONDS / slowest), _LEAST), _MOST)


def _once(model: nn.Module, inputs: Inputs) -> float:
    cuda = any(leaf.is_cuda for leaf in tree_leaves(inputs) if isinstance(leaf, Tensor))
    if cuda:
        torch.cuda.synchronize()
    started = time.perf_counter()
    call_model(model, inputs)
    if cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - started


def _summary(values: list[float], first: list[float], threads: int, device: str) -> Latency:
    ordered = sorted(values)
    last = len(ordered) - 1
    return Latency(
        median_ms=statistics.median(ordered),
        p10_ms=ordered[round(0.1 * last)],
        p90_ms=ordered[round(0.9 * last)],
        share=statistics.median(mine / other for mine, other in zip(values, first, strict=True)),
        repeats=len(ordered),
        threads=threads,
        device=device,
    )


def _device(model: nn.Module) -> torch.device:
    return next((parameter.device for parameter in model.parameters()), torch.device("cpu"))


def _beside(model: nn.Module, inputs: Inputs) -> Inputs:
    device = _device(model)
    moved: Inputs = tree_map_only(Tensor, lambda tensor: tensor.to(device), inputs)
    return moved


@contextmanager
def _threads(count: int | None) -> Iterator[None]:
    before = torch.get_num_threads()
    if count is not None:
        torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
