"""One small rule an operator: how the labels of its arguments become the labels of its results."""

from secateurs.graph.rules import contraction, indexing, normalization, pointwise, reduction, spatial, views
from secateurs.graph.rules.registry import find_call_rule, find_rule, rule

__all__ = [
    "contraction",
    "find_call_rule",
    "find_rule",
    "indexing",
    "normalization",
    "pointwise",
    "reduction",
    "rule",
    "spatial",
    "views",
]
