"""Calls that multiply an activation with a parameter and sum, spelled in letters as an einsum is.

A product with a matrix is a layer, however it is written. The letters of both operands and of the result
tell which dimensions are summed over, whichever function was called: ``x @ vector``, ``matrix @ x.mT``,
``torch.tensordot``, ``(x * vector).sum(-1)``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.nn.functional import linear
from torch.utils._pytree import tree_map_only

from secateurs.graph.einsum import Letter, letters_of
from secateurs.recovery.readers import reader_of

_MATRICES = frozenset(
    getattr(owner, name)
    for owner in (torch, Tensor)
    for name in ("matmul", "bmm", "mm", "mv", "__matmul__")
    if hasattr(owner, name)
)
_INNER = frozenset((torch.inner, Tensor.inner))
SPELLED = _MATRICES | _INNER | {torch.einsum, torch.tensordot, linear}
MULTIPLIED = frozenset(
    (torch.mul, torch.multiply, Tensor.mul, Tensor.multiply, Tensor.__mul__, Tensor.__rmul__)
)
SUMMED = frozenset((torch.sum, Tensor.sum))
ADDED = {  # products that are added to what comes first
    torch.addmv: torch.mv, Tensor.addmv: torch.mv, torch.baddbmm: torch.bmm, Tensor.baddbmm: torch.bmm,
}  # fmt: skip
_Letters = tuple[Letter, ...]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Spelled:
    """A product of an activation and a parameter.

    Args:
        x: The activation.
        weight: The parameter.
        of_x: The letters of the activation, without dimensions that are dropped.
        of_weight: Those of the parameter, without dimensions in which it is repeated, and their lengths.
        result: Those of the result.
        shape: The shape of the result, which may have dimensions of length 1 besides.
        strides: How the result lies in memory, which a `view` behind the call may rely on.
        dropped: Dimensions of the activation in which it is repeated.
        operand: The letters of what the call itself is given, where that is a product by elements.
    """

    x: Tensor
    weight: Tensor
    of_x: _Letters
    of_weight: Mapping[Letter, int]
    result: _Letters
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dropped: tuple[int, ...] = ()
    operand: _Letters | None = None

    @property
    def x_shape(self) -> tuple[int, ...]:
        """The lengths of the letters of the activation."""
        return tuple(size for dim, size in enumerate(self.x.shape) if dim not in self.dropped)

    @classmethod
    def of(cls, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Spelled | None:
        """The product that a call is; None for any other, and for one that is read as it is.

        Args:
            func: One of `SPELLED`.
            args: Its positional arguments.
            kwargs: Its arguments by name.

        Example:
            >>> x, vector = torch.randn(7, 5), Parameter(torch.randn(5))
            >>> product = Spelled.of(torch.mv, (x, vector), {})
            >>> product.of_x, product.of_weight, product.result
            (('n', 'k'), {'k': 5}, ('n',))
        """
        operands = args[1] if func is torch.einsum and len(args) == 2 else args[func is torch.einsum :]
        is_tensordot = func is torch.tensordot
        if (kwargs and not is_tensordot) or not isinstance(operands, (tuple, list)):
            return None
        pair = tuple(operands[:2])
        if len(operands) != 2 and not (is_tensordot and len(operands) == 3):
            return None
        if [isinstance(each, Parameter) for each in pair] not in ([True, False], [False, True]):
            return None
        if not all(isinstance(each, Tensor) for each in pair) or _is_read_as_it_is(func, args, kwargs, pair):
            return None
        read = _letters(func, args, kwargs, pair)
        if read is None or any(len(own) != each.dim() for own, each in zip(read[0], pair, strict=True)):
            return None  # a letter that occurs twice in one of them
        place = isinstance(pair[1], Parameter)
        given = _without_data(func, args, kwargs)
        weight, of_weight = pair[place], read[0][place]
        return cls(
            x=pair[1 - place], weight=weight, of_x=read[0][1 - place],
            of_weight=dict(zip(of_weight, weight.shape, strict=True)), result=read[1],
            shape=tuple(given.shape), strides=given.stride(),
        )  # fmt: skip

    @classmethod
    def of_sum(cls, product: Product, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Spelled | None:
        """The product that a sum over products by elements is; None where it is none.

        Args:
            product: What is summed over, the first of the arguments.
            args: The positional arguments of the sum.
            kwargs: Its arguments by name.

        Example:
            >>> x, vector = torch.randn(7, 5), Parameter(torch.randn(5))
            >>> product = Spelled.of_sum(Product(x, vector), (x * vector, -1), {})
            >>> product.of_x, product.of_weight, product.result
            ((1, 0), {0: 5}, (1,))
        """
        dims = args[1] if len(args) > 1 else kwargs.get("dim", kwargs.get("axis"))
        if dims is None or kwargs.get("dtype") is not None or len(args) > 3:
            return None
        count = args[0].dim()
        each = dims if isinstance(dims, (tuple, list)) else (dims,)
        gone = {count - 1 - int(dim) % count for dim in each}  # letters count dimensions from the last
        of_x, of_weight = _met(product.x, product.weight, gone)
        if not gone <= {*of_x} & {*of_weight}:
            return None
        operand, known = tuple(range(count - 1, -1, -1)), {*of_x, *of_weight}
        places = tuple(range(product.x.dim() - 1, -1, -1))
        given = _without_data(torch.sum, args, kwargs)
        return cls(
            x=product.x, weight=product.weight, of_x=of_x,
            of_weight={letter: product.weight.shape[-1 - letter] for letter in of_weight},
            result=tuple(letter for letter in operand if letter not in gone and letter in known),
            shape=tuple(given.shape), strides=given.stride(), operand=operand,
            dropped=tuple(dim for dim, letter in enumerate(places) if letter not in of_x),
        )  # fmt: skip


@dataclass(frozen=True, slots=True, eq=False)
class Product:
    """An activation times a parameter, element by element.

    Args:
        x: The activation.
        weight: The parameter.
    """

    x: Tensor
    weight: Tensor

    @classmethod
    def of(cls, args: Sequence[Any], given: Any) -> Product | None:
        """The product of the operands of a call; None where they are no activation and a parameter."""
        if len(args) != 2 or not isinstance(given, Tensor) or not all(isinstance(a, Tensor) for a in args):
            return None
        if isinstance(args[0], Parameter) == isinstance(args[1], Parameter):
            return None
        x, weight = args if isinstance(args[1], Parameter) else args[::-1]
        return cls(x, weight) if weight.numel() > 1 and given.is_floating_point() else None


def _is_read_as_it_is(
    func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], pair: tuple[Tensor, ...]
) -> bool:
    """Whether a call is a layer's already: one with a matrix, behind the activation."""
    if func is linear:
        return pair[1].dim() != 1 or len(args) > 2
    reader = reader_of(func, args, kwargs)
    return reader is not None and isinstance(reader.weight, Parameter) and reader.weight.dim() == 2


def _without_data(func: Callable[..., Tensor], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """What a call gives, as a tensor without data."""
    empty = tree_map_only(
        Tensor, lambda x: torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="meta"), args
    )
    return func(*empty, **kwargs)


def _letters(
    func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], pair: tuple[Tensor, ...]
) -> tuple[list[_Letters], _Letters] | None:
    """The letters of both operands and of the result."""
    one, other = pair
    if func is torch.einsum:
        return letters_of(args)
    if func in _MATRICES:
        return _of_matrices(one, other)
    rows, columns = tuple(range(one.dim())), tuple(range(-other.dim(), 0))
    if func is torch.tensordot:
        dims = args[2] if len(args) > 2 else kwargs.get("dims", 2)
        if isinstance(dims, int):
            dims = range(one.dim() - dims, one.dim()), range(dims)
        elif not (isinstance(dims, (tuple, list)) and len(dims) == 2):
            return None
        sides = [[int(dim) for dim in (each if not isinstance(each, int) else [each])] for each in dims]
    else:
        sides = [[one.dim() - 1], [other.dim() - 1]]
    met = {columns[second]: rows[first] for first, second in zip(*sides, strict=True)}
    summed = {*met.values()}
    columns = tuple(met.get(letter, letter) for letter in columns)
    return [rows, columns], tuple(each for each in (*rows, *columns) if each not in summed)


def _of_matrices(one: Tensor, other: Tensor) -> tuple[list[_Letters], _Letters] | None:
    """The letters of a product of batches of matrices; None where a parameter has one for several.

    A vector is a row, or a column, whose dimension the result lacks.
    """
    rows: _Letters = ("n", "k")[2 - min(one.dim(), 2) :]
    columns: _Letters = ("k", "m")[: min(other.dim(), 2)]
    batches = [tuple(range(each.dim() - 3, -1, -1)) for each in (one, other)]  # counted from the right
    weight, x = (one, other) if isinstance(one, Parameter) else (other, one)
    lengths = zip(reversed(x.shape[:-2]), reversed(weight.shape[:-2]), strict=False)
    if any(length not in (1, size) for length, size in lengths):
        return None
    whole = max(batches, key=len)
    kept = tuple(letter for letter in (*rows, *columns) if letter != "k")
    return [(*batches[0], *rows), (*batches[1], *columns)], (*whole, *kept)


def _met(x: Tensor, weight: Tensor, summed: set[int]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The letters of both factors of a product by elements, without dimensions in which one is repeated.

    A dimension of length 1 in both is the activation's, and the parameter's too if it is summed over.
    """
    found: list[tuple[int, ...]] = []
    for one, other in ((x, weight), (weight, x)):
        letters = []
        for letter in range(one.dim() - 1, -1, -1):
            beside = other.shape[-1 - letter] if letter < other.dim() else 1
            if one.shape[-1 - letter] > 1 or (beside == 1 and (one is x or letter in summed)):
                letters.append(letter)
        found.append(tuple(letters))
    return found[0], found[1]
