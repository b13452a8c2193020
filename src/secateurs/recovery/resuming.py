"""Where a training run stands, as a state that can be kept and taken up at any step."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn, optim

from secateurs.errors import TrainingError
from secateurs.progress import State
from secateurs.recovery.average import Average
from secateurs.recovery.history import History
from secateurs.recovery.regularizer import Regularizer
from secateurs.recovery.surroundings import weights_of


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """A place in a training run, between two steps.

    Attributes:
        history: The epochs that are over.
        batches: Batches of the next one that are done.
        loss: The sum of the losses of their samples.
        samples: Their number.
    """

    history: History
    batches: int = 0
    loss: float = 0.0
    samples: int = 0

    @property
    def epoch(self) -> int:
        """The number of the epoch that is not over."""
        return len(self.history.epochs) + 1

    def after(self, batches: int, loss: float, samples: int) -> Place:
        """One step further."""
        return Place(
            history=self.history,
            batches=self.batches + batches,
            loss=self.loss + loss,
            samples=self.samples + samples,
        )


class Snapshot:
    """All that the next step depends on, by name.

    Args:
        model: The model, not wrapped.
        optimizer: Its optimizer, not wrapped.
        average: The running average of its weights, if there is one.
        regularizer: What acts on it beside the loss, if anything does.
        scaler: The scaler of losses in half precision, if there is one.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: optim.Optimizer,
        *,
        average: Average | None = None,
        regularizer: Regularizer | None = None,
        scaler: Any = None,
    ) -> None:
        self.model, self.optimizer, self.average = model, optimizer, average
        self.regularizer, self.scaler = regularizer, scaler
        names = {id(parameter): name for name, parameter in model.named_parameters()}
        self._names = [names[id(p)] for group in optimizer.param_groups for p in group["params"]]
        self.best = weights_of(model)

    def take(self, place: Place) -> State:
        """The state at ``place``."""
        tensors = {f"model.{name}": tensor for name, tensor in self.model.state_dict().items()}
        facts: dict[str, Any] = {"history": place.history.to_dict()}
        facts |= {"batches": place.batches, "loss": place.loss, "samples": place.samples}
        if place.batches or self.average or place.history.best != len(place.history.epochs):
            tensors |= {f"best.{name}": tensor for name, tensor in self.best.items()}
        tensors |= {f"optimizer.{name}": tensor for name, tensor in self.momenta().items()}
        if self.average is not None:
            facts["updates"] = self.average.updates
            tensors |= {f"average.{name}": tensor for name, tensor in self.average.tensors.items()}
        if self.regularizer is not None:
            own = self.regularizer.state()
            facts["regularizer"] = dict(own.facts)
            tensors |= {f"regularizer.{name}": tensor for name, tensor in own.tensors.items()}
        if self.scaler is not None:
            facts["scaler"] = self.scaler.state_dict()
        return State(facts, tensors)

    def restore(self, state: State) -> Place:
        """Take up ``state``; gives the place that it is of.

        Raises:
            TrainingError: It is of a training of another kind.
        """
        facts, tensors = state.facts, state.tensors
        self._check_kind(facts)
        if self.regularizer is not None:
            self.regularizer.load_state(State(facts["regularizer"], below("regularizer.", tensors)))
        self.model.load_state_dict(below("model.", tensors))
        self.best = below("best.", tensors) or weights_of(self.model)
        if self.average is not None:
            self.average.updates = facts["updates"]
            for name, tensor in below("average.", tensors).items():
                self.average.tensors[name].copy_(tensor)
        if self.scaler is not None:
            self.scaler.load_state_dict(facts["scaler"])
        self.load_momenta(below("optimizer.", tensors))
        return Place(
            history=History.from_dict(facts["history"]),
            batches=facts["batches"],
            loss=facts["loss"],
            samples=facts["samples"],
        )

    def _check_kind(self, facts: Mapping[str, Any]) -> None:
        for key, own, what in (
            ("regularizer", self.regularizer, "a regularizer"),
            ("updates", self.average, "an average of the weights"),
            ("scaler", self.scaler, "a scaler of losses"),
        ):
            if (key in facts) != (own is not None):
                was = "with" if key in facts else "without"
                message = f"the checkpoint is of a training {was} {what}"
                raise TrainingError(message, fix="resume with the same arguments")

    def momenta(self) -> dict[str, Tensor]:
        """What the optimizer keeps of each parameter, as ``"layer.weight.momentum_buffer"``."""
        entries = self.optimizer.state_dict()["state"]
        return {
            f"{self._names[index]}.{key}": value
            for index, kept in entries.items()
            for key, value in kept.items()
            if isinstance(value, Tensor)
        }

    def load_momenta(self, momenta: Mapping[str, Tensor]) -> None:
        """Take up what :meth:`momenta` gave."""
        places = {name: index for index, name in enumerate(self._names)}
        entries: dict[int, dict[str, Tensor]] = {}
        for path, value in momenta.items():
            name, _, key = path.rpartition(".")
            entries.setdefault(places[name], {})[key] = value
        groups = self.optimizer.state_dict()["param_groups"]
        self.optimizer.load_state_dict({"state": entries, "param_groups": groups})


def below(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors whose names begin with ``prefix``, without it."""
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
