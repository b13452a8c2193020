"""The lines of a zoo file."""

from __future__ import annotations

import json
from collections.abc import Iterable
from importlib import metadata
from pathlib import Path
from typing import Any

Records = dict[tuple[str, str], dict[str, Any]]
_PACKAGES = ("torch", "torchvision", "timm", "transformers", "torch-pruning", "secateurs")


def read(files: Iterable[Path]) -> Records:
    """The newest facts of each (list, model), those of both tools together."""
    records: Records = {}
    for path in files:
        for line in path.read_text().splitlines():
            record = json.loads(line)
            records.setdefault((record["list"], record["model"]), {}).update(record)
    return records


def software() -> dict[str, str]:
    """The versions of what a run rests on."""
    found = {}
    for name in _PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found
