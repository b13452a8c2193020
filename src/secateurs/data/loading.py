"""Data sets over stored pixels, and a loader that is a pure function of its seed."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, default_collate
from torchvision.transforms import v2

from secateurs.errors import DataError

Sample = tuple[Tensor, int]


class Pixels(Protocol):
    """Images by number: uint8 tensors of shape ``(C, H, W)``, which may differ in size."""

    def __getitem__(self, number: int, /) -> Tensor:
        """The pixels of one image."""


class ImageSet(Dataset[Sample]):
    """Some of the images of a store, each with its label, through one transform.

    Args:
        pixels: The store; several sets may share one.
        numbers: Which of its images belong to this set, in order.
        labels: The class of each of them.
        transform: uint8 ``(C, H, W)`` to the float32 tensor that the network takes.
    """

    def __init__(
        self, pixels: Pixels, numbers: Sequence[int], labels: Sequence[int], transform: v2.Transform
    ) -> None:
        self.pixels = pixels
        self.numbers = tuple(numbers)
        self.labels = tuple(labels)
        self.transform = transform

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, index: int) -> Sample:
        return self.transform(self.pixels[self.numbers[index]]), self.labels[index]

    def labelled(self, labels: Sequence[int]) -> ImageSet:
        """The same images with other labels."""
        return ImageSet(self.pixels, self.numbers, labels, self.transform)


@dataclass(frozen=True, slots=True, kw_only=True)
class ImageFormat:
    """What the images of a data source look like to the network.

    Attributes:
        image_size: Pixels of a side, 8 or more.
        channels: 1 for grey, 3 for colour.
        mean: Subtracted from each channel in [0, 1].
        std: What each channel is divided by then.
    """

    image_size: int
    channels: int
    mean: tuple[float, ...]
    std: tuple[float, ...]

    def __post_init__(self) -> None:
        if self.image_size < 8:
            raise DataError(f"`image_size >= 8` must hold, got image_size={self.image_size}")
        if self.channels not in (1, 3):
            raise DataError(f"channels must be 1 (grey) or 3 (colour), got channels={self.channels}")
        if {len(self.mean), len(self.std)} != {self.channels}:
            raise DataError(f"mean and std need {self.channels} values each, got {self.mean} and {self.std}")
        if min(self.std) <= 0:
            raise DataError(f"every value of std must be positive, got std={self.std}")

    @property
    def input_size(self) -> tuple[int, int, int]:
        """``(C, H, W)`` of an image."""
        return (self.channels, self.image_size, self.image_size)

    def plain(self) -> v2.Transform:
        """The centre of the image at its full scale."""
        return self._then_normalise(v2.CenterCrop(self.image_size))

    def vary_photo(self) -> v2.Transform:
        """A part of at least half of the photograph, mirrored half of the time."""
        crop = v2.RandomResizedCrop(self.image_size, scale=(0.5, 1.0), antialias=True)
        return self._then_normalise(crop, v2.RandomHorizontalFlip())

    def vary_digit(self) -> v2.Transform:
        """Moved by up to an eighth of the side: a mirrored digit, or a part of one, is another sign."""
        return self._then_normalise(v2.RandomCrop(self.image_size, padding=self.image_size // 8))

    def _then_normalise(self, *first: v2.Transform) -> v2.Transform:
        floats = v2.ToDtype(torch.float32, scale=True)
        return v2.Compose([*first, floats, v2.Normalize(list(self.mean), list(self.std))])


@contextmanager
def _one_thread() -> Iterator[None]:
    """Torch on one thread: on a busy machine, threads that wait for each other take ten times as long."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


@contextmanager
def _random_state(seed: int) -> Iterator[None]:
    """Torch's CPU random numbers from a seed, and afterwards as if nothing had been drawn."""
    before = torch.default_generator.get_state()
    torch.default_generator.manual_seed(seed)
    try:
        yield
    finally:
        torch.default_generator.set_state(before)


def _collate(samples: list[Any]) -> Any:
    with _one_thread():
        return default_collate(samples)


class _Seeded(Dataset[Any]):
    """A data set whose random augmentation of an item depends on the seed and the item's index alone."""

    def __init__(self, dataset: Dataset[Any], seed: int) -> None:
        self.dataset = dataset
        self.seed = seed

    def __len__(self) -> int:
        return len(self.dataset)  # type: ignore[arg-type]

    def __getitem__(self, index: int) -> Any:
        with _one_thread(), _random_state((self.seed * 1_000_003 + index) % 2**63):
            return self.dataset[index]


def loader(
    dataset: Dataset[Any], *, batch_size: int, shuffle: bool, seed: int, workers: int = 0
) -> DataLoader[Any]:
    """Batches whose order and augmentation are a pure function of the seed.

    An item's augmentation follows from ``(seed, its index)``: neither the batch size nor the number of
    workers nor what ran before changes it, and a job that is resumed at an epoch sees the batches that it
    would have seen. Give each epoch a seed of its own. Torch's global random state is left alone.

    Args:
        dataset: Any data set with a length.
        batch_size: Samples in a batch; the last batch may be smaller.
        shuffle: Whether to permute the samples.
        seed: What order and augmentation follow from.
        workers: Processes that read ahead; 0 reads in this one.

    Returns:
        A loader; iterating it twice gives the same batches twice.

    Example:
        >>> from secateurs.data import load_data, loader
        >>> train = load_data("digits").train
        >>> first, again = (loader(train, batch_size=4, shuffle=True, seed=7) for _ in range(2))
        >>> all(a[0].equal(b[0]) for a, b in zip(first, again))
        True
    """
    generator = torch.Generator().manual_seed(seed)
    count = len(dataset)  # type: ignore[arg-type]
    order = torch.randperm(count, generator=generator).tolist() if shuffle else list(range(count))
    return DataLoader(
        _Seeded(dataset, seed),
        batch_size=batch_size,
        sampler=order,
        num_workers=workers,
        generator=generator,
        collate_fn=_collate,
    )
