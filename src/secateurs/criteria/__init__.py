"""Importance of units: criteria and `score`."""

from secateurs.criteria.activation import Activation, Apoz, MeanActivation, NonzeroCount, StdActivation
from secateurs.criteria.greedy import greedy
from secateurs.criteria.magnitude import L1, L2, Random
from secateurs.criteria.normalizations import NORMALIZATIONS, FlopsPenalty, normalization_names
from secateurs.criteria.observed import Batch, Layout, Reading
from secateurs.criteria.protocol import Criterion, Scores, names, producers, register, unit_rows
from secateurs.criteria.scoring import score
from secateurs.criteria.taylor import Taylor, TaylorSigned

__all__ = [
    "L1",
    "L2",
    "NORMALIZATIONS",
    "Activation",
    "Apoz",
    "Batch",
    "Criterion",
    "FlopsPenalty",
    "Layout",
    "MeanActivation",
    "NonzeroCount",
    "Random",
    "Reading",
    "Scores",
    "StdActivation",
    "Taylor",
    "TaylorSigned",
    "greedy",
    "names",
    "normalization_names",
    "producers",
    "register",
    "score",
    "unit_rows",
]
