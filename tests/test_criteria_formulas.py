"""Each criterion against its formula, computed from what hooks see of plain layers, or by autograd."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn.metrics import mutual_info_score
from torch import Tensor, nn

import models
import secateurs
from models import build
from secateurs.criteria import FlopsPenalty, normalization_names
from secateurs.errors import ScoreError, UnknownNameError
from toy import Toy, conv

READERS = {"conv1": "conv2", "conv2": "conv3", "conv3": "fc1", "fc1": "fc2"}
SIZES = [3, 4, 5]


class PooledThenFlattened(Toy):
    """Reads behind a max pooling, behind an average pooling, and 4 columns of each channel."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2, self.conv3 = conv(3, 6), conv(6, 8), conv(8, 7)
        self.fc1, self.fc2 = nn.Linear(28, 9), nn.Linear(9, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(self.conv1(x).relu(), 2)
        x = F.avg_pool2d(self.conv2(x).relu(), 2)
        return self.fc2(self.fc1(self.conv3(x).relu().flatten(1)).relu())


def batches(seed: int = 0) -> list[tuple[Tensor, Tensor]]:
    torch.manual_seed(seed)
    return [(torch.randn(n, 3, 8, 8).double(), torch.randint(4, (n,))) for n in SIZES]


def seen(model: nn.Module) -> list[dict[str, tuple[Tensor, Tensor]]]:
    """For each batch what each layer's reader reads, and its gradients; each ``(N, units, places)``."""
    found = []
    for inputs, labels in batches():
        kept: dict[str, Tensor] = {}
        handles = []
        for name, reader in READERS.items():

            def keep(_: nn.Module, args: Any, name: str = name, kept: dict[str, Tensor] = kept) -> None:
                args[0].retain_grad()
                kept[name] = args[0]

            handles.append(model.get_submodule(reader).register_forward_pre_hook(keep))
        F.cross_entropy(model(inputs), labels, reduction="sum").backward()
        for handle in handles:
            handle.remove()
        sizes = {name: model.get_submodule(name).weight.shape[0] for name in READERS}
        found.append(
            {
                name: tuple(t.detach().reshape(len(labels), sizes[name], -1) for t in (z, z.grad))
                for name, z in kept.items()
            }
        )
    return found


def expected(model: nn.Module, name: str) -> dict[str, Tensor]:
    """The formula, over all examples at once."""
    values = {}
    for layer in READERS:
        parts = [batch[layer] for batch in seen(model)]
        z, g = torch.cat([part[0] for part in parts]), torch.cat([part[1] for part in parts])
        values[layer] = {
            "mean-activation": lambda z=z, g=g: z.mean((0, 2)),
            "std-activation": lambda z=z, g=g: z.transpose(0, 1).flatten(1).std(1, correction=0),
            "apoz": lambda z=z, g=g: 1 - (z == 0).double().mean((0, 2)),
            "nonzero-count": lambda z=z, g=g: (z != 0).double().sum(2).mean(0),
            "activation": lambda z=z, g=g: z.mean(2).abs().mean(0),
            "gradient": lambda z=z, g=g: g.mean(2).abs().mean(0),
            "taylor": lambda z=z, g=g: (z * g).mean(2).abs().mean(0),
            "taylor-elementwise": lambda z=z, g=g: (z * g).abs().mean((0, 2)),
            "fisher": lambda z=z, g=g: (z * g).sum(2).square().mean(0) / 2,
            "taylor-2019-gate": lambda parts=parts: (
                sum((a * b).sum(2).mean(0).square() for a, b in parts) / len(SIZES)
            ),
        }[name]()
    return values


@pytest.mark.parametrize(
    "name",
    [
        "mean-activation",
        "std-activation",
        "apoz",
        "nonzero-count",
        "activation",
        "gradient",
        "taylor",
        "taylor-elementwise",
        "fisher",
        "taylor-2019-gate",
    ],
)
def test_criteria_on_what_is_read_are_their_formulas(name: str) -> None:
    model = build(PooledThenFlattened).double()
    graph = secateurs.trace(model, model.example().double())
    scores = secateurs.score(
        model, graph, name, data=batches(), loss_fn=F.cross_entropy, normalization="none"
    )
    for layer, values in expected(model, name).items():
        assert torch.allclose(scores[layer], values, rtol=1e-6, atol=1e-12), layer


def test_a_standard_deviation_beside_a_large_mean_keeps_its_digits() -> None:
    net = nn.Sequential(nn.Linear(1, 2), nn.Linear(2, 1))
    net[0].weight.data.fill_(1.0)
    net[0].bias.data.fill_(1000.0)
    inputs = torch.randn(4000, 1)
    scores = secateurs.score(
        net,
        secateurs.trace(net, inputs[:1]),
        "std-activation",
        data=[*inputs.split(500)],
        normalization="none",
    )
    assert scores["0"][0].item() == pytest.approx(inputs.std().item(), rel=1e-3)


def test_the_weight_form_of_2019_is_the_squared_products_of_each_batch() -> None:
    model = build(models.ResidualStream).double()
    graph = secateurs.trace(model, model.example().double())
    scores = secateurs.score(model, graph, "taylor-2019", data=batches(), loss_fn=F.cross_entropy)
    makers = [model.stem.weight, model.blocks[0].out.weight, model.blocks[1].out.weight]
    total = torch.zeros(len(makers[0]), dtype=torch.float64)
    for inputs, labels in batches():
        gradients = torch.autograd.grad(F.cross_entropy(model(inputs), labels), makers)
        for weight, gradient in zip(makers, gradients, strict=True):
            total += (weight.detach() * gradient).square().flatten(1).sum(1) / len(SIZES)
    assert torch.allclose(scores["stem"], total, rtol=1e-9)
    assert all(parameter.grad is None for parameter in model.parameters())


def test_a_gate_behind_the_norm_has_the_norms_own_form() -> None:
    """``(g_gamma gamma + g_beta beta)^2`` of each batch, by the gradients of the norm's parameters."""
    model = build(models.PlainVgg).double().eval()
    graph = secateurs.trace(model, model.example().double())
    scores = secateurs.score(model, graph, "taylor-2019-gate", data=batches(), loss_fn=F.cross_entropy)
    norm, total = model.bn1, torch.zeros(8).double()
    for inputs, labels in batches():
        loss = F.cross_entropy(model(inputs), labels)
        g_gamma, g_beta = torch.autograd.grad(loss, (norm.weight, norm.bias))
        total += (g_gamma * norm.weight + g_beta * norm.bias).detach().square() / len(SIZES)
    assert torch.allclose(scores["conv1"], total, rtol=1e-9)


def test_a_stream_shares_its_gate_among_its_blocks() -> None:
    model = build(models.ResidualStream).double()
    graph = secateurs.trace(model, model.example().double())
    call: dict[str, Any] = {"data": batches()[:1], "loss_fn": F.cross_entropy, "normalization": "none"}
    one = secateurs.score(model, graph, ["taylor-2019-gate", "taylor-signed"], **call)
    signed = one["taylor-signed"]["stem"]
    ratio = one["taylor-2019-gate"]["stem"] / signed.square()
    places = 64  # the mean over space of the one, the sum of the other
    assert torch.allclose(ratio, torch.full_like(ratio, places**2 / 2), rtol=1e-6)  # two blocks


def test_mutual_information_is_that_of_the_quantised_means() -> None:
    model = build(PooledThenFlattened).double()
    graph = secateurs.trace(model, model.example().double())
    scores = secateurs.score(model, graph, "mutual-information", data=batches(), normalization="none")
    labels = torch.cat([labels for _, labels in batches()]).numpy()
    for layer in READERS:
        means = torch.cat([batch[layer][0] for batch in seen(model)]).mean(2).numpy()
        for unit in range(means.shape[1]):
            values = means[:, unit]
            size = np.round(2 * np.log2(np.maximum(np.abs(values), 1e-30))).clip(-16, 7)
            codes = np.where(values == 0, 99, size + 40 * np.sign(values))
            nats = mutual_info_score(labels, codes)
            assert scores[layer][unit].item() == pytest.approx(nats, abs=1e-6)


def test_mutual_information_wants_classes() -> None:
    model = build(PooledThenFlattened)
    graph = secateurs.trace(model, model.example())
    with pytest.raises(ScoreError, match=r"needs the number of a class for each of 2 examples, got \(2, 4\)"):
        secateurs.score(model, graph, "mutual-information", data=[(model.example(), torch.rand(2, 4))])


# -- weights --------------------------------------------------------------------------------------


def test_fpgm_is_the_sum_of_distances_over_all_producers() -> None:
    model = build(models.ResidualStream)
    graph = secateurs.trace(model, model.example())
    makers = [model.stem.weight, model.blocks[0].out.weight, model.blocks[1].out.weight]
    rows = torch.cat([weight.detach().double().flatten(1) for weight in makers], 1)
    total = [sum((row - other).norm() for other in rows) for row in rows]
    assert torch.allclose(secateurs.score(model, graph, "fpgm")["stem"], torch.stack(total), rtol=1e-5)


def test_mean_weight_divides_by_the_number_of_weights() -> None:
    model = build(models.ResidualStream)
    graph = secateurs.trace(model, model.example())
    l1, mean = secateurs.score(model, graph, "l1"), secateurs.score(model, graph, "mean-weight")
    makers = [model.stem.weight, model.blocks[0].out.weight, model.blocks[1].out.weight]
    assert torch.allclose(mean["stem"], l1["stem"] / sum(weight[0].numel() for weight in makers))


def test_bn_scale_is_the_mean_over_the_norms_of_a_unit() -> None:
    model = build(TwoNorms)
    graph = secateurs.trace(model, model.example())
    expected = (model.bn1.weight.abs() + model.bn2.weight.abs()).detach().double() / 2
    scores = secateurs.score(model, graph, "bn-scale")
    assert torch.allclose(scores["a"], expected)
    assert list(scores.missing) == ["fc1"]


class TwoNorms(Toy):
    """One stream with two batch norms, a PReLU whose slopes are no scale, and neurons without a norm."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.bn1, self.act = conv(3, 5), nn.BatchNorm2d(5), nn.PReLU(5)
        self.b, self.bn2 = conv(3, 5), nn.BatchNorm2d(5)
        self.fc1, self.fc2 = nn.Linear(5, 6), nn.Linear(6, 4)
        nn.init.normal_(self.bn1.weight)
        nn.init.normal_(self.bn2.weight)

    def forward(self, x: Tensor) -> Tensor:
        x = self.act(self.bn1(self.a(x))) + self.bn2(self.b(x))
        return self.fc2(self.fc1(x.mean((2, 3))).relu())


# -- the penalty on costs -------------------------------------------------------------------------


def test_the_penalty_on_flops_is_what_a_unit_saves_over_the_mean() -> None:
    model = build(PooledThenFlattened)
    graph = secateurs.trace(model, model.example())
    plain = secateurs.score(model, graph, "l1", normalization="l2")
    penalty = FlopsPenalty(strength=0.5, base="l2")
    found = secateurs.score(model, graph, "l1", normalization=penalty)
    whole = graph.cost().macs
    saved = {g.name: whole - graph.cost({g.name: [g.size - 1]}).macs for g in graph.groups}
    mean = sum(saved[g.name] * g.size for g in graph.groups) / sum(g.size for g in graph.groups)
    for name in plain:
        assert torch.allclose(found[name], plain[name] - 0.5 * saved[name] / mean)
    named = secateurs.score(model, graph, "l1", normalization="flops")
    ours = secateurs.score(model, graph, "l1", normalization=FlopsPenalty(strength=1e-3))
    assert all(torch.equal(named[name], ours[name]) for name in named)


def test_kinds_are_compared_by_their_means_and_one_kind_as_it_is() -> None:
    model = build(PooledThenFlattened)
    graph = secateurs.trace(model, model.example())
    raw = secateurs.score(model, graph, "l2", normalization="none")
    found = secateurs.score(model, graph, "l2")
    channels = torch.cat([raw[name] for name in ("conv1", "conv2", "conv3")]).mean()
    for name in ("conv1", "conv2", "conv3"):
        assert torch.allclose(found[name], raw[name] / channels)
    assert torch.allclose(found["fc1"], raw["fc1"] / raw["fc1"].mean())
    model = build(models.ResidualStream)
    graph = secateurs.trace(model, model.example())
    raw, found = (secateurs.score(model, graph, "l2", normalization=n) for n in ("none", None))
    assert all(torch.equal(raw[name], found[name]) for name in raw)


def test_bad_penalties_are_refused() -> None:
    with pytest.raises(ScoreError, match="strength >= 0 must hold, got strength=-1"):
        FlopsPenalty(strength=-1)
    with pytest.raises(UnknownNameError, match="did you mean 'mean'"):
        FlopsPenalty(base="meen")
    assert normalization_names() == ["flops", "kind", "l1", "l2", "max", "mean", "none"]
