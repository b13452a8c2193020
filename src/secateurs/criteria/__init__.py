"""Importance of units: criteria and `score`."""

from secateurs.criteria.activation import Activation, Apoz, MeanActivation, NonzeroCount, StdActivation
from secateurs.criteria.curvature import Hessian, Obd
from secateurs.criteria.greedy import greedy
from secateurs.criteria.information import MutualInformation
from secateurs.criteria.magnitude import L1, L2, BnScale, Fpgm, MeanWeight, Random
from secateurs.criteria.normalizations import NORMALIZATIONS, FlopsPenalty, normalization_names
from secateurs.criteria.observed import Batch, Layout, Reading
from secateurs.criteria.protocol import Criterion, Scores, names, producers, register, unit_rows
from secateurs.criteria.reconstruction import Reconstruction, ThiNet
from secateurs.criteria.scoring import score
from secateurs.criteria.squares import Fisher, Taylor2019, Taylor2019Gate
from secateurs.criteria.taylor import Gradient, Taylor, TaylorElementwise, TaylorSigned

__all__ = [
    "L1",
    "L2",
    "NORMALIZATIONS",
    "Activation",
    "Apoz",
    "Batch",
    "BnScale",
    "Criterion",
    "Fisher",
    "FlopsPenalty",
    "Fpgm",
    "Gradient",
    "Hessian",
    "Layout",
    "MeanActivation",
    "MeanWeight",
    "MutualInformation",
    "NonzeroCount",
    "Obd",
    "Random",
    "Reading",
    "Reconstruction",
    "Scores",
    "StdActivation",
    "Taylor",
    "Taylor2019",
    "Taylor2019Gate",
    "TaylorElementwise",
    "TaylorSigned",
    "ThiNet",
    "greedy",
    "names",
    "normalization_names",
    "producers",
    "register",
    "score",
    "unit_rows",
]
