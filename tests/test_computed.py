"""Weights that a model computes from parameters: which are known, and the best that can be had of them."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations, parametrize, spectral_norm

import secateurs
from secateurs.recovery import Repair, repair
from secateurs.recovery.computed import Computed
from secateurs.recovery.recording import Recorder
from secateurs.recovery.streams import streams_in

IMAGES = torch.randn(40, 3, 9, 9, generator=torch.Generator().manual_seed(1))


class Standardized(nn.Conv2d):
    """Weight standardization: every filter has mean 0 and variance 1."""

    def forward(self, x: Tensor) -> Tensor:
        rows = self.weight.reshape(1, self.out_channels, -1)
        weight = F.batch_norm(rows, None, None, training=True, momentum=0.0, eps=1e-6).reshape_as(self.weight)
        return F.conv2d(x, weight, self.bias, self.stride, self.padding, self.dilation, self.groups)


class Scaled(nn.Conv2d):
    """The same with a learned length of each filter, by arithmetic of its own."""

    def __init__(self, *args: int, **settings: int) -> None:
        super().__init__(*args, **settings)  # type: ignore[arg-type]
        self.gain = nn.Parameter(torch.rand(self.out_channels, 1, 1, 1) / 5 + 0.1)

    def forward(self, x: Tensor) -> Tensor:
        var, mean = torch.var_mean(self.weight, (1, 2, 3), keepdim=True)
        weight = self.gain * (self.weight - mean) / (var + 1e-4).sqrt()
        return F.conv2d(x, weight, self.bias, self.stride, self.padding, self.dilation, self.groups)


class Bounded(nn.Module):
    """A parametrization of one's own: no value is above a half."""

    def forward(self, weight: Tensor) -> Tensor:
        return weight.tanh() / 2


class Turned(nn.Module):
    """One whose values go to other places."""

    def forward(self, weight: Tensor) -> Tensor:
        return weight.T.contiguous()


def bounded(layer: nn.Module) -> nn.Module:
    parametrize.register_parametrization(layer, "weight", Bounded())
    return layer


DRESSES: dict[str, Callable[..., nn.Module]] = {
    "standardized": Standardized,
    "scaled": Scaled,
    "spectral norm": lambda *args, **settings: parametrizations.spectral_norm(nn.Conv2d(*args, **settings)),
    "older spectral norm": lambda *args, **settings: spectral_norm(nn.Conv2d(*args, **settings)),
    "bounded": lambda *args, **settings: bounded(nn.Conv2d(*args, **settings)),
}


class Net(nn.Module):
    """Three convolutions, a sum, and norms or none; one of the convolutions has groups."""

    def __init__(self, conv: Callable[..., nn.Module], *, norms: bool, groups: int = 1) -> None:
        super().__init__()
        norm = nn.BatchNorm2d if norms else nn.Identity
        self.first, self.norm1 = conv(3, 16, 3, padding=1), norm(16)
        self.second, self.norm2 = conv(16, 12, 3, padding=1, groups=groups), norm(12)
        self.third, self.norm3 = conv(12, 12, 1), norm(12)
        self.head = nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm1(self.first(x)).relu()
        x = self.norm2(self.second(x)).relu()
        x = (x + self.norm3(self.third(x))).relu()
        return self.head(x.mean((2, 3)))  # type: ignore[no-any-return]


def ready(model: nn.Module) -> nn.Module:
    """Norms have statistics, and spectral norms the vectors of their largest singular value."""
    for norm in model.modules():
        if isinstance(norm, nn.BatchNorm2d):
            norm.momentum = None
            nn.init.uniform_(norm.weight, 0.5, 1.5)
    model.train()
    with torch.no_grad():
        for _ in range(40):
            model(IMAGES)
    return model.eval()


def cut(model: nn.Module, removed: dict[str, list[int]], *, ridge: float = 1e-6) -> tuple[nn.Module, Repair]:
    plan = secateurs.Plan.of(secateurs.trace(model, IMAGES[:2]), removed)
    small = secateurs.apply(model, plan)
    return small, repair(model, small, plan, IMAGES.split(8), ridge=ridge)


def name_of_first(model: nn.Module) -> str:
    return secateurs.trace(model, IMAGES[:2]).groups[0].name


def made_of(model: nn.Module, place: int = 1) -> Computed:
    record = Recorder(model, IMAGES[:2].to(next(model.parameters())))
    found = record.made_of([*record.readers.values()][place].weight)
    assert isinstance(found, Computed)
    return found


@pytest.mark.parametrize("name", DRESSES)
def test_a_weight_is_computed_again_from_what_it_was_computed_from(name: str) -> None:
    torch.manual_seed(0)
    model = ready(Net(DRESSES[name], norms=False))
    found = made_of(model)
    before = found.of([each.detach().double() for each in found.parameters])
    torch.testing.assert_close(before.float(), found.weight, atol=1e-2, rtol=1e-2)
    other = [each.detach() + 0.1 * torch.rand_like(each) for each in found.parameters]
    wanted = found.of(other)
    found.take(other)
    record = Recorder(model, IMAGES[:2])
    torch.testing.assert_close([*record.readers.values()][1].weight, wanted, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("norms", [False, True])
@pytest.mark.parametrize("name", DRESSES)
def test_what_such_a_layer_is_said_to_miss_is_what_it_misses(name: str, norms: bool) -> None:
    torch.manual_seed(0)
    model = ready(Net(DRESSES[name], norms=norms))
    model.norm2 = nn.Identity() if not norms else model.norm2
    seen: list[Tensor] = []
    handle = None
    small, done = cut(model, {name_of_first(model): [0, 3, 7, 8]})
    layer = next(each for each in done.layers if each.name.startswith("second"))
    assert not done.left and layer.what == "weights"
    assert layer.after is not None and layer.before is not None and layer.after < 0.5 * layer.before
    with torch.no_grad():
        for each in (model, small):
            handle = each.norm2.register_forward_hook(lambda *args: seen.append(args[2].double()))
            each(IMAGES)
            handle.remove()
    wanted, given = seen
    spread = (wanted - wanted.mean((0, 2, 3), keepdim=True)).square().sum()
    assert float((wanted - given).square().sum() / spread) == pytest.approx(layer.after, rel=2e-3)


def lagrange(target: Tensor, spread: Tensor) -> Tensor:
    """The rows of sum 0 that leave least of what is wanted, in closed form."""
    ones = torch.linalg.solve(spread, torch.ones(spread.shape[0], dtype=spread.dtype))
    return target - target.sum(1, keepdim=True) / ones.sum() * ones


def on_a_sphere(target: Tensor, spread: Tensor, length: float) -> Tensor:
    """The rows of sum 0 and one length that leave least, by the root of the secular equation of each."""
    size = spread.shape[0]
    basis = torch.linalg.svd(torch.ones(1, size, dtype=spread.dtype)).Vh[1:]  # of all rows of sum 0
    values, turns = torch.linalg.eigh(basis @ spread @ basis.T)
    shared = target @ spread @ basis.T @ turns
    low = torch.full((len(target), 1), -float(values[0]), dtype=spread.dtype)
    high = low + shared.norm(dim=1, keepdim=True) / length
    for _ in range(200):
        middle = (low + high) / 2
        is_long = (shared / (values + middle)).norm(dim=1, keepdim=True) > length
        low, high = torch.where(is_long, middle, low), torch.where(is_long, high, middle)
    return shared / (values + high) @ turns.T @ basis


@pytest.mark.parametrize("name", ["scaled", "standardized"])
def test_the_weights_are_the_best_of_their_kind(name: str) -> None:
    torch.manual_seed(0)
    model = ready(Net(DRESSES[name], norms=False)).double()
    plain = ready(Net(nn.Conv2d, norms=False)).double()
    images, ridge = IMAGES.double(), 1e-2
    plan = secateurs.Plan.of(secateurs.trace(model, images[:2]), {"first": [0, 3, 7, 8]})
    small = secateurs.apply(model, plan)
    repair(model, small, plan, [images], ridge=ridge)
    with torch.no_grad():  # the same network without such weights, and its free refit
        for one, other in (
            (plain.first, model.first),
            (plain.second, model.second),
            (plain.third, model.third),
        ):
            weights = Recorder(model, images[:2]).readers.values()
            place = [model.first, model.second, model.third].index(other)
            one.weight.copy_([*weights][place].weight)
            one.bias.copy_(other.bias)
        read = F.unfold(small.first(images).relu(), 3, padding=1).movedim(1, -1).flatten(0, -2)
        wanted = model.second(model.first(images).relu()).movedim(1, -1).flatten(0, -2)
        start = Recorder(secateurs.apply(model, plan), images[:2]).readers
        old = [*start.values()][1].weight.flatten(1)
    read, wanted = read - read.mean(0), wanted - wanted.mean(0)
    spread = read.T @ read / len(read)
    spread += ridge * spread.diagonal().mean() * torch.eye(len(spread))
    free = old + torch.linalg.solve(spread, read.T @ (wanted - read @ old.T) / len(read)).T
    size = free.shape[1]
    best = lagrange(free, spread) if name == "scaled" else on_a_sphere(free, spread, size**0.5)
    found = made_of(small).weight.flatten(1)

    def cost(weight: Tensor) -> Tensor:
        return ((weight - free) @ spread * (weight - free)).sum()

    assert float(cost(old)) > 2 * float(cost(best))
    assert float(cost(found) / cost(best)) == pytest.approx(1.0, abs=2e-2)


def test_no_weight_near_by_of_spectral_norm_one_is_better() -> None:
    torch.manual_seed(0)
    model = ready(Net(DRESSES["spectral norm"], norms=False))
    small, done = cut(model, {name_of_first(model): [0, 3, 7, 8]}, ridge=1e-4)
    (after,) = [each.after for each in done.layers if each.name.startswith("second")]
    with torch.no_grad():
        read = F.unfold(small.first(IMAGES).relu(), 3, padding=1).movedim(1, -1).flatten(0, -2).double()
        wanted = model.second(model.first(IMAGES).relu()).movedim(1, -1).flatten(0, -2).double()
        weight = small.second.weight.flatten(1).double()
    assert float(torch.linalg.matrix_norm(weight, 2)) == pytest.approx(1.0, abs=1e-4)
    read, wanted = read - read.mean(0), wanted - wanted.mean(0)

    def misses(weight: Tensor) -> float:
        weight = weight / torch.linalg.matrix_norm(weight, 2)
        return float((wanted - read @ weight.T).square().sum() / wanted.square().sum())

    assert misses(weight) == pytest.approx(after, rel=1e-3)
    free = torch.linalg.lstsq(read, wanted).solution.T
    assert misses(free) > 1.001 * misses(weight)  # it is more than a free fit made shorter
    for _ in range(50):
        assert misses(
            weight + 0.003 * weight.norm() * F.normalize(torch.randn_like(weight), dim=None)
        ) > 0.999 * misses(weight)


@pytest.mark.parametrize("name", ["spectral norm", "older spectral norm"])
def test_training_goes_on_from_the_vectors_that_the_weight_has_now(name: str) -> None:
    torch.manual_seed(0)
    model = ready(Net(DRESSES[name], norms=True))
    small, _ = cut(model, {name_of_first(model): [0, 3, 7, 8]})
    with torch.no_grad():
        evaluated = small.second(torch.ones(1, 12, 4, 4))
        for _ in range(3):
            trained = small.train().second(torch.ones(1, 12, 4, 4))
    torch.testing.assert_close(trained, evaluated, atol=1e-4, rtol=1e-3)


def test_a_convolution_with_groups_is_fitted_group_by_group() -> None:
    torch.manual_seed(0)
    model = ready(Net(Scaled, norms=True, groups=4))
    group = next(each for each in secateurs.trace(model, IMAGES[:2]).groups if each.name == "first#2")
    _, done = cut(model, {group.name: [1, 2]})
    assert not done.left
    (layer,) = [each for each in done.layers if each.name.startswith("second")]
    assert layer.after is not None and layer.before is not None and layer.after < layer.before


def test_few_images_are_told_by_their_rows() -> None:
    """The root of the covariance from few rows gives what the whole covariance does."""
    torch.manual_seed(0)
    model = ready(Net(Scaled, norms=False))
    plan = secateurs.Plan.of(secateurs.trace(model, IMAGES[:2]), {"first": [0, 3, 7, 8]})
    small = secateurs.apply(model, plan)
    few = F.interpolate(IMAGES[:4], (3, 3))
    done = repair(model, small, plan, [few], ridge=1e-4)
    (layer,) = [each for each in done.layers if each.name.startswith("second")]
    assert layer.after is not None and layer.before is not None and layer.after < 0.05 * layer.before


class Layers(nn.Module):
    """Two linear layers; the second one's weight is to be computed."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(6, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.last(self.first(x).relu())
        return out


class Product(Layers):
    """Its weight is a product of two parameters, none of which is alike."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Parameter(torch.randn(8, 3)), nn.Parameter(torch.randn(3, 8))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(self.first(x).relu(), self.left @ self.right)


class Shown(Layers):
    """What the weight is computed from is given as well."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(self.first(x).relu(), self.last.weight.tanh()) + self.last.weight.abs().sum()


@pytest.mark.parametrize("make", [Product, Shown])
def test_what_cannot_follow_is_left_and_said(make: type[Layers]) -> None:
    torch.manual_seed(0)
    model, inputs = make().eval(), torch.randn(20, 6)
    plan = secateurs.Plan.of(secateurs.trace(model, inputs), {"first": [1, 2]})
    small = secateurs.apply(model, plan)
    done = repair(model, small, plan, [inputs])
    assert len(done.left) == 1 and "as it is" in next(iter(done.left.values()))
    left, before = next(iter(done.left)), secateurs.apply(model, plan).state_dict()
    assert torch.equal(small.state_dict()[left], before[left])


def test_rows_that_are_nearly_shut_do_not_hide_where_values_go() -> None:
    torch.manual_seed(0)
    layer = Scaled(30, 40, 1).eval()
    with torch.no_grad():
        layer.gain.copy_(torch.logspace(-5, 0, 40)[torch.randperm(40)].view(-1, 1, 1, 1))
    record = Recorder(layer, torch.randn(1, 30, 2, 2))
    [reader] = record.readers.values()
    assert record.name_of(reader.weight) == "weight"


def test_values_that_go_to_other_places_are_no_such_weight() -> None:
    model = Layers()
    parametrize.register_parametrization(model.last, "weight", Turned())
    record = Recorder(model.eval(), torch.randn(4, 6))
    first, last = record.readers.values()
    assert record.made_of(last.weight) is None and record.made_of(first.weight) is None
    assert record.name_of(last.weight) is None


def test_such_layers_keep_the_channels_of_a_stream() -> None:
    torch.manual_seed(0)
    for conv, count in ((nn.Conv2d, 1), (Scaled, 0)):
        model = nn.Sequential(conv(3, 9, 1), conv(9, 6, 1), nn.Conv2d(6, 9, 1), nn.ReLU(), nn.Conv2d(9, 2, 1))
        inputs = IMAGES[:3]
        with torch.no_grad():
            found = streams_in(model.eval(), inputs, Recorder(model, inputs))
        assert sum(1 in each.writers for each in found) == count


def test_asking_a_weight_for_its_shape_is_no_use_of_it() -> None:
    class Asking(Layers):
        def forward(self, x: Tensor) -> Tensor:
            self.last.weight.size(1)
            return super().forward(x)

    model, inputs = Asking().eval(), torch.randn(20, 6)
    plan = secateurs.Plan.of(secateurs.trace(model, inputs), {"first": [1, 2]})
    assert not repair(model, secateurs.apply(model, plan), plan, [inputs]).left
