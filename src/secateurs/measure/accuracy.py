"""How often a classifier is right."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils._pytree import tree_map_only

from secateurs.channels_last import ChannelsLast
from secateurs.errors import DataError
from secateurs.graph.running import call_model, modes_kept


@dataclass(frozen=True, slots=True, kw_only=True)
class Accuracy:
    """The result of one pass over labelled data.

    Args:
        top1: Share of samples whose largest output is their label, in [0, 1].
        loss: Mean cross-entropy.
        count: Samples seen.
    """

    top1: float
    loss: float
    count: int


def accuracy(model: nn.Module, batches: Iterable[Any], device: torch.device | str | None = None) -> Accuracy:
    """Measure a classifier in evaluation mode; its mode is put back afterwards.

    Args:
        model: A model that gives class scores ``(batch, classes)``, alone or as the first of several outputs.
        batches: Pairs ``(inputs, labels)``.
        device: Where to run; the model's own device if None.

    Returns:
        Share of right answers, mean loss, number of samples.

    Raises:
        DataError: There are no samples.

    Example:
        >>> accuracy(nn.Identity(), [(torch.eye(3), torch.tensor([0, 1, 0]))]).count
        3
    """
    place = torch.device(device or next((each.device for each in model.parameters()), "cpu"))
    right, loss, count = 0, 0.0, 0
    with modes_kept(model), torch.no_grad(), ChannelsLast(place) as channels_last:
        model.eval()
        for inputs, labels in batches:
            there, targets = tree_map_only(Tensor, lambda tensor: tensor.to(place), (inputs, labels))
            channels_last.choose(there, model)
            scores = _scores(call_model(model, there))
            right += int((scores.argmax(1) == targets).sum())
            loss += float(cross_entropy(scores.float(), targets, reduction="sum"))
            count += len(targets)
    if not count:
        raise DataError("accuracy needs at least one sample, but the data is empty")
    return Accuracy(top1=right / count, loss=loss / count, count=count)


def _scores(outputs: Any) -> Tensor:
    first = outputs[0] if isinstance(outputs, (tuple, list)) else outputs
    return first if isinstance(first, Tensor) else cast(Tensor, first.logits)
