"""New heads: the last layers of a classifier exchanged for ones that fit another task."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from secateurs.errors import ModelError, UnknownNameError
from secateurs.models.probing import Trial

HEADS = ("article", "keep", "linear")
_ARTICLE_WIDTH = 4096
_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


@dataclass(frozen=True, slots=True, kw_only=True)
class NewHead:
    """Where a head was exchanged.

    Attributes:
        place: The module that the exchange happened in, such as ``"classifier"``.
        parameters: The names of the new parameters.
    """

    place: str
    parameters: tuple[str, ...]


def exchange_head(model: nn.Module, name: str, head: str, num_classes: int, trial: Trial) -> NewHead | None:
    """Exchange the head of a model in place.

    Args:
        model: The model.
        name: What to call it in an error.
        head: ``"keep"``; ``"linear"`` for a new last layer; ``"article"`` for three new fully connected
            layers, 4096 neurons wide, with dropout, in front of which everything is frozen.
        num_classes: Scores that the new head gives.
        trial: What a trial run of the model showed.

    Returns:
        What is new, or ``None`` where all was kept.

    Raises:
        ModelError: It has no layer that could be exchanged.
    """
    if head not in HEADS:
        raise UnknownNameError("head", head, HEADS)
    if head == "keep":
        return None
    place = trial.layer_names[-1] if trial.layer_names else ""
    last = model.get_submodule(place)
    if isinstance(last, nn.Linear) and last.out_features == trial.classes:
        exchange = _exchange_linear if head == "linear" else _exchange_for_article
        return exchange(model, place, last, num_classes)
    if isinstance(last, nn.Conv2d) and last.kernel_size == (1, 1) and head == "linear":
        return _exchange_convolution(model, place, last, num_classes)
    what = f"its last layer, {place}, is {last}" if place else "it has neither linear layers nor convolutions"
    raise ModelError(
        f"{name} does not end in a linear layer that could be exchanged for a new head: {what}",
        fix="choose head='keep' and weights that were trained for your classes",
    )


def _exchange_linear(model: nn.Module, place: str, old: nn.Linear, num_classes: int) -> NewHead:
    new = nn.Linear(old.in_features, num_classes, bias=old.bias is not None)
    model.set_submodule(place, new)
    return _new_head(model, place, new)


def _exchange_convolution(model: nn.Module, place: str, old: nn.Conv2d, num_classes: int) -> NewHead:
    """SqueezeNet's way: a 1 x 1 convolution to the classes, and then the mean over space."""
    new = nn.Conv2d(old.in_channels, num_classes, 1, bias=old.bias is not None)
    model.set_submodule(place, new)
    return _new_head(model, place, new)


def _exchange_for_article(model: nn.Module, place: str, old: nn.Linear, num_classes: int) -> NewHead:
    """The article's layers in the place of the classifier's first linear layer and all that follows it.

    What the classifier does before (flattening, a norm) stays, but for dropout.
    """
    parent = place.rpartition(".")[0]
    classifier = model.get_submodule(parent)
    before: list[nn.Module] = []
    in_features = old.in_features
    if parent and isinstance(classifier, nn.Sequential) and not _has_convolution(classifier):
        place = parent
        for layer in classifier:
            if isinstance(layer, nn.Linear):
                in_features = layer.in_features
                break
            if not isinstance(layer, nn.Dropout):
                before.append(layer)
    model.requires_grad_(False)
    fresh = article_layers(in_features, num_classes)
    model.set_submodule(place, nn.Sequential(*before, *fresh))
    return _new_head(model, place, *fresh)


def article_layers(in_features: int, num_classes: int, width: int = _ARTICLE_WIDTH) -> list[nn.Module]:
    """Linear, ReLU, dropout; linear, ReLU, dropout; linear."""
    return [
        nn.Linear(in_features, width),
        nn.ReLU(inplace=True),
        nn.Dropout(),
        nn.Linear(width, width),
        nn.ReLU(inplace=True),
        nn.Dropout(),
        nn.Linear(width, num_classes),
    ]


def _has_convolution(module: nn.Module) -> bool:
    return any(isinstance(part, _CONVOLUTIONS) for part in module.modules())


def _new_head(model: nn.Module, place: str, *modules: nn.Module) -> NewHead:
    new = {id(parameter) for module in modules for parameter in module.parameters()}
    names = tuple(name for name, parameter in model.named_parameters() if id(parameter) in new)
    return NewHead(place=place, parameters=names)
