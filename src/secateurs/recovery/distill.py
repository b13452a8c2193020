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
from secateurs.planning.plan import Plan
from secateurs.recovery.features import Features, as_named, boundaries
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
        recipe: Says how much its outputs and features count, and how soft the outputs are.
        engine: Runs it in the precision of the training.
        model: The network that learns, where the two are to be compared inside.
        plan: The cut between the two.
    """

    def __init__(
        self, teacher: nn.Module, recipe: Recipe, engine: Accelerator, model: nn.Module, plan: Plan | None
    ) -> None:
        self.teacher, self.recipe, self.engine = teacher, recipe, engine
        self._model, self._plan = model, plan
        self.features: Features | None = None

    def begin(self, inputs: Any) -> None:
        """Called before the network that learns sees a batch; the first one shows where to compare."""
        if self.features is not None:
            self.features.forget()
        elif self._plan is not None and self.recipe.features_weight:
            places = boundaries(self.teacher, self._model, self._plan, inputs)
            if not places and self.recipe.distill_features is not None:
                raise TrainingError(
                    "no linear layer or convolution reads what this plan cuts, so no features are compared",
                    fix="Recipe(distill_features=0)",
                )
            teacher, model = (as_named(self._plan, each) for each in (self.teacher, self._model))
            self.features = Features(teacher, model, places)

    def close(self) -> None:
        """Stop reading what is inside."""
        if self.features is not None:
            self.features.close()

    def mix(self, loss: Tensor | None, outputs: Any, inputs: Any) -> Tensor:
        """``(1 - distill) * loss + distill * distillation_loss`` for one batch, and the features' difference.

        Without targets there is no loss to mix with: the teacher's part is then all of it.
        """
        with torch.no_grad(), self.engine.autocast():
            taught = logits_of(call_model(self.teacher, inputs)).float()
        share = self.recipe.taught_share if loss is not None else 1.0
        total = (1 - share) * loss if loss is not None else torch.zeros((), device=taught.device)
        if self.recipe.taught_share:
            total = total + share * distillation_loss(logits_of(outputs), taught, self.recipe.temperature)
        if self.features:
            total = total + self.recipe.features_weight * self.features.difference()
        return total


@contextlib.contextmanager
def lessons(
    teacher: nn.Module | None, model: nn.Module, plan: Plan | None, recipe: Recipe, engine: Accelerator
) -> Iterator[Lessons | None]:
    """A teacher made ready for training ``model``, and afterwards as it was, where it was.

    Raises:
        TrainingError: The recipe asks for a teacher and there is none, or the other way round.
    """
    if teacher is None:
        if recipe.needs_teacher:
            given = f"distill={recipe.taught_share}, distill_features={recipe.distill_features or 0.0}"
            raise TrainingError(f"{given} needs a teacher", fix="finetune(..., teacher=unpruned_model)")
        yield None
        return
    if not recipe.needs_teacher:
        raise TrainingError("a teacher has no effect with distill=0", fix="Recipe(distill=0.5)")
    if teacher is model:
        raise TrainingError("a network cannot be its own teacher", fix="teacher=copy.deepcopy(model)")
    if recipe.distill_features and plan is None:
        raise TrainingError(
            f"distill_features={recipe.distill_features} needs the cut between the two networks",
            fix="finetune(..., teacher=unpruned_model, plan=plan)",
        )
    home = next((parameter.device for parameter in teacher.parameters()), engine.device)
    with modes_kept(teacher):
        taught = Lessons(teacher.to(engine.device).eval(), recipe, engine, model, plan)
        try:
            yield taught
        finally:
            teacher.to(home)
            taught.close()


def logits_of(outputs: Any) -> Tensor:
    """The main logits of what a model returns: a tensor, a tuple that begins with it, or ``.logits``."""
    main = outputs[0] if isinstance(outputs, tuple) else outputs
    logits: Any = getattr(main, "logits", main)
    return cast(Tensor, logits)
