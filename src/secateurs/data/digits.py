"""The bundled default: 1,797 handwritten digits, so that a first run needs no download."""

from __future__ import annotations

import torch
from sklearn.datasets import load_digits
from torch.nn.functional import interpolate

from secateurs.data.loading import ImageFormat, ImageSet
from secateurs.data.source import TEST_SEED, TEST_SHARE, DataSource, stratified_split

DIGITS_SIZE = 16
DIGITS_MEAN = (0.3,)
DIGITS_STD = (0.33,)


def digits_source(form: ImageFormat, *, val_share: float, seed: int, augment: bool) -> DataSource:
    """The digits of scikit-learn, 8 x 8 in 17 shades, enlarged to the format's size."""
    bunch = load_digits()
    shades = torch.from_numpy(bunch.images).float().unsqueeze(1)  # (N, 1, 8, 8), 0 to 16
    large = interpolate(shades, size=form.input_size[1:], mode="bilinear", align_corners=False)
    pixels = (large * (255 / 16)).round().to(torch.uint8).expand(-1, form.channels, -1, -1)
    labels = bunch.target.tolist()
    rest, test = stratified_split(labels, TEST_SHARE, TEST_SEED)
    stay, off = stratified_split([labels[index] for index in rest], val_share, seed)
    train, val = [rest[index] for index in stay], [rest[index] for index in off]
    plain = form.plain()

    def images(numbers: list[int], transform: torch.nn.Module) -> ImageSet:
        return ImageSet(pixels, numbers, [labels[number] for number in numbers], transform)

    return DataSource(
        name="digits",
        train=images(train, form.vary_digit() if augment else plain),
        ranking=images(train, plain),
        val=images(val, plain),
        test=images(test, plain),
        class_names=tuple(str(digit) for digit in range(10)),
        input_size=form.input_size,
        mean=form.mean,
        std=form.std,
        notes=(
            "the bundled 1,797 handwritten digits of scikit-learn",
            f"no test set of its own: {len(test)} images, the same at every run, are held out as one",
            f"{len(val)} training images are held out for validation (seed {seed})",
        ),
    )
