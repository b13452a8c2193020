"""Healing the loss of accuracy that a cut leaves."""

from __future__ import annotations

from secateurs.recovery.finetune import finetune
from secateurs.recovery.recipe import Epoch, History, Recipe

__all__ = ["Epoch", "History", "Recipe", "finetune"]
