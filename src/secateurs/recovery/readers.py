"""The calls in which weights read activations: what they read at a position, and their weights as a matrix.

Every product of weights and activations is ``y = W x + b`` at each of its positions: a linear layer has one
row ``x`` for each vector, a convolution one for each place of its window. So one set of normal equations
serves all of them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.nn.functional import pad
from torch.overrides import TorchFunctionMode

from secateurs.graph.calls import is_numbered
from secateurs.graph.einsum import letters_of
from secateurs.recovery.moves import positions_of
from secateurs.recovery.recurrence import product_with_state

_CONVOLUTIONS = {"conv1d": 1, "conv2d": 2, "conv3d": 3}
_TRANSPOSED = {"conv_transpose1d": 1, "conv_transpose2d": 2, "conv_transpose3d": 3}
_LINEAR = frozenset(("linear", product_with_state.__name__))
_PRODUCTS = frozenset(("matmul", "__matmul__", "mm", "__rmatmul__"))


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Reader:
    """One call in which weights read activations.

    Args:
        source: What is read, as the call was given it.
        weight: The weight, as the call was given it: a parameter or a view of one.
        bias: What is added to each output, if the call was given it.
        groups: Groups of a convolution that do not mix.
        turned: Whether the inputs come before the outputs in the weight.
        windows: Kernel, stride, dilation and padding (before, after) of each spatial dimension; none for a
            linear layer.
        stretch: For a transposed convolution, the steps between the places where its inputs are put.
        reading: Of an einsum the dimension of the activation that is summed over, counted from the end; in
            `source` it is the last.
        writing: Of an einsum the dimension of the result that holds the outputs, counted from the end.

    Example:
        >>> layer = torch.nn.Conv2d(4, 6, 3, padding=1, groups=2)
        >>> x = torch.randn(5, 4, 7, 7)
        >>> reader = reader_of(torch.conv2d, (x, layer.weight, layer.bias, 1, 1, 1, 2), {})
        >>> rows = reader.rows(torch.tensor([0, 48]))  # two corners of the first image
        >>> rows.shape, reader.matrix().shape
        (torch.Size([2, 2, 18]), torch.Size([2, 3, 18]))
        >>> given = (rows @ reader.matrix().mT).movedim(0, 1).flatten(1) + layer.bias
        >>> torch.allclose(given, layer(x)[0, :, [0, 6], [0, 6]].T, atol=1e-6)
        True
    """

    source: Tensor
    weight: Tensor
    bias: Tensor | None
    groups: int = 1
    turned: bool = False
    windows: tuple[tuple[int, int, int, tuple[int, int]], ...] = ()
    stretch: tuple[int, ...] = ()
    reading: int | None = None
    writing: int | None = None

    @property
    def columns(self) -> int:
        """Length of a row in each group."""
        return self.weight.numel() // self.outputs

    @property
    def outputs(self) -> int:
        """Number of outputs, of all groups together."""
        out = int(self.weight.shape[1 if self.turned else 0])
        return out * self.groups if self.turned and self.windows else out

    @property
    def reading_dim(self) -> int:
        """The dimension of the weight that is summed over."""
        return 0 if self.turned else 1

    @property
    def channel(self) -> int:
        """The dimension of the call's result that holds its outputs, counted from the end."""
        return -1 - len(self.windows) if self.writing is None else self.writing

    @property
    def source_dim(self) -> int:
        """The dimension of the activation that is summed over, counted from the end."""
        return -1 - len(self.windows) if self.reading is None else self.reading

    @property
    def kernel(self) -> int:
        """Columns of one input channel."""
        return prod(window[0] for window in self.windows)

    def matrix(self, weight: Tensor | None = None) -> Tensor:
        """The weight as ``(G, outputs of a group, columns)``, in the order of the columns of a row."""
        weight = self.weight if weight is None else weight
        if not self.turned:
            return weight.reshape(self.groups, weight.shape[0] // self.groups, -1)
        each = weight.reshape(self.groups, weight.shape[0] // self.groups, *weight.shape[1:])
        flipped = each.flip(tuple(range(3, each.dim()))) if self.windows else each
        return flipped.transpose(1, 2).flatten(2)

    def unfolded(self, matrix: Tensor) -> Tensor:
        """The opposite of `matrix`: a weight of the call's shape."""
        if not self.turned:
            return matrix.reshape(self.weight.shape)
        shape = (self.groups, matrix.shape[1], -1, *self.weight.shape[2:])
        each = matrix.reshape(shape).transpose(1, 2)
        flipped = each.flip(tuple(range(3, each.dim()))) if self.windows else each
        return flipped.reshape(self.weight.shape)

    def rows(self, positions: Tensor) -> Tensor:
        """What the weights read at some positions; ``(G, n, columns)``.

        Args:
            positions: Numbers of positions of the result, counted over all its dimensions but the channels.
        """
        positions = positions.to(self.source.device)
        if not self.windows:
            return (
                self.source.flatten(0, -2)[positions][None]
                if self.source.dim() > 1
                else self.source[None, None]
            )
        windows = self._windows()  # (N, *out, C, *kernel)
        places = torch.unravel_index(positions, windows.shape[: 1 + len(self.windows)])
        return windows[places].reshape(len(positions), self.groups, -1).movedim(1, 0)

    def vectors(self) -> Tensor | None:
        """What is read at each position of the source, ``(n, columns)``; None where there is a window."""
        if self.kernel > 1 or self.stretch or self.source.dim() < 2 or not self.source.numel():
            return None
        return self.source.movedim(-1 - len(self.windows), -1).flatten(0, -2)

    def positions(self, shape: torch.Size) -> int:
        """How many positions a result of a shape has."""
        return positions_of(shape, self.channel)

    def _windows(self) -> Tensor:
        """Every window of the source, as a view of it or of a padded copy."""
        count = len(self.windows)
        x = self.source if self.source.dim() == count + 2 else self.source[None]
        if self.stretch:
            x = _stretched(x, self.stretch)
        x = pad(x, [side for *_, sides in reversed(self.windows) for side in sides])
        sizes, steps, inner = [], [], []
        for (kernel, stride, dilation, _), size, step in zip(
            self.windows, x.shape[2:], x.stride()[2:], strict=True
        ):
            sizes.append((size - dilation * (kernel - 1) - 1) // stride + 1)
            steps.append(step * stride)
            inner.append(step * dilation)
        kernels = [window[0] for window in self.windows]
        batch, channel = x.stride()[:2]
        return x.as_strided(
            (x.shape[0], *sizes, x.shape[1], *kernels), (batch, *steps, channel, *inner), x.storage_offset()
        )


def reader_of(func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Reader | None:
    """The reader that a torch function call is, or None: linear, convolution, or product with a matrix.

    Args:
        func: The function.
        args: Its positional arguments.
        kwargs: Its arguments by name.
    """
    name = getattr(func, "__name__", "")
    if name in _LINEAR:
        x, weight, bias = _named(args, kwargs, ("input", "weight", "bias"), (None,))
        return Reader(source=x, weight=weight, bias=bias)
    if name == "addmm":
        bias, x, weight = _named(args, kwargs, ("input", "mat1", "mat2"), ())
        plain = len(args) < 4 and kwargs.get("beta", 1) == kwargs.get("alpha", 1) == 1
        return Reader(source=x, weight=weight, bias=bias, turned=True) if plain else None
    if name in _PRODUCTS and len(args) == 2 and all(isinstance(each, Tensor) for each in args):
        x, weight = args if name != "__rmatmul__" else args[::-1]
        return Reader(source=x, weight=weight, bias=None, turned=True) if weight.dim() == 2 else None
    if name == "einsum":
        return _einsum(tuple(args)) if not kwargs else None
    if name in _CONVOLUTIONS:
        return _convolution(_CONVOLUTIONS[name], args, kwargs)
    return _transposed(_TRANSPOSED[name], args, kwargs) if name in _TRANSPOSED else None


def _einsum(args: tuple[Any, ...]) -> Reader | None:
    """A product with a matrix by letters: one is summed over, one is the matrix's own."""
    if len(args) != 3 or any(not isinstance(each, Tensor) for each in args[1:]):
        return None
    read = letters_of(args)
    if read is None:
        return None
    (one, other), result = read
    is_first = isinstance(args[1], Parameter) and not isinstance(args[2], Parameter)
    (x, weight), (of_x, of_weight) = (args[1:], (one, other)) if not is_first else (args[:0:-1], (other, one))
    inner = [letter for letter in of_weight if letter in of_x and letter not in result]
    own = [letter for letter in of_weight if letter in result and letter not in of_x]
    rest = [letter for letter in result if letter not in own]
    if not len(inner) == len(own) == 1 or len(of_weight) != 2 or {*rest, *inner} != {*of_x}:
        return None
    place = of_x.index(inner[0])
    return Reader(
        source=x.permute(*(of_x.index(letter) for letter in rest), place),
        weight=weight,
        bias=None,
        turned=of_weight[0] == inner[0],
        reading=place - len(of_x),
        writing=result.index(own[0]) - len(result),
    )


class Watching(TorchFunctionMode):
    """Shows every call of one forward pass in which weights read activations.

    Args:
        see: Called with the number of the torch function call in the pass (as in `Graph.reads`), the reader
            and the call's result, which is kept by no one and may be changed in place later. What it
            returns, unless None, takes the result's place.
        numbers: Of the calls, where the pass makes others than the one that they are known from; see
            `secateurs.graph.paths`. Calls without a number are not shown.

    Example:
        >>> moments = {}
        >>> def see(call, reader, result):
        ...     found = moments.setdefault(call, Moments(reader.columns, groups=reader.groups))
        ...     found.add(reader.rows(torch.arange(reader.positions(result.shape))))
        >>> from secateurs.recovery.moments import Moments
        >>> net, x = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.ReLU()), torch.ones(2, 3)
        >>> with torch.no_grad(), Watching(see):
        ...     _ = net(x)
        >>> moments[0].count, moments[0].mean().tolist()
        (2, [[1.0, 1.0, 1.0]])
    """

    def __init__(
        self, see: Callable[[int, Reader, Tensor], Tensor | None], numbers: Sequence[int] | None = None
    ) -> None:
        super().__init__()
        self.made = 0  # numbered calls
        self._see, self._numbers = see, numbers

    @property
    def number(self) -> int | None:
        """That of the next numbered call, if it has one."""
        if self._numbers is None:
            return self.made
        number = self._numbers[self.made] if self.made < len(self._numbers) else -1
        return number if number >= 0 else None

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        reader = reader_of(func, args, kwargs)  # before the call: some work in place
        out = func(*args, **kwargs)
        if reader is not None and (number := self.number) is not None:
            shown = self._see(number, reader, out)
            out = out if shown is None else shown
        self.made += is_numbered(func)
        return out


def _convolution(count: int, args: Sequence[Any], kwargs: dict[str, Any]) -> Reader:
    names = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")
    x, weight, bias, stride, padding, dilation, groups = _named(args, kwargs, names, (None, 1, 0, 1, 1))
    strides, dilations = _each(stride, count), _each(dilation, count)
    kernels = weight.shape[2:]
    if padding == "same":
        around = [d * (int(k) - 1) for d, k in zip(dilations, kernels, strict=True)]
        sides = [(total // 2, total - total // 2) for total in around]
    else:
        sides = [(each, each) for each in _each(0 if padding == "valid" else padding, count)]
    windows = tuple(
        (int(k), s, d, side) for k, s, d, side in zip(kernels, strides, dilations, sides, strict=True)
    )
    return Reader(source=x, weight=weight, bias=bias, groups=int(groups), windows=windows)


def _transposed(count: int, args: Sequence[Any], kwargs: dict[str, Any]) -> Reader:
    """A transposed convolution is a plain one of inputs that are spread out, with a mirrored kernel."""
    names = ("input", "weight", "bias", "stride", "padding", "output_padding", "groups", "dilation")
    x, weight, bias, stride, padding, extra, groups, dilation = _named(
        args, kwargs, names, (None, 1, 0, 0, 1, 1)
    )
    dilations = _each(dilation, count)
    windows = []
    for kernel, d, cut, more in zip(
        weight.shape[2:], dilations, _each(padding, count), _each(extra, count), strict=True
    ):
        side = d * (int(kernel) - 1) - cut
        windows.append((int(kernel), 1, d, (side, side + more)))
    return Reader(
        source=x, weight=weight, bias=bias, groups=int(groups), turned=True,
        windows=tuple(windows), stretch=_each(stride, count),
    )  # fmt: skip


def _stretched(x: Tensor, steps: Sequence[int]) -> Tensor:
    """Zeros between the values along each spatial dimension."""
    sizes = [(size - 1) * step + 1 for size, step in zip(x.shape[2:], steps, strict=True)]
    wide = x.new_zeros((*x.shape[:2], *sizes))
    wide[(..., *(slice(None, None, step) for step in steps))] = x  # type: ignore[index]
    return wide


def _named(
    args: Sequence[Any], kwargs: dict[str, Any], names: Sequence[str], defaults: Sequence[Any]
) -> list[Any]:
    """Arguments in the order of their names, however the call was written."""
    found = dict(zip(names, args, strict=False)) | {key: kwargs[key] for key in kwargs if key in names}
    found = dict(zip(names[len(names) - len(defaults) :], defaults, strict=True)) | found
    return [found[name] for name in names]


def _each(value: Any, count: int) -> tuple[int, ...]:
    values = tuple(int(each) for each in value) if isinstance(value, (tuple, list)) else (int(value),)
    return values * count if len(values) == 1 else values
