"""One writer at a time."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator
from pathlib import Path

from secateurs.errors import RunError


class Lock:
    """The right to write to a folder, held by one process; the system frees it when that process ends.

    Args:
        path: The lock file; it stays, since deleting it would race with the next holder.

    Raises:
        RunError: Another process, or another part of this one, holds the lock.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp()) / ".lock"
        >>> lock = Lock(path)
        >>> Lock(path)
        Traceback (most recent call last):
        secateurs.errors.RunError: another job (process ...) is writing to ...
        >>> lock.release()
        >>> Lock(path).release()
    """

    _held: set[Path] = set()  # noqa: RUF012  (record locks do not exclude their own process)

    def __init__(self, path: Path) -> None:
        self.path = path.resolve()
        if self.path in Lock._held:
            raise self._taken(os.getpid())
        try:
            self._handle = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o644)
        except OSError as error:
            raise RunError(f"{path} cannot be written: {error.strerror}", where=str(path)) from error
        try:
            _lock(self._handle)
        except OSError:
            holder = os.read(self._handle, 32).decode(errors="replace").strip()
            os.close(self._handle)
            raise self._taken(holder) from None
        os.ftruncate(self._handle, 0)
        os.write(self._handle, f"{os.getpid()}\n".encode())
        Lock._held.add(self.path)

    def _taken(self, holder: object) -> RunError:
        return RunError(
            f"another job (process {holder or '?'}) is writing to {self.path.parent}",
            where=str(self.path.parent),
            fix="wait for it to end, or pass another --out",
        )

    @contextlib.contextmanager
    def unless_failed(self) -> Iterator[Lock]:
        """Keep the lock after the block, but not if the block fails."""
        try:
            yield self
        except BaseException:
            self.release()
            raise

    def release(self) -> None:
        """Let the next one in; a second call does nothing."""
        if self.path in Lock._held:
            Lock._held.discard(self.path)
            os.close(self._handle)


if sys.platform == "win32":
    import msvcrt

    def _lock(handle: int) -> None:
        """Take the lock on a byte far past the text, which others must be able to read."""
        os.lseek(handle, 1 << 20, os.SEEK_SET)
        try:
            msvcrt.locking(handle, msvcrt.LK_NBLCK, 1)
        finally:
            os.lseek(handle, 0, os.SEEK_SET)
else:
    import fcntl

    def _lock(handle: int) -> None:
        """Take a record lock: a killed process loses it, and its forked workers never had it."""
        fcntl.lockf(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
