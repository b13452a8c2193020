"""How long each call of a torch function in a forward pass takes."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from secateurs.graph.calls import is_numbered
from secateurs.graph.copying import foreign_hooks_unseen
from secateurs.graph.exchange import attention_written_out
from secateurs.graph.running import Inputs, attention_as_written, call_model, device_of, modes_kept
from secateurs.recovery.choices import Choices, Chooser
from secateurs.recovery.recording import Recorder

_PROBES = 1000  # calls to learn from what the clock itself costs


@dataclass(frozen=True, slots=True, eq=False)
class PassTime:
    """The time of a forward pass by its calls: of each the least of several passes.

    Args:
        ms: ``(calls,)`` milliseconds.
        rest_ms: Milliseconds between the calls, in the model's own code.
    """

    ms: npt.NDArray[np.float64]
    rest_ms: float


def call_ms(
    models: Sequence[nn.Module], inputs: Inputs, *, warmup: int = 1, repeats: int = 5
) -> list[PassTime]:
    """Time the calls of torch functions in a forward pass, the same ones that a trace numbers.

    Each call is timed alone, with the device waited for; attention runs as it does in a trace. What the first
    model chooses by its activations, such as the experts of a token, the others choose too. Models take
    turns, so that a machine that slows down for a while does it to all, and the least time of a call counts,
    which other programs disturb least.

    Args:
        models: The models; they run in evaluation mode.
        inputs: Inputs for each of them, where the models are.
        warmup: Passes that are not timed.
        repeats: Passes that are.

    Returns:
        The times of each model.

    Example:
        >>> net = nn.Sequential(nn.Linear(4, 4), nn.ReLU())
        >>> [each.ms.shape for each in call_ms([net], torch.zeros(1, 4), repeats=1)]
        [(2,)]
    """
    clocks: list[list[_Clock]] = [[] for _ in models]
    with torch.no_grad(), modes_kept(*models), foreign_hooks_unseen(*models), attention_as_written():
        choose = _choices_of(models[0], inputs).follow
        for number in range(warmup + repeats):
            for model, of_model in zip(models, clocks, strict=True):
                model.eval()
                with attention_written_out(model), _Clock(device_of(model), choose) as clock:
                    started = time.perf_counter()
                    call_model(model, inputs)
                    clock.rest_ms = (time.perf_counter() - started) * 1000 - sum(clock.ms)
                if number >= warmup:
                    of_model.append(clock)
    own = _own_ms()
    return [
        PassTime(
            np.min(np.asarray([clock.ms for clock in of_model], np.float64), axis=0),
            max(min(clock.rest_ms - own * len(clock.ms) for clock in of_model), 0.0),
        )
        for of_model in clocks
    ]


def _choices_of(model: nn.Module, inputs: Inputs) -> Choices:
    """What a model chooses by its activations."""
    choices = Choices()
    with attention_written_out(model):
        record = Recorder(model.eval(), inputs, choose=choices.note)
    return choices.only(record.choices)


def _own_ms() -> float:
    """What the clock adds around a call, in milliseconds."""
    probe = torch.empty(0)
    with _Clock(torch.device("cpu"), Choices().follow) as clock:
        started = time.perf_counter()
        for _ in range(_PROBES):
            probe.dim()
        total = (time.perf_counter() - started) * 1000
    return float(total - sum(clock.ms)) / _PROBES


class _Clock(TorchFunctionMode):
    """Times each numbered call, and lets it choose; see `Choices`."""

    def __init__(self, device: torch.device, choose: Chooser) -> None:
        super().__init__()
        self._device, self._choose = device, choose
        self.ms: list[float] = []
        self.rest_ms = 0.0

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if not is_numbered(func):
            return func(*args, **(kwargs or {}))
        self._wait()
        started = time.perf_counter()
        out = func(*args, **(kwargs or {}))
        self._wait()
        self.ms.append((time.perf_counter() - started) * 1000)
        return self._choose(len(self.ms) - 1, func, args, kwargs or {}, out)

    def _wait(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
