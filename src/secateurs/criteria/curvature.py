"""Second-order forecasts of what removing a unit costs."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._pytree import tree_leaves

from secateurs.criteria.observed import Batch, Layout, UnitIndex
from secateurs.criteria.protocol import Criterion, Weights, producers, register, unit_totals
from secateurs.criteria.readings import Gates, Place
from secateurs.criteria.recursion import second_derivatives
from secateurs.errors import ScoreError
from secateurs.graph.copying import tensors_of
from secateurs.graph.groups import Graph, Group


class _Curvature(Criterion):
    """Sums over examples of a second-order term of each unit, from passes of its own."""

    needs_data = True
    readings = "none"
    needs_loss = True

    def __init__(self, *, probes: int = 1, seed: int = 0) -> None:
        if probes < 1:
            raise ScoreError(f"probes >= 1 must hold, got probes={probes}")
        self._probes, self._seed = probes, seed

    def start(self, graph: Graph, device: torch.device) -> None:
        """Forget everything."""
        self._graph, self._device = graph, device
        self._total = torch.zeros(graph.units, dtype=torch.float64, device=device)
        self._examples = torch.zeros((), dtype=torch.float64, device=device)

    def end_batch(self, examples: int) -> None:
        """Count the examples."""
        self._examples += examples

    def sums(self) -> Sequence[Tensor]:
        """Total and number of examples."""
        return self._total, self._examples

    def importance(self, group: Group, weights: Weights) -> Tensor:
        """Half the mean over all examples."""
        return self._total[group.first : group.first + group.size] / self._examples.clamp(min=1) / 2

    def chance(self, batch: Batch) -> torch.Generator:
        """Random numbers that depend on the batch alone, so that it does not matter which process has it."""
        seed = self._seed
        for leaf in tree_leaves(batch.inputs):
            if isinstance(leaf, Tensor):
                numbers = leaf.detach().cpu().contiguous().flatten().view(torch.uint8)
                seed = zlib.crc32(numbers.numpy().tobytes(), seed)
        return torch.Generator().manual_seed(seed)


def _signs(like: Tensor, chance: torch.Generator) -> Tensor:
    """Independent signs of the shape of a tensor."""
    return (2 * torch.randint(2, like.shape, generator=chance) - 1).to(like)


@register
class Obd(_Curvature):
    """Optimal Brain Damage: ``sum over the filter's weights of h_kk w_k^2 / 2``, the cost of zeroing them.

    ``h_kk`` is the second derivative of the loss in a weight, mean over examples. In a chain of layers it is
    that of the paper's backward recursion (`secateurs.criteria.recursion`). In other networks it is
    Hutchinson's estimate ``E v * Hv`` with random signs ``v``, one Hessian product a probe and batch; it
    costs two backward passes and the memory of both. `Scores.remark` says which. The forecast holds at a
    minimum, where gradients vanish; elsewhere an estimate may be negative. Layers are compared as they are,
    and the sums of all producers of a unit are added.

    Args:
        probes: Sign vectors for each batch, where Hutchinson's estimate is used.
        seed: What they follow from, with the batch.

    Example:
        >>> import secateurs
        >>> from torch import nn
        >>> net = nn.Sequential(nn.Linear(1, 2, bias=False), nn.Linear(2, 1, bias=False))
        >>> for layer in net:
        ...     _ = layer.weight.data.copy_(torch.tensor([1., 2.]).view_as(layer.weight))
        >>> graph, data = secateurs.trace(net, torch.zeros(1, 1)), [(torch.ones(1, 1), torch.ones(1, 1))]
        >>> scores = secateurs.score(net, graph, "obd", data=data, loss_fn=nn.functional.mse_loss)
        >>> scores["0"].tolist(), scores.remark
        ([1.0, 16.0], 'second derivatives by backward recursion')

    References:
        LeCun, Denker, Solla, Optimal Brain Damage, 1990
    """

    name = "obd"

    def start(self, graph: Graph, device: torch.device) -> None:
        """Forget everything."""
        super().start(graph, device)
        self.remark = ""

    def begin_batch(self, batch: Batch) -> None:
        """Add ``h_kk w_k^2`` of all examples of a batch."""
        tensors = tensors_of(batch.model)
        weights: dict[str, Tensor] = {n: t for n, t in tensors.items() if isinstance(t, torch.nn.Parameter)}
        found = None
        if not self.remark.startswith("Hutchinson"):
            found = second_derivatives(batch, weights)
        if found is None and self.remark.startswith("second"):
            raise ScoreError("the model takes another path on this batch than on the first")
        if found is None:
            self.remark = f"Hutchinson's estimate of second derivatives, {self._probes} probe(s) a batch"
            found = self._estimated(batch, weights)
        else:
            self.remark = "second derivatives by backward recursion"
        for group in self._graph.groups:
            mine = self._total[group.first : group.first + group.size]
            for part in producers(group, self.name):
                if part.parameter in found:
                    weight = weights[part.parameter].detach()
                    mine += unit_totals(found[part.parameter] * weight.square(), part)

    def _estimated(self, batch: Batch, weights: dict[str, Tensor]) -> dict[str, Tensor]:
        """``v * Hv`` of a batch's summed loss, mean over the probes."""
        wanted = {
            part.parameter: weights[part.parameter]
            for group in self._graph.groups
            for part in producers(group, self.name)
            if part.parameter in weights
        }
        flags = {name: weight.requires_grad for name, weight in wanted.items()}
        chance = self.chance(batch)
        try:
            for weight in wanted.values():
                weight.requires_grad_(True)
            products = _products(batch, list(wanted.values()), self._probes, chance)
        finally:
            for name, weight in wanted.items():
                weight.requires_grad_(flags[name])
        return dict(zip(wanted, products, strict=True))


def _products(
    batch: Batch,
    leaves: list[Tensor],
    probes: int,
    chance: torch.Generator,
    mode: AbstractContextManager[Any] | None = None,
) -> list[Tensor]:
    """Mean of ``v * Hv`` over random signs ``v`` for the summed loss of a batch, zero where it is flat."""
    with sdpa_kernel(SDPBackend.MATH):  # the fused kernels have no second derivative
        with mode or nullcontext():
            outputs = batch.outputs()
        loss = batch.loss(outputs) * batch.examples
        first = torch.autograd.grad(loss, leaves, create_graph=True, allow_unused=True)
        curved = [each for each in first if each is not None and each.requires_grad]
        total = [torch.zeros_like(leaf) for leaf in leaves]
        for _ in range(probes if curved else 0):
            signs = [_signs(leaf, chance) for leaf in leaves]
            rows = [
                s for s, each in zip(signs, first, strict=True) if each is not None and each.requires_grad
            ]
            second = torch.autograd.grad(curved, leaves, rows, retain_graph=True, allow_unused=True)
            for into, sign, product in zip(total, signs, second, strict=True):
                if product is not None:
                    into += sign * product / probes
    return total


class _Scaled(Gates):
    """Multiplies what is read of each unit of each example by a gate."""

    def __init__(self, graph: Graph, device: torch.device, batch: Batch) -> None:
        super().__init__(graph, device, layouts=batch.layouts)
        self.gates = torch.ones(batch.examples, graph.units + 1, device=device, requires_grad=True)
        self.begin(batch.examples, batch.numbers)

    def gate(self, value: Tensor, place: Place, dims: Sequence[tuple[int, UnitIndex]]) -> Tensor:
        """The value times its gates."""
        layout = self.layouts.get(place, Layout())
        if layout is None and self.examples > 1:
            raise ScoreError(
                "the examples of a batch cannot be told apart where weights read an activation",
                fix="pass batches of one example, or use a criterion on weights such as 'l2'",
            )
        for dim, index in dims:
            scale = self.gates[:, index.units].to(value.dtype)  # (N, length)
            if layout is None or self.examples == 1:
                shape = [value.shape[dim] if axis == dim else 1 for axis in range(value.dim())]
                value = value * scale.view(shape)
                continue
            at = layout.dim
            parts = layout.parts(value.shape[at], self.examples)
            split = value.unflatten(at, parts)
            across = dim + 2 if dim > at else dim
            if across < at + 1:
                scale = scale.T
            shape = [1] * split.dim()
            shape[at + 1], shape[across] = self.examples, value.shape[dim]
            value = (split * scale.reshape(shape)).flatten(at, at + 2)
        return value


@register
class Hessian(_Curvature):
    """The second derivative of the loss in a gate on the unit: ``1/2 mean over examples of d2C/dg2``.

    A gate is a factor of 1 on all that is read of a unit in one example. Where the gradient of the loss in
    the gate vanishes, this is what removing the unit costs, to second order. Each example has gates and
    random signs ``v`` of its own, and the mean over examples of ``v * Hv`` is Hutchinson's estimate of the
    diagonal. It may be negative. It costs two backward passes and the memory of both.

    Args:
        probes: Sign vectors for each example.
        seed: What they follow from, with the batch.

    References:
        Molchanov et al., https://arxiv.org/abs/1611.06440, compare with Optimal Brain Damage on activations;
        Hutchinson's estimator is ours
    """

    name = "hessian"

    def begin_batch(self, batch: Batch) -> None:
        """Add the estimates of a batch."""
        scaled = _Scaled(self._graph, self._device, batch)
        (found,) = _products(batch, [scaled.gates], self._probes, self.chance(batch), scaled)
        self._total += found.sum(0)[:-1].double()
