"""Labels for images that come without: what a network answers itself."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from secateurs.data import DataSource, ImageSet, loader
from secateurs.errors import DataError
from secateurs.graph.running import call_model, modes_kept
from secateurs.recovery.distill import logits_of

OWN_ANSWERS = "the original network's own answers"


def answered(
    source: DataSource, model: nn.Module, class_names: Sequence[str], *, batch_size: int, workers: int = 0
) -> DataSource:
    """Images without labels, each labelled by what ``model`` answers to it as it is, not augmented.

    So the accuracy of a pruned network is the share of images on which it agrees with the original.

    Args:
        source: The images; returned as they are where they have labels.
        model: The network before the cut.
        class_names: What its outputs stand for.
        batch_size: Images in a batch.
        workers: Processes that read images ahead.
    """
    if source.is_labelled:
        return source
    ranking, val, test = (
        _answers(model, images, batch_size, workers) for images in (source.ranking, source.val, source.test)
    )
    occur = len({*ranking, *val, *test})
    found = f"{occur} of {len(class_names)} classes occur"
    note = f"labels: {OWN_ANSWERS} ({found}), so accuracy is agreement with it"
    return source.answered(ranking=ranking, val=val, test=test, class_names=class_names, note=note)


def _answers(model: nn.Module, images: ImageSet, batch_size: int, workers: int) -> list[int]:
    home = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    answers: list[int] = []
    with modes_kept(model), torch.no_grad():
        model.to(device).eval()
        for inputs, _ in loader(images, batch_size=batch_size, shuffle=False, seed=0, workers=workers):
            answers += logits_of(call_model(model, inputs.to(device))).argmax(1).tolist()
    model.to(home)
    return answers


def with_classes(source: DataSource, what: str) -> DataSource:
    """The images themselves, if they come with classes.

    Raises:
        DataError: They come without, and ``what`` needs them.
    """
    if source.is_labelled:
        return source
    raise DataError(
        f"{what} needs images with classes, but {source.name!r} has no folders of classes",
        where=source.name,
        fix="lay it out as DIR/train/CLASS/*.jpg; only the images of a run's trained model need no classes",
    )
