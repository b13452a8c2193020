"""Quick shapes against what torch itself says of real tensors: shape, dtype and strides."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from secateurs.graph.shapes import compute

aten = torch.ops.aten
IMAGE = torch.randn(2, 6, 8, 10)
CASES: dict[str, tuple[Any, tuple[Any, ...]]] = {
    "exp": (aten.exp.default, (IMAGE,)),
    "softmax": (aten._softmax.default, (IMAGE, 1, False)),
    "add": (aten.add.Tensor, (IMAGE, IMAGE)),
    "add, spread out": (aten.add.Tensor, (IMAGE, torch.randn(1, 6, 1, 1))),
    "add a number": (aten.add.Tensor, (IMAGE, 2)),
    "divide by a number": (aten.div.Tensor, (IMAGE, 0.5)),
    "multiply in place": (aten.mul_.Tensor, (IMAGE, 0.5)),
    "mean": (aten.mean.dim, (IMAGE, [-1, 1], True)),
    "sum": (aten.sum.dim_IntList, (IMAGE, [2])),
    "matrix product": (aten.mm.default, (torch.randn(3, 4), torch.randn(4, 5))),
    "batched matrix product": (aten.bmm.default, (torch.randn(2, 3, 4), torch.randn(2, 4, 5))),
    "matrix product and bias": (aten.addmm.default, (torch.randn(5), torch.randn(3, 4), torch.randn(4, 5))),
    "upsampling": (aten.upsample_bilinear2d.default, (IMAGE, [16, 5], False)),
    "nearest": (aten.upsample_nearest2d.default, (IMAGE, [16, 20], 2.0, 2.0)),
}
LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "plain": lambda x: x,
    "channels last": lambda x: x.to(memory_format=torch.channels_last) if x.dim() == 4 else x,
    "a part": lambda x: torch.cat([x, x], 1)[:, : x.shape[1]] if x.dim() > 1 else x,
    "turned": lambda x: x.transpose(-1, -2).contiguous().transpose(-1, -2) if x.dim() > 1 else x,
    "half precision": lambda x: x.half(),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("case", CASES)
def test_a_quick_shape_is_that_of_the_real_result(case: str, layout: str) -> None:
    func, given = CASES[case]
    args = tuple(LAYOUTS[layout](value.clone()) if isinstance(value, Tensor) else value for value in given)
    empty = tuple(
        torch.empty_strided(v.shape, v.stride(), dtype=v.dtype, device="meta") if isinstance(v, Tensor) else v
        for v in args
    )
    real, quick = func(*args), compute(func, empty, {})
    assert (quick.shape, quick.dtype, quick.stride()) == (real.shape, real.dtype, real.stride())


@pytest.mark.parametrize(
    ("func", "args"),
    [
        (aten.mm.default, ((3, 4), (5, 6))),
        (aten.bmm.default, ((2, 3, 4), (1, 4, 5))),
        (aten.addmm.default, ((7,), (3, 4), (4, 5))),
    ],
)
def test_a_product_that_does_not_fit_is_refused(func: Any, args: tuple[tuple[int, ...], ...]) -> None:
    empty = tuple(torch.empty(shape, device="meta") for shape in args)
    with pytest.raises((RuntimeError, ValueError), match=r"size|shape|expand|same"):
        compute(func, empty, {})
