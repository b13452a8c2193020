"""Products with parameters of more than two dimensions, as the products with matrices that they are.

Attention is often written so: ``einsum("bnd,dhk->bnhk", x, query)`` is a linear layer to ``h k`` values, and
``einsum("bnhk,hkd->bnd", y, out)`` one from them. Experts have a matrix each: ``x @ w``, the same as
``einsum("ebi,eio->ebo", x, w)``, is a convolution with groups. Where the letters that both sides keep come
first in the weight, and those that are summed over lie together, a reshaped view of it is the layer's weight.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.nn.functional import conv1d, conv_transpose1d, linear
from torch.utils._pytree import tree_map_only

from secateurs.graph.einsum import Letter, letters_of

_MATRICES = frozenset((torch.matmul, torch.bmm, Tensor.matmul, Tensor.bmm, Tensor.__matmul__))
WITH_WIDE_WEIGHTS = _MATRICES | {torch.einsum}


@dataclass(frozen=True, slots=True, kw_only=True)
class WideProduct:
    """A call that multiplies an activation with a parameter of more than two dimensions.

    Args:
        x: The activation.
        weight: The parameter.
        rest: The letters of the activation alone.
        shared: Those that both have and the result too, in their order in the weight.
        inner: Those that are summed over, in their order in the weight.
        own: Those of the weight alone.
        of_x: Those of the activation, in their order.
        result: Those of the result.
        inner_first: Whether the weight has its inner letters before its own.
        strides: How the result lies in memory, which a `view` behind the call may rely on.

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

    x: Tensor
    weight: Tensor
    rest: tuple[Letter, ...]
    shared: tuple[Letter, ...]
    inner: tuple[Letter, ...]
    own: tuple[Letter, ...]
    of_x: tuple[Letter, ...]
    result: tuple[Letter, ...]
    inner_first: bool
    strides: tuple[int, ...]

    @classmethod
    def of(cls, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> WideProduct | None:
        """The product that a call is; None for any other.

        Args:
            func: One of `WITH_WIDE_WEIGHTS`.
            args: Its positional arguments.
            kwargs: Its arguments by name.
        """
        is_einsum = func is torch.einsum
        operands = args if not is_einsum else args[1] if len(args) == 2 else args[1:]
        if kwargs or not isinstance(operands, (tuple, list)) or len(operands) != 2:
            return None
        wide = [isinstance(each, Parameter) and each.dim() > 2 for each in operands]
        if sum(wide) != 1 or not all(isinstance(each, Tensor) for each in operands):
            return None
        read = letters_of(args) if is_einsum else _letters_of_matrices(*operands)
        if read is None:
            return None
        place = wide.index(True)
        of_weight, of_x, result = read[0][place], read[0][1 - place], read[1]
        x, weight = operands[1 - place], operands[place]
        x, of_x = _for_each(x, of_x, weight, of_weight, result)
        both = [letter for letter in of_weight if letter in of_x]
        shared, inner = (tuple(each for each in both if (each in result) == kept) for kept in (True, False))
        own = tuple(letter for letter in of_weight if letter not in both)
        rest = tuple(letter for letter in of_x if letter not in both)
        orders = (*shared, *inner, *own), (*shared, *own, *inner)
        if not (inner and own) or {*result} != {*rest, *shared, *own} or of_weight not in orders:
            return None
        return cls(
            x=x, weight=weight, rest=rest, shared=shared, inner=inner, own=own, of_x=of_x, result=result,
            inner_first=of_weight == orders[0], strides=_strides_of(func, args),
        )  # fmt: skip

    @property
    def units(self) -> Mapping[int, tuple[int, int]]:
        """Where the columns that are read lie in the activation.

        For each of its dimensions that is summed over its length, and how far apart two indices are.
        """
        found, apart = {}, 1
        for letter in reversed(self.inner):
            dim = self.of_x.index(letter)
            found[dim] = (self.x.shape[dim], apart)
            apart *= self.x.shape[dim]
        return found

    def run(self) -> Tensor:
        """What the call gives, by a product with a matrix, or by a convolution with groups."""
        order = (*self.rest, *self.shared, *self.inner)
        x = self.x.permute([self.of_x.index(letter) for letter in order]).flatten(len(self.rest))
        groups, sides = self._lengths(self.shared), (self._lengths(self.own), self._lengths(self.inner))
        first, second = (prod(each) for each in (sides[::-1] if self.inner_first else sides))
        if self.shared:
            weight = self.weight.view(prod(groups) * first, second, 1)
            convolve = conv_transpose1d if self.inner_first else conv1d
            wide = x.reshape(-1, x.shape[-1], 1)
            given = convolve(wide, weight, groups=prod(groups)).reshape(*x.shape[:-1], -1)
        else:
            weight = self.weight.view(first, second)
            given = x @ weight if self.inner_first else linear(x, weight)
        letters = (*self.rest, *self.shared, *self.own)
        apart = given.unflatten(-1, (*groups, *sides[0]))
        result: Tensor = apart.permute([letters.index(letter) for letter in self.result])
        return result if result.stride() == self.strides else _laid_out(result, self.strides)

    def _lengths(self, letters: Sequence[Letter]) -> list[int]:
        """Those of some dimensions of the weight."""
        sides = (self.inner, self.own) if self.inner_first else (self.own, self.inner)
        of_weight = (*self.shared, *sides[0], *sides[1])
        return [self.weight.shape[of_weight.index(letter)] for letter in letters]


def _strides_of(func: Any, args: tuple[Any, ...]) -> tuple[int, ...]:
    """Those of what a call gives, found without computing it."""
    empty = tree_map_only(
        Tensor, lambda x: torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="meta"), args
    )
    strides: tuple[int, ...] = func(*empty).stride()
    return strides


def _laid_out(x: Tensor, strides: Sequence[int]) -> Tensor:
    """The same values with their dimensions in the order in memory that strides tell."""
    order = sorted(range(x.dim()), key=lambda dim: -strides[dim])
    back = [order.index(dim) for dim in range(x.dim())]
    return x.permute(order).contiguous().permute(back)


def _for_each(
    x: Tensor,
    of_x: tuple[Letter, ...],
    weight: Tensor,
    of_weight: tuple[Letter, ...],
    result: tuple[Letter, ...],
) -> tuple[Tensor, tuple[Letter, ...]]:
    """The activation once for each of the matrices that a weight holds, where all of them read the same."""
    inner = [letter in of_x and letter not in result for letter in of_weight]
    first = inner.index(True) if True in inner else 0
    for letter, size in zip(of_weight[:first], weight.shape, strict=False):
        if letter in of_x:
            lengths = [size if each == letter else length for each, length in zip(of_x, x.shape, strict=True)]
            x = x.expand(lengths)
        elif not inner[-1]:  # else these are rows of one matrix
            x, of_x = x[..., None].expand(*x.shape, size), (*of_x, letter)
    return x, of_x


def _letters_of_matrices(
    one: Tensor, other: Tensor
) -> tuple[list[tuple[Letter, ...]], tuple[Letter, ...]] | None:
    """The letters of a product of batches of matrices; None where the second has one for several."""
    if min(one.dim(), other.dim()) < 2:
        return None
    batches = [range(each.dim() - 3, -1, -1) for each in (one, other)]  # counted from the right
    lengths = zip(reversed(one.shape[:-2]), reversed(other.shape[:-2]), strict=False)
    if any(length not in (1, size) for length, size in lengths):
        return None
    whole = max(batches, key=len)
    return [(*batches[0], "n", "k"), (*batches[1], "k", "m")], (*whole, "n", "m")
