"""Healing the loss of accuracy that a cut leaves."""

from __future__ import annotations

from secateurs.recovery.distill import distillation_loss
from secateurs.recovery.finetune import finetune
from secateurs.recovery.recipe import Epoch, History, Recipe
from secateurs.recovery.reconstruct import Refit, reconstruct
from secateurs.recovery.regularizer import Regularizer
from secateurs.recovery.repair import Repair, Repaired, repair

__all__ = [
    "Epoch",
    "History",
    "Recipe",
    "Refit",
    "Regularizer",
    "Repair",
    "Repaired",
    "distillation_loss",
    "finetune",
    "reconstruct",
    "repair",
]
