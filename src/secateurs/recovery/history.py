"""What happened in a training run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any


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

    def is_over(self, patience: int | None) -> bool:
        """Whether no epoch of the last ``patience`` was better than one before."""
        return patience is not None and len(self.epochs) - self.best >= patience

    def told(self, patience: int | None = None) -> str:
        """Which epoch's weights were kept, and why, in one sentence.

        Args:
            patience: The recipe's; the sentence says where it ended the training.

        Example:
            >>> start, better, worse = (
            ...     Epoch(number=n, loss=1.0, score=score, val_loss=1.0, seconds=0.1)
            ...     for n, score in enumerate((0.5, 0.7, 0.6))
            ... )
            >>> History(start=start).with_epoch(better).with_epoch(worse).told(patience=1)
            'epoch 1 of 2 kept: the best validation; stopped after 1 epoch without a better one'
        """
        if not self.epochs:
            return "nothing was trained"
        which = f"epoch {self.best} of {len(self.epochs)} kept" if self.best else "no epoch kept"
        over = patience if self.is_over(patience) else None
        plural = "" if over == 1 else "s"
        end = f"; stopped after {over} epoch{plural} without a better one" if over else ""
        return f"{which}: {self._why()}{end}"

    def _why(self) -> str:
        if self.kept.score is None:
            return "the last, because nothing was measured"
        others = (each for each in (self.start, *self.epochs) if each is not self.kept)
        if self.best and any(each.is_better_than(self.kept) for each in others):
            return "the last, whatever the validation"
        return "the best validation" if self.best else "none was better than the weights before them"

    def to_dict(self) -> dict[str, Any]:
        """This history as JSON can hold it."""
        return asdict(self)

    @classmethod
    def from_dict(cls, facts: Mapping[str, Any]) -> History:
        """The history that :meth:`to_dict` wrote."""
        epochs = tuple(Epoch(**epoch) for epoch in facts["epochs"])
        return cls(start=Epoch(**facts["start"]), epochs=epochs, best=facts["best"])
