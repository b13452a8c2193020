"""Least-squares reconstruction: the weights that read what left are refitted, without training.

A layer read all of ``x`` and gave ``y = W x``. Of ``x`` a part ``k`` is kept, and a part ``r`` is removed.
The weights that give ``y`` best from ``k``, over the data, follow from the covariance ``C`` of ``x`` alone:

    W' = W_k + W_r C_rk (C_kk + ridge)^-1        b' = b + (W m - W' m_k)

with the mean ``m``. So one pass over the *unpruned* model serves all layers at once, and needs no labels.
Where a layer has no bias and a batch norm takes its output directly, the norm's running mean takes the
shift.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn.functional import pad
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils._pytree import tree_map_only

from secateurs.errors import TrainingError
from secateurs.graph.running import call_model, modes_kept
from secateurs.planning.plan import Plan

_WIDEST = 4608  # inputs of a layer, with their kernel: more need more memory and time than they are worth
_ROWS = 4096  # positions that are read of one layer in one batch
_Layer: TypeAlias = nn.Linear | nn.Conv2d


@dataclass(frozen=True, slots=True, kw_only=True)
class Refit:
    """What became of the layers that read units which left.

    Attributes:
        unexplained: For each refitted layer the share of its outputs' variance that the kept inputs
            do not give.
        left: Layers that stay as they were: of a kind, a width or a use that is not understood.
    """

    unexplained: dict[str, float]
    left: tuple[str, ...]


@torch.no_grad()
def reconstruct(
    model: nn.Module,
    smaller: nn.Module,
    plan: Plan,
    batches: Iterable[Any],
    *,
    ridge: float = 0.01,
    seed: int = 0,
) -> Refit:
    """Refit the layers of ``smaller`` that read units which left, in place, by least squares on ``batches``.

    Linear layers and two-dimensional convolutions without groups are refitted; everything else stays. Use
    images that were trained on, as they are, a few hundred of them.

    Args:
        model: The model before the cut; it is not changed.
        smaller: What :func:`secateurs.apply` made of it with ``plan``, not trained since.
        plan: The cut between the two.
        batches: Inputs for ``model``, or pairs of inputs and targets; the targets are not used.
        ridge: The pull towards the weights as they are, relative to the inputs' mean variance; positive.
        seed: Which positions of large maps are read.

    Returns:
        What was refitted, and how well.

    Raises:
        TrainingError: There is no batch, or the ridge is not positive.

    Example:
        >>> import secateurs
        >>> net = nn.Sequential(nn.Linear(3, 8), nn.Linear(8, 2))  # three inputs: eight units are too many
        >>> cut = secateurs.Plan.of(secateurs.trace(net, torch.zeros(1, 3)), {"0": [0, 2, 4, 6]})
        >>> small, inputs = secateurs.apply(net, cut), torch.randn(64, 3)
        >>> _ = reconstruct(net, small, cut, [inputs], ridge=1e-9)
        >>> bool((net(inputs) - small(inputs)).abs().max() < 1e-4)
        True
    """
    if not ridge > 0:
        raise TrainingError(f"`0 < ridge` must hold, got ridge={ridge}")
    cuts = {(axis.parameter, axis.dim): axis.removed for axis in plan.axes}
    names = [
        name
        for name, module in model.named_modules()
        if cuts.get((f"{name}.weight", 1)) and isinstance(module.weight, nn.Parameter)
    ]
    layers = _refittable(model, names)
    watch = _Watch(model, layers, seed)
    with modes_kept(model):
        model.eval()
        watch.read(batches)
    unexplained = {}
    for name in layers:
        if name in watch.moments:
            factors = _row_factors(plan, f"{name}.weight", len(layers[name].weight))
            unexplained[name] = _refit(name, watch, layers[name], smaller, cuts, factors, ridge)
    return Refit(unexplained=unexplained, left=tuple(name for name in names if name not in unexplained))


def _refittable(model: nn.Module, names: Iterable[str]) -> dict[str, _Layer]:
    """The layers that are understood; a weight that two modules share has no single best value."""
    uses: dict[int, int] = {}
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            uses[id(parameter)] = uses.get(id(parameter), 0) + 1
    found: dict[str, _Layer] = {}
    for name in names:
        layer = model.get_submodule(name)
        if not isinstance(layer, (nn.Linear, nn.Conv2d)) or type(layer) not in (nn.Linear, nn.Conv2d):
            continue  # a subclass may compute something else
        plain = isinstance(layer, nn.Linear) or (layer.groups == 1 and layer.padding_mode == "zeros")
        if plain and uses[id(layer.weight)] == 1 and layer.weight[0].numel() <= _WIDEST:
            found[name] = layer
    return found


class _Moments:
    """Count, sum and products of the inputs of a layer, one column for each of its weights."""

    def __init__(self, width: int) -> None:
        self.count = 0
        self.total = torch.zeros(width, dtype=torch.float64)
        self.products = torch.zeros(width, width, dtype=torch.float64)

    def add(self, rows: Tensor) -> None:
        """Take in ``(rows, width)`` inputs."""
        rows = rows.float()
        self.count += len(rows)
        self.total += rows.sum(0).double().cpu()
        self.products += (rows.T @ rows).double().cpu()

    def centred(self, shift: bool) -> tuple[Tensor, Tensor]:
        """Mean and covariance; zero and the plain second moment where nothing can take over a shift."""
        mean = self.total / self.count if shift else torch.zeros_like(self.total)
        return mean, self.products / self.count - mean[:, None] * mean


class _Watch:
    """Reads the inputs of layers during forward passes, and which batch norm follows which layer."""

    def __init__(self, model: nn.Module, layers: dict[str, _Layer], seed: int) -> None:
        self.model, self.layers = model, layers
        self.moments: dict[str, _Moments] = {}
        self.norms: dict[str, str] = {}
        self._outputs: dict[int, tuple[str, Tensor]] = {}  # the tensor is kept so that its id stays its own
        self._chance = torch.Generator().manual_seed(seed)

    def read(self, batches: Iterable[Any]) -> None:
        """Run the model over all batches."""
        device = next(self.model.parameters()).device
        handles = [layer.register_forward_hook(self._layer(name)) for name, layer in self.layers.items()]
        for name, module in self.model.named_modules():
            if isinstance(module, _BatchNorm) and module.track_running_stats:
                handles.append(module.register_forward_pre_hook(self._norm(name)))
        empty = True
        try:
            for batch in batches:
                inputs = batch[0] if isinstance(batch, (tuple, list)) and len(batch) == 2 else batch
                self._outputs.clear()
                call_model(self.model, tree_map_only(Tensor, lambda tensor: tensor.to(device), inputs))
                empty = False
        finally:
            self._outputs.clear()
            for handle in handles:
                handle.remove()
        if empty:
            raise TrainingError("the data to reconstruct on gave no batch")

    def _layer(self, name: str) -> Any:
        def hook(layer: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
            if inputs:
                moments = self.moments.setdefault(name, _Moments(layer.weight[0].numel()))
                moments.add(_rows(layer, inputs[0], self._chance))
                self._outputs[id(output)] = (name, output)

        return hook

    def _norm(self, name: str) -> Any:
        def hook(_: nn.Module, inputs: tuple[Any, ...]) -> None:
            if inputs and id(inputs[0]) in self._outputs:
                self.norms[self._outputs[id(inputs[0])][0]] = name

        return hook


def _rows(layer: _Layer, x: Tensor, chance: torch.Generator) -> Tensor:
    """What the weights of ``layer`` read, at some positions; ``(rows, columns of the weight)``."""
    if isinstance(layer, nn.Linear):
        rows = x.flatten(0, -2)
        return rows[_some(len(rows), chance).to(x.device)]
    (kh, kw), (sh, sw), (dh, dw) = layer.kernel_size, layer.stride, layer.dilation
    left, right, top, bottom = layer._reversed_padding_repeated_twice
    x = pad(x if x.ndim == 4 else x[None], (left, right, top, bottom))
    high, wide = (x.shape[2] - dh * (kh - 1) - 1) // sh + 1, (x.shape[3] - dw * (kw - 1) - 1) // sw + 1
    n, c, h, w = x.stride()
    windows = x.as_strided(
        (x.shape[0], high, wide, x.shape[1], kh, kw), (n, h * sh, w * sw, c, h * dh, w * dw)
    )  # (N, H, W, C, kH, kW), a view
    places = _some(x.shape[0] * high * wide, chance).to(x.device)
    return windows[places // (high * wide), places // wide % high, places % wide].flatten(1)


def _some(count: int, chance: torch.Generator) -> Tensor:
    return torch.arange(count) if count <= _ROWS else torch.randint(count, (_ROWS,), generator=chance)


def _refit(
    name: str,
    watch: _Watch,
    layer: _Layer,
    smaller: nn.Module,
    cuts: dict[tuple[str, int], tuple[int, ...]],
    factors: Tensor,
    ridge: float,
) -> float:
    """Write the best weights; gives the share of the variance that they do not explain."""
    target: Any = smaller.get_submodule(name)
    rows = _kept(layer.weight.shape[0], cuts.get((f"{name}.weight", 0), ()))
    size = layer.weight[0, 0].numel()
    kept = _kept(layer.weight.shape[1], cuts[f"{name}.weight", 1]).repeat_interleave(size)
    weight = layer.weight.detach().double().cpu().flatten(1) * factors[:, None]
    weight = weight[rows]  # (C_out kept, columns)
    home = _home_of_shift(target, smaller, watch.norms.get(name))
    mean, spread = watch.moments[name].centred(shift=home is not None)
    inner, across = spread[kept][:, kept], spread[kept][:, ~kept]
    pull = max(ridge * inner.diagonal().mean().item(), 1e-30) * torch.eye(len(inner), dtype=torch.float64)
    new = weight[:, kept] + torch.linalg.solve(inner + pull, across @ weight[:, ~kept].T).T
    target.weight.copy_(new.view_as(target.weight))
    if home is not None:
        values, sign = home
        values += sign * (weight @ mean - new @ mean[kept]).to(values)
    apart = weight.clone()
    apart[:, kept] -= new
    whole = ((weight @ spread) * weight).sum()
    return float(((apart @ spread) * apart).sum() / whole) if whole > 0 else 0.0


def _row_factors(plan: Plan, parameter: str, size: int) -> Tensor:
    """What the cut multiplies each row of a weight by, to make up for a derived scale."""
    factors = torch.ones(size, dtype=torch.float64)
    for each in plan.rescaled:
        if (each.parameter, each.dim) == (parameter, 0):
            factors[list(each.indices)] *= each.factor
    return factors


def _home_of_shift(target: _Layer, smaller: nn.Module, norm: str | None) -> tuple[Tensor, int] | None:
    """What can take over a constant shift of a layer's output, and with which sign."""
    if target.bias is not None:
        return target.bias.data, 1
    mean = getattr(smaller.get_submodule(norm), "running_mean", None) if norm else None
    return (mean, -1) if mean is not None and len(mean) == len(target.weight) else None


def _kept(size: int, removed: tuple[int, ...]) -> Tensor:
    keep = torch.ones(size, dtype=torch.bool)
    keep[list(removed)] = False
    return keep
