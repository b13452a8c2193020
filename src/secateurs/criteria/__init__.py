"""Importance of units: criteria and `score`."""

from secateurs.criteria.greedy import greedy
from secateurs.criteria.magnitude import L1, L2, Random
from secateurs.criteria.protocol import Criterion, Reading, Scores, names, producers, register, unit_rows
from secateurs.criteria.scoring import NORMALIZATIONS, score
from secateurs.criteria.taylor import Taylor, TaylorSigned

__all__ = [
    "L1",
    "L2",
    "NORMALIZATIONS",
    "Criterion",
    "Random",
    "Reading",
    "Scores",
    "Taylor",
    "TaylorSigned",
    "greedy",
    "names",
    "producers",
    "register",
    "score",
    "unit_rows",
]
