"""The original and the smaller network side by side: one pass of each, call by call the same."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor, nn

from secateurs.errors import TrainingError
from secateurs.graph.attributes_kept import Attributes
from secateurs.graph.copying import tensors_of
from secateurs.graph.running import Inputs
from secateurs.recovery.choices import Choices
from secateurs.recovery.recording import Recorder


@dataclass(frozen=True, slots=True, eq=False)
class Both:
    """A pass of the original and one of the smaller network, written down.

    Args:
        whole: That of the original.
        small: That of the smaller network.
        before: Parameters and buffers of the original, by name.
        after: Those of the smaller network.
    """

    whole: Recorder
    small: Recorder
    before: Mapping[str, Tensor]
    after: Mapping[str, Tensor]

    @classmethod
    def of(cls, model: nn.Module, smaller: nn.Module, inputs: Inputs) -> Both:
        """Run both, which are in evaluation mode, until a pass leaves nothing for the next one to find.

        Args:
            model: The original.
            smaller: The network after the cut.
            inputs: A batch of inputs.

        Raises:
            TrainingError: The two do not call the same functions, or cannot be called on the inputs.
        """
        try:
            whole, choices = _settled(model, inputs)
            small, _ = _settled(smaller, inputs, choices)
        except TypeError as error:
            raise TrainingError(
                f"{type(model).__name__} could not be called on a batch: {error}",
                fix="a batch is inputs or (inputs, targets), so several inputs are ((one, other), None)",
            ) from error
        if whole.names != small.names:
            both = zip((*whole.names, "nothing"), (*small.names, "nothing"), strict=False)
            place, (one, other) = next(
                (place, names) for place, names in enumerate(both) if len(set(names)) > 1
            )
            raise TrainingError(
                "the smaller network calls other functions than the original, so their values cannot be "
                "compared",
                where=f"call {place} of the forward pass: {one} there, {other} here",
                fix="repair(model, apply(model, plan), plan, batches), without hooks that compute",
            )
        return cls(whole, small, tensors_of(model), tensors_of(smaller))


def _settled(model: nn.Module, inputs: Inputs, original: Choices | None = None) -> tuple[Recorder, Choices]:
    """A pass that calls what later ones will, which find the tables that the first one may leave for them.

    Args:
        model: The original, or the smaller network.
        inputs: A batch of inputs.
        original: For the smaller network, what the original chose.
    """
    before = Attributes(model)
    record, choices = _recorded(model, inputs, original)
    return _recorded(model, inputs, original) if before.are_changed() else (record, choices)


def _recorded(model: nn.Module, inputs: Inputs, original: Choices | None) -> tuple[Recorder, Choices]:
    """A pass, and what was chosen in it."""
    choices = Choices()
    choose = choices.note if original is None else original.follow
    record = Recorder(model, inputs, written_out=True, choose=choose)
    return record, choices.only(record.choices)
