"""Einsum by letters alone: torch's values, the same operators at any length, and heads that one by one go."""

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import secateurs
from secateurs.graph.einsum import einsum
from secateurs.testing import check_model

LENGTHS = {"b": 2, "h": 3, "i": 4, "j": 5, "d": 6, "e": 7}
EQUATIONS = [
    "bhid,bhjd->bhij",
    "bhij,bhjd->bihd",
    "bid,de->bie",
    "bid,hde,hej->bhij",
    "bi,bi->bi",
    "i,j->ji",
    "bidh->bd",
    "bdi,ed->be",
    "ii->i",
    "bibi->bi",
    "bii,ij->b",
    "b...d,ed->b...e",
    "...id,...jd->...ij",
    "...id,jd",
    "hbi, ih",
    "bi,bj,bd->bijd",
    "bij->",
    "b...->b",
]


def operands_of(equation: str, lengths: dict[str, int] = LENGTHS) -> list[Tensor]:
    """Random operands, three dimensions for an ellipsis."""
    spelled = equation.partition("->")[0].replace(" ", "").replace("...", "hij"[:2]).split(",")
    return [torch.randn([lengths[letter] for letter in letters], dtype=torch.float64) for letters in spelled]


@pytest.mark.parametrize("equation", EQUATIONS)
def test_values_are_those_of_torch(equation: str) -> None:
    operands = operands_of(equation)
    torch.testing.assert_close(einsum(equation, *operands), torch.einsum(equation, *operands))
    torch.testing.assert_close(einsum(equation, operands), torch.einsum(equation, *operands))


class _Operators(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if "clone" not in str(func):  # a reshape copies where the layout of memory asks for it
            self.names.append(str(func).replace("_unsafe_view", "view"))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("letter", LENGTHS)
@pytest.mark.parametrize("equation", EQUATIONS)
def test_the_way_does_not_depend_on_lengths(equation: str, letter: str) -> None:
    ways = []
    for lengths in (LENGTHS, {**LENGTHS, letter: 1}):
        operands = operands_of(equation, lengths)
        with _Operators() as seen:
            einsum(equation, *operands)
        ways.append(seen.names)
    assert ways[0] == ways[1]


@pytest.mark.parametrize(
    "call",
    [
        lambda f: f("ij,jk->ik", torch.randn(2, 3), torch.randn(1, 4)),  # a length of 1 is spread
        lambda f: f(torch.randn(2, 3), [0, 1], torch.randn(3, 4), [1, 2], [0, 2]),
    ],
)
def test_what_letters_do_not_decide_is_left_to_torch(call) -> None:
    torch.manual_seed(0)
    ours = call(einsum)
    torch.manual_seed(0)
    torch.testing.assert_close(ours, call(torch.einsum))


@pytest.mark.parametrize("wrong", ["ij,jk", "ij->ik", "ijk->i", "ij->ii", "ij,"])
def test_a_wrong_equation_is_refused_as_torch_refuses_it(wrong: str) -> None:
    with pytest.raises(RuntimeError, match="einsum"):
        einsum(wrong, torch.randn(2, 3))


class TwoHeads(nn.Module):
    """Attention by einsum with two heads, so that a cut to half of them leaves one."""

    def __init__(self) -> None:
        super().__init__()
        self.heads = 2
        self.query, self.key, self.value = nn.Linear(8, 12), nn.Linear(8, 12), nn.Linear(8, 12)
        self.out = nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = (
            layer(x).unflatten(-1, (self.heads, -1)) for layer in (self.query, self.key, self.value)
        )
        weights = torch.einsum("bihd,bjhd->bhij", query, key).softmax(-1)
        return self.out(torch.einsum("bhij,bjhd->bihd", weights, value).flatten(2))


def test_one_of_two_heads_can_go() -> None:
    graph = check_model(TwoHeads().eval(), torch.randn(2, 5, 8))
    assert [group.size for group in graph.groups if group.kind == "head"] == [2]
    model = TwoHeads().eval()
    heads = [group.name for group in graph.groups if group.kind == "head"]
    small = secateurs.apply(model, secateurs.Plan.of(graph, {heads[0]: [1]}))
    assert small.heads == 1 and small.query.out_features == 6
