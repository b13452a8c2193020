"""Trainings that go wrong: noticed early, and said in one sentence."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator

import torch

from secateurs.errors import TrainingError, TrainingStoppedError
from secateurs.recovery.history import History
from secateurs.recovery.recipe import Recipe

_KEPT = "the model keeps the best weights that it had before"
_COLLAPSED = 0.5  # of the score before training: no good learning rate loses half of it for long
_REFUSED = "view size is not compatible"  # torch's words
_WAIT = 3  # epochs at least before a collapse counts as one, and a quarter of them all


def check_finite(loss: float, recipe: Recipe, *, epoch: int, batch: int, lr: float) -> None:
    """Stop at a loss that is no number.

    Raises:
        TrainingStoppedError: It is none.
    """
    if not math.isfinite(loss):
        raise TrainingStoppedError(
            f"the loss became {loss} in epoch {epoch}, batch {batch}, at a learning rate of {lr:.3g}; "
            f"{_KEPT}",
            fix=f"lower lr to {recipe.lr / 10:.2g}, or set clip_norm=1.0",
        )


def check_measured(score: float | None, loss: float | None) -> None:
    """Stop at a validation that gives no number.

    Raises:
        TrainingStoppedError: It gives none.
    """
    if not all(value is None or math.isfinite(value) for value in (score, loss)):
        raise TrainingStoppedError(
            f"on the validation data the loss became {loss}, at a score of {score}; {_KEPT}",
            fix="lower lr, or set clip_norm=1.0",
        )


def check_collapse(history: History, recipe: Recipe) -> None:
    """Stop a training that lost half of the accuracy that it began with and does not get it back.

    A high learning rate costs accuracy at first, so a loss counts only when it lasts for a quarter of the
    epochs, and for three at least, or to the end.

    Raises:
        TrainingStoppedError: It did not come back.
    """
    first, epochs = history.start.score, history.epochs
    if first is None or first <= 0 or not epochs:
        return
    low = 0
    while low < len(epochs) and (epochs[-1 - low].score or 0.0) < _COLLAPSED * first:
        low += 1
    if low >= max(_WAIT, math.ceil(recipe.epochs / 4)) or (low and len(epochs) == recipe.epochs):
        raise TrainingStoppedError(
            f"training at lr={recipe.lr:g} destroyed the network: the validation score fell from {first:.3f} "
            f"to {epochs[-1].score:.3f} and did not come back (epoch {len(epochs)}); {_KEPT}",
            fix=f"lower lr to {recipe.lr / 10:.2g}",
        )


@contextlib.contextmanager
def memory_told(size: int, epoch: int) -> Iterator[None]:
    """An error that says which batch was too large, in place of torch's own.

    Raises:
        TrainingStoppedError: The memory was not enough.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not _is_out_of_memory(error):
            raise
        half = max(size // 2, 1)
        raise TrainingStoppedError(
            f"out of memory in epoch {epoch} with a batch of {size}; {_KEPT}",
            fix=f"batches of {half} and Recipe(accumulate=2): the steps stay the same",
        ) from error


@contextlib.contextmanager
def channels_last_told(is_on: bool) -> Iterator[None]:
    """An error that says what to do where a step finds what the trial did not: `view` refuses a layout.

    Raises:
        TrainingError: The model does not train with channels last.
    """
    try:
        yield
    except RuntimeError as error:
        if not (is_on and _REFUSED in str(error)):
            raise
        raise TrainingError(
            f"in training mode the model does not run with channels last: {error}",
            fix="Recipe(channels_last=False), or --no-channels-last",
        ) from error


def _is_out_of_memory(error: BaseException) -> bool:
    told = str(error)  # on the CPU torch raises a plain RuntimeError
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "DefaultCPUAllocator" in told
