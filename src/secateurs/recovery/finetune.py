"""Training a model in place: on accelerate's devices, resumable at every step, keeping the best weights."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from torch import nn

from secateurs.errors import TrainingError
from secateurs.planning.plan import Plan
from secateurs.progress import Checkpoint, Observer, ignore
from secateurs.recovery.distill import lessons
from secateurs.recovery.history import History
from secateurs.recovery.loop import Batches, Loop
from secateurs.recovery.losses import LossFunction, Validation, classification_loss, evaluated
from secateurs.recovery.recipe import Recipe
from secateurs.recovery.regularizer import Regularizer
from secateurs.recovery.surroundings import nothing_else_changed, prepared

if TYPE_CHECKING:
    from accelerate import Accelerator


def finetune(
    model: nn.Module,
    batches: Batches | Callable[[int], Batches],
    validation: Validation | None = None,
    *,
    recipe: Recipe | None = None,
    loss_fn: LossFunction | None = None,
    teacher: nn.Module | None = None,
    plan: Plan | None = None,
    regularizer: Regularizer | None = None,
    observer: Observer = ignore,
    checkpoint: Checkpoint | None = None,
    accelerator: Accelerator | None = None,
) -> History:
    """Train ``model`` in place and leave it with the best weights that it had.

    The random numbers of a step follow from ``recipe.seed`` and its place alone, so that on a CPU a run
    that is killed and resumed from its checkpoint, also within an epoch, ends with the same bits. The model's
    mode, its device and the global random state are afterwards what they were; so are the weights of a run
    that fails, or the best that it had until then.

    Args:
        model: Any model; parameters that require no gradient stay as they are, and so do the statistics
            of batch norms that have no parameter to train.
        batches: Pairs ``(inputs, targets)``, where inputs are a tensor, a tuple or a dict of keyword
            arguments; or a function that gives such batches for the seed of an epoch. With a teacher, inputs
            alone will do, or ``None`` for targets: the loss is then the teacher's.
        validation: Batches to measure top-1 accuracy on after each epoch, or a function of the model whose
            value is larger for better models. Without it the last weights are kept.
        recipe: The settings; ``Recipe()`` if not given.
        loss_fn: ``(outputs, targets)`` to a scalar mean; cross-entropy if not given.
        teacher: The network that ``recipe.distill`` learns from, usually the one before pruning. It sees the
            same batches, in evaluation mode, and is not changed.
        plan: The cut between ``teacher`` and ``model``, so that the two can be compared inside as well; see
            ``recipe.distill_features``.
        regularizer: What acts on gradients and weights beside the loss. With it the last weights are kept and
            not the best: it trades accuracy for sparsity, so that the best epoch is the one it touched least.
        observer: Called with an :class:`~secateurs.progress.Event` for each batch and each epoch.
        checkpoint: Where the state goes after each epoch and every ``recipe.checkpoint_minutes``, and where
            it comes from at the start.
        accelerator: Devices, precision and processes; by default the first GPU, else the CPU.

    Returns:
        Losses and scores of every epoch, and which epoch's weights were kept.

    Raises:
        TrainingStoppedError: The loss was no longer a number, the accuracy fell and did not come back, or the
            memory was not enough.
        TrainingError: No parameter requires a gradient, or the arguments do not go together.

    Example:
        >>> import torch
        >>> inputs, targets = torch.randn(8, 4), torch.arange(8) % 2
        >>> history = finetune(nn.Linear(4, 2), [(inputs, targets)], recipe=Recipe(epochs=3, lr=0.1))
        >>> history.epochs[2].loss < history.epochs[0].loss
        True
    """
    recipe = recipe or Recipe()
    _check(recipe, loss_fn, validation, regularizer)
    optimizer = recipe.optimizer_for(model)
    with (
        prepared(model, accelerator, recipe.precision) as (engine, network),
        nothing_else_changed(model, batches),
        lessons(teacher, model, plan, recipe, engine) as taught,
    ):
        if recipe.epochs == 0:
            return History(start=evaluated(model, validation, engine))
        loop = Loop(
            model,
            network,
            optimizer,
            recipe,
            loss_fn=loss_fn or classification_loss(recipe),
            lessons=taught,
            regularizer=regularizer,
            engine=engine,
            observer=observer,
            checkpoint=checkpoint,
        )
        return loop.run(batches, validation)


def _check(
    recipe: Recipe,
    loss_fn: LossFunction | None,
    validation: Validation | None,
    regularizer: Regularizer | None,
) -> None:
    """Refuse settings that would have no effect."""
    if loss_fn is not None and recipe.label_smoothing:
        message = f"label_smoothing={recipe.label_smoothing} has no effect on a loss_fn of your own"
        raise TrainingError(message, fix="Recipe(label_smoothing=0) and smooth in loss_fn")
    if recipe.patience is not None and validation is None:
        message = f"patience={recipe.patience} has no effect without validation data"
        raise TrainingError(message, fix="finetune(model, batches, validation)")
    if regularizer is not None and (recipe.ema or recipe.patience is not None):
        given = f"ema={recipe.ema}, patience={recipe.patience}"
        raise TrainingError(
            f"with a regularizer the last weights are kept as they are, so {given} have no effect",
            fix="Recipe(ema=0, patience=None)",
        )
