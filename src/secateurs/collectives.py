"""Torch's functions for several processes, imported so that they keep no group of processes alive."""

from __future__ import annotations

import importlib

import torch.distributed as dist


def import_collectives() -> None:
    """Import ``torch.distributed.nn``, whose functions have the group of the import as a default.

    Imported while there is one, as torch does when it first needs its compiler, they would keep the group
    alive after its end, and with it threads that can abort a process as it exits. Without a default they take
    the group that there is.
    """
    if not dist.is_available():
        return
    group = dist.group.WORLD
    dist.group.WORLD = None
    try:
        importlib.import_module("torch.distributed.nn")
    finally:
        dist.group.WORLD = group
