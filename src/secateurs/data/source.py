"""What a job is given as data: training, ranking, validation and test sets of one kind of image."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from secateurs.data.loading import ImageSet

TEST_SHARE = 0.2
NO_LABEL = -1  # no class of any loss: to train on it by mistake is an error
TEST_SEED = 0  # no setting changes what is test data: another seed would train on what was tested before


@dataclass(frozen=True, slots=True, kw_only=True)
class SkippedFile:
    """A file that could not be decoded, and why."""

    path: Path
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class DataSource:
    """The data of a job.

    Attributes:
        name: The folder, or ``"digits"``.
        train: Training images, augmented.
        ranking: The same images in the same order, not augmented.
        val: Held-out images, for every choice that is made on the way.
        test: Images to be read once before and once after.
        class_names: The name of each label, sorted; none for images without classes.
        input_size: ``(C, H, W)`` of every image that the sets give.
        mean: What was subtracted from each channel in [0, 1].
        std: What each channel was divided by then.
        notes: What a reader should be told: splits that were made, files that were skipped.
        skipped: Every file that could not be decoded.
        is_labelled: Whether the images come with classes; without, labels are -1 until `answered` is called.
    """

    name: str
    train: ImageSet
    ranking: ImageSet
    val: ImageSet
    test: ImageSet
    class_names: tuple[str, ...]
    input_size: tuple[int, int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    notes: tuple[str, ...] = ()
    skipped: tuple[SkippedFile, ...] = ()
    is_labelled: bool = True

    def __str__(self) -> str:
        size = " x ".join(map(str, self.input_size))
        counts = f"{len(self.train)} training, {len(self.val)} validation and {len(self.test)} test images"
        classes = f"{len(self.class_names)} classes" if self.is_labelled else "no classes"
        return f"{self.name}: {classes}, {counts} of {size}"

    def answered(
        self,
        *,
        ranking: Sequence[int],
        val: Sequence[int],
        test: Sequence[int],
        class_names: Sequence[str],
        note: str,
    ) -> DataSource:
        """The same images with a network's answers for labels; ``train`` takes those of ``ranking``."""
        return replace(
            self,
            train=self.train.labelled(ranking),
            ranking=self.ranking.labelled(ranking),
            val=self.val.labelled(val),
            test=self.test.labelled(test),
            class_names=tuple(class_names),
            notes=(*self.notes, note),
        )


def stratified_split(labels: list[int], share: float, seed: int) -> tuple[list[int], list[int]]:
    """Indices that stay and indices that are split off, the same share of every class.

    Args:
        labels: The class of each item. A class needs two items: one is left on each side at least.
        share: The share to split off, in (0, 1).
        seed: What the choice follows from.

    Returns:
        ``(stay, off)``, both ascending.

    Example:
        >>> stay, off = stratified_split([0, 0, 0, 0, 1, 1], 0.5, seed=0)
        >>> len(stay), [[0, 0, 0, 0, 1, 1][index] for index in off]
        (3, [0, 0, 1])
    """
    generator = torch.Generator().manual_seed(seed)
    classes: dict[int, list[int]] = {}
    for index, label in enumerate(labels):
        classes.setdefault(label, []).append(index)
    off: set[int] = set()
    for _, members in sorted(classes.items()):
        count = min(max(1, round(share * len(members))), len(members) - 1)
        shuffled = torch.randperm(len(members), generator=generator).tolist()
        off.update(members[place] for place in shuffled[:count])
    return [index for index in range(len(labels)) if index not in off], sorted(off)
