"""Second-order criteria against exact Hessians and against Jacobians, layer by layer."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.functional import hessian, jacobian
from torch.func import functional_call

import models
import secateurs
from models import build
from secateurs.criteria import Batch, Hessian, Obd
from secateurs.criteria.curvature import _Scaled
from secateurs.criteria.layouts import find_layouts
from secateurs.criteria.readings import scoring_mode
from secateurs.criteria.recursion import second_derivatives
from secateurs.errors import ScoreError
from test_criteria_passes import PositionsThenExamplesInRows, SequenceFirst
from toy import Toy


def exact_diagonal(model: nn.Module, name: str, batch: tuple[Tensor, Tensor], loss_fn: Any) -> Tensor:
    """The diagonal of the Hessian of the mean loss in one parameter."""
    inputs, targets = batch
    weight = model.get_parameter(name).detach()

    def loss(flat: Tensor) -> Tensor:
        return loss_fn(functional_call(model, {name: flat.view_as(weight)}, (inputs,)), targets)

    return hessian(loss, weight.flatten()).diagonal().view_as(weight)


def as_batch(model: nn.Module, inputs: Tensor, targets: Tensor, loss_fn: Any) -> Batch:
    return Batch(model=model, inputs=inputs, targets=targets, examples=len(inputs), loss_fn=loss_fn)


@pytest.mark.parametrize("activation", [nn.Tanh(), nn.ReLU(), nn.Sigmoid(), nn.GELU(), nn.ReLU6()])
def test_of_two_layers_and_a_squared_error_the_recursion_is_exact(activation: nn.Module) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 5), activation, nn.Linear(5, 2)).double()
    data = torch.randn(7, 3).double(), torch.randn(7, 2).double()
    graph = secateurs.trace(net, data[0])
    scores = secateurs.score(net, graph, "obd", data=[data], loss_fn=F.mse_loss)
    curvature = exact_diagonal(net, "0.weight", data, F.mse_loss)
    expected = (curvature * net[0].weight.detach().square() / 2).sum(1)
    assert torch.allclose(scores["0"], expected, rtol=1e-9)
    assert scores.remark == "second derivatives by backward recursion"


def chain() -> nn.Sequential:
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1, stride=2),
        nn.BatchNorm2d(4),
        nn.ReLU(inplace=True),
        nn.MaxPool2d(3, stride=1, padding=1),
        nn.Conv2d(4, 6, 3, groups=2, bias=False),
        nn.Softplus(),
        nn.AvgPool2d(2, stride=1),
        nn.Conv2d(6, 5, 1),
        nn.Tanh(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Dropout(0.3),
        nn.Linear(5, 3),
    ).double()
    net[1].running_mean.normal_()
    net[1].running_var.uniform_(0.5, 2)
    nn.init.normal_(net[1].weight)
    return net.eval()


def test_the_recursion_squares_the_jacobian_of_every_layer() -> None:
    net = chain()
    inputs, labels = torch.randn(3, 2, 10, 10).double(), torch.tensor([0, 2, 1])
    wanted: dict[str, Tensor] = {}
    for number in range(3):
        values = [inputs[number : number + 1]]
        for layer in net:
            values.append(layer(values[-1].clone()).detach())
        label = labels[number : number + 1]

        def loss(out: Tensor, label: Tensor = label) -> Tensor:
            return F.cross_entropy(out.view(1, -1), label)

        out = values[-1].flatten()
        g, h = jacobian(loss, out), hessian(loss, out).diagonal()
        for place in reversed(range(len(net))):
            layer, x = net[place], values[place]
            for leaf, weight in layer.named_parameters():

                def of_weight(w: Tensor, layer: nn.Module = layer, leaf: str = leaf, x: Tensor = x) -> Tensor:
                    return functional_call(layer, {leaf: w}, (x,)).flatten()

                squares = jacobian(of_weight, weight.detach()).flatten(1).square()
                name = f"{place}.{leaf}"
                wanted[name] = wanted.get(name, 0) + (squares.T @ h).view_as(weight)
            slopes = jacobian(lambda x, layer=layer: layer(x.clone()).flatten(), x).flatten(1)
            curve = torch.zeros(x.numel()).double()
            if isinstance(layer, (nn.Tanh, nn.Softplus)):
                bent = hessian(lambda x, layer=layer: layer(x).sum(), x.flatten())
                curve = bent.diagonal() * g
            g, h = slopes.T @ g, slopes.square().T @ h + curve
    found = second_derivatives(as_batch(net, inputs, labels, F.cross_entropy), dict(net.named_parameters()))
    assert found is not None
    assert found.keys() == wanted.keys()
    for name, values in wanted.items():
        assert torch.allclose(found[name], values, rtol=1e-7, atol=1e-12), name


class FunctionalChain(Toy):
    """The same operators called as functions and methods."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.fc = nn.Conv2d(3, 6, 3), nn.Linear(6 * 9, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(torch.relu(self.conv(x)), kernel_size=2)
        return self.fc(x.view(x.size(0), -1))


class UsedTwice(Toy):
    """One layer on its own output: two uses of each weight."""

    PIXELS = (5,)

    def __init__(self) -> None:
        super().__init__()
        self.first, self.fc = nn.Linear(5, 5), nn.Linear(5, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.first(self.first(x).relu()).relu())


@pytest.mark.parametrize(
    ("toy", "is_chain"),
    [
        (models.PlainVgg, True),
        (FunctionalChain, True),
        (models.ResidualStream, False),
        (models.DenseBlock, False),
        (models.SqueezeExcite, False),
        (UsedTwice, False),
        (models.LayerNormNet, False),
    ],
)
def test_chains_are_recognised_and_nothing_else(toy: type[Toy], is_chain: bool) -> None:
    model = build(toy).eval()
    inputs = model.example(2)
    batch = as_batch(model, inputs, torch.tensor([0, 1]), F.cross_entropy)
    found = second_derivatives(batch, dict(model.named_parameters()))
    assert (found is not None) is is_chain


class SmallResidual(Toy):
    """A stream of six channels and a block beside it."""

    PIXELS = (5,)

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.inner, self.out = nn.Linear(5, 6), nn.Linear(6, 3), nn.Linear(3, 6)
        self.fc = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).tanh()
        return self.fc(x + self.out(self.inner(x).tanh()))


def test_hutchinsons_estimate_goes_to_the_exact_diagonal() -> None:
    model = build(SmallResidual).double()
    data = model.example(4).double(), torch.tensor([0, 1, 2, 3])
    graph = secateurs.trace(model, data[0])
    scores = secateurs.score(model, graph, Obd(probes=4000), data=[data], loss_fn=F.cross_entropy)
    assert "Hutchinson" in scores.remark
    assert "4000 probe(s)" in repr(scores)
    wanted = {"inner": 0.0, "stem": 0.0}
    for group, makers in (("inner", ["inner"]), ("stem", ["stem", "out"])):
        for maker in makers:
            curvature = exact_diagonal(model, f"{maker}.weight", data, F.cross_entropy)
            wanted[group] += (curvature * model.get_parameter(f"{maker}.weight").detach().square() / 2).sum(1)
        scale = wanted[group].abs().max()
        assert torch.allclose(scores[group], wanted[group], atol=float(0.2 * scale))
    assert all(parameter.requires_grad and parameter.grad is None for parameter in model.parameters())


def test_the_hessian_in_the_gates_is_that_of_scaled_units() -> None:
    model = build(SmallResidual).double()
    inputs, labels = model.example(4).double(), torch.tensor([0, 1, 2, 3])
    graph = secateurs.trace(model, inputs)
    scores = secateurs.score(
        model, graph, Hessian(probes=4000), data=[(inputs, labels)], loss_fn=F.cross_entropy
    )

    def loss(gates: Tensor, x: Tensor, label: Tensor) -> Tensor:  # what inner.weight and fc.weight read
        x = model.stem(x).tanh()
        inner = model.inner(x * gates[:6]).tanh() * gates[6:]
        return F.cross_entropy(model.fc((x + model.out(inner)) * gates[:6]), label)

    curvature = (
        torch.stack(
            [
                hessian(lambda g, n=n: loss(g, inputs[n], labels[n]), torch.ones(9).double()).diagonal()
                for n in range(4)
            ]
        ).mean(0)
        / 2
    )
    scale = float(curvature.abs().max())
    assert torch.allclose(scores["stem"], curvature[:6], atol=0.08 * scale)
    assert torch.allclose(scores["inner"], curvature[6:], atol=0.08 * scale)


@pytest.mark.parametrize(
    "toy", [SequenceFirst, PositionsThenExamplesInRows, models.Conv1dNet, models.FlattenHead]
)
def test_each_example_has_gates_of_its_own(toy: type[Toy]) -> None:
    model = build(toy).double()
    inputs, labels = model.example(3).double(), torch.tensor([0, 1, 2])
    graph = secateurs.trace(model, inputs[:1])
    cpu = torch.device("cpu")

    def slopes(x: Tensor, y: Tensor) -> Tensor:
        layouts = find_layouts(model, graph, cpu, x, len(x)) if len(x) > 1 else {}
        batch = Batch(
            model=model, inputs=x, targets=y, examples=len(x), loss_fn=F.cross_entropy, layouts=layouts
        )
        scaled = _Scaled(graph, cpu, batch)
        with scaled:
            out = batch.outputs()
        loss = F.cross_entropy(out.reshape(len(x), -1), y, reduction="sum")
        return torch.autograd.grad(loss, scaled.gates)[0]

    with scoring_mode(model):
        together = slopes(inputs, labels)
        apart = torch.cat([slopes(inputs[n : n + 1], labels[n : n + 1]) for n in range(3)])
    assert torch.allclose(together, apart, rtol=1e-9, atol=1e-12)
    assert together[:, :-1].abs().max() > 1e-6


def test_probes_are_at_least_one() -> None:
    with pytest.raises(ScoreError, match="probes >= 1 must hold, got probes=0"):
        Obd(probes=0)
