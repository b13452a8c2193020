"""The proof: the smaller model computes what the original does without the units that left.

Two ways say what the original does without them. *Silenced*: their consumers read zero. That is the same as
absence where all that lies between is per channel. *Gathered*: where an operator computes across units it is
given the kept ones alone (see `secateurs.surgery.gathered`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import isfinite
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn

from secateurs.errors import SecateursError, VerifyError
from secateurs.graph import trace
from secateurs.graph.copying import copy_model, tensors_of
from secateurs.graph.groups import Graph, Indices
from secateurs.graph.inference import outside_inference_mode
from secateurs.graph.running import Inputs, has_values
from secateurs.planning.parts import AxisCut, RowScale
from secateurs.planning.plan import Plan
from secateurs.surgery.apply import apply, check_fits, rescaled
from secateurs.surgery.decisions import Decisions
from secateurs.surgery.gathered import NotGathered, run_gathered
from secateurs.surgery.silence import silencing, zeroed
from secateurs.surgery.wide import deciding, in_wide, run_wide


@dataclass(frozen=True, slots=True, kw_only=True)
class VerifyReport:
    """What the comparison of a pruned model with the original found.

    Args:
        max_error: Largest absolute difference between the outputs of the two.
        scale: Largest absolute value of the outputs of the original without the units.
        effect: Largest absolute difference that leaving them out made to the original's outputs; where it is
            0, the comparison proves little. Infinite where their number changed, such as that of boxes.
        tolerance: Largest relative error (`max_error` / `scale`) that counts as rounding.
        way: How the original went without the units: ``silenced``, or ``gathered`` where an operator mixes
            them.
        mixed: Groups whose units an operator mixes, with the operator.
        unproved: Groups that could not be left out of the original, with the reason; they were cut in
            it by the same surgery as in the pruned model, so that all others are proved.
        problem: Anything else that is wrong, such as other shapes; empty if nothing is.
    """

    max_error: float
    scale: float
    effect: float
    tolerance: float
    way: Literal["silenced", "gathered"]
    mixed: Mapping[str, str] = field(default_factory=dict)
    unproved: Mapping[str, str] = field(default_factory=dict)
    problem: str = ""

    @property
    def exact_expected(self) -> bool:
        """Whether the comparison is with the original itself in every group."""
        return not self.unproved

    @property
    def ok(self) -> bool:
        """Whether the cut is right, in all groups but those that are `unproved`."""
        return not self.problem and self.max_error <= self.tolerance * max(self.scale, 1e-12)

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
        verdict = "verified" if self.ok else "verify failed"
        verb = "silencing" if self.way == "silenced" else "gathering"
        changed = (
            f"the outputs by {self.effect:.3g}" if isfinite(self.effect) else "how many outputs there are"
        )
        text = (
            f"{verdict}: pruned and {self.way} output differ by {self.max_error:.3g} "
            f"at scale {self.scale:.3g} (tolerance {self.tolerance:g} relative); "
            f"{verb} changed {changed}"
        )
        if self.unproved:
            name, reason = next(iter(self.unproved.items()))
            more = f" and {len(self.unproved) - 1} more groups" if len(self.unproved) > 1 else ""
            text += f"; not proved are {name!r}{more}: {reason}"
        return text


@dataclass(frozen=True, slots=True, kw_only=True)
class _Without:
    """What the original gives without the units that left, what it decided by value then, and as it is."""

    whole: list[Tensor]
    outputs: list[Tensor]
    decisions: Decisions
    unproved: Mapping[str, str] = field(default_factory=dict)


@outside_inference_mode
def verify(original: nn.Module, pruned: nn.Module, plan: Plan, inputs: Inputs) -> VerifyReport:
    """Compare the pruned model with the original that goes without the removed units.

    Where all that lies between a unit and its consumers is per channel, the unit is *silenced*: the
    consumers' slices are zeroed. Where an operator computes across units that leave, as a layer norm does,
    the original runs at its full size and such an operator is evaluated on the kept subset, *gathered* from
    its operands. Either way both outputs must agree to rounding. The comparison runs on copies, in float64
    and evaluation mode, with the same random numbers; the models are left as they are. Call it before the
    pruned model's weights change.

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

    Example:
        >>> from torch import nn
        >>> import secateurs
        >>> net = nn.Sequential(nn.Linear(4, 6), nn.LayerNorm(6), nn.Linear(6, 2))
        >>> x = torch.randn(3, 4)
        >>> plan = secateurs.Plan.of(secateurs.trace(net, x), {"0": [0, 3]})
        >>> report = secateurs.verify(net, secateurs.apply(net, plan), plan, x)
        >>> report.ok, report.way, report.mixed
        (True, 'gathered', {'0': 'layer normalisation'})
    """
    check_fits(original, plan)
    if not (has_values(original) and has_values(pruned)):
        raise VerifyError(
            "on the meta device weights have no values, so no outputs can be compared",
            fix="verify with the models on a real device",
        )
    mixed = {group.name: group.mixed_by for group in plan.groups if group.mixed_by}
    without = _gathered(original, plan, inputs) if mixed else _silenced(original, plan, inputs)
    forward = deciding(without.decisions, is_first=False)
    after = run_wide(pruned, inputs, "the pruned model", forward=forward)
    shapes = [[tuple(t.shape) for t in outputs] for outputs in (without.outputs, after)]
    problem = f"output shapes {shapes[1]} instead of {shapes[0]}" if shapes[0] != shapes[1] else ""
    finite = [[t.isfinite() for t in outputs] for outputs in (without.outputs, after)]
    if not problem and not all(map(torch.equal, *finite)):
        problem = "the pruned model's outputs are not finite where they must be"
    if not problem and any(t.numel() for t in after) and not any(bool(each.any()) for each in finite[0]):
        problem = "the original itself gives no finite number on these inputs, so nothing can be compared"
    return VerifyReport(
        max_error=float("nan") if problem else _largest_difference(without.outputs, after),
        scale=_largest_difference(without.outputs, [torch.zeros_like(t) for t in without.outputs]),
        effect=_effect(without.whole, without.outputs),
        tolerance=1e-6,
        way="gathered" if mixed else "silenced",
        mixed=mixed,
        unproved=without.unproved,
        problem=problem,
    )


# -- the original without the units ---------------------------------------------------------------


def _silenced(original: nn.Module, plan: Plan, inputs: Inputs) -> _Without:
    """The first way: the units' consumers read zero."""
    decisions = Decisions()
    whole = run_wide(original, inputs, "the original")
    original = _rounded_alike(original, plan.rescaled)
    tensors = tensors_of(original)
    exchanged = zeroed(tensors, silencing(tensors, plan.axes))
    forward = deciding(decisions, is_first=True)
    outputs = run_wide(original, inputs, "the silenced original", exchanged=exchanged, forward=forward)
    return _Without(whole=whole, outputs=outputs, decisions=decisions)


def _rounded_alike(original: nn.Module, scales: Sequence[RowScale]) -> nn.Module:
    """The original with rescaled rows as the pruned model's dtype holds them, back at their old scale.

    So the comparison does not count what rounding ``row * factor`` costs, which is much in bfloat16.
    """
    if not scales:
        return original
    tensors = {name: in_wide(tensor) for name, tensor in rescaled(tensors_of(original), scales).items()}
    back = [replace(each, factor=1 / each.factor) for each in scales]
    return copy_model(original, {**tensors, **rescaled(tensors, back)}, share=True)


def _gathered(original: nn.Module, plan: Plan, inputs: Inputs) -> _Without:
    """The second way: operators that mix units are given the kept ones alone.

    Where one of them cannot be evaluated so, its groups are cut in the original, and the rest is tried again.
    """
    unproved: dict[str, str] = {}
    before: list[Tensor] | None = None
    parts: _Parts | None = None
    model, axes = _rounded_alike(original, plan.rescaled), plan.axes
    while True:
        decisions = Decisions()
        try:
            whole, outputs = run_gathered(model, axes, inputs, decisions)
        except NotGathered as failure:
            if len(unproved) == len(plan.groups):  # nothing is left to gather
                decisions = Decisions()
                forward = deciding(decisions, is_first=True)
                outputs = run_wide(model, inputs, "the cut original", forward=forward)
                return _Without(whole=before or [], outputs=outputs, decisions=decisions, unproved=unproved)
            parts = parts or _Parts(original, plan, inputs)
            before = before or run_wide(original, inputs, "the original")
            names = parts.behind(failure, unproved)
            unproved.update(dict.fromkeys(names, str(failure)))
            cut = parts.only(unproved)
            done = {(each.parameter, each.dim, each.factor) for each in cut.rescaled}
            left = [s for s in plan.rescaled if (s.parameter, s.dim, s.factor) not in done]
            model, axes = apply(_rounded_alike(original, left), cut), _what_is_left(plan, cut)
        else:
            return _Without(whole=before or whole, outputs=outputs, decisions=decisions, unproved=unproved)


class _Parts:
    """A plan taken apart into its groups, where a trace of the original makes the same plan again."""

    def __init__(self, original: nn.Module, plan: Plan, inputs: Inputs) -> None:
        self._plan = plan
        self._graph: Graph | None = None
        try:
            graph = trace(original, inputs)
            again = Plan.of(graph, {group.name: group.removed for group in plan.groups})
        except SecateursError:
            return
        if again.axes == plan.axes:
            self._graph = graph

    def behind(self, failure: NotGathered, known: Mapping[str, str]) -> list[str]:
        """The groups that a failure is about; all where it cannot be told."""
        names = [group.name for group in self._plan.groups]
        if self._graph is None:
            return names
        cut, sizes = self.only(known), self._graph.parameters
        homes = {
            (name, dim): _staying(cut, name, dim, sizes[name][dim])[places]
            for (name, dim), places in failure.homes.items()
        }
        found = [
            group.name
            for group in self._plan.groups
            if group.name not in known
            and any(
                np.isin(part.indices[list(group.removed)], homes[part.parameter, part.dim]).any()
                for part in self._graph.by_name[group.name].slices
                if (part.parameter, part.dim) in homes
            )
        ]
        return found or names

    def only(self, names: Mapping[str, str]) -> Plan:
        """The part of the plan that cuts these groups."""
        if self._graph is None:
            return self._plan if names else replace(self._plan, axes=(), groups=(), integers=(), rescaled=())
        chosen = {group.name: group.removed for group in self._plan.groups if group.name in names}
        return Plan.of(self._graph, chosen)


def _what_is_left(plan: Plan, cut: Plan) -> tuple[AxisCut, ...]:
    """What the plan cuts further where a part of it has been cut already."""
    left = []
    for axis in plan.axes:
        stays = _staying(cut, axis.parameter, axis.dim, axis.size)
        removed = np.flatnonzero(np.isin(stays, axis.removed))
        left.append(replace(axis, size=len(stays), removed=tuple(removed.tolist()), silenced=()))
    return tuple(left)


def _staying(cut: Plan, parameter: str, dim: int, size: int) -> Indices:
    """The indices of a parameter dimension that a plan leaves."""
    lost = [axis.removed for axis in cut.axes if (axis.parameter, axis.dim) == (parameter, dim)]
    stays: Indices = np.delete(np.arange(size), np.asarray(lost, np.int64))
    return stays


def _effect(whole: list[Tensor], outputs: list[Tensor]) -> float:
    """What leaving the units out changed; infinite where there are more outputs, or fewer, such as boxes."""
    if [t.shape for t in whole] != [t.shape for t in outputs]:
        return float("inf")
    return _largest_difference(whole, outputs)


def _largest_difference(a: list[Tensor], b: list[Tensor]) -> float:
    """Infinite or not a number in both is no difference."""
    largest = 0.0
    for x, y in zip(a, b, strict=True):
        both = x.isfinite() & y.isfinite()
        if both.any():
            largest = max(largest, float((1 * x[both] - 1 * y[both]).abs().max()))
    return largest
