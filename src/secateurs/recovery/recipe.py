"""How to train: the numbers of a training run."""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise

from torch import nn, optim

from secateurs.errors import TrainingError, UnknownNameError

OPTIMIZERS = ("adamw", "sgd")
SCHEDULES = ("constant", "cosine", "step")
PRECISIONS = ("bf16", "fp16", "no")
_FEATURES = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """The settings of a training run.

    Attributes:
        epochs: Passes over the data, 0 or more.
        lr: The highest learning rate, positive.
        optimizer: ``"sgd"`` (with momentum) or ``"adamw"``.
        momentum: For ``"sgd"``, in [0, 1).
        nesterov: For ``"sgd"``: look ahead along the momentum, which must then be positive.
        weight_decay: 0 or more; on weights alone, not on biases and norms (parameters of one dimension).
        schedule: ``"cosine"`` falls to zero over the epochs, ``"step"`` by a factor at some, ``"constant"``
            stays.
        lr_steps: For ``"step"``: the shares of the training at which the rate falls, ascending, in (0, 1).
        lr_factor: For ``"step"``: what it is multiplied by there, in (0, 1).
        warmup_epochs: The learning rate rises in a line over this many epochs first.
        label_smoothing: The share of each target that is spread over all classes, in [0, 1).
        clip_norm: The longest gradient, as the 2-norm over all parameters; ``None`` for no limit.
        freeze_bn: Keep the running statistics of batch norms as they are.
        accumulate: Batches whose gradients make one step of the optimizer, 1 or more.
        precision: ``"bf16"`` or ``"fp16"`` for mixed precision, ``"no"`` for none; ``None`` for what
            ``accelerate launch`` says, else none.
        channels_last: Whether convolutions of images run with this memory layout, which changes speed and
            rounding; ``None`` for where it is faster and the model runs so, see
            :class:`~secateurs.channels_last.ChannelsLast`.
        mixup: 0, or the ``alpha`` of the Beta distribution that says how far samples are mixed with others.
        ema: 0, or the decay of a running average of the weights, which is what is measured and kept.
        patience: Epochs without a better validation after which training stops; ``None`` for never.
        distill: The share of the loss that comes from a teacher's outputs, in [0, 1]. ``None`` is 0; a job
            that prunes or recovers on images without labels takes 1 for it.
        temperature: How soft these outputs are made, positive; see
            :func:`~secateurs.recovery.distill.distillation_loss`.
        distill_features: How much the difference from the teacher where cut groups end counts in the loss,
            beside the rest; 0 or more. ``None`` is 1 where a teacher's outputs count, the cut is known and
            there is anything to compare, and else 0.
        checkpoint_minutes: Time between two states that are kept within an epoch; 0 for every step.
        seed: What the random numbers of each step follow from.

    Example:
        >>> Recipe(epochs=2, lr=0.1).lr_at(1.0)
        0.05
        >>> steps = Recipe(epochs=4, lr=1.0, schedule="step")
        >>> [round(steps.lr_at(done), 3) for done in (0, 2, 3)]
        [1.0, 0.1, 0.01]
    """

    epochs: int = 10
    lr: float = 0.001
    optimizer: str = "sgd"
    momentum: float = 0.9
    nesterov: bool = False
    weight_decay: float = 1e-4
    schedule: str = "cosine"
    lr_steps: tuple[float, ...] = (0.5, 0.75)
    lr_factor: float = 0.1
    warmup_epochs: float = 0.0
    label_smoothing: float = 0.0
    clip_norm: float | None = None
    freeze_bn: bool = False
    accumulate: int = 1
    precision: str | None = None
    channels_last: bool | None = None
    mixup: float = 0.0
    ema: float = 0.0
    patience: int | None = None
    distill: float | None = None
    temperature: float = 4.0
    distill_features: float | None = None
    checkpoint_minutes: float = 5.0
    seed: int = 0

    def __post_init__(self) -> None:
        for kind, name, known in (
            ("optimizer", self.optimizer, OPTIMIZERS),
            ("schedule", self.schedule, SCHEDULES),
            ("precision", self.precision, PRECISIONS),
        ):
            if name is not None and name not in known:
                raise UnknownNameError(kind, name, known)
        looks_ahead = self.optimizer == "sgd" and self.momentum > 0
        fall = (0.0, *self.lr_steps, 1.0)
        for holds, rule, name in (
            (self.epochs >= 0, "epochs >= 0", "epochs"),
            (0 < self.lr < math.inf, "0 < lr", "lr"),
            (0 <= self.momentum < 1, "0 <= momentum < 1", "momentum"),
            (looks_ahead or not self.nesterov, "optimizer = sgd and momentum > 0", "nesterov"),
            (0 <= self.weight_decay < math.inf, "0 <= weight_decay", "weight_decay"),
            (all(a < b for a, b in pairwise(fall)), "0 < a < b ... < 1", "lr_steps"),
            (0 < self.lr_factor < 1, "0 < lr_factor < 1", "lr_factor"),
            (0 <= self.warmup_epochs < math.inf, "0 <= warmup_epochs", "warmup_epochs"),
            (0 <= self.label_smoothing < 1, "0 <= label_smoothing < 1", "label_smoothing"),
            (self.clip_norm is None or self.clip_norm > 0, "0 < clip_norm", "clip_norm"),
            (self.accumulate >= 1, "accumulate >= 1", "accumulate"),
            (0 <= self.mixup < math.inf, "0 <= mixup", "mixup"),
            (0 <= self.ema < 1, "0 <= ema < 1", "ema"),
            (self.patience is None or self.patience >= 1, "patience >= 1", "patience"),
            (0 <= self.taught_share <= 1, "0 <= distill <= 1", "distill"),
            (0 < self.temperature < math.inf, "0 < temperature", "temperature"),
            (0 <= (self.distill_features or 0) < math.inf, "0 <= distill_features", "distill_features"),
            (0 <= self.checkpoint_minutes < math.inf, "0 <= checkpoint_minutes", "checkpoint_minutes"),
        ):
            if not holds:
                raise TrainingError(f"`{rule}` must hold, got {name}={getattr(self, name)}")

    @property
    def needs_teacher(self) -> bool:
        """Whether a part of the loss comes from another network."""
        return self.taught_share > 0 or (self.distill_features or 0) > 0

    @property
    def taught_share(self) -> float:
        """The share of the loss that comes from a teacher's outputs, also where none is given."""
        return self.distill or 0.0

    @property
    def features_weight(self) -> float:
        """What features count where they can be compared, also where no weight is given."""
        if self.distill_features is None:
            return _FEATURES if self.taught_share else 0.0
        return self.distill_features

    def lr_at(self, epochs_done: float) -> float:
        """The learning rate after ``epochs_done`` epochs, which may be a fraction.

        A pure function of where training is, so that a resumed run needs no scheduler state.
        """
        if epochs_done < self.warmup_epochs:
            return self.lr * max(epochs_done / self.warmup_epochs, 1e-3)
        if self.schedule == "constant":
            return self.lr
        if self.schedule == "step":
            return self.lr * self.lr_factor ** sum(epochs_done >= at * self.epochs for at in self.lr_steps)
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
        return optim.SGD(groups, lr=self.lr, momentum=self.momentum, nesterov=self.nesterov)
