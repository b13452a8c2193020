"""The loss of a batch: the task's, the teacher's, or both; and the score on the validation data."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from secateurs.errors import TrainingError
from secateurs.graph.running import call_model
from secateurs.recovery.batches import Batch
from secateurs.recovery.distill import Lessons
from secateurs.recovery.history import Epoch
from secateurs.recovery.recipe import Recipe
from secateurs.recovery.trouble import check_measured

if TYPE_CHECKING:
    from accelerate import Accelerator

LossFunction = Callable[[Any, Tensor], Tensor]
Validation = Iterable[Any] | Callable[[nn.Module], float]
_AUXILIARY = 0.3  # what the side outputs of an Inception or GoogLeNet count in training


def loss_on(network: nn.Module, batch: Batch, loss_fn: LossFunction, lessons: Lessons | None) -> Tensor:
    """The mean loss of one batch.

    Raises:
        TrainingError: The batch has no targets, and there is no teacher.
    """
    if lessons is not None:
        lessons.begin(batch.inputs)
    outputs = call_model(network, batch.inputs)
    loss = None
    if batch.targets is not None:
        loss = loss_fn(outputs, batch.targets)
        if batch.others is not None:
            loss = batch.share * loss + (1 - batch.share) * loss_fn(outputs, batch.others)
    if lessons is not None:
        return lessons.mix(loss, outputs, batch.inputs)
    if loss is None:
        raise TrainingError(
            "the training batches have no targets, and nobody teaches",
            fix="finetune(..., teacher=unpruned_model, recipe=Recipe(distill=1.0))",
        )
    return loss


def classification_loss(recipe: Recipe) -> LossFunction:
    """The mean cross-entropy, with the side outputs that some networks have in training."""

    def loss_fn(outputs: Any, targets: Tensor) -> Tensor:
        main, *sides = outputs if isinstance(outputs, tuple) else (outputs,)
        losses = [
            cross_entropy(getattr(output, "logits", output), targets, label_smoothing=recipe.label_smoothing)
            for output in (main, *sides)
            if output is not None
        ]
        return losses[0] + _AUXILIARY * sum(losses[1:], torch.zeros_like(losses[0]))

    return loss_fn


def evaluated(model: nn.Module, validation: Validation | None, engine: Accelerator) -> Epoch:
    """The model as it is, as an epoch with the number 0."""
    from secateurs.measure.accuracy import accuracy

    started = time.perf_counter()
    score = loss = None
    model.eval()
    if callable(validation):
        score = float(validation(model))
    elif validation is not None:
        measured = accuracy(model, validation, engine.device)
        score, loss = measured.top1, measured.loss
    check_measured(score, loss)
    seconds = round(time.perf_counter() - started, 3)
    return Epoch(number=0, loss=None, score=score, val_loss=loss, seconds=seconds)
