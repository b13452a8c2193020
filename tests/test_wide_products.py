"""Products with weights of more than two dimensions, as the products with matrices that they are."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import secateurs
from secateurs.criteria.unit_reads import unrankable
from secateurs.recovery import repair
from secateurs.recovery.in_parameter import place_in
from secateurs.recovery.recording import Recorder
from secateurs.recovery.wide_products import WideProduct
from secateurs.recovery.written_out import WrittenOut

WIDE = {
    "bnd,dhk->bnhk": ((2, 7, 5), (5, 3, 4)),
    "bnd,hkd->bhnk": ((2, 7, 5), (3, 4, 5)),
    "bnhk,hkd->bnd": ((2, 7, 3, 4), (3, 4, 5)),
    "bkhn,hkd->dnb": ((2, 4, 3, 7), (3, 4, 5)),
    "ebi,eio->ebo": ((3, 7, 5), (3, 5, 4)),
    "bei,eoi->oeb": ((7, 3, 5), (3, 4, 5)),
    "bnd,edh->benh": ((2, 7, 5), (3, 5, 4)),
    "...d,dhk->...hk": ((2, 7, 5), (5, 3, 4)),
    "bghnd,ghde->bnghe": ((2, 3, 4, 7, 5), (3, 4, 5, 6)),
    "bnd,bnd->bn": ((2, 7, 5), (2, 7, 5)),
    "bnhk,hk->bn": ((2, 7, 3, 4), (3, 4)),
    "bnhk,hk->bhn": ((2, 7, 3, 4), (3, 4)),
}
OTHERS = {
    "bnrs,rqs->bnq": ((2, 7, 3, 4), (3, 5, 4)),  # its own letter lies between those that are summed over
    "bnd,dhk->bnk": ((2, 7, 5), (5, 3, 4)),  # one of its own is summed over
    "bnd,dhk->nhk": ((2, 7, 5), (5, 3, 4)),  # one of the activation
    "bnd,dd->bn": ((2, 7, 5), (5, 5)),  # a diagonal
    "bnd,ddh->bnh": ((2, 7, 5), (5, 5, 3)),
    "bnd,dh->bnh": ((2, 7, 5), (5, 3)),  # a matrix, which needs no other form
}


def product_of(func: Any, *args: Any) -> WideProduct | None:
    return WideProduct.of(func, args, {})


@pytest.mark.parametrize("weight_first", [False, True])
@pytest.mark.parametrize("equation", WIDE)
def test_einsum_gives_the_same(equation: str, weight_first: bool) -> None:
    x, weight = (torch.randn(shape) for shape in WIDE[equation])
    inputs, result = equation.split("->")
    operands = [x, nn.Parameter(weight)]
    if weight_first:
        inputs, operands = ",".join(reversed(inputs.split(","))), operands[::-1]
    for args in ((f"{inputs}->{result}", *operands), (f"{inputs} -> {result}", operands)):
        product = product_of(torch.einsum, *args)
        assert product is not None
        given, wanted = product.run(), torch.einsum(*args)
        torch.testing.assert_close(given, wanted, atol=1e-5, rtol=1e-5)
        assert given.stride() == wanted.stride()  # a view behind it may rely on them


@pytest.mark.parametrize("equation", OTHERS)
def test_what_is_no_such_product_runs_as_it_is(equation: str) -> None:
    x, weight = (torch.randn(shape) for shape in OTHERS[equation])
    assert product_of(torch.einsum, equation, x, nn.Parameter(weight)) is None
    with WrittenOut():
        given = torch.einsum(equation, x, nn.Parameter(weight))
    torch.testing.assert_close(given, torch.einsum(equation, x, weight))


def test_products_of_three_run_as_they_are() -> None:
    x, y, weight = torch.randn(7, 5), torch.randn(7, 5), nn.Parameter(torch.randn(5, 3, 2))
    assert product_of(torch.einsum, "nd,dhk,nd->nhk", x, weight, y) is None
    assert product_of(torch.einsum, "nd,dhk,nd->nhk", [x, weight, y]) is None


def test_two_activations_and_two_parameters_are_no_such_product() -> None:
    x, weight = torch.randn(3, 7, 5), torch.randn(3, 5, 4)
    assert product_of(torch.bmm, x, weight) is None
    assert product_of(torch.bmm, nn.Parameter(x), nn.Parameter(weight)) is None


@pytest.mark.parametrize(
    ("func", "x", "weight"),
    [
        (torch.bmm, (3, 7, 5), (3, 5, 4)),
        (torch.matmul, (2, 3, 7, 5), (3, 5, 4)),
        (torch.matmul, (2, 1, 7, 5), (3, 5, 4)),
        (torch.matmul, (7, 5), (3, 5, 4)),
        (torch.matmul, (5,), (3, 5, 4)),
        (Tensor.__matmul__, (2, 6, 3, 7, 5), (6, 3, 5, 4)),
    ],
)
def test_products_of_matrices_give_the_same(func: Any, x: tuple[int, ...], weight: tuple[int, ...]) -> None:
    args = torch.randn(x), nn.Parameter(torch.randn(weight))
    product = product_of(func, *args)
    assert product is not None
    torch.testing.assert_close(product.run(), func(*args), atol=1e-5, rtol=1e-5)
    assert product.run().stride() == func(*args).stride()


def test_one_matrix_for_several_of_a_batch_runs_as_it_is() -> None:
    assert product_of(torch.matmul, torch.randn(2, 3, 7, 5), nn.Parameter(torch.randn(1, 5, 4))) is None


@pytest.mark.parametrize("equation", WIDE)
def test_dimensions_of_the_parameter_are_sides_of_the_weight(equation: str) -> None:
    """Kernels of the columns and outputs that a place says are those that change with its dimensions."""
    x, shape = WIDE[equation]
    inputs, result = equation.split("->")
    letters = inputs.split(",")[1]

    class Product(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(shape))

        def forward(self, x: Tensor) -> Tensor:
            return torch.einsum(equation, x, self.weight)

    model = Product().eval()
    [reader] = Recorder(model, torch.randn(x), written_out=True).readers.values()
    place = place_in(reader, model.weight)
    assert place is not None and place.first == 0
    summed = {dim for dim, letter in enumerate(letters) if letter not in result}
    assert {*place.reading} == summed and {*place.outputs} == {*range(len(shape))} - summed


class Experts(nn.Module):
    """A mixture of experts with weights for all of them, read in one of several ways."""

    def __init__(self, up: Callable[..., Tensor], turned: bool = False) -> None:
        super().__init__()
        self.first, self.gate, self.last = nn.Linear(6, 12), nn.Linear(12, 4), nn.Linear(12, 3)
        self.up, self.down = nn.Parameter(torch.randn(4, 12, 20)), nn.Parameter(torch.randn(4, 20, 12))
        if turned:
            self.up, self.down = nn.Parameter(torch.randn(4, 20, 12)), nn.Parameter(torch.randn(4, 12, 20))
        self.read = up

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x).relu()
        each = self.read(self.read(x, self.up, 0).relu(), self.down, 1)  # (batch, places, experts, channels)
        mixed = torch.einsum("bned,bne->bnd", each, self.gate(x).softmax(-1))
        return self.last((x + mixed).relu())  # type: ignore[no-any-return]


WAYS: dict[str, tuple[Callable[..., Tensor], bool]] = {
    "einsum": (lambda x, w, second: torch.einsum(("bnd,edh->bneh", "bneh,ehd->bned")[second], x, w), False),
    "outputs first": (
        lambda x, w, second: torch.einsum(("bnd,ehd->bneh", "bneh,edh->bned")[second], x, w), True,
    ),
    "matmul": (
        lambda x, w, second: ((x.transpose(1, 2) if second else x[:, None]) @ w).transpose(1, 2), False,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", WAYS)
def test_experts_are_ranked_and_refitted(name: str) -> None:
    torch.manual_seed(0)
    model, inputs, others = Experts(*WAYS[name]).eval(), torch.randn(60, 8, 6), torch.randn(60, 8, 6)
    graph = secateurs.trace(model, inputs[:2])
    assert not unrankable(model, graph, inputs[:2])
    scores = secateurs.score(model, graph, "reconstruction", data=list(inputs.split(20)))
    (group,) = [each for each in graph.groups if each.size == 20]
    plan = secateurs.Plan.of(graph, {group.name: scores[group.name].argsort()[:6].tolist()})
    small = secateurs.apply(model, plan)

    def missed() -> float:
        with torch.no_grad():
            wanted = model(others)
            return float((small(others) - wanted).square().mean() / wanted.var((0, 1)).mean())

    cut = missed()
    done = repair(model, small, plan, inputs.split(20))
    assert not done.left and done.layers[0].name == "down"
    assert missed() < 0.3 * cut


def test_the_units_that_are_needed_least_leave_first() -> None:
    """Units of one expert's matrix that nothing reads, and copies of others."""
    torch.manual_seed(0)
    model, inputs = Experts(*WAYS["einsum"]).eval(), torch.randn(60, 8, 6)
    with torch.no_grad():
        model.down[:, 3] = 0
        model.up[:, :, 7] = model.up[:, :, 11]
    graph = secateurs.trace(model, inputs[:2])
    (group,) = [each for each in graph.groups if each.size == 20]
    scores = secateurs.score(model, graph, "reconstruction", data=list(inputs.split(20)))[group.name]
    first = scores.argsort()[:2].tolist()
    assert 3 in first and {*first} & {7, 11}
