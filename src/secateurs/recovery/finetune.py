"""The training loop: on accelerate's devices, resumable at every epoch, keeping the best weights."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Iterable, Mapping, Sized
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from secateurs.errors import TrainingError
from secateurs.graph.running import call_model
from secateurs.progress import Checkpoint, Event, Observer, State, derive_seed, ignore
from secateurs.recovery.distill import Lessons, lessons
from secateurs.recovery.recipe import Epoch, History, Recipe
from secateurs.recovery.regularizer import Regularizer
from secateurs.recovery.surroundings import (
    agreed,
    nothing_else_changed,
    on_device,
    prepared,
    seed_everything,
    training_mode,
)

if TYPE_CHECKING:
    from accelerate import Accelerator

Batches = Iterable[Any]
LossFunction = Callable[[Any, Tensor], Tensor]
Validation = Iterable[Any] | Callable[[nn.Module], float]
_AUXILIARY = 0.3  # what the side outputs of an Inception or GoogLeNet count in training


def finetune(
    model: nn.Module,
    batches: Batches | Callable[[int], Batches],
    validation: Validation | None = None,
    *,
    recipe: Recipe | None = None,
    loss_fn: LossFunction | None = None,
    teacher: nn.Module | None = None,
    regularizer: Regularizer | None = None,
    observer: Observer = ignore,
    checkpoint: Checkpoint | None = None,
    accelerator: Accelerator | None = None,
) -> History:
    """Train ``model`` in place and leave it with the best weights that it had.

    The random numbers of an epoch follow from ``recipe.seed`` and its number alone, so that on a CPU a run
    that is killed and resumed from its checkpoint ends with the same bits. The model's mode, its device and
    the global random state are afterwards what they were; so are the weights of a run that fails, or the best
    that it had until then.

    Args:
        model: Any model; parameters that require no gradient stay as they are, and so do the statistics
            of batch norms that have no parameter to train.
        batches: Pairs ``(inputs, targets)``, where inputs are a tensor, a tuple or a dict of keyword
            arguments; or a function that gives such batches for the seed of an epoch.
        validation: Batches to measure top-1 accuracy on after each epoch, or a function of the model whose
            value is larger for better models. Without it the last weights are kept.
        recipe: The settings; ``Recipe()`` if not given.
        loss_fn: ``(outputs, targets)`` to a scalar mean; cross-entropy if not given.
        teacher: The network that ``recipe.distill`` learns from, usually the one before pruning. It sees the
            same batches, in evaluation mode, and is not changed.
        regularizer: What acts on gradients and weights beside the loss. With it the last weights are kept and
            not the best: it trades accuracy for sparsity, so that the best epoch is the one it touched least.
        observer: Called with an :class:`~secateurs.progress.Event` for each batch and each epoch.
        checkpoint: Where the state goes after each epoch, and where it comes from at the start.
        accelerator: Devices, precision and processes; by default the first GPU, else the CPU.

    Returns:
        Losses and scores of every epoch, and which epoch's weights were kept.

    Raises:
        TrainingError: The loss was no longer a number, or no parameter requires a gradient, or the recipe
            and the teacher do not go together.

    Example:
        >>> inputs, targets = torch.randn(8, 4), torch.arange(8) % 2
        >>> history = finetune(nn.Linear(4, 2), [(inputs, targets)], recipe=Recipe(epochs=3, lr=0.1))
        >>> history.epochs[2].loss < history.epochs[0].loss
        True
    """
    recipe = recipe or Recipe()
    if loss_fn is not None and recipe.label_smoothing:
        message = f"label_smoothing={recipe.label_smoothing} has no effect on a loss_fn of your own"
        raise TrainingError(message, fix="Recipe(label_smoothing=0) and smooth in loss_fn")
    optimizer = recipe.optimizer_for(model)
    with (
        prepared(model, accelerator) as (engine, network),
        nothing_else_changed(model, batches),
        lessons(teacher, model, recipe, engine) as taught,
    ):
        if recipe.epochs == 0:
            return History(start=_evaluate(model, validation, engine))
        loss_fn = loss_fn or _cross_entropy(recipe)
        loop = _Loop(model, network, optimizer, recipe, loss_fn, taught, regularizer, engine)
        return loop.run(batches, validation, observer, checkpoint)


class _Loop:
    """One call of :func:`finetune`, once everything is on its device."""

    def __init__(
        self,
        model: nn.Module,
        network: nn.Module,
        optimizer: torch.optim.Optimizer,
        recipe: Recipe,
        loss_fn: LossFunction,
        lessons: Lessons | None,
        regularizer: Regularizer | None,
        engine: Accelerator,
    ) -> None:
        self.model, self.network, self.recipe = model, network, recipe
        self.loss_fn, self.lessons, self.engine = loss_fn, lessons, engine
        self.regularizer = regularizer
        self.plain_optimizer = optimizer
        self.optimizer = engine.prepare_optimizer(optimizer)
        self.best = _copy(model)

    def run(
        self,
        batches: Batches | Callable[[int], Batches],
        validation: Validation | None,
        observer: Observer,
        checkpoint: Checkpoint | None,
    ) -> History:
        try:
            if self.regularizer is not None:
                self.regularizer.start(self.model)
            history = self._restore(checkpoint.load() if checkpoint else None)
            if history is None:
                history = History(start=_evaluate(self.model, validation, self.engine))
            for number in range(len(history.epochs) + 1, self.recipe.epochs + 1):
                started = time.perf_counter()
                loss = self._train(number, batches, observer)
                if self.regularizer is not None:
                    self.regularizer.after_epoch(self.model, number)
                measured = _evaluate(self.model, validation, self.engine)
                epoch = Epoch(
                    number=number,
                    loss=loss,
                    score=measured.score,
                    val_loss=measured.val_loss,
                    seconds=round(time.perf_counter() - started, 3),
                )
                history = history.with_epoch(epoch, keep=self.regularizer is not None)
                if history.best == number:
                    self.best = _copy(self.model)
                if self.engine.is_main_process:
                    if checkpoint:
                        checkpoint.save(self._state(history))
                    more = {} if self.regularizer is None else self.regularizer.facts(self.model)
                    observer(Event("epoch", {**_facts(epoch), **more, "epochs": self.recipe.epochs}))
        finally:
            self.model.load_state_dict(self.best)
        return history

    def _train(self, number: int, batches: Batches | Callable[[int], Batches], observer: Observer) -> float:
        """One epoch; gives the mean loss."""
        seed = derive_seed(self.recipe.seed, "epoch", number)
        seed_everything(seed, batches)
        data = batches(seed) if callable(batches) else batches
        count = len(data) if isinstance(data, Sized) else None
        training_mode(self.model, self.recipe)
        total, samples = 0.0, 0
        with contextlib.closing(on_device(data, self.engine)) as placed:
            for index, (inputs, targets) in enumerate(placed):
                done = number - 1 + index / count if count else number - 1
                lr = self.recipe.lr_at(done)
                loss = self._update(inputs, targets, lr, done)
                if not math.isfinite(loss):
                    raise self._diverged(loss, number, index + 1, lr)
                total, samples = total + loss * len(targets), samples + len(targets)
                if self.engine.is_main_process:
                    facts = {"epoch": number, "epochs": self.recipe.epochs, "batch": index + 1}
                    observer(Event("batch", {**facts, "batches": count, "loss": loss, "lr": lr}))
        if samples == 0:
            raise TrainingError("the training data gave no batch")
        return agreed(total, samples, self.model, self.engine)

    def _diverged(self, loss: float, epoch: int, batch: int, lr: float) -> TrainingError:
        return TrainingError(
            f"the loss became {loss} in epoch {epoch}, batch {batch}, at a learning rate of {lr:.3g}; the "
            "model keeps the best weights that it had before",
            fix=f"lower lr to {self.recipe.lr / 10:.2g}, or set clip_norm=1.0",
        )

    def _update(self, inputs: Any, targets: Tensor, lr: float, epochs_done: float) -> float:
        """One step of the optimizer."""
        for group in self.plain_optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.zero_grad(set_to_none=True)
        outputs = call_model(self.network, inputs)
        loss = self.loss_fn(outputs, targets)
        if self.lessons is not None:
            loss = self.lessons.mix(loss, outputs, inputs)
        value = loss.item()
        if math.isfinite(value):
            self.engine.backward(loss)
            if self.recipe.clip_norm is not None:
                self.engine.clip_grad_norm_(self.model.parameters(), self.recipe.clip_norm)
            elif self.regularizer is not None:
                self.engine.unscale_gradients(
                    self.optimizer
                )  # as clipping does: else half precision scales them
            if self.regularizer is not None:
                self.regularizer.after_backward(self.model, epochs_done)
            self.optimizer.step()
            if self.regularizer is not None:
                self.regularizer.after_step(self.model)
        return value

    def _state(self, history: History) -> State:
        """All that the next epoch depends on, by name."""
        tensors = {f"model.{name}": tensor for name, tensor in self.model.state_dict().items()}
        if history.best != len(history.epochs):
            tensors |= {f"best.{name}": tensor for name, tensor in self.best.items()}
        for index, entries in self.plain_optimizer.state_dict()["state"].items():
            for name, value in entries.items():
                if isinstance(value, Tensor):
                    tensors[f"optimizer.{index}.{name}"] = value
        facts: dict[str, Any] = {"history": history.to_dict()}
        if self.regularizer is not None:
            own = self.regularizer.state()
            facts["regularizer"] = dict(own.facts)
            tensors |= {f"regularizer.{name}": tensor for name, tensor in own.tensors.items()}
        return State(facts, tensors)

    def _restore(self, state: State | None) -> History | None:
        """Continue from ``state``; gives the history so far."""
        if state is None:
            return None
        history = History.from_dict(state.facts["history"])
        if ("regularizer" in state.facts) != (self.regularizer is not None):
            was = "with" if "regularizer" in state.facts else "without"
            raise TrainingError(
                f"the checkpoint is of a training {was} a regularizer", fix="resume with the same arguments"
            )
        if self.regularizer is not None:
            own = _below("regularizer.", state.tensors)
            self.regularizer.load_state(State(state.facts["regularizer"], own))
        current = _below("model.", state.tensors)
        self.model.load_state_dict(current)
        self.best = (
            _copy(self.model) if history.best == len(history.epochs) else _below("best.", state.tensors)
        )
        entries: dict[int, dict[str, Tensor]] = {}
        for path, value in _below("optimizer.", state.tensors).items():
            index, name = path.split(".", 1)
            entries.setdefault(int(index), {})[name] = value
        groups = self.plain_optimizer.state_dict()["param_groups"]
        self.plain_optimizer.load_state_dict({"state": entries, "param_groups": groups})
        return history


def _evaluate(model: nn.Module, validation: Validation | None, engine: Accelerator) -> Epoch:
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
    if not all(value is None or math.isfinite(value) for value in (score, loss)):
        raise TrainingError(
            f"on the validation data the loss became {loss}, at a score of {score}; the model keeps the best "
            "weights that it had before",
            fix="lower lr, or set clip_norm=1.0",
        )
    seconds = round(time.perf_counter() - started, 3)
    return Epoch(number=0, loss=None, score=score, val_loss=loss, seconds=seconds)


def _cross_entropy(recipe: Recipe) -> LossFunction:
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


def _copy(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def _below(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}


def _facts(epoch: Epoch) -> dict[str, Any]:
    return {
        "epoch": epoch.number,
        "loss": epoch.loss,
        "score": epoch.score,
        "val_loss": epoch.val_loss,
        "seconds": epoch.seconds,
    }
