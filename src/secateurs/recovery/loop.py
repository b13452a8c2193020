"""The training loop: epochs of steps, resumable between any two of them."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Iterable, Sized
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.utils.data import DataLoader

from secateurs.channels_last import ChannelsLast
from secateurs.errors import TrainingError, TrainingStoppedError
from secateurs.progress import Checkpoint, Event, Observer, derive_seed
from secateurs.recovery.average import Average
from secateurs.recovery.batches import Batch, drawn_apart, gathered
from secateurs.recovery.distill import Lessons
from secateurs.recovery.history import Epoch, History
from secateurs.recovery.losses import LossFunction, Validation, evaluated, loss_on
from secateurs.recovery.recipe import Recipe
from secateurs.recovery.regularizer import Regularizer
from secateurs.recovery.resuming import Place, Snapshot
from secateurs.recovery.surroundings import (
    agree,
    on_device,
    seed_everything,
    summed,
    training_mode,
    weights_of,
)
from secateurs.recovery.trouble import channels_last_told, check_collapse, check_finite, memory_told

if TYPE_CHECKING:
    from accelerate import Accelerator

Batches = Iterable[Any]


class Loop:
    """One call of :func:`~secateurs.recovery.finetune`, once everything is on its device.

    Args:
        model: The model.
        network: The same as accelerate runs it.
        optimizer: The optimizer of its parameters.
        recipe: The settings.
        loss_fn: The loss of a batch that has targets.
        lessons: What a teacher adds.
        regularizer: What acts on gradients and weights beside the loss.
        engine: Devices, precision and processes.
        observer: Who is told.
        checkpoint: Where states go.
    """

    def __init__(
        self,
        model: nn.Module,
        network: nn.Module,
        optimizer: torch.optim.Optimizer,
        recipe: Recipe,
        *,
        loss_fn: LossFunction,
        lessons: Lessons | None,
        regularizer: Regularizer | None,
        engine: Accelerator,
        observer: Observer,
        checkpoint: Checkpoint | None,
    ) -> None:
        self.model, self.network, self.recipe, self.engine = model, network, recipe, engine
        self.loss_fn, self.lessons, self.regularizer = loss_fn, lessons, regularizer
        self.observer, self.checkpoint = observer, checkpoint
        self.plain_optimizer = optimizer
        self.optimizer = engine.prepare_optimizer(optimizer)
        self.average = Average(model, recipe.ema) if recipe.ema else None
        self.snapshot = Snapshot(
            model, optimizer, average=self.average, regularizer=regularizer, scaler=engine.scaler
        )
        self.history: History | None = None
        self.channels_last = ChannelsLast(engine.device, recipe.channels_last, engine.autocast)
        self._saved_at = time.monotonic()

    def run(self, batches: Batches | Callable[[int], Batches], validation: Validation | None) -> History:
        """All epochs that are not over, from where the checkpoint is; the best weights are put back."""
        try:
            with self.channels_last:
                return self._run(batches, validation)
        except TrainingStoppedError as error:
            error.history = self.history
            raise
        finally:
            self.model.load_state_dict(self.snapshot.best)

    def _run(self, batches: Batches | Callable[[int], Batches], validation: Validation | None) -> History:
        if self.regularizer is not None:
            self.regularizer.start(self.model)
        state = self.checkpoint.load() if self.checkpoint else None
        if state is None:
            place = Place(history=History(start=evaluated(self.model, validation, self.engine)))
        else:
            place = self.snapshot.restore(state)
        self.history = place.history
        if self.regularizer is None:
            check_collapse(self.history, self.recipe)  # a resumed run stops where it had stopped
        while place.epoch <= self.recipe.epochs and not place.history.is_over(self.recipe.patience):
            place = self._epoch(place, batches, validation)
        return place.history

    def _epoch(
        self, place: Place, batches: Batches | Callable[[int], Batches], validation: Validation | None
    ) -> Place:
        """The rest of one epoch, measured, kept if it is the best, and told."""
        started, number = time.perf_counter(), place.epoch
        place = self._train(place, batches)
        agree(self.model, self.engine)
        if self.regularizer is not None:
            self.regularizer.after_epoch(self.model, number)
        with self.average.worn(self.model) if self.average else contextlib.nullcontext():
            measured = self._measure(validation)
            epoch = Epoch(
                number=number,
                loss=place.loss / place.samples,
                score=measured.score,
                val_loss=measured.val_loss,
                seconds=round(time.perf_counter() - started, 3),
            )
            history = place.history.with_epoch(epoch, keep=self.regularizer is not None)
            if history.best == number:
                self.snapshot.best = weights_of(self.model)
        self.history, place = history, Place(history=history)
        self._keep(place)
        if self.engine.is_main_process:
            more = {} if self.regularizer is None else self.regularizer.facts(self.model)
            self.observer(Event("epoch", {**_facts(epoch), **more, "epochs": self.recipe.epochs}))
        if self.regularizer is None:
            check_collapse(history, self.recipe)
        return place

    def _measure(self, validation: Validation | None) -> Epoch:
        """The score after an epoch; a function of the user's own finds the model as it was handed over."""
        with self.channels_last.suspended() if callable(validation) else contextlib.nullcontext():
            return evaluated(self.model, validation, self.engine)

    def _train(self, place: Place, batches: Batches | Callable[[int], Batches]) -> Place:
        """The steps of an epoch that are not done yet."""
        seed = derive_seed(self.recipe.seed, "epoch", place.epoch)
        seed_everything(seed, batches)
        data = batches(seed) if callable(batches) else batches
        count = _length(data, self.engine)
        training_mode(self.model, self.recipe)
        skipped, before = 0, place.batches  # what a killed run had done of this epoch
        with contextlib.closing(on_device(data, self.engine)) as placed:
            for some in gathered(drawn_apart(placed, seed), self.recipe.accumulate):
                if skipped < before:
                    skipped += len(some)
                    continue
                done = place.epoch - 1 + (place.batches / count if count else 0)
                self._choose_memory(some[0])
                with (
                    memory_told(max(map(len, some)), place.epoch),
                    channels_last_told(self.channels_last.is_on),
                ):
                    loss, samples = self._step(some, place, seed, done)
                place = place.after(len(some), loss * samples, samples)
                self._tell_step(place, count, loss, done)
                if time.monotonic() - self._saved_at >= 60 * self.recipe.checkpoint_minutes:
                    self._keep(place)
        if place.samples == 0:
            raise TrainingError("the training data gave no batch")
        return place

    def _choose_memory(self, batch: Batch) -> None:
        """Before the first step: how the networks lie in memory."""
        if not self.channels_last.is_open:
            return
        networks = [self.model, *([self.lessons.teacher] if self.lessons else [])]
        trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        refused = self.channels_last.choose(batch.inputs, *networks, trained=trained)
        if refused is not None and self.recipe.channels_last:
            raise TrainingError(
                f"the model does not run with channels last: {refused}",
                fix="Recipe(channels_last=False), or --no-channels-last",
            ) from refused
        for kept in self.plain_optimizer.state.values():
            kept |= self.channels_last.like_kernels(kept)

    def _step(self, some: list[Batch], place: Place, seed: int, done: float) -> tuple[float, int]:
        """One step of the optimizer; gives the mean loss and the samples of all processes."""
        torch.manual_seed(derive_seed(seed, "batch", place.batches, self.engine.process_index))
        lr = self.recipe.lr_at(done)
        for group in self.plain_optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.zero_grad(set_to_none=True)
        sizes = [len(batch) for batch in some]
        total = samples = 0.0
        for index, batch in enumerate(some):
            last = index == len(some) - 1
            with contextlib.nullcontext() if last else self.engine.no_sync(self.network):
                mixed = batch.mixed(self.recipe.mixup) if self.recipe.mixup else batch
                loss = loss_on(self.network, mixed, self.loss_fn, self.lessons)
                here, size = summed([loss.item() * sizes[index], sizes[index]], self.engine)
                check_finite(here, self.recipe, epoch=place.epoch, batch=place.batches + index + 1, lr=lr)
                self.engine.backward(loss * (sizes[index] / sum(sizes)))
                total, samples = total + here, samples + size
        self._move(done)
        return total / samples, int(samples)

    def _move(self, done: float) -> None:
        """The gradients are complete: move the weights."""
        if self.recipe.clip_norm is not None:
            self.engine.clip_grad_norm_(self.model.parameters(), self.recipe.clip_norm)
        elif self.regularizer is not None:
            self.engine.unscale_gradients(self.optimizer)  # as clipping does: else half precision scales them
        if self.regularizer is not None:
            self.regularizer.after_backward(self.model, done)
        self.optimizer.step()
        if self.regularizer is not None:
            self.regularizer.after_step(self.model)
        if self.average is not None:
            self.average.update(self.model)

    def _tell_step(self, place: Place, count: int | None, loss: float, done: float) -> None:
        if self.engine.is_main_process:
            facts: dict[str, Any] = {
                "epoch": place.epoch,
                "epochs": self.recipe.epochs,
                "batch": place.batches,
            }
            facts |= {"batches": count, "loss": loss, "lr": self.recipe.lr_at(done)}
            self.observer(Event("batch", facts))

    def _keep(self, place: Place) -> None:
        """Keep the state, in the first process."""
        if self.checkpoint is not None and self.engine.is_main_process:
            self.checkpoint.save(self.snapshot.take(place))
        self._saved_at = time.monotonic()


def _length(data: Batches, engine: Accelerator) -> int | None:
    """How many batches of an epoch this process gets, if that is known."""
    if not isinstance(data, Sized):
        return None
    shared_out = isinstance(data, DataLoader)
    return math.ceil(len(data) / engine.num_processes) if shared_out else len(data)


def _facts(epoch: Epoch) -> dict[str, Any]:
    return {
        "epoch": epoch.number,
        "loss": epoch.loss,
        "score": epoch.score,
        "val_loss": epoch.val_loss,
        "seconds": epoch.seconds,
    }
