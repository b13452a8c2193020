"""Healing the loss of accuracy that a cut leaves."""

from __future__ import annotations

from secateurs.recovery.distill import distillation_loss
from secateurs.recovery.finetune import finetune
from secateurs.recovery.history import Epoch, History
from secateurs.recovery.optimizer import carry_optimizer
from secateurs.recovery.recipe import Recipe
from secateurs.recovery.regularizer import Regularizer
from secateurs.recovery.repair import Repair, Repaired, repair

__all__ = [
    "Epoch",
    "History",
    "Recipe",
    "Regularizer",
    "Repair",
    "Repaired",
    "carry_optimizer",
    "distillation_loss",
    "finetune",
    "repair",
]
