"""Distillation: a smaller network learns what a larger one says, not only which answer is right."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn
from torch.nn.functional import kl_div, log_softmax

from secateurs.errors import TrainingError
from secateurs.graph.running import call_model, modes_kept
from secateurs.recovery.recipe import Recipe

if TYPE_CHECKING:
    from accelerate import Accelerator


def distillation_loss(outputs: Tensor, taught: Tensor, temperature: float = 4.0) -> Tensor:
    """How far a network's softened outputs are from its teacher's.

    ``T^2 * KL(softmax(taught / T) || softmax(outputs / T))``, the mean over all but the classes. A high ``T``
    shows what the teacher thinks of the classes that it does not choose; ``T^2`` keeps the gradient, which
    falls with ``1 / T^2``, on the scale of a cross-entropy's.

    Args:
        outputs: Logits of the network that learns; shape ``(N, classes)`` or ``(N, classes, ...)``.
        taught: Logits of its teacher, of the same shape.
        temperature: ``T``, positive.

    Returns:
        A scalar, 0 where both agree.

    Raises:
        TrainingError: The shapes differ.

    References:
        Hinton, Vinyals, Dean, Distilling the Knowledge in a Neural Network,
        https://arxiv.org/abs/1503.02531

    Example:
        >>> distillation_loss(torch.tensor([[1.0, 0.0]]), torch.tensor([[1.0, 0.0]])).item()
        0.0
    """
    if outputs.shape != taught.shape:
        raise TrainingError(
            f"the network gives outputs of shape {tuple(outputs.shape)}, its teacher {tuple(taught.shape)}",
            fix="use a teacher of the same classes, such as the network before pruning",
        )
    told = log_softmax(taught / temperature, dim=1)  # (N, classes, ...)
    said = log_softmax(outputs / temperature, dim=1)
    apart = kl_div(said, told, reduction="none", log_target=True).sum(1)
    return temperature**2 * apart.mean()


class Lessons:
    """What a teacher adds to the loss of each batch.

    Args:
        teacher: The network to learn from, in evaluation mode and on the device of the batches.
        recipe: Says how much its outputs count, and how soft they are.
        engine: Runs it in the precision of the training.
    """

    def __init__(self, teacher: nn.Module, recipe: Recipe, engine: Accelerator) -> None:
        self.teacher, self.recipe, self.engine = teacher, recipe, engine

    def mix(self, loss: Tensor, outputs: Any, inputs: Any) -> Tensor:
        """``(1 - distill) * loss + distill * distillation_loss`` for one batch."""
        with torch.no_grad(), self.engine.autocast():
            taught = logits_of(call_model(self.teacher, inputs)).float()
        share = self.recipe.distill
        lesson = distillation_loss(logits_of(outputs), taught, self.recipe.temperature)
        return (1 - share) * loss + share * lesson


@contextlib.contextmanager
def lessons(
    teacher: nn.Module | None, model: nn.Module, recipe: Recipe, engine: Accelerator
) -> Iterator[Lessons | None]:
    """A teacher made ready for training ``model``, and afterwards as it was, where it was.

    Raises:
        TrainingError: The recipe asks for a teacher and there is none, or the other way round.
    """
    if teacher is None:
        if recipe.distill:
            raise TrainingError(
                f"distill={recipe.distill} needs a teacher", fix="finetune(..., teacher=unpruned_model)"
            )
        yield None
        return
    if not recipe.distill:
        raise TrainingError("a teacher has no effect with distill=0", fix="Recipe(distill=0.5)")
    if teacher is model:
        raise TrainingError("a network cannot be its own teacher", fix="teacher=copy.deepcopy(model)")
    home = next((parameter.device for parameter in teacher.parameters()), engine.device)
    with modes_kept(teacher):
        try:
            yield Lessons(teacher.to(engine.device).eval(), recipe, engine)
        finally:
            teacher.to(home)


def logits_of(outputs: Any) -> Tensor:
    """The main logits of what a model returns: a tensor, a tuple that begins with it, or ``.logits``."""
    main = outputs[0] if isinstance(outputs, tuple) else outputs
    logits: Any = getattr(main, "logits", main)
    return cast(Tensor, logits)
