"""A machine whose times are known: each call takes what a rule says."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from torch import Tensor, nn

import secateurs
from secateurs import LatencyModel
from secateurs.graph.cost import kept_lengths
from secateurs.measure.calls import PassTime
from secateurs.measure.latency import Latency
from secateurs.planning.latency import CallTime, products

BLOCK = 16
FIXED, VALUE, MAC, REST = 0.05, 1e-5, 1e-6, 0.5


def known_times(graph: secateurs.Graph, block: int = BLOCK) -> LatencyModel:
    """The rule."""
    calls = [
        CallTime(name=w.name, fixed_ms=FIXED, value_ms=VALUE, mac_ms=MAC if w.macs else 0.0, block=block)
        for w in graph.work.calls
    ]
    return LatencyModel(graph=graph, calls=calls, rest_ms=REST, error=0.0, device="cpu", threads=1)


def known_machine(monkeypatch: pytest.MonkeyPatch, block: int = BLOCK) -> None:
    """Let all that is timed take what the rule says."""

    def timed(models: Sequence[nn.Module], inputs: Tensor, **_: Any) -> list[PassTime]:
        return [PassTime(ms_of(model, inputs, block), REST) for model in models]

    def share(model: nn.Module, smaller: nn.Module, inputs: Tensor, **_: Any) -> float:
        whole, part = (ms_of(each, inputs, block).sum() + REST for each in (model, smaller))
        return float(part / whole)

    monkeypatch.setattr("secateurs.timing.call_ms", timed)

    def alone(model: nn.Module, inputs: Tensor, **_: Any) -> Latency:
        ms = float(ms_of(model, inputs, block).sum() + REST)
        return Latency(median_ms=ms, p10_ms=ms, p90_ms=ms, share=1.0, repeats=1, threads=1, device="cpu")

    for place in ("secateurs.pruning", "secateurs.jobs.prune", "secateurs.jobs.cuts"):
        monkeypatch.setattr(f"{place}.latency_share", share)
        monkeypatch.setattr(f"{place}.latency_ms", alone)


def ms_of(model: nn.Module, inputs: Tensor, block: int) -> Any:
    graph = secateurs.trace(model, inputs)
    lengths = kept_lengths(graph.work.lengths, graph.mask({}))
    return np.array(
        [
            c.fixed_ms
            + c.value_ms * products(w.values, lengths)
            + c.mac_ms * products(w.macs, lengths, c.block)
            for c, w in zip(known_times(graph, block).calls, graph.work.calls, strict=True)
        ]
    )
