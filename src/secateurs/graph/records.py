"""What a trace writes down: where labels start, what is multiplied, each operator call, each read."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from secateurs.graph.labels import Dim
from secateurs.graph.paths import Signature


@dataclass(frozen=True, slots=True)
class ParameterDim:
    """One dimension of one parameter or buffer: the place where labels start."""

    parameter: str
    dim: int
    size: int
    labels: Dim


@dataclass(frozen=True, slots=True)
class Contraction:
    """A product that sums over a dimension: `multiplier` x the lengths of `dims` multiply-accumulates."""

    multiplier: float
    dims: tuple[Dim, ...]


@dataclass(frozen=True, slots=True)
class Record:
    """One operator call: what came out, what labelled dimensions went in, and what numbers it was given.

    The numbers are None where they may change with a cut, because something makes up for it.
    """

    operator: Any
    numbers: tuple[float, ...] | None
    outputs: tuple[tuple[Dim, ...], ...]
    dtypes: tuple[torch.dtype, ...]
    is_single: bool
    inputs: tuple[Dim, ...]


@dataclass(frozen=True, slots=True)
class Pass:
    """The operator calls of one forward pass.

    Args:
        training: Whether the model was in training mode.
        records: The calls.
        takes_state: Whether the model was given the state that the pass before returned.
        takes_all: Whether all was chosen that may be; see `secateurs.graph.values.Everything`.
    """

    training: bool
    records: tuple[Record, ...]
    takes_state: bool = False
    takes_all: bool = False


@dataclass(frozen=True, slots=True)
class Read:
    """A place where weights read labelled activations, or where these are multiplied with others.

    Args:
        call: Number of the torch function call in the forward pass.
        argument: Position of the activation among the tensors given to that call.
        dims: Labels of the activation's dimensions.
        contracted: The dimensions that are summed over during the call.
    """

    call: int
    argument: int
    dims: tuple[Dim, ...]
    contracted: tuple[Dim, ...]


@dataclass(frozen=True, slots=True)
class CallRecord:
    """One call of a torch function.

    Args:
        name: The function.
        contractions: Which of the contractions so far it made, as the first and the one behind the last.
        tensors: The dimensions of each tensor that it was given and that it gave.
        signature: What tells it from other calls of the pass.
    """

    name: str
    contractions: tuple[int, int]
    tensors: tuple[tuple[Dim, ...], ...]
    signature: Signature
