"""The surgery: all groups at once, every tensor sliced once, all or nothing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor, nn

from secateurs.errors import ApplyError
from secateurs.graph.attributes import restate_sizes
from secateurs.graph.copying import copy_model, registered_tensors, tensors_of
from secateurs.graph.exchange import fold_where_possible, write_out
from secateurs.graph.groups import fingerprint_of
from secateurs.graph.inference import outside_inference_mode
from secateurs.graph.origins import set_integer
from secateurs.graph.rewriting import write_sizes
from secateurs.planning.parts import AxisCut, RowScale
from secateurs.planning.plan import Plan


@outside_inference_mode
def apply(model: nn.Module, plan: Plan, *, inplace: bool = False) -> nn.Module:
    """The smaller model.

    Every parameter and buffer that the plan names is sliced once; the others are copied. Rows that make up
    for a scale which is derived from a length are multiplied in the same pass. Nothing is masked: the result
    is an ordinary model of the same class. A ``torch.nn.MultiheadAttention`` whose heads and
    stream no longer fit together becomes a `secateurs.attention.MultiheadAttention` with the same parameters.
    A module in whose code a size stood that no longer holds (`Plan.written`) gets a class derived from its
    own, of the same name, in which that size is an attribute.

    Args:
        model: A model of the architecture that the plan was made for.
        plan: What leaves.
        inplace: Cut the given model itself. Its parameters stay the same objects with smaller data, and their
            gradients are dropped; an optimizer's state (momentum) no longer fits them.

    Returns:
        A new model in the same mode and on the same devices, or the given one if `inplace`.

    Raises:
        ApplyError: The plan was made for another architecture, or for other code of a module in which sizes
            stand. The model is then unchanged.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> import secateurs
        >>> net = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2))
        >>> graph = secateurs.trace(net, torch.zeros(1, 4))
        >>> small = secateurs.apply(net, secateurs.Plan.of(graph, {"0": [0, 3]}))
        >>> small
        Sequential(
          (0): Linear(in_features=4, out_features=4, bias=True)
          (1): ReLU()
          (2): Linear(in_features=4, out_features=2, bias=True)
        )
    """
    tensors = tensors_of(model)
    check_fits(model, plan)
    small = _slices(tensors, plan)
    result = model if inplace else copy_model(model, small, held=tensors)
    write_sizes(result, plan.written)
    if inplace:
        for name, tensor in small.items():
            tensors[name].data = tensor
            tensors[name].grad = None
    heads = {layer: layer.num_heads for layer in write_out(result)}
    for change in plan.integers:
        set_integer(result, change.module, change.attribute, change.position, change.after)
    restate_sizes(result)
    fold_where_possible(result, heads)
    return result


def cut_alike(tensors: Mapping[str, Tensor], plan: Plan) -> dict[str, Tensor]:
    """Tensors that are laid out as parameters are, such as momentum, without the entries that leave.

    Args:
        tensors: By the name of the parameter; none is changed.
        plan: What leaves. What it rescales is not rescaled here.

    Returns:
        The same names; what the plan does not cut is the tensor given.
    """
    axes = tuple(axis for axis in plan.axes if axis.parameter in tensors)
    return {**tensors, **_slices(dict(tensors), replace(plan, axes=axes, rescaled=()))}


def check_fits(model: nn.Module, plan: Plan) -> None:
    """Refuse a plan for another architecture.

    Raises:
        ApplyError: Names or shapes differ from those that the plan was made for.
    """
    found = fingerprint_of(model)
    if found == plan.fingerprint:
        return
    tensors = registered_tensors(model)
    for axis in plan.axes:
        tensor = tensors.get(axis.parameter)
        if tensor is None:
            raise ApplyError(
                f"the plan cuts {axis.parameter!r}, which this model does not have",
                fix="build the architecture that the plan was made for",
            )
        if tensor.dim() <= axis.dim or tensor.shape[axis.dim] != axis.size:
            raise ApplyError(
                f"the plan cuts dimension {axis.dim} of {axis.parameter!r} from length {axis.size}, "
                f"but its shape here is {tuple(tensor.shape)}",
                fix="apply each plan once, to the model that it was made for",
            )
    raise ApplyError(
        f"the plan was made for a model with fingerprint {plan.fingerprint}, this one has {found}",
        fix="build the architecture that the plan was made for",
    )


def axes_present(tensors: Mapping[str, Tensor], axes: Sequence[AxisCut]) -> list[AxisCut]:
    """The axes of a plan that fits, without those of constants that this model has not made yet.

    Such a table is made by `forward` when it is first called, in the size that is asked for then.
    """
    return [
        axis
        for axis in axes
        if (tensor := tensors.get(axis.parameter)) is not None
        and axis.dim < tensor.dim()
        and tensor.shape[axis.dim] == axis.size
    ]


def _slices(tensors: dict[str, Tensor], plan: Plan) -> dict[str, Tensor]:
    kept: dict[str, list[tuple[int, Tensor]]] = {}
    known: dict[tuple[int, int], Tensor] = {}  # dimensions that are cut alike may hold the same tuple
    for axis in axes_present(tensors, plan.axes):
        key = (axis.size, id(axis.removed))
        if key not in known:
            places = np.delete(np.arange(axis.size), np.asarray(axis.removed, np.int64))
            known[key] = torch.from_numpy(places)
        kept.setdefault(axis.parameter, []).append((axis.dim, known[key]))
    scaled = rescaled(tensors, plan.rescaled)
    return {
        name: _take(scaled.get(name, tensors[name].detach()), kept.get(name, []))
        for name in {**kept, **scaled}
    }


def rescaled(tensors: Mapping[str, Tensor], scales: Sequence[RowScale]) -> dict[str, Tensor]:
    """Tensors of which some rows are multiplied, at their full size; products are rounded to their dtype."""
    found: dict[str, Tensor] = {}
    for each in scales:
        tensor = found.get(each.parameter, tensors[each.parameter].detach())
        rows = torch.tensor(each.indices, device=tensor.device)
        wide = torch.promote_types(tensor.dtype, torch.float32)
        grown = (tensor.index_select(each.dim, rows).to(wide) * each.factor).to(tensor.dtype)
        found[each.parameter] = tensor.index_copy(each.dim, rows, grown)
    return found


def _take(tensor: Tensor, cuts: list[tuple[int, Tensor]]) -> Tensor:
    dense = tensor.dim() == 4 and not tensor.is_contiguous()
    last = dense and tensor.is_contiguous(memory_format=torch.channels_last)
    layout = torch.channels_last if last else torch.contiguous_format
    for dim, places in sorted(cuts, key=lambda cut: len(cut[1]) / tensor.shape[cut[0]]):
        tensor = tensor.index_select(dim, places.to(tensor.device))
    return tensor.contiguous(memory_format=layout)
