"""Structured pruning for any PyTorch network: rank, cut, prove, heal, measure."""

from secateurs.criteria import Criterion, Scores, score
from secateurs.graph import Cost, Graph, Group, Locked, Slice, rule, trace
from secateurs.planning import Budget, Plan, Remove, plan
from secateurs.pruning import Step, prune_steps
from secateurs.surgery import VerifyReport, apply, verify

__version__ = "0.1.0"

__all__ = [
    "Budget",
    "Cost",
    "Criterion",
    "Graph",
    "Group",
    "Locked",
    "Plan",
    "Remove",
    "Scores",
    "Slice",
    "Step",
    "VerifyReport",
    "apply",
    "plan",
    "prune_steps",
    "rule",
    "score",
    "trace",
    "verify",
]
