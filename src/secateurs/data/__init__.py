"""Images for a classifier: a folder of the user's, or the bundled digits."""

from __future__ import annotations

from pathlib import Path

from secateurs.data.digits import DIGITS_MEAN, DIGITS_SIZE, DIGITS_STD, digits_source
from secateurs.data.folders import folder_source
from secateurs.data.images import read_image
from secateurs.data.loading import ImageFormat, ImageSet, loader
from secateurs.data.source import DataSource, SkippedFile
from secateurs.errors import DataError

__all__ = ["DataSource", "ImageSet", "SkippedFile", "load_data", "loader", "read_image"]

_PHOTO_SIZE = 224
# ImageNet's, which most published weights were trained with
_PHOTO_MEAN = {1: (0.449,), 3: (0.485, 0.456, 0.406)}
_PHOTO_STD = {1: (0.226,), 3: (0.229, 0.224, 0.225)}


def load_data(
    path: str | Path | None = None,
    *,
    image_size: int | None = None,
    channels: int | None = None,
    mean: tuple[float, ...] | None = None,
    std: tuple[float, ...] | None = None,
    val_share: float = 0.1,
    seed: int = 0,
    augment: bool = True,
    cache_bytes: int = 2**30,
) -> DataSource:
    """Training, validation and test images of a folder, or of the bundled digits.

    The folder holds ``train/`` and ``test/``, perhaps ``val/``, each with a folder a class. Without ``val/``,
    a share of every class of the training images is held out; without ``test/`` a fifth, always the same.
    Where a folder holds images and no folders, they come without labels: `DataSource.is_labelled` is false.
    Every file is decoded once at the start: what cannot be decoded is skipped and named in the notes, and
    what fits in ``cache_bytes`` stays in memory, so that an epoch decodes nothing.

    Args:
        path: The folder; ``None`` or ``"digits"`` for the bundled digits.
        image_size: Pixels of the square images, 224 for a folder and 16 for the digits if not given.
        channels: 3 for colour or 1 for grey; 3 for a folder and 1 for the digits if not given.
        mean: Subtracted from each channel in [0, 1]; ImageNet's if not given.
        std: What each channel is divided by then; ImageNet's if not given.
        val_share: The share of the training images held out for validation, in (0, 1).
        seed: What the choice of the validation images follows from.
        augment: Whether training images are cropped, moved and mirrored at random.
        cache_bytes: Memory that decoded images may take.

    Returns:
        The sets, their class names and notes on how they came about.

    Raises:
        DataError: The folder is missing or empty, has one class only, mixes images and folders of classes, or
            its parts have different classes.

    Example:
        >>> print(load_data("digits"))
        digits: 10 classes, 1295 training, 143 validation and 359 test images of 1 x 16 x 16
    """
    if not 0 < val_share < 1:
        raise DataError(f"`0 < val_share < 1` must hold, got val_share={val_share}")
    digits = path is None or str(path) == "digits"
    if image_size is None:
        image_size = DIGITS_SIZE if digits else _PHOTO_SIZE
    if channels is None:
        channels = 1 if digits else 3
    usual_mean = DIGITS_MEAN * channels if digits else _PHOTO_MEAN.get(channels, ())
    usual_std = DIGITS_STD * channels if digits else _PHOTO_STD.get(channels, ())
    form = ImageFormat(
        image_size=image_size, channels=channels, mean=mean or usual_mean, std=std or usual_std
    )
    if path is None or digits:
        return digits_source(form, val_share=val_share, seed=seed, augment=augment)
    return folder_source(
        Path(path), form, val_share=val_share, seed=seed, augment=augment, cache_bytes=cache_bytes
    )
