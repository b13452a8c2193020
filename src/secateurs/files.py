"""Files that are whole or absent: temporary name, fsync, rename; JSON lines and tensors."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from secateurs.errors import RunError

_TEMPORARY = ".tmp-"


@contextlib.contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """A temporary path in the folder of ``path``, which becomes ``path`` once the block has written it.

    A process killed at any moment leaves either the old file or the new one, never a part of one.

    Args:
        path: The file to write; one that exists is replaced.

    Yields:
        Where to write.

    Raises:
        RunError: The folder cannot be written to, or the disk is full.

    Example:
        >>> import tempfile
        >>> target = Path(tempfile.mkdtemp()) / "note.txt"
        >>> with whole_file(target) as temporary:
        ...     _ = temporary.write_text("whole")
        >>> target.read_text(), [p.name for p in target.parent.iterdir()]
        ('whole', ['note.txt'])
    """
    temporary = path.with_name(f"{_TEMPORARY}{os.getpid()}-{path.name}")
    try:
        yield temporary
        _sync(temporary)
        os.replace(temporary, path)
        _sync(path.parent)
    except OSError as error:
        raise RunError(f"{path} cannot be written: {error.strerror or error}", where=str(path)) from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()


def _sync(path: Path) -> None:
    """Push a file or a folder to the disk; folders cannot be opened on every system."""
    try:
        handle = os.open(path, os.O_RDONLY)
    except OSError:
        if path.is_dir():
            return
        raise
    try:
        os.fsync(handle)
    except OSError:
        if not path.is_dir():
            raise
    finally:
        os.close(handle)


def remove_leftovers(folder: Path) -> None:
    """Delete the temporary files that a killed process left in ``folder``."""
    for leftover in folder.glob(f"{_TEMPORARY}*"):
        leftover.unlink(missing_ok=True)


def is_leftover(path: Path) -> bool:
    """Whether ``path`` is a temporary file of :func:`whole_file`."""
    return path.name.startswith(_TEMPORARY)


def write_text(path: Path, text: str) -> None:
    """Write ``text`` to ``path`` as a whole or not at all."""
    with whole_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, value: object) -> None:
    """Write ``value`` as indented JSON; NaN and infinity, which JSON lacks, are refused."""
    write_text(path, json.dumps(value, indent=2, allow_nan=False) + "\n")


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in ``path``.

    Raises:
        RunError: The file is absent, is not JSON, or holds something other than an object.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise RunError(f"{path} does not exist", where=str(path)) from error
    except (OSError, ValueError) as error:
        raise RunError(f"{path} cannot be read as JSON: {error}", where=str(path)) from error
    if not isinstance(value, dict):
        raise RunError(f"{path} must hold a JSON object, but holds a {type(value).__name__}", where=str(path))
    return value


def append_line(path: Path, value: Mapping[str, object]) -> None:
    """Add ``value`` as one JSON line, in one write, so that a kill can tear the last line only."""
    line = json.dumps(value, allow_nan=False) + "\n"
    with path.open("ab") as file:
        file.write(line.encode())


def drop_torn_line(path: Path) -> None:
    """Cut off what follows the last line end of ``path``: the line that a killed process was writing."""
    if not path.exists():
        return
    text = path.read_bytes()
    whole = text.rfind(b"\n") + 1
    if whole < len(text):
        os.truncate(path, whole)


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The JSON objects of ``path``, one a line; a torn last line is left out.

    Raises:
        RunError: A line before the last is not JSON.
    """
    if not path.exists():
        return []
    lines = path.read_bytes().split(b"\n")[:-1]
    try:
        return [json.loads(line) for line in lines]
    except ValueError as error:
        raise RunError(f"{path} holds a line that is not JSON: {error}", where=str(path)) from error


def write_tensors(path: Path, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str]) -> None:
    """Write ``tensors`` as safetensors; those that share memory are written once for each name."""
    from safetensors.torch import save_file

    with whole_file(path) as temporary:
        temporary.touch()
        usual = temporary.stat().st_mode
        save_file(_unshared(tensors), temporary, dict(metadata) or None)
        temporary.chmod(usual)  # safetensors' own files can be read by their owner alone


def _unshared(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Contiguous CPU tensors with memory of their own, as the file format demands."""
    seen: set[int] = set()
    result = {}
    for name, tensor in tensors.items():
        plain = tensor.detach().cpu().contiguous()
        memory = plain.untyped_storage().data_ptr()
        result[name] = plain.clone() if memory in seen else plain
        seen.add(memory)
    return result


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[Any]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            yield file
    except FileNotFoundError as error:
        raise RunError(f"{path} does not exist", where=str(path)) from error
    except (OSError, SafetensorError) as error:
        raise RunError(f"{path} is damaged: {error}", where=str(path)) from error


def read_tensors(path: Path) -> dict[str, torch.Tensor]:
    """The tensors of a safetensors file, on the CPU.

    Raises:
        RunError: The file is absent or damaged.
    """
    with _opened(path) as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


def read_metadata(path: Path) -> dict[str, str]:
    """The metadata of a safetensors file.

    Raises:
        RunError: The file is absent or damaged.
    """
    with _opened(path) as file:
        return dict(file.metadata() or {})
