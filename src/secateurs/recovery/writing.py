"""How layers change: they begin with combinations of the original's weights, and take what a fit has found.

A fit's solution is written so that evaluation gives it at the point. A batch norm behind the layer gets the
statistics of what it then sees.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from secateurs.recovery.chains import Norm
from secateurs.recovery.computed import Computed
from secateurs.recovery.derived import WeightNorm
from secateurs.recovery.fitting import Equations, Link, Solution
from secateurs.recovery.moments import Moments
from secateurs.recovery.passes import Reading
from secateurs.recovery.readers import Reader
from secateurs.recovery.samples import Samples

_TINY = 1e-30


def write(equations: Equations, solution: Solution) -> None:
    """Change the weights, and what holds the constant; evaluation then gives the solution at the point."""
    home = next((link for link in equations.fit.links if link.chain.homes), None)
    start = 0
    for place, link in enumerate(equations.fit.links):
        constant = solution.bias if link is home else torch.zeros_like(solution.bias)
        is_written = False
        if solution.weights:
            columns = slice(start, start + link.reader.columns)
            start += link.reader.columns
            is_written = link.chain.norm is not None
            missing, values = solution.weights[place], solution.parameters.get(place)
            if link.chain.norm is not None:
                _write_with_norm(link, link.chain.norm, missing, constant, equations.missing, columns, values)
            else:
                _write_plainly(link, missing, values)
        if link is home and not is_written:
            _shift(link, constant)


def _write_plainly(link: Link, missing: Tensor, values: Sequence[Tensor] | None) -> None:
    if values is not None:
        _compute_anew(link, values)
        return
    gain = torch.where(link.gain == 0, 1.0, link.gain).view(missing.shape[0], -1, 1)
    _set(link, link.reader.weight.data + link.reader.unfolded(missing / gain.to(missing)))


def begin(link: Link, original: Reader, norm: Norm | None, rows: Tensor, columns: Tensor) -> None:
    """Give a layer combinations of the original's weights, from which its fit goes on.

    Args:
        link: The layer, at a point where `rows` are combinations.
        original: Its call in the original.
        norm: The batch norm behind that, where `rows` combine what the norm gives.
        rows: ``(C, C of the original)``: what it is to give of the original's outputs.
        columns: ``(K, K of the original)``: what it reads of the original's inputs, or combinations of them.
    """
    if norm is not None:
        _begin_with_norm(link, original, norm, rows, columns)
        return
    _set(link, as_cut(link.reader, original, rows, columns))
    if link.reader.bias is not None and original.bias is not None:
        bias = original.bias.detach().double()
        link.reader.bias.data.copy_(rows.to(bias) @ bias)


def as_cut(reader: Reader, original: Reader, rows: Tensor, columns: Tensor) -> Tensor:
    """The weight of a reader that gives some of the original's outputs for some of its inputs.

    Args:
        reader: The reader, with a single group.
        original: Its call in the original.
        rows: ``(C, C of the original)``: the outputs.
        columns: ``(K, K of the original)``: the inputs.
    """
    old = original.matrix()[0].detach().double().unflatten(1, (-1, original.kernel))  # (C, K, kernel)
    new = torch.einsum("ro,oik,ji->rjk", rows.to(old), old, columns.to(old)).flatten(1)
    return reader.unfolded(new[None].to(reader.weight.dtype))


def _begin_with_norm(link: Link, original: Reader, norm: Norm, rows: Tensor, columns: Tensor) -> None:
    """Write what a layer and the norm behind it gave into the layer; its own norm scales that and shifts."""
    own, scale = link.chain.norm, norm.scale
    assert own is not None and own.weight is not None and own.bias is not None and norm.bias is not None
    bias = torch.zeros_like(scale) if original.bias is None else original.bias.detach().double()
    gives = norm.bias.detach().double() + scale * (bias - norm.mean.double())
    rows = rows.to(scale)
    new = as_cut(link.reader, original, rows * scale, columns)
    lengths = link.reader.matrix(new.double())[0].norm(dim=1)
    usual = original.matrix()[0].detach().double().norm(dim=1).mean()
    inner = torch.where(lengths > 0, lengths / usual, 1.0)  # rows are as long as rows are in the original
    shape = [1] * new.dim()
    shape[1 - link.reader.reading_dim] = -1
    _set(link, new / inner.to(new).view(shape))
    if link.reader.bias is not None:
        link.reader.bias.data.zero_()
    own.mean.zero_()
    own.var.fill_(1.0)
    own.weight.data.copy_(inner * (own.var.double() + own.eps).sqrt())
    own.bias.data.copy_(rows @ gives)


def _set(link: Link, weight: Tensor) -> None:
    link.reader.weight.data.copy_(weight)
    if isinstance(link.made_of, WeightNorm):
        link.made_of.take(link.reader.weight)


def _compute_anew(link: Link, values: Sequence[Tensor]) -> None:
    """Give the parameters that a weight is computed from other values, and the weight what they give."""
    assert isinstance(link.made_of, Computed)
    link.made_of.take(values)
    link.reader.weight.data.copy_(link.made_of.of(values))


def _write_with_norm(
    link: Link,
    norm: Norm,
    missing: Tensor,
    constant: Tensor,
    rows: Moments | Samples,
    columns: slice,
    values: Sequence[Tensor] | None,
) -> None:
    """A layer and the batch norm behind it, whose statistics become those of the layer's new outputs.

    The norm is to give ``V x + c``. The layer gets ``W = V / s``, the norm gets the mean and variance of
    ``W x + b``, and such a scale and shift that in evaluation it multiplies by ``s`` and gives ``c`` at
    ``x = 0``. A pass in training mode finds the same statistics, and so computes the same.
    """
    old = link.reader.matrix().double()  # (G, C, K)
    shape = (old.shape[0], -1, 1)
    onward = torch.where(link.gain == 0, 1.0, link.gain)
    whole = norm.scale.view(shape) * old + missing / onward.view(shape)  # V
    if values is None:
        new, inner = _as_long_as_before(whole, old, norm.scale)
        _set(link, link.reader.unfolded(new))
    else:
        _compute_anew(link, values)
        new = link.reader.matrix().double()
        own = (whole * new).sum(2) / new.square().sum(2).clamp(min=_TINY)
        inner = torch.where(link.gain == 0, norm.scale, own.flatten())
    bias = torch.zeros_like(constant) if link.reader.bias is None else link.reader.bias.detach().double()
    assert norm.weight is not None and norm.bias is not None
    gives = norm.bias.detach().double() + norm.scale * (bias - norm.mean.double()) + constant / onward  # c
    mean, var = (each.flatten() for each in rows.given(new, columns))
    norm.mean.copy_(mean + bias)
    norm.var.copy_(var * rows.count / max(rows.count - 1, 1))
    norm.weight.data.copy_(inner * (norm.var.double() + norm.eps).sqrt())
    norm.bias.data.copy_(gives + inner * (norm.mean.double() - bias))


def _as_long_as_before(whole: Tensor, old: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """``W`` and ``s`` of ``V = s W``: rows keep their length, so that weight decay and rate act as before."""
    length, before = whole.norm(dim=2).flatten(), old.norm(dim=2).flatten()
    sign = torch.where(scale < 0, -1.0, 1.0)
    inner = torch.where((length > 0) & (before > 0), sign * length / before, scale)
    inner = torch.where(inner == 0, 1.0, inner)
    return whole / inner.view(old.shape[0], -1, 1), inner


def _shift(link: Link, constant: Tensor) -> None:
    """Add a constant at the point: in the first place that can hold it for every channel, or the best."""
    home, gain = max(link.chain.homes, key=lambda each: int((each[1] != 0).sum()))
    more = torch.where(gain == 0, 0.0, constant / torch.where(gain == 0, 1.0, gain))
    home.data += more.to(home.dtype).view_as(home)


def correct(equations: Equations, solution: Solution, smaller: Tensor, readings: dict[int, Reading]) -> None:
    """Change the smaller network's value at the point, in place, as the new weights would have."""
    fit = equations.fit
    weights, bias = solution.weights, solution.bias
    if fit.others:  # the solution is that of the weight itself
        gain = fit.gains[0].to(bias)
        weights = tuple(each * gain.view(each.shape[0], -1, 1) for each in weights)
        bias = bias * gain
    for part, link in zip(weights, fit.links, strict=False):
        reader = link.reader
        more = readings[link.chain.call].at_point(reader.unfolded(part.to(reader.weight.dtype)))
        smaller += more.to(smaller.dtype)
    shape = [1] * smaller.dim()
    shape[fit.links[0].chain.channel] = len(bias)
    smaller += bias.to(smaller.dtype).view(shape)
