"""The proof where operators mix units: the original with the kept subset gathered, and what it finds out."""

from __future__ import annotations

import sys
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn

import models
import secateurs
from models import build
from secateurs import Plan, VerifyReport
from secateurs.errors import VerifyError
from secateurs.graph.packed import tensors_in
from secateurs.surgery import following, gathered


def seasoned(model: nn.Module) -> nn.Module:
    """With biases and scales that are not those of the start, so that a wrong index shows."""
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        parameter.data.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


def halved(model: nn.Module, inputs: Any) -> tuple[nn.Module, Plan]:
    """The model with about half of all units cut, in no order."""
    graph = secateurs.trace(model, inputs)
    scores = secateurs.score(model, graph, "random")
    plan = secateurs.plan(graph, scores, secateurs.Budget(units=0.6), scope="local")
    return secateurs.apply(model, plan), plan


def proved(model: nn.Module, inputs: Any) -> VerifyReport:
    small, plan = halved(model, inputs)
    report = secateurs.verify(model, small, plan, inputs).raise_if_failed()
    assert report.exact_expected
    assert report.effect > 1e-6
    assert report.max_error <= 1e-9 * report.scale
    return report


# -- toys -----------------------------------------------------------------------------------------


class RmsNorm(nn.Module):
    """A norm written out, which computes in float32 whatever comes in."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)
        return self.weight * wide.to(x.dtype)


class TinyLlama(nn.Module):
    """Two layers with norms written out, attention heads, and a gate."""

    def __init__(self, width: int = 24, heads: int = 3, head_dim: int = 8) -> None:
        super().__init__()
        self.heads, self.head_dim = heads, head_dim
        self.embed = nn.Embedding(11, width)
        self.layers = nn.ModuleList(
            nn.ModuleDict(
                {
                    "before": RmsNorm(width),
                    "q": nn.Linear(width, heads * head_dim, bias=False),
                    "k": nn.Linear(width, heads * head_dim, bias=False),
                    "v": nn.Linear(width, heads * head_dim, bias=False),
                    "o": nn.Linear(heads * head_dim, width, bias=False),
                    "between": RmsNorm(width),
                    "gate": nn.Linear(width, 40, bias=False),
                    "up": nn.Linear(width, 40, bias=False),
                    "down": nn.Linear(40, width, bias=False),
                }
            )
            for _ in range(2)
        )
        self.norm, self.head = RmsNorm(width), nn.Linear(width, 11, bias=False)

    def forward(self, tokens: Tensor) -> dict[str, Tensor]:
        x = self.embed(tokens)
        for layer in self.layers:
            y = layer["before"](x)
            q, k, v = (
                layer[n](y).view(*y.shape[:2], self.heads, self.head_dim).transpose(1, 2) for n in "qkv"
            )
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=0.35)
            x = x + layer["o"](y.transpose(1, 2).flatten(2))
            y = layer["between"](x)
            x = x + layer["down"](F.silu(layer["gate"](y)) * layer["up"](y))
        return {"logits": self.head(self.norm(x))}


class Noise(nn.Module):
    """Draws as many random numbers as there are channels left."""

    def __init__(self) -> None:
        super().__init__()
        self.make, self.read = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.make(x)
        return self.read(x * (1 + torch.rand_like(x)))


class StandardConv(nn.Conv2d):
    """Weights that are standardised over their input planes, written out."""

    def forward(self, x: Tensor) -> Tensor:
        mean = self.weight.mean((1, 2, 3), keepdim=True)
        std = self.weight.std((1, 2, 3), keepdim=True)
        return F.conv2d(x, (self.weight - mean) / (std + 1e-5), self.bias, padding=1)


class SelectiveKernel(nn.Module):
    """Two branches weighed by a softmax over branches, normalised over channels before."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Conv2d(3, 8, 1), nn.Conv2d(3, 8, 3, padding=1)
        self.down, self.up = nn.Linear(8, 6), nn.Linear(6, 16)
        self.read = nn.Conv2d(8, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        both = torch.stack([self.one(x), self.two(x)], 1)
        pooled = both.sum(1).mean((2, 3)).softmax(1)
        share = self.up(F.relu(self.down(pooled))).view(-1, 2, both.shape[2]).softmax(1)
        return self.read((both * share[..., None, None]).sum(1))


class VectorAttention(nn.Module):
    """Activations with activations over channels, and channels against channels."""

    def __init__(self) -> None:
        super().__init__()
        self.make, self.read = nn.Conv1d(3, 12, 1), nn.Conv1d(12, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.make(x)
        x = x @ (x.mT @ x / 12).softmax(-1)
        across = (x @ x.mT).softmax(-1)  # a channel looks at all others
        return self.read(across @ x)


def image(side: int = 8) -> Tensor:
    return torch.randn(2, 3, side, side)


def resnet_with_group_norm() -> nn.Module:
    return torchvision.models.resnet18(norm_layer=partial(nn.GroupNorm, 4), num_classes=5)


def small_swin() -> nn.Module:
    return torchvision.models.SwinTransformer(
        [2, 2], embed_dim=24, depths=[2, 2], num_heads=[2, 4], window_size=[4, 4], num_classes=5
    )


def small_vit() -> nn.Module:
    return torchvision.models.VisionTransformer(
        image_size=32, patch_size=8, num_layers=2, num_heads=4, hidden_dim=32, mlp_dim=48, num_classes=5
    )


def small_convnext() -> nn.Module:
    from torchvision.models.convnext import CNBlockConfig, ConvNeXt

    settings = [CNBlockConfig(16, 24, 2), CNBlockConfig(24, None, 2)]
    return ConvNeXt(settings, layer_scale=0.5, num_classes=5)


MODELS: dict[str, tuple[Callable[[], nn.Module], Callable[[], Any]]] = {
    "Llama": (TinyLlama, lambda: torch.randint(0, 11, (2, 5))),
    "noise": (Noise, image),
    "standardised weights": (
        lambda: nn.Sequential(nn.Conv2d(3, 8, 1), nn.ReLU(), StandardConv(8, 6, 3), nn.Conv2d(6, 4, 1)),
        image,
    ),
    "selective kernel": (SelectiveKernel, image),
    "attention over channels": (VectorAttention, lambda: torch.randn(2, 3, 10)),
    "ResNet with group norm": (resnet_with_group_norm, lambda: image(32)),
    "ViT": (small_vit, lambda: image(32)),
    "ConvNeXt": (small_convnext, lambda: image(32)),
}


@pytest.mark.parametrize("name", MODELS)
def test_a_model_that_mixes_units_is_proved_in_the_second_way(name: str) -> None:
    make, example = MODELS[name]
    torch.manual_seed(0)
    assert proved(seasoned(make()), example()).way == "gathered"


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("vit_tiny_patch16_224", {"img_size": 32, "patch_size": 8, "depth": 2}),
        ("skresnet18", {}),
        ("nf_resnet26", {}),
        ("convnext_atto", {}),
    ],
)
def test_models_of_timm(name: str, settings: dict[str, Any]) -> None:
    timm = pytest.importorskip("timm", reason="timm is not installed")
    torch.manual_seed(0)
    proved(seasoned(timm.create_model(name, num_classes=5, **settings)), image(32))


def test_a_swin_whose_stream_and_heads_shrink_together_is_proved() -> None:
    """Its scale follows from the width of a head, so the width of the stream goes by whole heads."""
    torch.manual_seed(0)
    report = proved(seasoned(small_swin()), image(32))
    assert (report.way, report.unproved) == ("gathered", {})


class EinsumAfterNorm(nn.Module):
    """The norm is gathered, and the einsum must go the same way in both runs of the original."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.last = nn.Linear(6, 10), nn.LayerNorm(10), nn.Linear(10, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.first(x))
        return self.last(torch.einsum("bij,bjc->bic", torch.einsum("bic,bjc->bij", y, y).tanh(), y))


def test_einsum_goes_the_same_way_in_both_runs() -> None:
    torch.manual_seed(0)
    report = proved(seasoned(EinsumAfterNorm()), torch.randn(2, 5, 6))
    assert (report.way, report.unproved) == ("gathered", {})


def test_a_cast_to_a_narrow_float_costs_no_precision() -> None:
    torch.manual_seed(0)
    report = proved(seasoned(TinyLlama()), torch.randint(0, 11, (2, 5)))
    assert report.max_error <= 1e-13 * report.scale


def test_the_comparison_is_with_the_kept_units_computed_by_hand() -> None:
    torch.manual_seed(0)
    net = seasoned(nn.Sequential(nn.Linear(4, 6), nn.LayerNorm(6), nn.Linear(6, 2)))
    x, kept = torch.randn(3, 4), [1, 2, 4, 5]
    plan = Plan.of(secateurs.trace(net, x), {"0": [0, 3]})
    report = secateurs.verify(net, secateurs.apply(net, plan), plan, x)
    with torch.no_grad():
        y = F.layer_norm(net[0](x)[:, kept], (4,), net[1].weight[kept], net[1].bias[kept])
        effect = (F.linear(y, net[2].weight[:, kept], net[2].bias) - net(x)).abs().max()
    assert report.effect == pytest.approx(float(effect), rel=1e-5)


# -- what it finds out ----------------------------------------------------------------------------


def _wrong_channel_kept(model: Any, small: Any) -> None:
    first = model.layers[0]["gate"].weight
    small.layers[0]["gate"].weight.data.copy_(
        first[: len(small.layers[0]["gate"].weight), : small.norm.weight.numel()]
    )


def _norm_sliced_wrongly(model: Any, small: Any) -> None:
    small.norm.weight.data.copy_(model.norm.weight[: small.norm.weight.numel()])


def _heads_change_places(model: Any, small: Any) -> None:
    weight = small.layers[0]["q"].weight.data
    weight.copy_(weight.view(small.heads, -1, weight.shape[1]).flip(0).flatten(0, 1))


def _embedding_rolled(model: Any, small: Any) -> None:
    small.embed.weight.data.copy_(small.embed.weight.roll(1, 1))


@pytest.mark.parametrize(
    "corrupt", [_wrong_channel_kept, _norm_sliced_wrongly, _heads_change_places, _embedding_rolled]
)
def test_a_corrupted_transformer_is_found_out(corrupt: Callable[[Any, Any], None]) -> None:
    torch.manual_seed(0)
    model, tokens = seasoned(TinyLlama()), torch.randint(0, 11, (2, 5))
    small, plan = halved(model, tokens)
    assert secateurs.verify(model, small, plan, tokens).ok
    corrupt(model, small)
    report = secateurs.verify(model, small, plan, tokens)
    assert report.way == "gathered"
    assert not report.ok
    with pytest.raises(VerifyError, match="verify failed: pruned and gathered output differ by"):
        report.raise_if_failed()


def test_a_statistic_over_the_removed_units_too_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """Break the second way: zeros are not absence."""
    net = seasoned(nn.Sequential(nn.Linear(4, 6), nn.LayerNorm(6), nn.Linear(6, 2)))
    x = torch.randn(3, 4)
    plan = Plan.of(secateurs.trace(net, x), {"0": [0, 3]})
    small = secateurs.apply(net, plan)
    monkeypatch.setattr(
        gathered.Gathering, "_on_kept", lambda self, call, args, kwargs: call.operator(*args, **kwargs)
    )
    assert not secateurs.verify(net, small, plan, x).ok


# -- what cannot be gathered ----------------------------------------------------------------------


class NormAndConv(nn.Module):
    """One group behind a layer norm, one behind nothing that mixes."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = nn.Linear(4, 8), nn.LayerNorm(8)
        self.second, self.third = nn.Linear(8, 6), nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.second(self.norm(self.first(x))))
        return self.third(x)


def unproved(monkeypatch: pytest.MonkeyPatch) -> tuple[Any, Any, Plan, Tensor]:
    torch.manual_seed(0)
    model, x = seasoned(NormAndConv()), torch.randn(3, 4)
    plan = Plan.of(secateurs.trace(model, x), {"first": [0, 3], "second": [1]})
    sizes = {k: v for k, v in gathered._SIZE_ARGUMENTS.items() if k is not torch.ops.aten.native_layer_norm}
    monkeypatch.setattr(gathered, "_SIZE_ARGUMENTS", sizes)
    return model, secateurs.apply(model, plan), plan, x


def test_where_an_operator_cannot_be_gathered_the_rest_is_proved(monkeypatch: pytest.MonkeyPatch) -> None:
    report = secateurs.verify(*unproved(monkeypatch))
    assert report.ok
    assert not report.exact_expected
    assert list(report.unproved) == ["first"]
    assert "aten.native_layer_norm.default (layer normalisation) cannot be evaluated" in str(report)
    assert "not proved are 'first'" in str(report)
    assert report.max_error < 1e-12


def test_a_fault_in_the_rest_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    model, small, plan, x = unproved(monkeypatch)
    small.second.weight.data.copy_(model.second.weight[:5, [1, 2, 4, 5, 6, 7]])
    report = secateurs.verify(model, small, plan, x)
    assert list(report.unproved) == ["first"]
    assert not report.ok


def test_nothing_is_traced_where_nothing_is_mixed(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build(models.PlainVgg)
    x = model.example()
    plan = Plan.of(secateurs.trace(model, x), {"conv1": [0]})
    monkeypatch.setattr(following.Follower, "__init__", lambda _: pytest.fail("the original was traced"))
    verifying = sys.modules["secateurs.surgery.verify"]
    monkeypatch.setattr(verifying, "trace", lambda *_: pytest.fail("the original was traced"))
    assert secateurs.verify(model, secateurs.apply(model, plan), plan, x).way == "silenced"


# -- randomness, inputs and outputs ---------------------------------------------------------------


def test_random_numbers_are_drawn_alike_and_those_of_the_caller_stay() -> None:
    model, x = seasoned(Noise()), image()
    graph = secateurs.trace(model, x)
    assert set(graph.mixers.values()) == {"drawing random numbers"}
    state = torch.random.get_rng_state()
    proved(model, x)
    assert torch.equal(torch.random.get_rng_state(), state)


@dataclass
class Boxes:
    """An output that torch's own tree functions take for a leaf."""

    boxes: Tensor
    more: Any = None


PACKINGS: dict[str, Callable[[Tensor, Tensor], Any]] = {
    "tuple": lambda a, b: (a, b),
    "nested": lambda a, b: {"a": [a, {"b": (b,)}]},
    "ordered": lambda a, b: OrderedDict(z=a, a=b),
    "dataclass": lambda a, b: Boxes(a, Boxes(b)),
    "object": lambda a, b: SimpleNamespace(one=a, other=[b], name="x"),
}


class Packed(nn.Module):
    """Gives the features themselves too, so that they must stay."""

    def __init__(self, packing: str) -> None:
        super().__init__()
        self.packing = packing
        self.make, self.inner = nn.Linear(4, 6), nn.Linear(6, 8)
        self.norm, self.read = nn.LayerNorm(8), nn.Linear(8, 2)

    def forward(self, left: Tensor, right: Tensor) -> Any:
        features = self.make(left + right)
        return PACKINGS[self.packing](features, self.read(self.norm(self.inner(features))))


@pytest.mark.parametrize("packing", PACKINGS)
@pytest.mark.parametrize("form", ["tuple", "dict"])
def test_outputs_count_however_they_are_packed(packing: str, form: str) -> None:
    torch.manual_seed(0)
    model, (a, b) = seasoned(Packed(packing)), torch.randn(2, 3, 4)
    inputs: Any = (a, b) if form == "tuple" else {"right": b, "left": a}
    graph = secateurs.trace(model, inputs)
    assert [group.name for group in graph.groups] == ["inner"]
    plan = Plan.of(graph, {"inner": [0, 5]})
    small = secateurs.apply(model, plan)
    assert secateurs.verify(model, small, plan, inputs).ok
    small.make.bias.data[2] += 1
    assert not secateurs.verify(model, small, plan, inputs).ok


def test_tensors_are_found_in_a_fixed_order_and_in_what_holds_itself() -> None:
    one, two, three = torch.zeros(1), torch.zeros(2), torch.zeros(3)
    holder = SimpleNamespace(boxes=Boxes(one, [two]), by_name={"c": three}, number=4)
    holder.itself = holder
    assert [len(tensor) for tensor in tensors_in([holder, one])] == [1, 2, 3, 1]
    assert tensors_in(nn.Linear(2, 2)) == []
    assert np.all([tensors_in(value) == [] for value in (None, 3, "text", int, torch)])
