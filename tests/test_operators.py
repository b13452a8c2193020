"""The rarer operators, by family: what rides along is cut exactly, what is told apart by place is locked."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from secateurs.testing import Between, check_rule

SHAPES = {"vector": (3, 4), "sequence": (3, 4, 10), "image": (3, 4, 8, 8), "volume": (2, 4, 4, 4, 4)}


def _places(x: Tensor, count: int) -> Tensor:
    """An index that is spread out along the channels."""
    return (torch.arange(count) % x.shape[2]).expand(x.shape[0], x.shape[1], count)


def _windows_by_strides(x: Tensor) -> Tensor:
    """Overlapping windows of 4 positions as Longformer takes them, by strides of its own."""
    x = x.contiguous()
    size, stride = [*x.shape[:2], x.shape[2] // 2 - 1, 4], [*x.stride()[:2], 2 * x.stride(2), x.stride(2)]
    return x.as_strided(size, stride).mean(-1)


def _mask(x: Tensor) -> Tensor:
    return torch.ones(x.shape[0], x.shape[2], dtype=torch.bool)


def _filled(x: Tensor) -> Tensor:
    """Token embeddings whose places for an image are filled from another table, as language models do."""
    tokens = x.mT
    return tokens.masked_scatter(_mask(x)[..., None], tokens.reshape(-1, x.shape[1])).mT


def _put(x: Tensor) -> Tensor:
    y = torch.zeros_like(x).mT.contiguous()
    y[torch.arange(3), torch.tensor([0, 4, 9])] = x[:, :, 0]
    y[_mask(x)] = x.mT.reshape(-1, x.shape[1])
    return y.mT


def _boxes(x: Tensor) -> Tensor:
    return torch.tensor([[0.0, 1, 1, 6, 5], [1, 0, 2, 4, 7]], dtype=x.dtype)


class Deformed(nn.Module):
    """A deformable convolution, whose offsets are computed from its input."""

    def __init__(self, groups: int = 1) -> None:
        super().__init__()
        self.offset = nn.Conv2d(12, 18, 3, padding=1)
        self.deform = torchvision.ops.DeformConv2d(12, 6, 3, padding=1, groups=groups)

    def forward(self, x: Tensor) -> Tensor:
        return self.deform(x, self.offset(x))


class Bilinear(nn.Module):
    """A bilinear layer that reads its input twice."""

    def __init__(self) -> None:
        super().__init__()
        self.pair = nn.Bilinear(12, 12, 7)

    def forward(self, x: Tensor) -> Tensor:
        return self.pair(x, x.relu())


WINDOWS: dict[str, tuple[Between, str]] = {
    "unfold to columns": (lambda x: F.unfold(x, 3, padding=1), "image"),
    "unfold and fold": (lambda x: F.fold(F.unfold(x, 2, stride=2), (8, 8), 2, stride=2), "image"),
    "overlapping windows": (lambda x: x.unfold(2, 3, 1).mean(-1), "image"),
    "windows of channels": (lambda x: x.unfold(1, 3, 3).mean(-1), "image"),
    "windows by strides": (_windows_by_strides, "sequence"),
    "short time transform": (
        lambda x: (
            torch.stft(x.flatten(0, 1), 4, 2, window=torch.ones(4), return_complex=True)
            .abs()
            .unflatten(0, (3, -1))
        ),
        "sequence",
    ),
    "unpool": (lambda x: F.max_unpool2d(*F.max_pool2d(x, 2, return_indices=True), 2), "image"),
    "unpool 1d": (lambda x: F.max_unpool1d(*F.max_pool1d(x, 2, return_indices=True), 2), "sequence"),
    "unpool 3d": (lambda x: F.max_unpool3d(*F.max_pool3d(x, 2, return_indices=True), 2), "volume"),
    "adaptive max pool": (lambda x: F.adaptive_max_pool2d(x, 3, return_indices=True)[0], "image"),
    "adaptive max pool 1d": (lambda x: F.adaptive_max_pool1d(x, 3), "sequence"),
    "fractional pool": (
        lambda x: F.fractional_max_pool2d(
            x, 2, output_size=3, _random_samples=torch.full((x.shape[0], x.shape[1], 2), 0.5)
        ),
        "image",
    ),
    "lp pool 1d": (nn.LPPool1d(2, 2), "sequence"),
    "sampled on a grid": (
        lambda x: F.grid_sample(
            x,
            F.affine_grid(torch.eye(2, 3).expand(3, 2, 3), [3, 1, 5, 5], align_corners=False),
            align_corners=False,
        ),
        "image",
    ),
}
LOOKUPS: dict[str, tuple[Between, str]] = {
    "gather along space": (lambda x: x.gather(2, _places(x, 5)), "sequence"),
    "gather by keyword": (lambda x: torch.gather(input=x, dim=-1, index=_places(x, 5)), "sequence"),
    "gather by order": (lambda x: torch.take_along_dim(x, x.argsort(2), 2), "sequence"),
    "scatter along space": (lambda x: torch.zeros_like(x).scatter(2, x.argsort(2), x), "sequence"),
    "scatter and add": (
        lambda x: torch.zeros(x.shape[0], x.shape[1], 4).scatter_add(2, x.argsort(2) % 4, x),
        "sequence",
    ),
    "scatter and reduce": (
        lambda x: torch.zeros_like(x).scatter_reduce(2, _places(x, 10), x, "amax"),
        "sequence",
    ),
    "mask over leading dimensions": (lambda x: x.mT[_mask(x)], "sequence"),
    "filled from a source": (_filled, "sequence"),
    "put in place": (_put, "sequence"),
    "put rows": (lambda x: torch.zeros_like(x).index_put((torch.arange(2),), x[:2]), "vector"),
    "add slices": (
        lambda x: torch.zeros(*x.shape[:2], 3).index_add(2, torch.arange(10) % 3, x),
        "sequence",
    ),
    "copy slices": (lambda x: torch.zeros(*x.shape[:2], 12).index_copy(2, torch.arange(10), x), "sequence"),
    "fill slices": (lambda x: x.index_fill(2, torch.tensor([1, 3]), 0.5), "sequence"),
    "select slices": (lambda x: x.index_select(-1, torch.tensor([1, 3, 3])), "sequence"),
    "exchange a slice": (lambda x: x.slice_scatter(x[:, :, 2:4] * 2, 2, 0, 2), "sequence"),
    "exchange an index": (lambda x: x.select_scatter(x[:, :, 2], 2, 0), "sequence"),
    "one hot": (lambda x: F.one_hot(x.argmax(2), 10) + x, "sequence"),
    "buckets": (lambda x: torch.bucketize(x, torch.linspace(-1, 1, 5)) + x, "sequence"),
    "sorted search": (lambda x: torch.searchsorted(torch.linspace(-1, 1, 5), x) + x, "sequence"),
}
ORDERS: dict[str, tuple[Between, str]] = {
    "largest": (lambda x: x.topk(3, 2)[0], "sequence"),
    "largest by keyword": (lambda x: x.topk(k=3, dim=-1).values, "sequence"),
    "sort": (lambda x: x.sort(dim=2)[0] + x.sort(dim=2, stable=True, descending=True)[0], "sequence"),
    "argsort": (lambda x: x.argsort(-1) + x, "sequence"),
    "kth": (lambda x: x.kthvalue(2, dim=2, keepdim=True)[0] + x.median(2, keepdim=True)[0], "sequence"),
    "running extreme": (lambda x: x.cummax(2)[0] + x.cummin(-1).values, "sequence"),
    "running product": (lambda x: x.cumprod(2) + x.cumsum(dim=-1), "sequence"),
}
SHAPED: dict[str, tuple[Between, str]] = {
    "gated half": (lambda x: F.glu(x, 1), "image"),
    "gated half, dimension from the end": (lambda x: F.glu(x, dim=-3), "image"),
    "flip of channels": (lambda x: x.flip(1), "image"),
    "flip added": (lambda x: x + x.flip(1), "image"),
    "repeat each channel": (lambda x: x.repeat_interleave(3, 1), "image"),
    "repeat by counts": (
        lambda x: x.repeat_interleave(torch.tensor([2] * 10), 2, output_size=20),
        "sequence",
    ),
    "tile": (lambda x: x.tile(1, 2, 1), "sequence"),
    "moved": (lambda x: x.movedim(1, -1).movedim(-1, 1), "image"),
    "narrow": (lambda x: x.narrow(2, 1, 3), "image"),
    "squeeze two": (lambda x: x.mean((2, 3), True).squeeze((2, 3)), "image"),
    "diagonal": (lambda x: torch.einsum("bii->bi", x[:, :, None] * x[:, None]), "vector"),
    "diagonal matrix": (lambda x: torch.diag_embed(x).diagonal(0, 1, 2), "vector"),
    "joined with nothing": (lambda x: torch.cat([torch.empty(0), x], 1), "vector"),
    "triangle of space": (lambda x: x.tril() + x.triu(1), "image"),
    "Kronecker product": (lambda x: torch.kron(x, torch.ones(1, 2)), "vector"),
}
NUMBERS: dict[str, tuple[Between, str]] = {
    "Fourier": (lambda x: torch.view_as_real(torch.fft.rfft2(x)).flatten(3), "image"),
    "filtered in frequency": (
        lambda x: torch.fft.irfft2(torch.fft.rfft2(x) * torch.view_as_complex(torch.ones(8, 5, 2)), s=(8, 8)),
        "image",
    ),
    "complex": (
        lambda x: torch.complex(x, x).conj().resolve_conj().abs() + torch.polar(x, x).real,
        "image",
    ),
    "clamped by tensors": (lambda x: x.nan_to_num().clamp(torch.zeros(()), torch.ones(1)), "image"),
    "interpolated": (lambda x: torch.lerp(x, x.relu(), 0.3) + torch.addcmul(x, x, x, value=2), "image"),
    "logic and bits": (lambda x: ((x > 0) & (x < 1)) * (x.floor().int() & 3) + x, "image"),
    "in place of a twin": (lambda x: (x + 0).abs_().sub_(0.5).gt_(0).logical_not_(), "image"),
    "norm of rows": (lambda x: x / x.norm(3, 2, True), "sequence"),
    "sums by keyword": (lambda x: torch.sum(input=x, dim=-1) + x.amax((-1,), keepdim=False), "image"),
    "scalars": (lambda x: x * torch.tensor(2.0).sum() * torch.tensor(3.0).max(), "image"),
}
PRODUCTS: dict[str, tuple[Between, str]] = {
    "bilinear": (Bilinear(), "vector"),
    "batch and bias": (lambda x: torch.baddbmm(x, x, torch.ones(3, 10, 10)), "sequence"),
    "spread out": (lambda x: torch.matmul(torch.ones(6, 10)[None], x.mT).mT, "sequence"),
    "einsum": (lambda x: torch.einsum("bchw,wd->bcdh", x, torch.ones(8, 3)), "image"),
    "einsum with dots": (lambda x: torch.einsum("b...t,td->b...d", x, torch.ones(10, 3)), "sequence"),
}
TORCHVISION: dict[str, tuple[Between, str]] = {
    "patches of boxes": (lambda x: torchvision.ops.roi_align(x, _boxes(x), 3), "image"),
    "pooled boxes": (lambda x: torchvision.ops.roi_pool(x, _boxes(x), 3), "image"),
    "patches by position": (lambda x: torchvision.ops.ps_roi_align(x, _boxes(x), 2), "image"),
    "pooled by position": (lambda x: torchvision.ops.ps_roi_pool(x, _boxes(x), 2), "image"),
    "deformable": (Deformed(), "image"),
    "deformable in groups": (Deformed(groups=3), "image"),
}
NORMS: dict[str, tuple[Between, str]] = {
    "instance norm with statistics": (
        nn.InstanceNorm2d(12, affine=True, track_running_stats=True),
        "image",
    ),
    "instance norm 1d": (nn.InstanceNorm1d(12, affine=True, track_running_stats=True), "sequence"),
    "as many groups as channels": (nn.GroupNorm(12, 12), "image"),
    "layer norm of positions": (nn.LayerNorm(10), "sequence"),
}
FAMILIES = [WINDOWS, LOOKUPS, ORDERS, SHAPED, NUMBERS, PRODUCTS, TORCHVISION, NORMS]
EXACT = {name: case for family in FAMILIES for name, case in family.items()}


@pytest.mark.parametrize("name", EXACT)
def test_what_rides_along_is_cut_exactly(name: str) -> None:
    between, form = EXACT[name]
    check_rule(between, torch.randn(SHAPES[form]))


MIXING: dict[str, tuple[Between, str]] = {
    "distances": (lambda x: torch.cdist(x.mT, x.mT), "sequence"),
    "cosine": (lambda x: F.cosine_similarity(x, x.flip(2), dim=1), "sequence"),
    "distance of pairs": (lambda x: F.pairwise_distance(x, x.relu(), keepdim=True) + x, "vector"),
    "spread of everything": (lambda x: x - x.std(), "image"),
    "norm of everything": (lambda x: x / torch.linalg.vector_norm(x, 3), "image"),
    "running product of channels": (lambda x: x.cumprod(1), "image"),
    "weight norm": (parametrizations.weight_norm(nn.Conv2d(12, 8, 3)), "image"),
    "spectral norm": (parametrizations.spectral_norm(nn.Conv2d(12, 8, 3)), "image"),
}


@pytest.mark.parametrize("name", MIXING)
def test_what_is_computed_across_units_says_so_and_runs(name: str) -> None:
    between, form = MIXING[name]
    check_rule(between, torch.randn(SHAPES[form]), exact=False)


LOCKING: dict[str, tuple[Between, str, str]] = {
    "roll of channels": (lambda x: x.roll(1, 1), "image", "change places"),
    "roll of everything": (lambda x: x.roll(1), "image", "change places"),
    "sort of channels": (lambda x: x.sort(1)[0], "image", "ordered by value"),
    "place of the largest": (lambda x: x.argmax(1)[:, None] + x, "image", "ordered by value"),
    "picked channels": (lambda x: x[:, torch.tensor([0, 5, 3])] + 0, "image", "indexed by a tensor"),
    "gathered channels": (
        lambda x: x.gather(1, x.argsort(1)),
        "sequence",
        "computed places|ordered by value",
    ),
    "picked by mask": (lambda x: x.masked_select(x > -9).view(3, -1), "vector", "values decide"),
    "counted": (lambda x: x * x.nonzero().shape[1], "vector", "values decide"),
    "distinct values": (lambda x: x + x.unique().sum(), "vector", "values are counted"),
    "orthogonal": (parametrizations.orthogonal(nn.Linear(12, 12)), "vector", "matrix decomposition"),
    "triangle of channels": (lambda x: x.mT.tril().mT, "sequence", "triangle"),
    "transform of channels": (lambda x: torch.fft.rfft(x, dim=1).abs(), "sequence", "transformed as a whole"),
    "suppression": (
        lambda x: x.mT[:, torchvision.ops.nms(x[0].mT[:, :4], x[0].mT[:, 4], 0.5)].mT,
        "sequence",
        "single index|values decide",
    ),
}


@pytest.mark.parametrize("name", LOCKING)
def test_what_tells_places_apart_is_locked_with_its_reason(name: str) -> None:
    between, form, reason = LOCKING[name]
    with pytest.raises(AssertionError, match=reason):
        check_rule(between, torch.randn(SHAPES[form]))


ODD_CALLS: dict[str, Any] = {
    "topk": lambda x: torch.topk(input=x, k=1, dim=-1, sorted=False).values,
    "squeeze": lambda x: torch.squeeze(input=x, dim=-1)[..., None],
    "stack": lambda x: torch.stack(tensors=[x, x], dim=-1).sum(dim=-1),
    "split": lambda x: torch.cat(torch.split(x, split_size_or_sections=5, dim=-1), dim=-1),
    "softmax": lambda x: torch.softmax(input=x, dim=-1),
    "flip": lambda x: torch.flip(input=x, dims=[-1]),
    "variance": lambda x: x + torch.var(input=x, dim=-1, keepdim=True),
    "roll": lambda x: torch.roll(input=x, shifts=1, dims=-1),
    "empty": lambda x: x + x[..., :0].sum(-1, keepdim=True),
    "no dimensions": lambda x: x + torch.tensor(3.0).sort().values + torch.tensor(2.0).cumsum(0),
}


@pytest.mark.parametrize("name", ODD_CALLS)
def test_arguments_by_keyword_from_the_end_and_of_no_size(name: str) -> None:
    check_rule(ODD_CALLS[name], torch.randn(3, 4, 10))
