"""One small rule an operator: how the labels of its arguments become the labels of its results."""

from secateurs.graph.rules import (
    calls,
    contraction,
    detection,
    indexing,
    lookup,
    matrices,
    normalization,
    ordering,
    pointwise,
    reduction,
    spatial,
    spectral,
    views,
    windows,
)
from secateurs.graph.rules.registry import find_call_rule, find_rule, rule

__all__ = [
    "calls",
    "contraction",
    "detection",
    "find_call_rule",
    "find_rule",
    "indexing",
    "lookup",
    "matrices",
    "normalization",
    "ordering",
    "pointwise",
    "reduction",
    "rule",
    "spatial",
    "spectral",
    "views",
    "windows",
]
