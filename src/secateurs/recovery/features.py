"""Distillation inside the network: what each layer behind a cut gives, against what it gave before."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torch.utils.hooks import RemovableHandle

from secateurs.errors import TrainingError
from secateurs.planning.plan import Plan
from secateurs.recovery.surroundings import is_batch_norm


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
    """Reads what the same layers give in two networks: behind the batch norm that reads a layer, if one does.

    There a repair leaves the values as they were; in front of it they have another scale in each network.

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
            for module in network.modules():
                if is_batch_norm(module):
                    self._handles.append(module.register_forward_hook(_follower(outputs)))

    def difference(self) -> Tensor:
        """The squared difference as a share of the teacher's square, the mean over all layers."""
        shares: list[Tensor] = []
        for name, kept in self._kept.items():
            for told, said in zip(self._taught.get(name, ()), self._said.get(name, ()), strict=True):
                dim = self._dims[name]
                is_whole = len(kept) == told.shape[dim]
                target = told if is_whole else told.index_select(dim, kept.to(told.device))
                shares.append(_Share.apply(said, target))
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


class _Share(torch.autograd.Function):
    """``|said - target|^2 / |target|^2`` in few passes over memory; no gradient of the target."""

    @staticmethod
    def forward(ctx: Any, said: Tensor, target: Tensor) -> Tensor:
        wide = torch.promote_types(said.dtype, torch.float32)
        apart = said.to(wide) - target.to(wide)
        whole = _square(target.to(wide)).clamp_min(1e-12 * target.numel())
        ctx.save_for_backward(apart, whole)
        ctx.dtype = said.dtype
        return _square(apart) / whole

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        apart, whole = ctx.saved_tensors
        return (apart * (2 * gradient / whole)).to(ctx.dtype), None


def _square(values: Tensor) -> Tensor:
    """The sum of squares."""
    length: Tensor = torch.linalg.vector_norm(values)
    return length.square()


def _follower(outputs: dict[str, list[Tensor]]) -> Callable[..., None]:
    """A hook of a batch norm: what it reads of a layer is replaced by what it gives."""

    def hook(_: nn.Module, inputs: Any, output: Any) -> None:
        for kept in outputs.values() if isinstance(output, Tensor) else ():
            if kept and inputs and kept[-1] is inputs[0]:
                kept[-1] = output

    return hook


def _keeper(name: str, outputs: dict[str, list[Tensor]]) -> Callable[..., None]:
    def hook(_: nn.Module, inputs: Any, output: Tensor) -> None:
        outputs.setdefault(name, []).append(output)

    return hook
