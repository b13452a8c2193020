"""Fixtures for every test: fixed seeds, one thread, and small image folders."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

SHARED_DATA = Path(__file__).resolve().parents[2] / "shared" / "data"


@pytest.fixture(autouse=True)
def _fixed_seed_and_one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def shared_data() -> Path:
    """Real images and weights, where they lie beside the project."""
    if not SHARED_DATA.is_dir():
        pytest.skip(f"needs the real data of {SHARED_DATA}")
    return SHARED_DATA


@pytest.fixture
def make_folder(tmp_path: Path) -> Callable[..., Path]:
    """Image folders: ``make_folder({"train/cat": 3, "train/dog": 3, "test/cat": 1})`` gives their root.

    Images are noise of different sizes; the mean brightness tells the classes apart.
    """

    def make(counts: dict[str, int], *, size: tuple[int, int] = (20, 16)) -> Path:
        random = np.random.default_rng(0)
        root = tmp_path / "images"
        root.mkdir(exist_ok=True)
        for place, count in counts.items():
            folder = root / place
            folder.mkdir(parents=True, exist_ok=True)
            level = 40 + 90 * (sum(map(ord, folder.name)) % 3)
            for number in range(count):
                pixels = random.normal(level, 20, (size[1] + number % 3, size[0], 3)).clip(0, 255)
                Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{number:03}.png")
        return root

    return make
