"""Products of an activation and a parameter that are layers, however they are written."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import secateurs
from secateurs.criteria.unit_reads import unrankable
from secateurs.recovery import repair
from secateurs.recovery.spelled import Product, Spelled
from secateurs.recovery.wide_products import WideProduct
from secateurs.recovery.written_out import WrittenOut

Read = Callable[..., Tensor]
CALLS: dict[str, tuple[Read, list[tuple[int, ...]]]] = {  # what reads (n, 12), and its parameters
    "vector": (lambda a, w: a @ w, [(12,)]),
    "mv": (torch.mv, [(12,)]),
    "addmv": (lambda a, w, c: torch.addmv(c, a, w), [(12,), (1,)]),
    "vector in letters": (lambda a, w: torch.einsum("nd,d->n", a, w), [(12,)]),
    "linear to one value": (nn.functional.linear, [(12,)]),
    "weight first": (lambda a, w: (w @ a.t()).t(), [(3, 12)]),
    "weight first, mm": (lambda a, w: torch.mm(w, a.t()).t(), [(3, 12)]),
    "inner": (torch.inner, [(3, 12)]),
    "tensordot": (lambda a, w: torch.tensordot(a, w, dims=1), [(12, 3)]),
    "tensordot by dimensions": (lambda a, w: torch.tensordot(w, a, dims=([1], [1])).t(), [(3, 12)]),
    "baddbmm": (
        lambda a, w, c: torch.baddbmm(c, a.expand(2, *a.shape), w).transpose(0, 1).flatten(1),
        [(2, 12, 3), (2, 1, 3)],
    ),
}
SUMS: dict[str, tuple[Read, list[tuple[int, ...]]]] = {
    "sum": (lambda a, w: (a * w).sum(-1), [(12,)]),
    "weight first": (lambda a, w: torch.sum(w * a, 1), [(12,)]),
    "a dimension of one": (lambda a, w: torch.mul(a, w).sum(dim=1, keepdim=True), [(1, 12)]),
    "rows": (lambda a, w: (a[:, None] * w).sum(-1), [(3, 12)]),
    "rows of one": (lambda a, w: (a[:, None] * w).sum((-1,)), [(1, 3, 12)]),
    "columns": (lambda a, w: (a[..., None] * w).sum(1), [(12, 3)]),
}


class Net(nn.Module):
    """Twelve units of which two each are the same, and what reads them."""

    def __init__(self, read: Read, shapes: list[tuple[int, ...]], pair: bool = False) -> None:
        super().__init__()
        self.make, self.other = nn.Linear(5, 12), nn.Linear(5, 4) if pair else None
        self.weights = nn.ParameterList(nn.Parameter(torch.randn(shape)) for shape in shapes)
        self.read = read
        with torch.no_grad():
            self.make.weight[6:], self.make.bias[6:] = self.make.weight[:6], self.make.bias[:6]

    def forward(self, x: Tensor) -> Tensor:
        beside = () if self.other is None else (self.other(x),)
        return self.read(self.make(x).relu(), *beside, *self.weights)


def repaired(model: nn.Module, x: Tensor) -> tuple[Any, float, float]:
    """The repair where each unit's double leaves, and the largest error before and after it."""
    graph = secateurs.trace(model, x[:4])
    plan = secateurs.Plan.of(graph, {"make": [0, 7, 2, 9, 4, 11]})
    small = secateurs.apply(model, plan)

    def error() -> float:
        with torch.no_grad():
            return float((model(x) - small(x)).abs().max())

    cut = error()
    return repair(model, small, plan, x.split(50), ridge=1e-10), cut, error()


@pytest.mark.parametrize("name", [*CALLS, *(f"{name}, multiplied" for name in SUMS)])
def test_what_left_is_made_up_for_where_its_double_stays(name: str) -> None:
    torch.manual_seed(0)
    model = Net(*CALLS[name] if name in CALLS else SUMS[name.removesuffix(", multiplied")]).eval()
    done, cut, after = repaired(model, torch.randn(200, 5))
    assert [layer.name for layer in done.layers] == ["weights.0"] and not done.left
    assert after < 1e-4 * cut


@pytest.mark.parametrize("name", CALLS)
def test_their_units_are_ranked(name: str) -> None:
    torch.manual_seed(0)
    model, x = Net(*CALLS[name]).eval(), torch.randn(200, 5)
    graph = secateurs.trace(model, x[:4])
    assert not unrankable(model, graph, x[:4])
    with torch.no_grad():  # of each pair one unit is enough, and the fourth pair's weights are small
        along = next(dim for dim, size in enumerate(model.weights[0].shape) if size == 12)
        model.weights[0].abs_().add_(1)
        model.weights[0].movedim(along, 0)[[3, 9]] *= 0.1
        model.make.bias += 1  # all are at work
    order = secateurs.score(model, graph, "reconstruction", data=list(x.split(50)))["make"].argsort().tolist()
    assert len({unit % 6 for unit in order[6:]}) == 6
    assert order[6] % 6 == 3


@pytest.mark.parametrize("name", [*CALLS, *(f"{name}, multiplied" for name in SUMS)])
def test_steps_give_what_the_call_gives(name: str) -> None:
    model = Net(*CALLS[name] if name in CALLS else SUMS[name.removesuffix(", multiplied")]).eval()
    x = torch.randn(7, 5)
    with WrittenOut() as steps, torch.no_grad():
        given = model(x)
    assert steps.runs == 1
    with torch.no_grad():
        wanted = model(x)
    torch.testing.assert_close(given, wanted, atol=1e-5, rtol=1e-5)
    assert given.stride() == wanted.stride()


def test_products_of_two_activations_are_refitted() -> None:
    torch.manual_seed(0)
    shapes: list[tuple[int, ...]] = [(3, 12, 4), (3,)]
    done, cut, after = repaired(Net(nn.functional.bilinear, shapes, pair=True).eval(), torch.randn(400, 5))
    assert [layer.name for layer in done.layers] == ["weights.0"] and not done.left
    assert after < 1e-3 * cut


@pytest.mark.parametrize(
    "read",
    [
        lambda a, w: (a * w).mul_(2).sum(-1),  # the product has changed
        lambda a, w: (lambda made: (a.add_(1), made.sum(-1))[1])(a * w),  # the activation has
        lambda a, w: (a * w).sum(-1, dtype=torch.float64).float(),
        lambda a, w: (a * w).sum(),
        lambda a, w: (a[:, None] * w[:, None]).sum((1, 2)),  # over what the activation has not, as well
    ],
)
def test_what_is_no_such_sum_runs_as_it_is(read: Read) -> None:
    weight, x = nn.Parameter(torch.randn(12, 12)), torch.randn(12, 12)
    with WrittenOut() as steps, torch.no_grad():
        given = read(x.clone(), weight)
    assert steps.runs == 0
    torch.testing.assert_close(given, read(x.clone(), weight).detach())


def test_what_a_product_was_made_of_is_forgotten_with_it() -> None:
    weight, x = nn.Parameter(torch.randn(12)), torch.randn(7, 12)
    with WrittenOut() as steps, torch.no_grad():
        made = x * weight
        assert len(steps._products) == 1
        del made
        assert not steps._products


def test_sums_that_are_no_products_of_an_activation_and_a_parameter() -> None:
    x, weight = torch.randn(3, 4), nn.Parameter(torch.randn(4))
    assert Product.of((x, x), x) is None and Product.of((weight, weight), x) is None
    assert Product.of((x, nn.Parameter(torch.ones(1))), x) is None and Product.of((x, 2.0), x) is None
    product = Product.of((weight, x), x * weight)
    assert product is not None and product.x is x and product.weight is weight
    assert WideProduct.of_sum(product, (x * weight, 0), {}) is None  # over what the parameter has not
    assert Spelled.of(torch.tensordot, (x, weight), {"dims": "no"}) is None


def test_where_no_weight_reads_what_left_the_repair_says_so() -> None:
    done, cut, after = repaired(Net(lambda a, w: (a - w).abs().sum(-1), [(12,)]).eval(), torch.randn(60, 5))
    assert not done.layers and not done.left and cut == after
    assert str(done).endswith("no weights behind the cut read what left")
