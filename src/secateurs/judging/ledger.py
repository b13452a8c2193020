"""What the oracle has found so far, a line for each group and batch, so that it can be continued."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from secateurs import files
from secateurs.errors import RunError


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """One group on one batch.

    Args:
        batch: Number of the batch.
        examples: Examples in it.
        group: Name of the group.
        loss: The loss of the model as it is.
        units: The units that were silenced, each alone.
        losses: The loss without each of them.
        silent: How many of them were zero in the whole batch, so that nothing was run for them.
        way: How the loss was found; see `secateurs.judging.Oracle.ways`.
        seconds: What it took, with the passes that were made for it.
    """

    batch: int
    examples: int
    group: str
    loss: float
    units: tuple[int, ...]
    losses: tuple[float, ...]
    silent: int
    way: str
    seconds: float = 0.0


class Ledger:
    """The entries in the order in which they were found; in a file, if there is one.

    Args:
        path: A file of JSON lines, which is read first where it exists.

    Raises:
        RunError: The file holds something else.

    Example:
        >>> ledger = Ledger()
        >>> ledger.add(Entry(batch=0, examples=2, group="conv", loss=1.0, units=(0,), losses=(1.5,),
        ...                  silent=0, way="replayed"))
        >>> ledger.has(0, "conv", (0,)), ledger.has(1, "conv", (0,))
        (True, False)
    """

    def __init__(self, path: Path | None = None) -> None:
        self._path = path
        self.entries: list[Entry] = []
        if path:
            files.drop_torn_line(path)
        for line in files.read_lines(path) if path else ():
            try:
                pairs = {"units": tuple(line["units"]), "losses": tuple(line["losses"])}
                self.entries.append(Entry(**{**line, **pairs}))
            except (KeyError, TypeError) as error:
                raise RunError(
                    f"{path} holds a line that the oracle did not write", where=str(path)
                ) from error
        self._known = {(each.batch, each.group): each for each in self.entries}

    def has(self, batch: int, group: str, units: Sequence[int]) -> bool:
        """Whether these units of a group are done on a batch."""
        entry = self._known.get((batch, group))
        return entry is not None and entry.units == tuple(units)

    def add(self, entry: Entry) -> None:
        """Keep an entry, in the file too before this returns."""
        self.entries.append(entry)
        self._known[entry.batch, entry.group] = entry
        if self._path:
            files.append_line(self._path, asdict(entry))

    def of(self, chosen: Mapping[str, Sequence[int]]) -> list[Entry]:
        """The entries that are about these units, by batch."""
        mine = [each for each in self._known.values() if tuple(chosen.get(each.group, ())) == each.units]
        return sorted(mine, key=lambda each: each.batch)
