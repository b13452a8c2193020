"""Training for sparsity: the units that are to leave are emptied before the cut.

Each method is a :class:`~secateurs.recovery.Regularizer` for :func:`secateurs.recovery.finetune`, and acts on
the groups of a graph, whatever layers they lie in.
"""

from __future__ import annotations

import inspect
from typing import Any

from secateurs.errors import TrainingError, UnknownNameError
from secateurs.graph.groups import Graph
from secateurs.recovery.sparsify.base import Sparsifier
from secateurs.recovery.sparsify.geometric_median import GeometricMedian
from secateurs.recovery.sparsify.group_lasso import GroupLasso
from secateurs.recovery.sparsify.growing import Growing
from secateurs.recovery.sparsify.slimming import Slimming
from secateurs.recovery.sparsify.soft import SoftPruning

__all__ = [
    "METHODS",
    "GeometricMedian",
    "GroupLasso",
    "Growing",
    "Slimming",
    "SoftPruning",
    "Sparsifier",
    "check_options",
    "sparsifier",
]

METHODS: dict[str, type[Sparsifier]] = {
    method.name: method for method in (Slimming, GroupLasso, Growing, SoftPruning, GeometricMedian)
}


def sparsifier(method: str, graph: Graph, **options: Any) -> Sparsifier:
    """A method of training for sparsity by its name.

    Args:
        method: ``"slimming"``, ``"group-lasso"``, ``"growing"``, ``"sfp"`` or ``"fpgm"``.
        graph: The graph of the model that is trained.
        options: What the method's class takes.

    Returns:
        The regulariser for :func:`secateurs.recovery.finetune`.

    Raises:
        UnknownNameError: There is no such method.
        TrainingError: The method has no such option, or its value is out of range.

    Example:
        >>> import secateurs, torch
        >>> net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Linear(8, 2))
        >>> sparsifier("sfp", secateurs.trace(net, torch.zeros(2, 4)), rate=0.25).rate
        0.25
    """
    check_options(method, options)
    return METHODS[method](graph, **options)


def check_options(method: str, options: dict[str, Any]) -> None:
    """Refuse options that a method does not have, before there is a graph.

    Raises:
        UnknownNameError: There is no such method.
        TrainingError: It has no such option; the message says which it has.
    """
    if method not in METHODS:
        raise UnknownNameError("method", method, METHODS)
    known = [name for name in inspect.signature(METHODS[method]).parameters if name != "graph"]
    for name, value in options.items():
        if name not in known:
            raise TrainingError(
                f"{method} has no option {name}, got {name}={value}", fix=f"it takes {', '.join(known)}"
            )
