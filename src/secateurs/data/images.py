"""One image file to pixels: any colour mode, any depth, any size, at the size that is needed."""

from __future__ import annotations

import functools
import logging
import os
import warnings
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from secateurs.errors import DataError

_LOG = logging.getLogger(__name__)

# Formats whose decoders are part of Pillow. EPS and the like are left out: they start other programs.
_FORMATS = ("AVIF", "BMP", "GIF", "ICO", "JPEG", "JPEG2000", "MPO", "PNG", "PPM", "TGA", "TIFF", "WEBP")
_MAX_ASPECT = 4  # a 1 x 5000 image resized to a shorter side of 256 would have 1.3 million columns
_CHECK_SIZE = 8  # where only readability matters, JPEGs decode at an eighth of their size


@functools.cache
def _formats() -> tuple[str, ...]:
    Image.init()
    return tuple(name for name in _FORMATS if name in Image.OPEN)


def _resized(size: tuple[int, int], shorter_side: int) -> tuple[int, int]:
    scale = shorter_side / min(size)
    return max(1, round(size[0] * scale)), max(1, round(size[1] * scale))


def _to_eight_bits(image: Image.Image) -> Image.Image:
    """Grey of 16 or 32 bits, or of floats, to 8 bits: Pillow's own conversion would clip it to white."""
    values = np.asarray(image, dtype=np.float64)
    brightest = values.max()
    if image.mode == "F" and brightest <= 1:
        top = 1.0
    elif image.mode in ("I", "F") and brightest <= 255:
        top = 255.0
    else:
        top = 65535.0
    return Image.fromarray(np.clip(values * (255.0 / top) + 0.5, 0, 255).astype(np.uint8))


def _to_mode(image: Image.Image, mode: str) -> Image.Image:
    """To ``"RGB"`` or ``"L"``; what is transparent shows white, whatever colour is stored under it."""
    if image.mode == "F" or image.mode.startswith("I"):
        image = _to_eight_bits(image)
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert(mode)


def _crop_to_aspect(image: Image.Image) -> Image.Image:
    width, height = image.size
    limit = _MAX_ASPECT * min(width, height)
    if max(width, height) <= limit:
        return image
    new = min(width, limit), min(height, limit)
    left, top = (width - new[0]) // 2, (height - new[1]) // 2
    return image.crop((left, top, left + new[0], top + new[1]))


def read_image(path: str | Path, *, shorter_side: int, channels: int = 3) -> Tensor:
    """Decode an image file at the size that is needed.

    Grey, palette, CMYK, 16-bit and transparent images all come out alike; a photograph is turned as its EXIF
    entry says; JPEGs are decoded at a fraction of their size where that is enough.

    Args:
        path: The file. Its content, not its name, says what format it has.
        shorter_side: Pixels that the shorter side is resized to; the longer keeps the aspect, up to 4:1.
        channels: 3 for colour, 1 for grey.

    Returns:
        uint8 pixels of shape ``(channels, H, W)`` with ``min(H, W) == shorter_side``.

    Raises:
        Exception: Whatever Pillow's decoder of that format raises on a broken file.

    Example:
        >>> import tempfile, PIL.Image
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     PIL.Image.new("CMYK", (60, 40)).save(f"{folder}/a.jpg")
        ...     tuple(read_image(f"{folder}/a.jpg", shorter_side=20).shape)
        (3, 20, 30)
    """
    with Image.open(path, formats=_formats()) as image:
        image.draft(None, _resized(image.size, shorter_side))
        image.load()
        turned = ImageOps.exif_transpose(image) if image.getexif() else image
        small = _crop_to_aspect(_to_mode(turned, "RGB" if channels == 3 else "L"))
        small = small.resize(_resized(small.size, shorter_side), Image.Resampling.BILINEAR)
        pixels = torch.from_numpy(np.array(small))  # (H, W, 3) or (H, W)
    return pixels.unsqueeze(0) if channels == 1 else pixels.permute(2, 0, 1).contiguous()


def _reason(error: Exception) -> str:
    if isinstance(error, UnidentifiedImageError):
        return "not an image"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror.lower()
    return " ".join(str(error).split()) or type(error).__name__


class ImageFiles:
    """Image files by number, each decoded once where memory allows.

    Args:
        paths: The files, in the order of their numbers.
        shorter_side: Pixels of the shorter side after reading.
        channels: 3 or 1.
        cache_bytes: Memory for decoded images; those beyond it are decoded at every use.
    """

    def __init__(self, paths: Sequence[Path], *, shorter_side: int, channels: int, cache_bytes: int) -> None:
        self.paths = tuple(paths)
        self.shorter_side = shorter_side
        self.channels = channels
        self._room = cache_bytes
        self._cache: dict[int, Tensor] = {}

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, number: int) -> Tensor:
        kept = self._cache.get(number)
        if kept is not None:
            return kept
        path = self.paths[number]
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                return read_image(path, shorter_side=self.shorter_side, channels=self.channels)
        except Exception as error:  # decoders raise anything
            raise DataError(f"image can no longer be read: {_reason(error)}", where=str(path)) from error

    def check(self) -> dict[int, str]:
        """Read every file once, keep what fits in memory, and say which cannot be decoded and why.

        Returns:
            The reason by number, for the broken files alone, in ascending order.
        """
        _LOG.info("reading %d images", len(self.paths))
        with warnings.catch_warnings(), ThreadPoolExecutor(os.cpu_count() or 1) as pool:
            warnings.simplefilter("ignore")  # broken metadata is no news: the pixels are what counts
            reasons = list(pool.map(self._check_one, range(len(self.paths))))
        return {number: reason for number, reason in enumerate(reasons) if reason}

    def _check_one(self, number: int) -> str:
        keep = self._room > 0
        try:
            side = self.shorter_side if keep else _CHECK_SIZE
            pixels = read_image(self.paths[number], shorter_side=side, channels=self.channels)
        except Exception as error:  # decoders raise anything
            return _reason(error)
        if keep:
            self._room -= pixels.numel()
            self._cache[number] = pixels
        return ""


def image_paths(folder: Path) -> list[Path]:
    """Every file below a folder that may be an image, sorted; no hidden files, no litter of systems."""
    found: list[Path] = []
    for place, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if not _is_litter(name)]
        found += [Path(place, name) for name in names if not _is_litter(name)]
    return sorted(found)


def files_in(folder: Path) -> list[Path]:
    """The visible files directly inside a folder, sorted by name."""
    return sorted(entry for entry in folder.iterdir() if entry.is_file() and not _is_litter(entry.name))


def is_named_as_image(path: Path) -> bool:
    """Whether a file's name ends as those of images do, whatever it holds."""
    return Image.registered_extensions().get(path.suffix.lower()) in _FORMATS


def _is_litter(name: str) -> bool:
    return name.startswith((".", "__MACOSX")) or name.lower() in ("thumbs.db", "desktop.ini")


def sub_folders(folder: Path) -> Iterable[Path]:
    """The visible folders directly inside a folder, sorted by name."""
    return sorted(entry for entry in folder.iterdir() if entry.is_dir() and not _is_litter(entry.name))
