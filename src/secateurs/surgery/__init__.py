"""Cutting a model, and the proof that the cut was right."""

from secateurs.surgery.apply import apply
from secateurs.surgery.silence import silenced
from secateurs.surgery.verify import VerifyReport, verify

__all__ = ["VerifyReport", "apply", "silenced", "verify"]
