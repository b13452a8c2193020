"""Second derivatives of the loss by one backward sweep, as Optimal Brain Damage computes them.

Backwards through a chain of layers go two numbers for each activation of each example: the gradient ``g`` and
the second derivative ``h`` of the loss, mixed derivatives of two activations being left out:

    h_w = sum over uses  x^2 h_a             a weight w that multiplies x in the sum a
    h_x = sum over w     w^2 h_a             linear layers, convolutions, means
    h_a = f'(a)^2 h_x + f''(a) g_x           an activation function x = f(a)

The paper prints the last sign as a minus; calculus gives a plus. Of a ReLU ``f''`` is zero. The recursion is
defined for chains; in a network that branches the mixed derivatives of the branches are no longer small.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from math import prod
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from secateurs.criteria.observed import Batch
from secateurs.graph.calls import is_numbered
from secateurs.graph.packed import call_tensors

Pair: TypeAlias = tuple[Tensor, Tensor]  # gradient and second derivative, each of an activation's shape
Step: TypeAlias = Callable[[Pair], tuple[Pair, dict[int, Tensor]]]  # and those of weights, by their id

_LINEAR = frozenset(("linear", "conv1d", "conv2d", "conv3d"))
_POINTWISE = frozenset(
    ("relu", "relu_", "leaky_relu", "leaky_relu_", "hardtanh", "relu6", "elu", "selu", "celu", "gelu", "silu")
) | frozenset(("tanh", "tanh_", "sigmoid", "sigmoid_", "softplus", "hardswish", "hardsigmoid", "mish"))
_SELECTING = frozenset(
    ("flatten", "reshape", "view", "squeeze", "unsqueeze", "contiguous", "transpose", "permute", "identity")
) | frozenset(
    ("max_pool1d", "max_pool2d", "max_pool3d", "adaptive_max_pool1d", "adaptive_max_pool2d", "unflatten")
)
_AVERAGING = frozenset(("mean", "avg_pool1d", "avg_pool2d", "avg_pool3d"))
_ADAPTIVE = frozenset(("adaptive_avg_pool1d", "adaptive_avg_pool2d", "adaptive_avg_pool3d"))
_DROPPING = frozenset(("dropout", "dropout1d", "dropout2d", "dropout3d", "alpha_dropout", "feature_dropout"))


def second_derivatives(batch: Batch, weights: Mapping[str, Tensor]) -> dict[str, Tensor] | None:
    """The diagonal second derivatives of a batch's summed loss in its weights, by the recursion.

    Args:
        batch: The batch.
        weights: Parameters by name.

    Returns:
        For each parameter that the chain uses a tensor of its shape; None where the network is no chain of
        layers that the recursion knows.
    """
    if not isinstance(batch.inputs, Tensor):
        return None
    chain = _Chain(batch.inputs)
    with torch.no_grad(), chain:
        outputs = batch.outputs()
    if chain.broken or outputs is not chain.current or not isinstance(outputs, Tensor):
        return None
    names = {id(weight): name for name, weight in weights.items()}
    if any(id(weight) not in names for weight in chain.weights) or chain.reuses_weights:
        return None
    pair = _of_loss(batch, outputs)
    found: dict[str, Tensor] = {}
    for step in reversed(chain.steps):
        pair, of_weights = step(pair)
        found |= {names[key]: value for key, value in of_weights.items()}
    return found


def _of_loss(batch: Batch, outputs: Tensor) -> Pair:
    """Gradient and second derivative of the summed loss in each output of each example."""
    with torch.enable_grad():
        leaf = outputs.detach().requires_grad_()
        loss = batch.loss(leaf) * batch.examples
        (gradient,) = torch.autograd.grad(loss, leaf, create_graph=True)
        second = torch.zeros_like(leaf)
        if gradient.requires_grad:
            columns, flat = gradient.flatten(1), second.flatten(1)
            for column in range(columns.shape[1]):  # examples do not mix, so all go together
                (row,) = torch.autograd.grad(columns[:, column].sum(), leaf, retain_graph=True)
                flat[:, column] = row.flatten(1)[:, column]
    return gradient.detach(), second


class _Chain(TorchFunctionMode):
    """Writes down what each torch function call does to second derivatives, as long as there is one path."""

    def __init__(self, inputs: Tensor) -> None:
        super().__init__()
        self.current = inputs
        self.steps: list[Step] = []
        self.weights: list[Tensor] = []
        self.broken = False
        self._earlier: dict[int, Tensor] = {}  # kept alive, so that their ids stay theirs

    @property
    def reuses_weights(self) -> bool:
        """Whether a weight is used twice; uses would have to be added up before they are squared."""
        return len({id(weight) for weight in self.weights}) < len(self.weights)

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        if self.broken or not is_numbered(func) or not isinstance(out, Tensor):
            return out
        tensors = call_tensors(args, kwargs)
        if any(id(tensor) in self._earlier for tensor in tensors):
            self.broken = True
        elif any(tensor is self.current for tensor in tensors):
            step = self._step(func, args, kwargs, out) if args and args[0] is self.current else None
            self.broken = step is None
            if step is not None:
                self.steps.append(step)
                if out is not self.current:
                    self._earlier[id(self.current)] = self.current
                self.current = out
        return out

    def _step(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Tensor) -> Step | None:
        name, x = getattr(func, "__name__", "").lstrip("_"), args[0]
        name = name if name in _POINTWISE else name.rstrip("_")
        rest = tuple(args[1:])
        if name in _LINEAR:
            weight, bias = _bound(("weight", "bias"), rest, kwargs)
            self.weights += [each for each in (weight, bias) if each is not None]
            options = {key: value for key, value in kwargs.items() if key not in ("weight", "bias")}
            return _linear(lambda x, w: func(x, w, None, *rest[2:], **options), x, weight, bias)
        if name == "batch_norm":
            mean, variance, weight, bias, training, _, eps = _bound(
                ("running_mean", "running_var", "weight", "bias", "training", "momentum", "eps"), rest, kwargs
            )
            if training or mean is None:
                return None
            self.weights += [each for each in (weight, bias) if each is not None]
            return _norm(x, mean, variance, weight, bias, 1e-5 if eps is None else eps)
        if name in _POINTWISE:
            slopes = (out > 0).to(out.dtype) if name in ("relu", "relu_") else None
            if slopes is None and out is x:  # what it was is gone
                return None
            return _pointwise(lambda x: func(x, *rest, **kwargs), x, slopes)
        if name in _DROPPING:
            same = torch.equal(out, x)
            return (lambda pair: (pair, {})) if same else None
        share = _share(name, x, out, rest, kwargs)
        return _moved(lambda x: func(x, *rest, **kwargs), x, share) if share else None


def _bound(names: Sequence[str], args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Any]:
    """Arguments by name, wherever they were given."""
    return [args[place] if place < len(args) else kwargs.get(name) for place, name in enumerate(names)]


def _share(name: str, x: Tensor, out: Tensor, rest: tuple[Any, ...], kwargs: dict[str, Any]) -> float | None:
    """What one input contributes to an output that takes or averages inputs; None where that differs."""
    if name in _SELECTING:
        return 1.0
    if name == "mean":
        return out.numel() / x.numel()
    if name in _ADAPTIVE:
        even = all(size % length == 0 for size, length in zip(x.shape[2:], out.shape[2:], strict=True))
        return out.numel() / x.numel() if even else None
    if name in _AVERAGING:
        kernel, _, padding, ceil_mode, counted, divisor = _bound(
            ("kernel_size", "stride", "padding", "ceil_mode", "count_include_pad", "divisor_override"),
            rest,
            kwargs,
        )
        padded = padding not in (None, 0) and any((padding,) if isinstance(padding, int) else padding)
        if ceil_mode or divisor is not None or (padded and counted is False):
            return None
        window = kernel ** (x.dim() - 2) if isinstance(kernel, int) else prod(kernel)
        return 1 / int(window)
    return None


def _pull(function: Callable[[Tensor], Tensor], x: Tensor, *rows: Tensor) -> list[Tensor]:
    """Row times the derivative of a function that is linear at `x`, for several rows."""
    with torch.enable_grad():
        leaf = x.detach().requires_grad_()
        out = function(leaf)
    return [torch.autograd.grad(out, leaf, row, retain_graph=True)[0] for row in rows]


def _linear(
    function: Callable[[Tensor, Tensor], Tensor], x: Tensor, weight: Tensor, bias: Tensor | None
) -> Step:
    def step(pair: Pair) -> tuple[Pair, dict[int, Tensor]]:
        gradient, second = pair
        (back,) = _pull(lambda leaf: function(leaf, weight.detach()), x, gradient)
        (curved,) = _pull(lambda leaf: function(leaf, weight.detach().square()), x, second)
        (of_weight,) = _pull(lambda leaf: function(x.square(), leaf), weight, second)
        found = {id(weight): of_weight}
        if bias is not None:
            channels = second.dim() - 1 if weight.dim() == 2 else 1
            found[id(bias)] = second.sum([dim for dim in range(second.dim()) if dim != channels])
        return (back, curved), found

    return step


def _norm(
    x: Tensor, mean: Tensor, variance: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
) -> Step:
    def step(pair: Pair) -> tuple[Pair, dict[int, Tensor]]:
        gradient, second = pair
        shape = [-1 if dim == 1 else 1 for dim in range(x.dim())]
        others = [dim for dim in range(x.dim()) if dim != 1]
        inverse = (variance + eps).rsqrt().view(shape)
        found: dict[int, Tensor] = {}
        scale = inverse
        if weight is not None:
            normal = (x - mean.view(shape)) * inverse
            found[id(weight)] = (second * normal.square()).sum(others)
            scale = inverse * weight.detach().view(shape)
        if bias is not None:
            found[id(bias)] = second.sum(others)
        return (gradient * scale, second * scale.square()), found

    return step


def _pointwise(function: Callable[[Tensor], Tensor], x: Tensor, slopes: Tensor | None) -> Step:
    """A function of each value by itself; its slopes, where they are known and it does not curve."""
    if slopes is not None:
        return lambda pair: ((pair[0] * slopes, pair[1] * slopes), {})

    def step(pair: Pair) -> tuple[Pair, dict[int, Tensor]]:
        gradient, second = pair
        with torch.enable_grad():
            leaf = x.detach().requires_grad_()
            (slope,) = torch.autograd.grad(function(leaf).sum(), leaf, create_graph=True)
            curve = (
                torch.autograd.grad(slope.sum(), leaf)[0] if slope.requires_grad else torch.zeros_like(leaf)
            )
        slope = slope.detach()
        return (gradient * slope, slope.square() * second + curve * gradient), {}

    return step


def _moved(function: Callable[[Tensor], Tensor], x: Tensor, share: float) -> Step:
    """A function whose outputs are sums of inputs, each times `share`."""

    def step(pair: Pair) -> tuple[Pair, dict[int, Tensor]]:
        gradient, second = _pull(function, x, *pair)
        return (gradient, second * share), {}

    return step
