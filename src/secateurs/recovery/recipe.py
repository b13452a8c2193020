"""How to train: the numbers of a training run, and what happened in it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from torch import nn, optim

from secateurs.errors import TrainingError, UnknownNameError

OPTIMIZERS = ("adamw", "sgd")
SCHEDULES = ("constant", "cosine")


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """The settings of a training run.

    Attributes:
        epochs: Passes over the data, 0 or more.
        lr: The highest learning rate, positive.
        optimizer: ``"sgd"`` (with momentum) or ``"adamw"``.
        momentum: For ``"sgd"``, in [0, 1).
        weight_decay: 0 or more; on weights alone, not on biases and norms (parameters of one dimension).
        schedule: ``"cosine"`` falls to zero over the epochs, ``"constant"`` stays.
        warmup_epochs: The learning rate rises in a line over this many epochs first.
        label_smoothing: The share of each target that is spread over all classes, in [0, 1).
        clip_norm: The longest gradient, as the 2-norm over all parameters; ``None`` for no limit.
        freeze_bn: Keep the running statistics of batch norms as they are.
        distill: The share of the loss that comes from a teacher's outputs, in [0, 1].
        temperature: How soft these outputs are made, positive; see
            :func:`~secateurs.recovery.distill.distillation_loss`.
        seed: What the random numbers of each epoch follow from.

    Example:
        >>> Recipe(epochs=2, lr=0.1).lr_at(1.0)
        0.05
    """

    epochs: int = 10
    lr: float = 0.001
    optimizer: str = "sgd"
    momentum: float = 0.9
    weight_decay: float = 1e-4
    schedule: str = "cosine"
    warmup_epochs: float = 0.0
    label_smoothing: float = 0.0
    clip_norm: float | None = None
    freeze_bn: bool = False
    distill: float = 0.0
    temperature: float = 4.0
    seed: int = 0

    def __post_init__(self) -> None:
        if self.optimizer not in OPTIMIZERS:
            raise UnknownNameError("optimizer", self.optimizer, OPTIMIZERS)
        if self.schedule not in SCHEDULES:
            raise UnknownNameError("schedule", self.schedule, SCHEDULES)
        for holds, rule, name in (
            (self.epochs >= 0, "epochs >= 0", "epochs"),
            (0 < self.lr < math.inf, "0 < lr", "lr"),
            (0 <= self.momentum < 1, "0 <= momentum < 1", "momentum"),
            (0 <= self.weight_decay < math.inf, "0 <= weight_decay", "weight_decay"),
            (0 <= self.warmup_epochs < math.inf, "0 <= warmup_epochs", "warmup_epochs"),
            (0 <= self.label_smoothing < 1, "0 <= label_smoothing < 1", "label_smoothing"),
            (self.clip_norm is None or self.clip_norm > 0, "0 < clip_norm", "clip_norm"),
            (0 <= self.distill <= 1, "0 <= distill <= 1", "distill"),
            (0 < self.temperature < math.inf, "0 < temperature", "temperature"),
        ):
            if not holds:
                raise TrainingError(f"`{rule}` must hold, got {name}={getattr(self, name)}")

    def lr_at(self, epochs_done: float) -> float:
        """The learning rate after ``epochs_done`` epochs, which may be a fraction.

        A pure function of where training is, so that a resumed run needs no scheduler state.
        """
        if epochs_done < self.warmup_epochs:
            return self.lr * max(epochs_done / self.warmup_epochs, 1e-3)
        if self.schedule == "constant":
            return self.lr
        share = (epochs_done - self.warmup_epochs) / max(self.epochs - self.warmup_epochs, 1e-9)
        return self.lr * (1 + math.cos(math.pi * min(share, 1.0))) / 2

    def optimizer_for(self, model: nn.Module) -> optim.Optimizer:
        """The optimizer over the parameters of ``model`` that require gradients."""
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        if not trained:
            raise TrainingError(
                "no parameter of the model requires a gradient, so there is nothing to train",
                fix="model.requires_grad_(True)",
            )
        groups = [
            {"params": [p for p in trained if p.ndim > 1], "weight_decay": self.weight_decay},
            {"params": [p for p in trained if p.ndim <= 1], "weight_decay": 0.0},
        ]
        groups = [group for group in groups if group["params"]]
        if self.optimizer == "adamw":
            return optim.AdamW(groups, lr=self.lr)
        return optim.SGD(groups, lr=self.lr, momentum=self.momentum)


@dataclass(frozen=True, slots=True, kw_only=True)
class Epoch:
    """One pass over the data, and how good the model was after it.

    Attributes:
        number: From 1; 0 for the model before training.
        loss: Mean training loss; ``None`` before training.
        score: Top-1 accuracy on the validation data as a share, or what the given function returned; ``None``
            without validation.
        val_loss: Mean loss on the validation data, where there is one.
        seconds: What the epoch took, validation included.
    """

    number: int
    loss: float | None
    score: float | None
    val_loss: float | None
    seconds: float

    def is_better_than(self, other: Epoch) -> bool:
        """Whether this epoch's model is to be kept instead: by score, then by loss, else the later one."""
        if self.score is None or other.score is None:
            return True
        if self.score != other.score:
            return self.score > other.score
        return (self.val_loss or 0.0) < (other.val_loss or 0.0)


@dataclass(frozen=True, slots=True, kw_only=True)
class History:
    """What happened in a training run.

    Attributes:
        start: The model before training.
        epochs: Each epoch in order.
        best: The number of the epoch whose weights were kept; 0 for those from before training.
    """

    start: Epoch
    epochs: tuple[Epoch, ...] = ()
    best: int = 0

    @property
    def kept(self) -> Epoch:
        """The epoch whose weights were kept."""
        return self.start if self.best == 0 else self.epochs[self.best - 1]

    def with_epoch(self, epoch: Epoch, *, keep: bool = False) -> History:
        """This history and one epoch more; its weights are kept if they are the best, or if ``keep``."""
        best = epoch.number if keep or epoch.is_better_than(self.kept) else self.best
        return History(start=self.start, epochs=(*self.epochs, epoch), best=best)

    def to_dict(self) -> dict[str, Any]:
        """This history as JSON can hold it."""
        return asdict(self)

    @classmethod
    def from_dict(cls, facts: Mapping[str, Any]) -> History:
        """The history that :meth:`to_dict` wrote."""
        epochs = tuple(Epoch(**epoch) for epoch in facts["epochs"])
        return cls(start=Epoch(**facts["start"]), epochs=epochs, best=facts["best"])
