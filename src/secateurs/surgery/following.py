"""The first of the two runs of `secateurs.surgery.gathered`: the original traced on tensors with data."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from secateurs.graph.calls import watched
from secateurs.graph.copying import tensors_of
from secateurs.graph.labels import Dim
from secateurs.graph.operators import canonical
from secateurs.graph.outputs import Returned
from secateurs.graph.packed import call_tensors, results_of
from secateurs.graph.rules import find_call_rule, find_rule
from secateurs.graph.running import Inputs, call_model
from secateurs.graph.tracing import Tracer
from secateurs.graph.values import without_masks
from secateurs.surgery.wide import call_wide, widened


@dataclass(frozen=True, slots=True)
class Call:
    """One operator call of the original.

    Args:
        operator: The operator.
        operands: The labelled dimensions of each tensor that went in.
        results: The same of each that came out.
        mixed: The dimensions that the operator computes across, and in which words.
        sums: Whether it multiplies and sums over a dimension.
    """

    operator: Any
    operands: tuple[tuple[Dim, ...], ...]
    results: tuple[tuple[Dim, ...], ...]
    mixed: tuple[tuple[Dim, str], ...]
    sums: bool


class Follower(Tracer):
    """The tracer on tensors with data, which notes what each operator call mixes and sums over."""

    def __init__(self) -> None:
        super().__init__(find_rule, find_call_rule)
        self.followed: list[Call] = []
        self._computed: list[Any] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        return self.run(func, without_masks(func, args), widened(kwargs))

    def follow(self, model: nn.Module, inputs: Inputs) -> Any:
        """Run the model on inputs with values; its outputs, which keep their lengths as in any trace."""
        self.know(model)
        for name, tensor in tensors_of(model).items():
            self._register(name, tensor)
        with watched(self, model):
            outputs = call_model(model, inputs)
        self.lock_outputs(Returned.by(model, outputs))
        return outputs

    def derive_scale(self, query: Tensor, key: Tensor, others: Sequence[Any]) -> None:
        """The original at its full size keeps its scale, so that nothing has to make up for another."""

    def compute(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The results of one operator, with data."""
        out = call_wide(func, args, kwargs)
        self._computed.append(out)
        return out

    def run(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Carry out one operator and note its dimensions."""
        operands = tuple(self.dims(tensor) for tensor in call_tensors(args, kwargs))
        mixed, sums = len(self.mixed), len(self.contractions)
        try:
            out = super().run(func, args, kwargs)
        except Exception as error:
            if not self._computed:
                raise
            out = self._computed[0]  # the rule cannot say what this kernel did, so what it touched stays
            self._refuse(
                func, call_tensors(args, kwargs), results_of(out), f"the rule of {func} fails: {error}"
            )
        finally:
            self._computed.clear()  # torch goes other ways with a tensor that is held elsewhere
        if canonical(func) is None:
            return out
        results = tuple(self.dims(tensor) for tensor in results_of(out))
        new = tuple(self.mixed[mixed:])
        self.followed.append(Call(func, operands, results, new, len(self.contractions) > sums))
        return out
