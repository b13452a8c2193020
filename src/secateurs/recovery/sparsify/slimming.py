"""Network slimming: an L1 penalty on the scales of batch norms."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from secateurs.errors import TrainingError
from secateurs.graph.groups import Graph
from secateurs.recovery.sparsify.base import Sparsifier, add_gradient, check_positive


class Slimming(Sparsifier):
    """Pulls the scales of batch norms to zero: ``loss + strength * sum |gamma|``.

    The subgradient ``strength * sign(gamma)`` is added to the gradient of each scale that belongs to a unit
    which may leave. Rank by ``bn-scale`` afterwards, all layers in one list: that is the paper's one global
    threshold, with the difference that a group always keeps one unit, so that no layer is lost.

    Args:
        graph: The graph of the model that is trained.
        strength: The paper's lambda: 1e-4 for its VGG, 1e-5 for its ResNet and DenseNet, over 160 epochs.
        initial_scale: What the scales are set to before training, as the paper does with 0.5 when it trains
            from scratch; a trained model keeps its own with ``None``.
        kinds: Kinds of groups to act on; see :func:`secateurs.plan`.
        skip: Glob patterns of groups to leave alone.

    Raises:
        TrainingError: A number is out of range; at the start of training: no unit has a batch norm's scale.

    Example:
        >>> import secateurs
        >>> from secateurs.recovery import Recipe, finetune
        >>> _ = torch.manual_seed(0)
        >>> net = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 2))
        >>> method = Slimming(secateurs.trace(net, torch.zeros(2, 4)), strength=0.1)
        >>> batch = (torch.randn(16, 4), torch.arange(16) % 2)
        >>> _ = finetune(net, [batch], recipe=Recipe(epochs=30, lr=0.1), regularizer=method)
        >>> bool(net[1].weight.abs().mean() < 0.5)
        True

    References:
        Liu et al., Learning Efficient Convolutional Networks through Network Slimming,
        https://arxiv.org/abs/1708.06519. It penalises every batch norm; we leave those alone that no cut can
        make smaller.
    """

    name: ClassVar[str] = "slimming"
    criterion: ClassVar[str] = "bn-scale"

    def __init__(
        self,
        graph: Graph,
        *,
        strength: float = 1e-4,
        initial_scale: float | None = None,
        kinds: Collection[str] | None = None,
        skip: Sequence[str] = (),
    ) -> None:
        super().__init__(graph, kinds=kinds, skip=skip)
        check_positive("strength", strength)
        if initial_scale is not None:
            check_positive("initial_scale", initial_scale)
        self.strength, self.initial_scale = strength, initial_scale

    def start(self, model: nn.Module) -> None:
        """Set the scales, if asked to."""
        super().start(model)
        scales = self._scales(model)
        if not scales:
            raise TrainingError(
                f"slimming needs scales of batch norms that are trained, and no unit of this "
                f"{type(model).__name__} has one",
                fix="use group-lasso, or model.requires_grad_(True) if the norms are frozen",
            )
        if self.initial_scale is not None:
            for weight, places in scales:
                weight.detach()[places] = self.initial_scale

    def after_backward(self, model: nn.Module, epochs_done: float) -> None:
        """``strength * sign(gamma)``."""
        for weight, places in self._scales(model):
            extra = torch.zeros_like(weight)
            extra[places] = self.strength * weight.detach()[places].sign()
            add_gradient(weight, extra)

    def facts(self, model: nn.Module) -> Mapping[str, Any]:
        """The value of the penalty."""
        total = sum(weight.detach()[places].abs().sum().item() for weight, places in self._scales(model))
        return {"penalty": self.strength * total}

    def _scales(self, model: nn.Module) -> list[tuple[nn.Parameter, Tensor]]:
        """The scales of batch norms that units of the groups have, each once, and which of their entries."""
        norms = {
            f"{name}.weight": module.weight
            for name, module in model.named_modules()
            if isinstance(module, _BatchNorm) and module.affine and module.weight.requires_grad
        }
        found: dict[str, list[Tensor]] = {}
        for group in self.groups:
            for part in group.slices:
                if part.parameter in norms:
                    places = torch.from_numpy(part.indices.reshape(-1))
                    found.setdefault(part.parameter, []).append(places)
        return [
            (norms[name], torch.cat(places).unique().to(norms[name].device)) for name, places in found.items()
        ]
