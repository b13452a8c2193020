"""What an optimizer has learned about the weights, carried through a cut."""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Mapping
from typing import TypeVar

from torch import Tensor, nn, optim

from secateurs.errors import TrainingError
from secateurs.planning.plan import Plan
from secateurs.surgery.apply import cut_alike

_Optimizer = TypeVar("_Optimizer", bound=optim.Optimizer)


def carry_optimizer(optimizer: _Optimizer, model: nn.Module, smaller: nn.Module, plan: Plan) -> _Optimizer:
    """An optimizer for the smaller model that goes on where the given one was.

    Momentum and other running averages of a weight are cut as the weight itself was, so that what is kept is
    trained on as if the rest had never been there. Settings of parameter groups stay.

    Args:
        optimizer: The optimizer of ``model``; it is not changed.
        model: The model before the cut, or ``smaller`` itself after ``apply(..., inplace=True)``.
        smaller: What :func:`~secateurs.apply` gave.
        plan: The cut.

    Returns:
        An optimizer of the same class.

    Raises:
        TrainingError: A parameter of the optimizer is none of the model's, or it keeps something of another
            shape than its parameter's, such as a factored average.

    Example:
        >>> import secateurs, torch
        >>> net = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
        >>> optimizer = optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
        >>> net(torch.ones(1, 3)).sum().backward()
        >>> optimizer.step()
        >>> cut = secateurs.Plan.of(secateurs.trace(net, torch.zeros(1, 3)), {"0": [1, 2]})
        >>> small = secateurs.apply(net, cut)
        >>> carried = carry_optimizer(optimizer, net, small, cut)
        >>> carried.state[small[0].weight]["momentum_buffer"].shape
        torch.Size([2, 3])
    """
    names = {parameter: name for name, parameter in model.named_parameters()}
    parameters = dict(smaller.named_parameters())
    carried = copy.copy(optimizer)
    carried.state, carried.param_groups = defaultdict(dict), []
    for group in optimizer.param_groups:
        for old in group["params"]:
            if old not in names:
                raise TrainingError(
                    f"the optimizer has a parameter of shape {tuple(old.shape)} that is none of the model's",
                    fix="pass the model that the optimizer was made for",
                )
        params = [parameters[names[old]] for old in group["params"]]
        carried.param_groups.append({**group, "params": params})
        for old, new in zip(group["params"], params, strict=True):
            if old in optimizer.state:
                carried.state[new] = cut_entries(names[old], optimizer.state[old], new, plan)
    return carried


def cut_entries(name: str, entries: Mapping[str, object], parameter: Tensor, plan: Plan) -> dict[str, object]:
    """What an optimizer keeps of one parameter, without what left.

    Args:
        name: The parameter.
        entries: The optimizer's state of it.
        parameter: The parameter after the cut.
        plan: The cut.

    Raises:
        TrainingError: An entry has another shape than the parameter had.
    """
    before = list(parameter.shape)
    for axis in plan.axes:
        if axis.parameter == name:
            before[axis.dim] = axis.size
    cut: dict[str, object] = {}
    for key, value in entries.items():
        if isinstance(value, Tensor) and value.dim():  # a count of steps has no dimension
            if list(value.shape) != before:
                raise TrainingError(
                    f"{key!r} of {name!r} has shape {tuple(value.shape)}, and cannot be cut as the parameter "
                    f"of shape {tuple(before)} was",
                    fix="start a new optimizer after the cut",
                )
            value = cut_alike({name: value}, plan)[name]
        cut[key] = value.clone() if isinstance(value, Tensor) else copy.deepcopy(value)
    return cut
