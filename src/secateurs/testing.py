"""The conformance kit: is an operator's rule right, is a model cut right?

`check_rule` puts an operator between a producer and a consumer, cuts each group of units at several places
and proves every cut; `check_model` does the same with a model as it is. Both raise `AssertionError`, which
says what is wrong, so that they work with any test runner.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from secateurs.errors import ApplyError, VerifyError
from secateurs.graph import Graph, Group, Inputs, trace
from secateurs.graph.copying import tensors_of
from secateurs.planning import Plan
from secateurs.surgery import apply, verify

__all__ = ["Between", "Sandwich", "check_model", "check_rule", "cuts", "fitting"]

Between: TypeAlias = nn.Module | Callable[[Tensor], Tensor]
_LAYERS: dict[int, type[nn.Linear] | type[nn.Conv1d] | type[nn.Conv2d] | type[nn.Conv3d]]
_LAYERS = {2: nn.Linear, 3: nn.Conv1d, 4: nn.Conv2d, 5: nn.Conv3d}
_READERS = 5


class Sandwich(nn.Module):
    """A producer, an operator, and a consumer that reads along dimension 1 all that comes out.

    Args:
        between: The operator: a module, or a function of one tensor.
        example: Input of the producer, ``(batch, features, *positions)`` with up to three positions.
        filters: Units that the producer makes, which is dimension 1 of what the operator gets.
    """

    def __init__(self, between: Between, example: Tensor, filters: int = 12) -> None:
        super().__init__()
        self.make = _layer(example.shape, filters)
        self.between = between
        with torch.no_grad():
            self.read = _layer(self.inside(example).shape, _READERS)

    def inside(self, x: Tensor) -> Tensor:
        """What the operator gives, before it is read."""
        result: Tensor = self.between(self.make(x))
        return result

    def forward(self, x: Tensor) -> Tensor:
        """What the consumer reads out of it."""
        result: Tensor = self.read(self.inside(x))
        return result


def _layer(shape: Sequence[int], filters: int) -> nn.Module:
    if len(shape) not in _LAYERS:
        raise ValueError(f"a tensor of 2 to 5 dimensions is needed, got shape {tuple(shape)}")
    kernel = () if len(shape) == 2 else (1,)
    return _LAYERS[len(shape)](shape[1], filters, *kernel)


def check_rule(
    between: Between, example: Tensor, *, filters: int = 12, exact: bool = True, seed: int = 3
) -> Graph:
    """Prove that the rules of an operator are right, by cutting a network that consists of little else.

    A layer with ``filters`` units makes what the operator gets, another reads along dimension 1 all that it
    gives. Every operator must have a rule, the producer's units must be free to leave, and `check_model` must
    hold. Then each unit is nudged by itself: no input of the consumer may move but those that the graph says
    go with the unit.

    Args:
        between: The operator: a module, or a function of one tensor, ``(batch, filters, *positions)``.
        example: Input of the producer, ``(batch, features, *positions)`` with up to three positions.
        filters: Units of the producer; a number with many divisors tries more.
        exact: Whether the operator keeps units apart. One that computes across them, as a softmax over
            channels does, must say so (`Tracer.mix`); its cuts are compared with the operator on the kept
            units alone, and no unit is nudged.
        seed: Seed of all weights; the global generator is left as it was.

    Returns:
        The graph, for further checks.

    Raises:
        AssertionError: The rule is missing, failed, locks its units, or is wrong.

    Example:
        >>> import torch, secateurs
        >>> @torch.library.custom_op("doc::halve", mutates_args=())
        ... def halve(x: torch.Tensor) -> torch.Tensor:
        ...     return x / 2
        >>> register = halve.register_fake(torch.empty_like)
        >>> @secateurs.rule(torch.ops.doc.halve)
        ... def halve_rule(tracer, args, kwargs, out):
        ...     tracer.set(out, tracer.dims(args[0]))
        >>> check_rule(halve, torch.randn(2, 3, 8, 8)).groups
        (Group('make', channel, 12 units, 3 slices),)
    """
    with _seeded(seed):
        model = Sandwich(between, example, filters).eval()
        _spread_statistics(model)
        graph = trace(model, example)
        _understood(graph)
        if not any(part.parameter == "make.weight" for group in graph.groups for part in group.slices):
            reasons = sorted({lock.reason for lock in graph.locked if lock.name == "make" and lock.dim == 0})
            raise AssertionError(f"none of the {filters} units can be cut: {'; '.join(reasons)}")
        if exact and graph.mixers:
            raise AssertionError(
                f"the operator was said to keep units apart, but its rule mixes: {graph.mixers}"
            )
        if not exact and not graph.mixers:
            raise AssertionError(
                "the operator was said to compute across units, but its rule does not say so"
            )
        check_model(model, example, graph=graph)
        if exact:
            _check_by_nudging(model, example, graph)
    return graph


def check_model(model: nn.Module, inputs: Inputs, *, graph: Graph | None = None) -> Graph:
    """Prove that a model is cut right: every group by itself at several places, then all at once.

    An empty plan must be the identity. Each cut must give the shapes and the number of parameters that its
    plan foretells, run, and compute what the model does without the removed units.

    Args:
        model: The model; it is left as it was.
        inputs: Example inputs with real values: a tensor, a sequence or a mapping.
        graph: Its graph, if it was traced already.

    Returns:
        The graph, for further checks.

    Raises:
        AssertionError: A cut is wrong.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> net = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2))
        >>> check_model(net, torch.randn(3, 4)).groups
        (Group('0', neuron, 6 units, 3 slices),)
    """
    graph = graph or trace(model, inputs)
    _empty_plan_is_identity(model, inputs, graph)
    for removed in cuts(graph):
        _check_cut(model, inputs, graph, removed)
    return graph


def cuts(graph: Graph) -> list[dict[str, list[int]]]:
    """What `check_model` removes: half of each group, odd places of each group, and much of all at once.

    Args:
        graph: The graph of a model.

    Returns:
        Indices of units by group name, one mapping a cut; none where nothing can be cut. Where counts are
        tied, each is the cut next to the one named that fits.
    """
    wanted: list[dict[str, list[int]]] = []
    for group in graph.groups:
        odd = [place for place in (0, 5) if place < group.size][: group.size - 1]
        wanted += [{group.name: list(range(group.size // 2))}, {group.name: odd}]
    if graph.groups:
        wanted.append({group.name: list(range(1, group.size, 2)) for group in graph.groups})
    return [fitting(graph, removed) for removed in wanted]


def fitting(graph: Graph, removed: Mapping[str, Sequence[int]]) -> dict[str, list[int]]:
    """A cut that is possible, next to one that may not be: counts that the model's code ties agree.

    Args:
        graph: The graph of a model.
        removed: Indices of units by group name.

    Returns:
        The same, with units added or left out of groups whose counts are tied.

    Example:
        >>> from torch import nn
        >>> graph = trace(nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 2)), torch.zeros(1, 4))
        >>> fitting(graph, {"0": [1, 3]})
        {'0': [1, 3]}
    """
    kept = [group.size - len(removed.get(group.name, ())) for group in graph.groups]
    counts = graph.counts.settle(kept, [True] * len(kept), [1] * len(kept), lower=True)
    found = {}
    for group, count in zip(graph.groups, counts, strict=True):
        first = list(removed.get(group.name, ()))
        order = first + [place for place in range(group.size) if place not in set(first)]
        if count < group.size:
            found[group.name] = sorted(order[: group.size - count])
    return found


def _understood(graph: Graph) -> None:
    for operator, where in graph.unknown.items():
        failed = [lock.reason for lock in graph.locked if operator in lock.reason]
        raise AssertionError(f"{failed[0] if failed else f'{operator} has no rule'} (at {where})")


def _empty_plan_is_identity(model: nn.Module, inputs: Inputs, graph: Graph) -> None:
    same = apply(model, Plan.of(graph, {}))
    old, new = tensors_of(model), tensors_of(same)
    changed = [name for name in old if not torch.equal(old[name], new[name])]
    if changed:
        raise AssertionError(f"a plan that removes nothing changed {changed[0]}")


def _check_cut(model: nn.Module, inputs: Inputs, graph: Graph, removed: dict[str, list[int]]) -> None:
    plan = Plan.of(graph, removed)
    try:
        small = apply(model, plan)
        report = verify(model, small, plan, inputs)
    except (ApplyError, VerifyError) as error:
        raise AssertionError(f"removing {removed} failed: {error}") from error
    if not report.ok:
        raise AssertionError(f"removing {removed}: {report}")
    _check_forecast(model, small, plan, removed)


def _check_forecast(model: nn.Module, small: nn.Module, plan: Plan, removed: dict[str, list[int]]) -> None:
    shapes = {name: list(tensor.shape) for name, tensor in tensors_of(model).items()}
    for axis in plan.axes:
        shapes[axis.parameter][axis.dim] -= len(axis.removed)
    for name, tensor in tensors_of(small).items():
        if list(tensor.shape) != shapes[name]:
            raise AssertionError(
                f"removing {removed}: {name} has shape {list(tensor.shape)}, not {shapes[name]}"
            )
    count = sum(parameter.numel() for parameter in small.parameters())
    if count != plan.after.params:
        raise AssertionError(f"removing {removed}: {count} parameters, but the plan says {plan.after.params}")
    held = sum({id(tensor): tensor.nbytes for tensor in small.state_dict(keep_vars=True).values()}.values())
    if held != plan.after.bytes:
        raise AssertionError(f"removing {removed}: {held} bytes, but the plan says {plan.after.bytes}")


def _check_by_nudging(model: Sandwich, example: Tensor, graph: Graph) -> None:
    """A second way to find what goes with a unit: move its filters, see what moves before the reader."""
    keeps = not isinstance(model.between, nn.Module) or not any(True for _ in model.between.parameters())
    with torch.no_grad():
        for group in graph.groups:
            if group.first in graph.bare_units:  # units are multiplied with each other, so that all move all
                continue
            columns = _indices(group, "read.weight", 1)
            for unit, filters in enumerate(_indices(group, "make.weight", 0)):
                allowed = np.zeros(graph.parameters["read.weight"][1], np.bool_)
                if len(columns):
                    allowed[columns[unit]] = True
                elif not keeps:  # the operator's own weights read the units, so that all may move
                    continue
                stray = _moved(model, example, filters) & ~allowed
                if stray.any():
                    raise AssertionError(
                        f"unit {unit} of {group.name!r} moves inputs {np.flatnonzero(stray).tolist()} of the "
                        f"consumer, which the graph does not count to it"
                    )


def _indices(group: Group, parameter: str, dim: int) -> list[list[int]]:
    found = [part.indices for part in group.slices if part.parameter == parameter and part.dim == dim]
    return found[0].tolist() if found else []


def _moved(model: Sandwich, example: Tensor, filters: Sequence[int]) -> npt.NDArray[np.bool_]:
    bias: Tensor = model.make.get_parameter("bias")
    before, kept = model.inside(example), bias.clone()
    bias[filters] += 0.37
    difference = (model.inside(example) - before).abs()
    bias.copy_(kept)
    moved: npt.NDArray[np.bool_] = (difference.transpose(0, 1).flatten(1).amax(1) > 1e-9).numpy()
    return moved


def _spread_statistics(model: nn.Module) -> None:
    """Running statistics as if trained: while they are 0 and 1, a mix-up of channels would not show."""
    for module in model.modules():
        buffers = dict(module.named_buffers(recurse=False))
        if buffers.get("running_mean") is not None and buffers.get("running_var") is not None:
            buffers["running_mean"].normal_()
            buffers["running_var"].uniform_(0.5, 2)


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield
