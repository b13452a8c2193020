"""Products with weights of more than two dimensions by einsum, as the products of matrices that they are.

Attention is often written so: ``einsum("bnd,dhk->bnhk", x, query)`` is a linear layer to ``h k`` values, and
``einsum("bnhk,hkd->bnd", x, out)`` one from them. Where the letters that are summed over lie together in the
weight, and its own do, a reshaped view of it is that layer's weight.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

from torch import Tensor
from torch.nn import Parameter
from torch.nn.functional import linear

from secateurs.graph.einsum import Letter, letters_of


@dataclass(frozen=True, slots=True, kw_only=True)
class WideProduct:
    """A call of einsum that multiplies an activation with a parameter of more than two dimensions.

    Args:
        x: The activation.
        weight: The parameter.
        rest: The letters of the activation that stay.
        inner: Those that are summed over, in their order in the weight.
        own: Those of the weight alone.
        of_x: Those of the activation, in their order.
        result: Those of the result.
        inner_first: Whether the weight has its inner letters before its own.

    Example:
        >>> import torch
        >>> x, weight = torch.randn(2, 7, 5), Parameter(torch.randn(5, 3, 4))
        >>> product = WideProduct.of(("bnd,dhk->bhnk", x, weight), {})
        >>> torch.allclose(product.run(), torch.einsum("bnd,dhk->bhnk", x, weight), atol=1e-6)
        True
    """

    x: Tensor
    weight: Tensor
    rest: tuple[Letter, ...]
    inner: tuple[Letter, ...]
    own: tuple[Letter, ...]
    of_x: tuple[Letter, ...]
    result: tuple[Letter, ...]
    inner_first: bool

    @classmethod
    def of(cls, args: tuple[Any, ...], kwargs: dict[str, Any]) -> WideProduct | None:
        """The product that a call is; None for any other."""
        operands = args[1:] if len(args) != 2 or isinstance(args[1], Tensor) else tuple(args[1])
        wide = [isinstance(each, Parameter) and each.dim() > 2 for each in operands]
        if kwargs or len(operands) != 2 or sum(wide) != 1 or not all(isinstance(e, Tensor) for e in operands):
            return None
        read = letters_of(args)
        if read is None:
            return None
        place = wide.index(True)
        of_weight, of_x, result = read[0][place], read[0][1 - place], read[1]
        inner = tuple(letter for letter in of_weight if letter in of_x and letter not in result)
        own = tuple(letter for letter in of_weight if letter in result and letter not in of_x)
        rest = tuple(letter for letter in of_x if letter not in inner)
        is_product = bool(inner and own) and {*result} == {*rest, *own}
        if not is_product or of_weight not in ((*inner, *own), (*own, *inner)):
            return None
        return cls(
            x=operands[1 - place], weight=operands[place], rest=rest, inner=inner, own=own, of_x=of_x,
            result=result, inner_first=of_weight[0] in inner,
        )  # fmt: skip

    @property
    def units(self) -> Mapping[int, tuple[int, int]]:
        """For each dimension of the activation that is summed over how many columns an index has.

        The second number is how far apart the columns of two indices begin.
        """
        found, apart = {}, 1
        for letter in reversed(self.inner):
            dim = self.of_x.index(letter)
            found[dim] = (self.x.shape[dim], apart)
            apart *= self.x.shape[dim]
        return found

    def run(self) -> Tensor:
        """What the call gives, by a product of two matrices."""
        x = self.x.permute([self.of_x.index(letter) for letter in (*self.rest, *self.inner)])
        x = x.flatten(len(self.rest))
        first = len(self.inner if self.inner_first else self.own)
        lengths = self.weight.shape[first:] if self.inner_first else self.weight.shape[:first]
        weight = self.weight.view(prod(self.weight.shape[:first]), -1)
        given = x @ weight if self.inner_first else linear(x, weight)
        letters = (*self.rest, *self.own)
        result: Tensor = given.unflatten(-1, lengths).permute([letters.index(each) for each in self.result])
        return result
