"""Einsum in steps that lengths do not choose.

``torch.einsum`` looks at lengths: a dimension of length 1 is left out of the product, and with `opt_einsum`
installed the order of the products is planned by lengths, too. A cut that leaves one head would then take
another way than the trace did. Here letters alone decide, so that a model takes the same way at any length.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor

Letter: TypeAlias = str | int  # integers are the dimensions that an ellipsis stands for, from the last


@dataclass(frozen=True, slots=True)
class _Term:
    """An operand and the letters of its dimensions."""

    value: Tensor
    letters: tuple[Letter, ...]

    def length(self, letter: Letter) -> int:
        """The length of a dimension."""
        return self.value.shape[self.letters.index(letter)]


def einsum(*args: Any) -> Tensor:
    """What ``torch.einsum`` returns, computed pair by pair from the left, in steps that letters decide.

    Args:
        *args: What ``torch.einsum`` takes. What is left to it: an equation that it refuses, letters by
            numbers, and a letter whose length is 1 in one operand and more in another.

    Example:
        >>> one, two = torch.randn(2, 3, 4), torch.randn(2, 4, 5)
        >>> torch.allclose(einsum("bij,bjk->bik", one, two), one @ two, atol=1e-6)
        True
    """
    read = _read(args)
    if read is None:
        return torch.einsum(*args)
    (term, *others), result = read
    for place, other in enumerate(others):
        later = {letter for each in others[place + 1 :] for letter in each.letters}
        term = _product(term, other, later | set(result))
    term = _summed(term, set(result))
    return term.value.permute([term.letters.index(letter) for letter in result])


def letters_of(args: tuple[Any, ...]) -> tuple[list[tuple[Letter, ...]], tuple[Letter, ...]] | None:
    """The letters of each operand and of the result; None where torch must see to it.

    Args:
        args: What ``torch.einsum`` takes.

    Example:
        >>> letters_of(("...i,oi", torch.zeros(2, 3, 4), torch.zeros(5, 4)))
        ([(1, 0, 'i'), ('o', 'i')], (1, 0, 'o'))
    """
    read = _read(args)
    return None if read is None else ([term.letters for term in read[0]], read[1])


def factors_of(args: tuple[Any, ...]) -> tuple[Tensor, Tensor] | None:
    """Both operands as batches of matrices that are multiplied; None unless they sum over one dimension.

    Args:
        args: What ``torch.einsum`` takes.

    Returns:
        ``(..., n, d)`` and ``(..., m, d)``.

    Example:
        >>> one, two = factors_of(("bihd,bjhd->bhij", torch.zeros(2, 3, 4, 5), torch.zeros(2, 7, 4, 5)))
        >>> one.shape, two.shape
        (torch.Size([2, 4, 3, 5]), torch.Size([2, 4, 7, 5]))
    """
    read = _read(args)
    if read is None or len(read[0]) != 2:
        return None
    (left, right), result = read
    both = [letter for letter in left.letters if letter in right.letters]
    batch, inner = ([each for each in both if (each in result) == kept] for kept in (True, False))
    rows, columns = ([each for each in term.letters if each not in both] for term in (left, right))
    if len(inner) != 1 or not {*rows, *columns} <= {*result}:
        return None
    return _matrix(left, batch, rows, inner), _matrix(right, batch, columns, inner)


def _read(args: tuple[Any, ...]) -> tuple[list[_Term], tuple[Letter, ...]] | None:
    """The terms and the letters of the result; None where torch must see to it."""
    operands = args[1] if len(args) == 2 and isinstance(args[1], (list, tuple)) else args[1:]
    if not operands or not isinstance(args[0], str):
        return None
    inputs, arrow, output = args[0].replace(" ", "").partition("->")
    spelled = inputs.split(",")
    if len(spelled) != len(operands):
        return None
    each = [_letters(text, operand.dim()) for text, operand in zip(spelled, operands, strict=True)]
    terms = [
        _diagonal(_Term(operand, letters))
        for operand, letters in zip(operands, each, strict=True)
        if len(letters) == operand.dim()
    ]
    if len(terms) != len(operands) or not _agree(terms):
        return None
    result = _letters(output, None, terms) if arrow else _implied(each)
    known = {letter for term in terms for letter in term.letters}
    return (terms, result) if known.issuperset(result) and len(set(result)) == len(result) else None


def _letters(text: str, dims: int | None, terms: Sequence[_Term] = ()) -> tuple[Letter, ...]:
    """The letters of an operand of so many dimensions, or of the result of some terms."""
    before, dots, after = text.partition("...")
    hidden = [letter for term in terms for letter in term.letters if isinstance(letter, int)]
    count = max(hidden, default=-1) + 1 if dims is None else dims - len(before) - len(after)
    return (*before, *(reversed(range(count)) if dots else ()), *after)


def _implied(each: Sequence[tuple[Letter, ...]]) -> tuple[Letter, ...]:
    """The letters of a result that is not spelled: what an ellipsis stands for, then what occurs once."""
    every = [letter for letters in each for letter in letters]
    hidden = sorted({letter for letter in every if isinstance(letter, int)}, reverse=True)
    return (
        *hidden,
        *sorted(letter for letter in every if isinstance(letter, str) and every.count(letter) == 1),
    )


def _agree(terms: Sequence[_Term]) -> bool:
    lengths: dict[Letter, int] = {}
    return all(
        lengths.setdefault(letter, term.length(letter)) == term.length(letter)
        for term in terms
        for letter in term.letters
    )


def _diagonal(term: _Term) -> _Term:
    """A term in which no letter occurs twice."""
    value, letters = term.value, list(term.letters)
    for letter in dict.fromkeys(letters):
        while letters.count(letter) > 1:
            first = letters.index(letter)
            second = letters.index(letter, first + 1)
            value = value.diagonal(0, first, second)
            letters = [*letters[:first], *letters[first + 1 : second], *letters[second + 1 :], letter]
    return _Term(value, tuple(letters))


def _summed(term: _Term, kept: set[Letter]) -> _Term:
    """A term summed over the letters that nothing else needs."""
    gone = [place for place, letter in enumerate(term.letters) if letter not in kept]
    if not gone:
        return term
    return _Term(term.value.sum(gone), tuple(letter for letter in term.letters if letter in kept))


def _product(left: _Term, right: _Term, needed: set[Letter]) -> _Term:
    """Two terms as one: a matrix product where a letter is summed over, else a product by elements."""
    left, right = _summed(left, needed | set(right.letters)), _summed(right, needed | set(left.letters))
    both = [letter for letter in left.letters if letter in right.letters]
    batch = [letter for letter in both if letter in needed]
    inner = [letter for letter in both if letter not in needed]
    rows = [letter for letter in left.letters if letter not in both]
    columns = [letter for letter in right.letters if letter not in both]
    letters = (*batch, *rows, *columns)
    if not inner:
        return _Term(_aligned(left, letters) * _aligned(right, letters), letters)
    value = torch.matmul(_matrix(left, batch, rows, inner), _matrix(right, batch, inner, columns))
    value = _parted(value, len(batch) + 1, [right.length(letter) for letter in columns])
    return _Term(_parted(value, len(batch), [left.length(letter) for letter in rows]), letters)


def _aligned(term: _Term, letters: Sequence[Letter]) -> Tensor:
    """The dimensions of a term in the order of the letters, with ones where it has none."""
    value = term.value.permute([term.letters.index(letter) for letter in letters if letter in term.letters])
    for place, letter in enumerate(letters):
        if letter not in term.letters:
            value = value.unsqueeze(place)
    return value


def _matrix(
    term: _Term, batch: Sequence[Letter], rows: Sequence[Letter], columns: Sequence[Letter]
) -> Tensor:
    """A term as a batch of matrices: each part of its letters but the first one dimension."""
    value = term.value.permute([term.letters.index(letter) for letter in (*batch, *rows, *columns)])
    for place, part in enumerate((rows, columns), len(batch)):
        value = value.flatten(place, place + len(part) - 1) if part else value.unsqueeze(place)
    return value


def _parted(value: Tensor, place: int, lengths: Sequence[int]) -> Tensor:
    """A dimension as those that it was made of; left out where it was made of none."""
    return value.unflatten(place, lengths) if lengths else value.squeeze(place)
