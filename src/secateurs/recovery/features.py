"""Distillation inside the network: what each layer behind a cut gives, against what it gave before."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torch.utils.hooks import RemovableHandle

from secateurs.errors import TrainingError
from secateurs.planning.plan import Plan


def boundaries(teacher: nn.Module, plan: Plan) -> dict[str, Tensor]:
    """The layers that read a cut group, each with the units of its outputs that both networks have.

    There the group ends: a linear layer or convolution sums over its units, so that what was lost can be
    told, and made good, in its outputs.

    Args:
        teacher: The network before the cut.
        plan: The cut.

    Returns:
        For the name of a layer the indices of its outputs that are kept; none for layers with rescaled rows.

    Example:
        >>> import secateurs
        >>> net = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
        >>> cut = {"0": [1], "2": [0, 3]}
        >>> places = boundaries(net, secateurs.Plan.of(secateurs.trace(net, torch.zeros(1, 3)), cut))
        >>> {name: kept.tolist() for name, kept in places.items()}
        {'2': [1, 2], '4': [0, 1]}
    """
    gone = {(axis.parameter, axis.dim): axis.removed for axis in plan.axes}
    rescaled = {each.parameter for each in plan.rescaled}
    found = {}
    for name, module in teacher.named_modules():
        plain = isinstance(module, (nn.Linear, _ConvNd)) and not isinstance(module, _ConvTransposeNd)
        if not plain or (f"{name}.weight", 1) not in gone or f"{name}.weight" in rescaled:
            continue
        kept = torch.ones(len(module.weight), dtype=torch.bool)
        kept[list(gone.get((f"{name}.weight", 0), ()))] = False
        found[name] = kept.nonzero().flatten()
    return found


class Features:
    """Reads the outputs of the same layers in two networks.

    Args:
        teacher: The network before the cut.
        model: The network after it.
        plan: The cut.

    Raises:
        TrainingError: No layer that reads a cut group is understood.
    """

    def __init__(self, teacher: nn.Module, model: nn.Module, plan: Plan) -> None:
        self._kept = boundaries(teacher, plan)
        if not self._kept:
            raise TrainingError(
                "no linear layer or convolution reads what this plan cuts: there are no features to compare",
                fix="Recipe(distill_features=0)",
            )
        self._dims = {
            name: -1 if isinstance(teacher.get_submodule(name), nn.Linear) else 1 for name in self._kept
        }
        self._taught: dict[str, list[Tensor]] = {}
        self._said: dict[str, list[Tensor]] = {}
        self._handles: list[RemovableHandle] = []
        for network, outputs in ((teacher, self._taught), (model, self._said)):
            for name in self._kept:
                layer = network.get_submodule(name)
                self._handles.append(layer.register_forward_hook(_keeper(name, outputs)))

    def difference(self) -> Tensor:
        """The squared difference as a share of the teacher's square, the mean over all layers."""
        shares = []
        for name, kept in self._kept.items():
            for told, said in zip(self._taught.get(name, ()), self._said.get(name, ()), strict=True):
                target = told.float().index_select(self._dims[name], kept.to(told.device))
                shares.append(
                    (said.float() - target).square().mean() / target.square().mean().clamp_min(1e-12)
                )
        self.forget()
        return torch.stack(shares).mean()

    def forget(self) -> None:
        """Drop what was read: a pass without a lesson."""
        self._taught.clear()
        self._said.clear()

    def close(self) -> None:
        """Stop reading."""
        self.forget()
        for handle in self._handles:
            handle.remove()


def _keeper(name: str, outputs: dict[str, list[Tensor]]) -> Callable[..., None]:
    def hook(_: nn.Module, inputs: Any, output: Tensor) -> None:
        outputs.setdefault(name, []).append(output)

    return hook
