"""What can be cut out of a model: labels, operator rules, groups, cost and the dry run."""

from __future__ import annotations

import gc
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from secateurs.collectives import import_collectives
from secateurs.errors import TraceError
from secateurs.graph.attributes_kept import remember
from secateurs.graph.building import GroupBuilder
from secateurs.graph.copying import saved_widths, tensors_of
from secateurs.graph.cost import Cost
from secateurs.graph.dry_run import prove, shapes_of
from secateurs.graph.groups import Graph, Group, Locked, Slice, fingerprint_of
from secateurs.graph.inference import outside_inference_mode
from secateurs.graph.rules import find_call_rule, find_rule, rule
from secateurs.graph.running import Inputs, device_of, empty_copy, in_evaluation, recorded_values
from secateurs.graph.tracing import Tracer
from secateurs.graph.values import UnknownValueError

__all__ = ["Cost", "Graph", "Group", "Inputs", "Locked", "Slice", "Tracer", "find_rule", "rule", "trace"]

import_collectives()  # before anything of torch's needs its compiler


@outside_inference_mode
def trace(model: nn.Module, inputs: Inputs) -> Graph:
    """The groups of units that can be cut out of a model, with all that must go with each.

    The model's own ``forward`` runs once on tensors without data, and every operator says what it does to
    the labels of its arguments; then a dry run proves that the model can follow the cuts. No weight is
    read, no activation allocated, and the model is left as it was. Only where `forward` asks for a value
    that depends on the weights (which expert, how many boxes) is the model run once on the real example.

    Args:
        model: Any module, in any mode; it is traced as it evaluates. What only training uses, such as an
            auxiliary head, is traced beside it.
        inputs: Example inputs: a tensor, a sequence of positional arguments or a mapping of keyword
            arguments. Only shapes and dtypes matter, unless `forward` reads values. The cost is stated per
            sample of the first dimension.

    Returns:
        The graph: groups, locked dimensions with reasons, and the cost of any cut.

    Raises:
        TraceError: The model could not be run on these inputs, or is of a kind that cannot be cut:
            TorchScript, an exported program, or one that registers no parameters.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 2))
        >>> trace(net, torch.zeros(1, 3, 8, 8)).groups
        (Group('0', channel, 8 units, 3 slices),)
    """
    _check_traceable(model)
    with _without_collections():
        try:
            tracer = _traced(model, inputs)
        except Exception as error:
            raise TraceError(
                f"{type(model).__name__} could not be run on the example inputs: "
                f"{type(error).__name__}: {error}",
                fix="check that model(inputs) runs",
            ) from error
        shapes = shapes_of(tensors_of(model))
        builder = GroupBuilder(tracer, shapes, saved_widths(model), batch_size(inputs), fingerprint_of(model))
        graph = prove(model, inputs, builder, tracer.passes)
    remember(model)
    return graph


def _check_traceable(model: nn.Module) -> None:
    """Refuse models that no trace can follow."""
    kind = type(model).__name__
    if isinstance(model, torch.jit.ScriptModule):
        raise TraceError(
            f"{kind} is a TorchScript module, whose code and sizes are fixed",
            fix="pass the module that it was scripted or traced from, and script the result again",
        )
    if _is_exported(model):
        raise TraceError(
            "an exported program has fixed sizes",
            fix="pass the module that was exported, and export the result",
        )
    if not tensors_of(model):
        raise TraceError(
            f"{kind} registers no parameters, so nothing can be cut",
            fix="hold layers in nn.ModuleList, and tensors as nn.Parameter, not in plain lists",
        )


def _is_exported(model: nn.Module) -> bool:
    """Whether a module is what ``torch.export`` gives; those cannot be put in evaluation mode."""
    return isinstance(model, torch.fx.GraphModule) and "eval" in model.__dict__


def _traced(model: nn.Module, inputs: Inputs) -> Tracer:
    """A finished trace, begun again where more has to be known.

    Where the code asks for values that depend on weights, the model is run on them; where something derives a
    scale from a length, the rows of parameters are followed.
    """
    values: list[tuple[Any, Any]] | None = None
    follow_rows = False
    while True:
        tracer = Tracer(
            find_rule, find_call_rule, values=values, follow_rows=follow_rows, device=device_of(model)
        )
        try:
            tracer.trace(in_evaluation(empty_copy(model)), inputs)
        except UnknownValueError:
            if values is not None:
                raise
            values = recorded_values(model, inputs)
            continue
        except Exception:
            if not tracer.needs_rows:
                raise
        if not tracer.needs_rows:
            return tracer
        follow_rows = True


@contextmanager
def _without_collections() -> Iterator[None]:
    """No garbage collection meanwhile: walking the heap of a program with torch takes longer than a trace."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def batch_size(inputs: Inputs) -> int:
    """Samples in a set of example inputs: the first dimension of the first tensor, 1 where there is none."""
    values = list(inputs.values()) if isinstance(inputs, Mapping) else inputs
    first = next((leaf for leaf in tree_leaves(values) if isinstance(leaf, Tensor)), None)
    return int(first.shape[0]) if first is not None and first.dim() > 1 and first.shape[0] > 0 else 1
