"""The proof: the smaller model computes what the original does with the removed units silenced."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only

from secateurs.errors import VerifyError
from secateurs.graph.copying import copy_model, tensors_of
from secateurs.graph.running import Inputs, call_model
from secateurs.planning.plan import Plan
from secateurs.surgery.apply import check_fits


@dataclass(frozen=True, slots=True, kw_only=True)
class VerifyReport:
    """What the comparison of a pruned model with the silenced original found.

    Args:
        max_error: Largest absolute difference between the two outputs.
        scale: Largest absolute value of the silenced original's outputs.
        effect: Largest absolute difference that silencing made to the original's outputs; where it is
            0, the comparison proves little.
        tolerance: Largest relative error (`max_error` / `scale`) that counts as rounding.
        exact_expected: Whether equality is expected; not where an operator mixes the units.
        mixed: Groups for which it is not, with the operator.
        problem: Anything else that is wrong, such as other shapes; empty if nothing is.
    """

    max_error: float
    scale: float
    effect: float
    tolerance: float
    exact_expected: bool
    mixed: dict[str, str]
    problem: str = ""

    @property
    def ok(self) -> bool:
        """Whether the cut is right, as far as equality is expected."""
        if self.problem:
            return False
        return not self.exact_expected or self.max_error <= self.tolerance * max(self.scale, 1e-12)

    def raise_if_failed(self) -> VerifyReport:
        """Return the report, or raise if the cut is wrong.

        Raises:
            VerifyError: The outputs differ where they must not.
        """
        if not self.ok:
            raise VerifyError(str(self), fix="report this model; the plan and the architecture reproduce it")
        return self

    def __str__(self) -> str:
        if self.problem:
            return f"verify failed: {self.problem}"
        if not self.exact_expected:
            name, operator = next(iter(self.mixed.items()))
            more = f" and {len(self.mixed) - 1} more groups" if len(self.mixed) > 1 else ""
            return (
                f"equality is not expected: {operator} computes across the units of {name!r}{more}; "
                f"shapes agree, outputs are finite, difference {self.max_error:.3g} at scale {self.scale:.3g}"
            )
        verdict = "verified" if self.ok else "verify failed"
        return (
            f"{verdict}: pruned and silenced output differ by {self.max_error:.3g} at scale {self.scale:.3g} "
            f"(tolerance {self.tolerance:g} relative); silencing changed the outputs by {self.effect:.3g}"
        )


def verify(original: nn.Module, pruned: nn.Module, plan: Plan, inputs: Inputs) -> VerifyReport:
    """Compare the pruned model with the original in which the removed units are silenced.

    Silencing a unit means that its consumers read zero from it: their slices are zeroed. Where all that
    lies between is per channel, both outputs agree to rounding. The comparison runs in float64 and
    evaluation mode on copies; both models are left as they are. Call it before the pruned model's weights
    change.

    Args:
        original: The model that the plan was applied to.
        pruned: The result of ``apply(original, plan)``.
        plan: The plan.
        inputs: Example inputs with real values; moved to the models' device.

    Returns:
        The report; its `raise_if_failed` turns a failure into an error.

    Raises:
        VerifyError: One of the models could not be run.
        ApplyError: The plan does not fit the original.
    """
    tensors = tensors_of(original)
    check_fits(tensors, plan)
    mixed = {group.name: group.mixed_by for group in plan.groups if group.mixed_by}
    before = _run(_double(original, {}), inputs, "the original")
    silenced = _run(_double(original, _silenced(tensors, plan)), inputs, "the silenced original")
    after = _run(_double(pruned, {}), inputs, "the pruned model")
    shapes = [[tuple(t.shape) for t in outputs] for outputs in (silenced, after)]
    problem = f"output shapes {shapes[1]} instead of {shapes[0]}" if shapes[0] != shapes[1] else ""
    if not problem and not all(bool(torch.isfinite(t).all()) for t in after):
        problem = "the pruned model's outputs are not finite"
    return VerifyReport(
        max_error=float("nan") if problem else _largest_difference(silenced, after),
        scale=max((float(t.abs().max()) for t in silenced if t.numel()), default=0.0),
        effect=_largest_difference(before, silenced),
        tolerance=1e-6,
        exact_expected=not mixed,
        mixed={name: operator or "" for name, operator in mixed.items()},
        problem=problem,
    )


def _silenced(tensors: dict[str, Tensor], plan: Plan) -> dict[str, Tensor]:
    """The tensors that are zeroed in part to silence the units: consumers' weights above all."""
    changed: dict[str, Tensor] = {}
    for axis in plan.axes:
        if axis.silenced:
            tensor = changed.get(axis.parameter)
            tensor = tensors[axis.parameter].detach().clone() if tensor is None else tensor
            places = torch.tensor(axis.silenced, device=tensor.device)
            changed[axis.parameter] = tensor.index_fill(axis.dim, places, 0)
    return changed


def _double(model: nn.Module, exchanged: dict[str, Tensor]) -> nn.Module:
    """A copy in evaluation mode and float64 for floating tensors, without hooks."""
    tensors = {name: exchanged.get(name, tensor).detach() for name, tensor in tensors_of(model).items()}
    wide = {
        name: tensor.double() if tensor.is_floating_point() else tensor for name, tensor in tensors.items()
    }
    duplicate = copy_model(model, wide)
    for module in duplicate.modules():
        module._forward_hooks.clear()
        module._forward_pre_hooks.clear()
    return duplicate.eval()


def _run(model: nn.Module, inputs: Inputs, which: str) -> list[Tensor]:
    device = next((tensor.device for tensor in tensors_of(model).values()), torch.device("cpu"))
    wide: Any = tree_map_only(
        Tensor, lambda t: t.to(device, torch.float64 if t.is_floating_point() else t.dtype), inputs
    )
    try:
        with torch.no_grad(), _default_dtype(torch.float64):
            outputs = call_model(model, wide)
    except Exception as error:
        raise VerifyError(f"{which} could not be run: {type(error).__name__}: {error}") from error
    return [leaf for leaf in tree_leaves(outputs) if isinstance(leaf, Tensor)]


@contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def _largest_difference(a: list[Tensor], b: list[Tensor]) -> float:
    return max((float((x - y).abs().max()) for x, y in zip(a, b, strict=True) if x.numel()), default=0.0)
