"""Products of activations and parameters, as the products with matrices that they are.

Attention is often written so: ``einsum("bnd,dhk->bnhk", x, query)`` is a linear layer to ``h k`` values, and
``einsum("bnhk,hkd->bnd", y, out)`` one from them. Experts have a matrix each: ``x @ w``, the same as
``einsum("ebi,eio->ebo", x, w)``, is a convolution with groups. Where the letters that both sides keep come
first in the weight, and those that are summed over lie together, a reshaped view of it is the layer's weight.
A vector is a layer's with one output.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.nn.functional import conv1d, conv_transpose1d, linear

from secateurs.graph.einsum import Letter
from secateurs.recovery.moments import WIDEST
from secateurs.recovery.spelled import Product, Spelled

BILINEAR = frozenset((torch.bilinear,))


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class WideProduct:
    """A call that multiplies an activation with a parameter, and is no layer as it stands.

    Args:
        spelled: The call in letters.
        x_shape: The shape of the activation, where it stands once for each matrix that reads it.
        of_x: Its letters then.
        rest: The letters of the activation alone.
        shared: Those that both have and the result too, in their order in the weight.
        inner: Those that are summed over, in their order in the weight.
        own: Those of the weight alone.
        inner_first: Whether the weight has its inner letters before its own.
        lengths: How long the dimension of each letter is.

    Example:
        >>> x, weight = torch.randn(2, 7, 5), Parameter(torch.randn(5, 3, 4))
        >>> product = WideProduct.of(torch.einsum, ("bnd,dhk->bhnk", x, weight), {})
        >>> torch.allclose(product.run(), torch.einsum("bnd,dhk->bhnk", x, weight), atol=1e-6)
        True
        >>> experts, each = torch.randn(3, 7, 5), Parameter(torch.randn(3, 5, 2))
        >>> product = WideProduct.of(torch.bmm, (experts, each), {})
        >>> torch.allclose(product.run(), experts @ each, atol=1e-6)
        True
    """

    spelled: Spelled
    x_shape: tuple[int, ...]
    of_x: tuple[Letter, ...]
    rest: tuple[Letter, ...]
    shared: tuple[Letter, ...]
    inner: tuple[Letter, ...]
    own: tuple[Letter, ...]
    inner_first: bool
    lengths: Mapping[Letter, int]

    @classmethod
    def of(cls, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> WideProduct | None:
        """The product that a call is; None for any other.

        Args:
            func: One of `SPELLED`.
            args: Its positional arguments.
            kwargs: Its arguments by name.
        """
        return cls._of(Spelled.of(func, args, kwargs))

    @classmethod
    def of_sum(cls, product: Product, args: tuple[Any, ...], kwargs: dict[str, Any]) -> WideProduct | None:
        """The product that a sum over products by elements is; see `Spelled.of_sum`."""
        return cls._of(Spelled.of_sum(product, args, kwargs))

    @classmethod
    def _of(cls, spelled: Spelled | None) -> WideProduct | None:
        if spelled is None:
            return None
        of_weight, result = tuple(spelled.of_weight), spelled.result
        x_shape, of_x = _for_each(spelled)
        both = [letter for letter in of_weight if letter in of_x]
        shared, inner = (tuple(each for each in both if (each in result) == kept) for kept in (True, False))
        own = tuple(letter for letter in of_weight if letter not in both)
        rest = tuple(letter for letter in of_x if letter not in both)
        orders = (*shared, *own, *inner), (*shared, *inner, *own)
        if not inner or {*result} != {*rest, *shared, *own} or of_weight not in orders:
            return None
        lengths = dict(zip(of_x, x_shape, strict=True)) | dict(spelled.of_weight)
        return cls(
            spelled=spelled, x_shape=x_shape, of_x=of_x, rest=rest, shared=shared, inner=inner, own=own,
            inner_first=of_weight != orders[0], lengths=lengths,
        )  # fmt: skip

    @property
    def units(self) -> Mapping[int, tuple[int, int]]:
        """Where the columns that are read lie in the activation.

        For each of its dimensions that is summed over its length, and how far apart two indices are.
        """
        found, apart = {}, 1
        of_given = self.spelled.operand or self.of_x
        for letter in reversed(self.inner):
            found[of_given.index(letter)] = (self.lengths[letter], apart)
            apart *= self.lengths[letter]
        return found

    def run(self) -> Tensor:
        """What the call gives, by a product with a matrix, or by a convolution with groups."""
        x = self.spelled.x.squeeze(self.spelled.dropped) if self.spelled.dropped else self.spelled.x
        x = x[..., None] if x.dim() < len(self.x_shape) else x
        x = x.expand(self.x_shape) if tuple(x.shape) != self.x_shape else x
        order = (*self.rest, *self.shared, *self.inner)
        x = x.permute([self.of_x.index(letter) for letter in order]).flatten(len(self.rest))
        groups, own, inner = (self._lengths(each) for each in (self.shared, self.own, self.inner))
        first, second = (prod(each) for each in ((inner, own) if self.inner_first else (own, inner)))
        if self.shared:
            weight = self.spelled.weight.view(prod(groups) * first, second, 1)
            convolve = conv_transpose1d if self.inner_first else conv1d
            wide = x.reshape(-1, x.shape[-1], 1)
            given = convolve(wide, weight, groups=prod(groups)).reshape(*x.shape[:-1], -1)
        else:
            weight = self.spelled.weight.view(first, second)
            given = x @ weight if self.inner_first else linear(x, weight)
        letters, lengths = (*self.rest, *self.shared, *self.own), (*groups, *own)
        apart = given.unflatten(-1, lengths) if lengths else given.squeeze(-1)
        result = apart.permute([letters.index(letter) for letter in self.spelled.result])
        return self._laid_out(result)

    def _lengths(self, letters: Sequence[Letter]) -> list[int]:
        return [self.lengths[letter] for letter in letters]

    def _laid_out(self, x: Tensor) -> Tensor:
        """The result in the shape that the call gives, its dimensions in the same order in memory."""
        shape, strides = self.spelled.shape, self.spelled.strides
        x = x.reshape(shape) if tuple(x.shape) != shape else x
        if all(one == other for one, other, size in zip(x.stride(), strides, shape, strict=True) if size > 1):
            return x
        order = sorted(range(x.dim()), key=lambda dim: -strides[dim])
        back = [order.index(dim) for dim in range(x.dim())]
        return x.permute(order).contiguous().permute(back)


def _for_each(spelled: Spelled) -> tuple[tuple[int, ...], tuple[Letter, ...]]:
    """The shape and the letters of an activation once for each of the matrices that read the same of it."""
    of_x, of_weight, shape = spelled.of_x, spelled.of_weight, spelled.x_shape
    inner = [letter in of_x and letter not in spelled.result for letter in of_weight]
    first = inner.index(True) if True in inner else 0
    for letter, length in list(of_weight.items())[:first]:
        if letter in of_x:
            place = of_x.index(letter)
            shape = (*shape[:place], length, *shape[place + 1 :])
        elif not inner[-1]:  # else these are rows of one matrix
            shape, of_x = (*shape, length), (*of_x, letter)
    return shape, of_x


def bilinear_steps(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Callable[[], Tensor] | None:
    """What runs ``torch.bilinear``: a linear layer that reads all products of two activations' values.

    None where these are more than equations are made of.

    Args:
        args: The positional arguments of the call.
        kwargs: Its arguments by name.

    Example:
        >>> layer, one, other = torch.nn.Bilinear(3, 4, 2), torch.randn(5, 3), torch.randn(5, 4)
        >>> run = bilinear_steps((one, other, layer.weight, layer.bias), {})
        >>> torch.allclose(run(), layer(one, other), atol=1e-6)
        True
    """
    if kwargs or len(args) not in (3, 4) or not isinstance(args[2], Parameter):
        return None
    one, other, weight, bias = (*args, None)[:4]
    if isinstance(one, Parameter) or isinstance(other, Parameter) or weight[0].numel() > WIDEST:
        return None

    def run() -> Tensor:
        products = (one[..., None] * other[..., None, :]).flatten(-2)
        return linear(products, weight.view(len(weight), -1), bias)

    return run
