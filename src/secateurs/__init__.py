"""Structured pruning for any PyTorch network: rank, cut, prove, heal, measure.

The public names are imported when they are first used, so that ``secateurs --help`` need not wait for torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from secateurs.criteria import Criterion, Scores, score
    from secateurs.errors import SecateursError
    from secateurs.graph import Cost, Graph, Group, Locked, Slice, rule, trace
    from secateurs.judging import Comparison, Oracle, compare, oracle
    from secateurs.lowered import Lowered, lowering
    from secateurs.oneshot import prune
    from secateurs.planning import AtMost, Budget, LatencyModel, Plan, Remove, plan
    from secateurs.pruning import Step, prune_steps
    from secateurs.runs import load
    from secateurs.sampling import Particles, particle_filter
    from secateurs.sensitivities import Sensitivity, sensitivity
    from secateurs.surgery import VerifyReport, apply, silenced, verify
    from secateurs.timing import latency_model

__version__ = "0.1.0"

__all__ = [
    "AtMost",
    "Budget",
    "Comparison",
    "Cost",
    "Criterion",
    "Graph",
    "Group",
    "LatencyModel",
    "Locked",
    "Lowered",
    "Oracle",
    "Particles",
    "Plan",
    "Remove",
    "Scores",
    "SecateursError",
    "Sensitivity",
    "Slice",
    "Step",
    "VerifyReport",
    "apply",
    "compare",
    "latency_model",
    "load",
    "lowering",
    "oracle",
    "particle_filter",
    "plan",
    "prune",
    "prune_steps",
    "rule",
    "score",
    "sensitivity",
    "silenced",
    "trace",
    "verify",
]

_HOMES = {
    "criteria": ("Criterion", "Scores", "score"),
    "errors": ("SecateursError",),
    "graph": ("Cost", "Graph", "Group", "Locked", "Slice", "rule", "trace"),
    "judging": ("Comparison", "Oracle", "compare", "oracle"),
    "lowered": ("Lowered", "lowering"),
    "oneshot": ("prune",),
    "planning": ("AtMost", "Budget", "LatencyModel", "Plan", "Remove", "plan"),
    "pruning": ("Step", "prune_steps"),
    "runs": ("load",),
    "sampling": ("Particles", "particle_filter"),
    "sensitivities": ("Sensitivity", "sensitivity"),
    "surgery": ("VerifyReport", "apply", "silenced", "verify"),
    "timing": ("latency_model",),
}
_HOME = {name: home for home, names in _HOMES.items() for name in names}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'secateurs' has no attribute {name!r}")
    value = getattr(import_module(f"secateurs.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
