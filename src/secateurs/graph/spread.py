"""Dimensions that were spread out from length 1: copies, whose number is all that can be said of them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from secateurs.graph.expressions import Attribute, Length
from secateurs.graph.integers import Statement
from secateurs.graph.labels import Dim, Labels
from secateurs.graph.records import ParameterDim


def tie_copies(
    labels: Labels,
    statements: Sequence[Statement],
    spread: Sequence[Dim],
    parameter_dims: Sequence[ParameterDim],
) -> None:
    """Let copies that met no parameter go with the dimension that their number was taken from.

    ``weights[:, None].expand(-1, self.num_heads, -1)`` has as many copies as there are heads. Where nothing
    else says which of them leave, those of the heads that leave do: one is as good as another.

    Args:
        labels: The labels of a finished trace.
        statements: What lengths were said to be.
        spread: Dimensions with labels of their own because they were spread out.
        parameter_dims: All dimensions of parameters and buffers.
    """
    copies = {id(dim) for dim in spread}
    loose = [each for each in statements if id(each.dim) in copies]
    if not loose:
        return
    held = _atoms(labels, [place.labels for place in parameter_dims])
    for each in loose:
        own = _atoms(labels, [each.dim])
        source = _source(each, statements, copies)
        if own.size and source is not None and not np.isin(own, held).any():
            labels.unify(each.dim, source)


def _source(copy: Statement, statements: Sequence[Statement], copies: set[int]) -> Dim | None:
    """The dimension that the number of copies was read off, or that the same attribute states."""
    if isinstance(copy.expression, Length):
        return copy.expression.dim
    if not isinstance(copy.expression, Attribute):
        return None
    for each in statements:
        same = isinstance(each.expression, Attribute) and each.expression.key == copy.expression.key
        if same and each.dim.factors and id(each.dim) not in copies:
            return each.dim
    return None


def _atoms(labels: Labels, dims: Sequence[Dim]) -> np.ndarray:
    """The free labels that some dimensions carry."""
    found = [factor for dim in dims for factor in labels.resolve(dim).factors]
    return np.setdiff1d(np.unique(np.concatenate(found)), [0]) if found else np.empty(0, np.int64)
