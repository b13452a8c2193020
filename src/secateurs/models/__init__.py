"""From the name of an architecture to a model that is ready for a task."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from torch import nn

from secateurs.errors import ModelError, UnknownNameError
from secateurs.models.heads import HEADS, exchange_head
from secateurs.models.probing import try_model
from secateurs.models.sources import create, rename_published
from secateurs.models.vgg_digits import VGGDigits
from secateurs.models.weights import fit_weights, is_weights_file, read_weights

__all__ = ["HEADS", "Architecture", "VGGDigits", "build", "build_architecture", "read_weights"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Architecture:
    """All that is needed to build a model anew, but for its weights.

    Attributes:
        name: ``torchvision:NAME``, ``timm:NAME``, ``secateurs:vgg-digits`` or ``package.module:factory``.
        num_classes: Scores that it gives.
        head: ``"keep"``, ``"linear"`` or ``"article"``.
        input_size: ``(C, H, W)`` of its images.

    Example:
        >>> own = Architecture(name="secateurs:vgg-digits", num_classes=10, input_size=(1, 16, 16))
        >>> Architecture.from_dict(own.to_dict()) == own
        True
    """

    name: str
    num_classes: int
    head: str = "keep"
    input_size: tuple[int, int, int] = (3, 224, 224)

    def __post_init__(self) -> None:
        if self.num_classes < 2:
            raise ModelError(f"`num_classes >= 2` must hold, got num_classes={self.num_classes}")
        if self.head not in HEADS:
            raise UnknownNameError("head", self.head, HEADS)
        if len(self.input_size) != 3 or min(self.input_size) < 1:
            raise ModelError(f"input_size must be (channels, height, width), got {self.input_size}")

    def to_dict(self) -> dict[str, Any]:
        """The fields as JSON knows them."""
        return {**asdict(self), "input_size": list(self.input_size)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Architecture:
        """The architecture that `to_dict` described.

        Args:
            values: Its fields.

        Returns:
            The architecture.

        Raises:
            ModelError: A field is missing, unknown or of the wrong type.
        """
        known = {field.name for field in fields(cls)}
        if values.keys() != known:
            wrong = sorted(values.keys() ^ known)
            raise ModelError(f"an architecture has the fields {sorted(known)}; missing or unknown: {wrong}")
        match values:
            case {
                "name": str(name),
                "num_classes": int(count),
                "head": str(head),
                "input_size": [int(channels), int(height), int(width)],
            }:
                return cls(name=name, num_classes=count, head=head, input_size=(channels, height, width))
        raise ModelError(f"an architecture has two texts, an integer and a list of three, got {dict(values)}")


def build(
    name: str,
    *,
    num_classes: int,
    weights: str = "none",
    head: str = "keep",
    input_size: tuple[int, int, int] = (3, 224, 224),
) -> nn.Module:
    """A model for a classification task, tried once on a blank image.

    Random weights come from torch's global random state. Factories of the user's own are imported from the
    installed packages or the working directory, called with ``num_classes`` if they take it.

    Args:
        name: ``torchvision:vgg16``, ``timm:resnet18``, ``secateurs:vgg-digits``, ``package.module:factory``.
        num_classes: Scores that the model is to give, two or more.
        weights: ``"none"``, the name of published weights (``"DEFAULT"``, ``"IMAGENET1K_V1"``), or a file,
            ``.safetensors`` or a PyTorch checkpoint. Of a file, the weights of the head are used only where
            they fit the head that is wanted.
        head: ``"keep"`` leaves the model as it is. ``"linear"`` exchanges the linear layer that runs last (or
            the 1 x 1 convolution that stands for one). ``"article"`` puts three fully connected layers, 4096
            neurons wide with dropout, in the place of the classifier, and freezes (``requires_grad=False``)
            all that comes before.
        input_size: ``(C, H, W)`` of the images.

    Returns:
        The model on the CPU in training mode.

    Raises:
        ModelError: It cannot be built, does not fit the images or the classes, or its weights do not fit it.
        UnknownNameError: No such model, weights or head.

    Example:
        >>> model = build("torchvision:resnet18", num_classes=2, head="linear", input_size=(3, 32, 32))
        >>> model.fc
        Linear(in_features=512, out_features=2, bias=True)
    """
    wanted = Architecture(name=name, num_classes=num_classes, head=head, input_size=input_size)
    from_file = is_weights_file(weights)
    tensors = read_weights(weights) if from_file else {}
    published = None if from_file or weights.lower() == "none" else weights
    model = create(
        name,
        num_classes=num_classes if head == "keep" else None,
        published=published,
        input_size=wanted.input_size,
    )
    first = try_model(model, name, wanted.input_size)
    new_head = exchange_head(model, name, head, num_classes, first)
    if from_file:
        own_names = rename_published(name, tensors)
        fit_weights(model, own_names, name=name, where=weights, head=new_head)
    trial = try_model(model, name, wanted.input_size) if new_head else first
    if trial.classes != num_classes:
        raise ModelError(
            f"{name} gives {trial.classes} scores, but there are {num_classes} classes",
            fix="choose head='linear'" if head == "keep" else None,
        )
    return model


def build_architecture(architecture: Architecture) -> nn.Module:
    """The model of an architecture with random weights, every parameter trainable.

    Args:
        architecture: What to build. A name of the form ``package.module:factory`` imports that module.

    Returns:
        The model on the CPU in training mode.

    Example:
        >>> own = Architecture(name="secateurs:vgg-digits", num_classes=10, input_size=(1, 16, 16))
        >>> sum(parameter.numel() for parameter in build_architecture(own).parameters())
        1411018
    """
    model = build(
        architecture.name,
        num_classes=architecture.num_classes,
        head=architecture.head,
        input_size=architecture.input_size,
    )
    return model.requires_grad_(True)
