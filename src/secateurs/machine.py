"""What the numbers of a run depend on beside its settings."""

from __future__ import annotations

import os
import platform
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

_PACKAGES = ("secateurs", "torch", "torchvision", "accelerate", "safetensors", "numpy")


def surroundings() -> dict[str, Any]:
    """Versions, machine and threads: what the numbers of a run depend on beside its settings."""
    cuda = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {
        "versions": {"python": platform.python_version(), **{name: _version(name) for name in _PACKAGES}},
        "machine": {
            "system": f"{platform.system()} {platform.release()}",
            "cpu": _cpu_name(),
            "cores": os.cpu_count(),
            "cuda": cuda,
        },
        "threads": torch.get_num_threads(),
    }


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _cpu_name() -> str:
    """The processor's name; ``platform`` gives the architecture alone on Linux."""
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()
