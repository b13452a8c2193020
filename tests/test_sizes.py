"""Integers that a model's own code holds, reads off shapes and computes with."""

from __future__ import annotations

import copy
import functools
import math
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import library_models
import secateurs
from secateurs import Budget, Graph, Plan
from secateurs.errors import PlanError
from secateurs.graph import dry_run
from secateurs.graph.counts import CountConstraint, Counted
from secateurs.graph.expressions import Attribute, Constant, Length, Operation, in_words, solve
from secateurs.graph.integers import Book, Traced
from secateurs.graph.labels import Dim
from secateurs.graph.memos import memos_opened
from secateurs.graph.settling import CountSystem


class WidthOverHeads(nn.Module):
    """``C // self.num_heads`` is computed in `forward`: the width of the stream is heads x head dimension."""

    def __init__(self, width: int = 24, heads: int = 4, blocks: int = 2) -> None:
        super().__init__()
        self.heads = heads
        self.embed, self.head = nn.Linear(5, width), nn.Linear(width, 3)
        self.qkv = nn.ModuleList(nn.Linear(width, 3 * width) for _ in range(blocks))
        self.proj = nn.ModuleList(nn.Linear(width, width) for _ in range(blocks))

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        batch, length, width = x.shape
        for qkv, proj in zip(self.qkv, self.proj, strict=True):
            each = qkv(x).reshape(batch, length, 3, self.heads, width // self.heads)
            q, k, v = each.permute(2, 0, 3, 1, 4).unbind(0)
            weights = (q @ k.transpose(-2, -1) * 0.4).softmax(-1)
            x = x + proj((weights @ v).transpose(1, 2).reshape(batch, length, width))
        return self.head(x.mean(1))


def half(model: nn.Module, inputs: Any, share: float = 0.5, **options: Any) -> tuple[Graph, Plan, nn.Module]:
    """Cut a model by a random ranking, with the proof."""
    graph = secateurs.trace(model, inputs)
    scores = secateurs.score(model, graph, "random")
    plan = secateurs.plan(graph, scores, Budget(units=share), scope="local", **options)
    small = secateurs.apply(model, plan)
    assert secateurs.verify(model, small, plan, inputs).raise_if_failed().exact_expected
    return graph, plan, small


def kept(plan: Plan, graph: Graph) -> dict[str, int]:
    left = {group.name: group.size for group in graph.groups}
    return left | {cut.name: cut.kept for cut in plan.groups}


def test_the_width_of_a_stream_stays_heads_times_head_dimension() -> None:
    model = WidthOverHeads().eval()
    graph, plan, small = half(model, torch.randn(2, 7, 5))
    assert {group.kind for group in graph.groups} == {"neuron", "head", "head_dim"}
    left = kept(plan, graph)
    assert left == {"embed": 12, "qkv.0": 4, "qkv.0#2": 3, "qkv.1": 4, "qkv.1#2": 3}
    assert small.heads == 4
    assert plan.after.params < 0.4 * plan.before.params


@pytest.mark.parametrize("share", [0.9, 0.6, 0.3, 0.1])
def test_every_budget_gives_counts_that_agree(share: float) -> None:
    half(WidthOverHeads().eval(), torch.randn(2, 7, 5), share)


def test_heads_are_cut_with_the_stream_where_they_are_named() -> None:
    graph, plan, small = half(WidthOverHeads().eval(), torch.randn(2, 7, 5), kinds={"neuron", "head"})
    assert kept(plan, graph) == {"embed": 12, "qkv.0": 2, "qkv.0#2": 6, "qkv.1": 2, "qkv.1#2": 6}
    assert small.heads == 2


def test_a_cut_by_hand_whose_counts_do_not_agree_is_refused() -> None:
    graph = secateurs.trace(WidthOverHeads().eval(), torch.randn(2, 7, 5))
    with pytest.raises(PlanError, match=r"the counts of 'embed', .* do not fit together: forward computes"):
        Plan.of(graph, {"embed": [0, 1]})


def test_a_smaller_budget_never_costs_more() -> None:
    model, inputs = WidthOverHeads().eval(), torch.randn(2, 7, 5)
    graph = secateurs.trace(model, inputs)
    scores = secateurs.score(model, graph, "l2")
    macs = [
        secateurs.plan(graph, scores, Budget(macs=share)).after.macs for share in (0.9, 0.7, 0.5, 0.3, 0.2)
    ]
    assert macs == sorted(macs, reverse=True)
    assert macs[-1] <= 0.2 * graph.cost().macs


class UnequalWidths(nn.Module):
    """A projection is made only where two sizes differ; a cut of half would make them equal."""

    def __init__(self) -> None:
        super().__init__()
        self.inside, self.outside = 6, 12
        self.conv, self.proj, self.head = nn.Linear(6, 12), nn.Linear(6, 12), nn.Linear(12, 2)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x).relu()
        if self.inside != self.outside:
            x = self.proj(x)
        return self.head(x + y.view(-1, self.outside))


def test_a_comparison_comes_out_as_it_did() -> None:
    model, inputs = UnequalWidths(), torch.randn(3, 6)
    graph, plan, small = half(model, inputs)
    assert kept(plan, graph) == {"conv": 7}
    assert small(inputs).shape == (3, 2)
    with pytest.raises(PlanError, match=r"forward would take another path, at inside == outside"):
        Plan.of(graph, {"conv": range(6)})


class NumbersFromLengths(nn.Module):
    """Lengths used as numbers, in four ways; what they scale has to keep its length."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.way = way
        self.make, self.read, self.free = nn.Linear(4, 12), nn.Linear(12, 6), nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.make(x)
        if self.way == "root":
            x = x / math.sqrt(x.shape[-1])
        elif self.way == "power":
            x = x * x.size(-1) ** -0.5
        elif self.way == "integer":
            x = x / x.shape[1]
        else:
            x = x / torch.sqrt(torch.tensor(x.size(-1), dtype=torch.float32))
        return self.free(self.read(x).relu())


@pytest.mark.parametrize("way", ["root", "power", "integer", "tensor"])
def test_a_length_that_is_used_as_a_number_stays(way: str) -> None:
    graph = secateurs.trace(NumbersFromLengths(way), torch.randn(3, 4))
    assert [group.name for group in graph.groups] == ["read"]
    (lock,) = (each for each in graph.locked if each.parameter == "make.weight" and each.dim == 0)
    assert "number" in lock.reason and "12" in lock.reason
    assert lock.source.endswith("in forward")


class HeadScaleFromStream(WidthOverHeads):
    """The scale is computed from the width of a head, so the width stays and whole heads go."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        batch, length, width = x.shape
        each = self.qkv[0](x).reshape(batch, length, 3, self.heads, width // self.heads)
        q, k, v = each.permute(2, 0, 3, 1, 4).unbind(0)
        weights = (q * (width // self.heads) ** -0.5 @ k.transpose(-2, -1)).softmax(-1)
        return self.head(self.proj[0]((weights @ v).transpose(1, 2).reshape(batch, length, width)).mean(1))


def test_a_scale_from_the_width_of_a_head_leaves_whole_heads_to_cut() -> None:
    graph, plan, _ = half(HeadScaleFromStream(blocks=1).eval(), torch.randn(2, 7, 5))
    assert kept(plan, graph) == {"embed": 12, "qkv.0": 2, "qkv.0#2": 6, "proj.0": 12}


@dataclass
class Settings:
    width: int = 8


class SharedSettings(nn.Module):
    """Two layers read one configuration object; only one of them is cut."""

    def __init__(self) -> None:
        super().__init__()
        settings = Settings()
        self.first, self.second = ReadsSettings(settings), ReadsSettings(settings)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x))


class ReadsSettings(nn.Module):
    def __init__(self, settings: Settings) -> None:
        super().__init__()
        self.settings = settings
        self.up, self.down = nn.Linear(4, 2 * settings.width), nn.Linear(settings.width, 4)

    def forward(self, x: Tensor) -> Tensor:
        gate, value = self.up(x).split([self.settings.width, self.settings.width], -1)
        return self.down(torch.sigmoid(gate) * value)


def test_a_configuration_that_layers_share_changes_for_one_of_them() -> None:
    model, inputs = SharedSettings(), torch.randn(3, 4)
    graph = secateurs.trace(model, inputs)
    plan = Plan.of(graph, {"first.up": [0, 2, 5]})
    small = secateurs.apply(model, plan)
    secateurs.verify(model, small, plan, inputs).raise_if_failed()
    assert (small.first.settings.width, small.second.settings.width) == (5, 8)
    assert model.first.settings is model.second.settings and model.first.settings.width == 8


class FormulaAttribute(nn.Module):
    """An attribute that is only ever stated inside a formula: ``3 * self.width``."""

    def __init__(self) -> None:
        super().__init__()
        self.width = 4
        self.make, self.read = nn.Linear(5, 12), nn.Linear(12, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.read(self.make(x).relu().view(-1, 3 * self.width))


def test_an_attribute_inside_a_formula_is_solved_for() -> None:
    graph, plan, small = half(FormulaAttribute(), torch.randn(2, 5))
    assert kept(plan, graph) == {"make": 6}
    assert small.width == 2 and not plan.written
    model, inputs = FormulaAttribute(), torch.randn(2, 5)
    eleven = Plan.of(secateurs.trace(model, inputs), {"make": [0]})  # no multiple of three
    other = secateurs.apply(model, eleven)
    assert [size.text for size in eleven.written] == ["3 * self.width"] and other.width == 4
    secateurs.verify(model, other, eleven, inputs).raise_if_failed()


class Ranges(nn.Module):
    """Ranges that end at an attribute, at a length, at a literal, and are counted from the end."""

    def __init__(self) -> None:
        super().__init__()
        self.near = 4
        self.make = nn.ModuleList(nn.Linear(3, 10) for _ in range(4))
        self.read = nn.ModuleList(nn.Linear(width, 2) for width in (4, 6, 5, 5, 3, 7, 8))

    def forward(self, x: Tensor) -> Tensor:
        a, b, c, d = (make(x).relu() for make in self.make)
        middle = b.shape[1] // 2
        parts = (a[:, : self.near], a[:, self.near :], b[:, :middle], b[:, middle:], c[:, :3], c[:, 3:])
        last = d[:, -8:]
        return sum(read(part) for read, part in zip(self.read, (*parts, last), strict=True))


def test_ranges_are_cut_where_their_ends_can_follow() -> None:
    graph, plan, small = half(Ranges(), torch.randn(2, 3))
    assert [(group.name, group.size) for group in graph.groups] == [
        ("make.0", 4), ("make.0#2", 6), ("make.1", 5), ("make.2", 3), ("make.2#2", 7), ("make.3", 2),
        ("make.3#2", 8),
    ]  # fmt: skip
    assert small.near == 2
    assert {size.text for size in plan.written} == {"3", "8"}


class RangesOfRows(nn.Module):
    """Experts whose rows lie together, so that torch's kernel asks for rows of whole 16 bytes."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.make, self.read = (nn.Linear(*sides, dtype=dtype) for sides in ((5, 32), (24, 2)))
        self.up = nn.Parameter(torch.randn(3, 48, 32, dtype=dtype) / 6)
        self.down = nn.Parameter(torch.randn(3, 48, 24, dtype=dtype) / 7)

    def forward(self, x: Tensor) -> Tensor:
        ends = torch.tensor([2, 3, 8], dtype=torch.int32)
        hidden = F.grouped_mm(self.make(x), self.up.transpose(1, 2), offs=ends).relu()
        return self.read(F.grouped_mm(hidden, self.down, offs=ends))


@pytest.mark.parametrize(("dtype", "block"), [(torch.float32, 4), (torch.bfloat16, 8)])
def test_a_kernel_that_asks_for_whole_blocks_of_bytes_gets_them(dtype: torch.dtype, block: int) -> None:
    model, x = RangesOfRows(dtype).eval(), torch.randn(8, 5, dtype=dtype)
    graph = secateurs.trace(model, x)
    assert {group.name: group.size for group in graph.groups} == {"make": 32, "up": 48, "down": 24}
    assert f"a length of 48, which has to stay a multiple of {block}" in {c.reason for c in graph.constraints}
    for share in (0.9, 0.7, 0.37):
        plan = secateurs.plan(graph, secateurs.score(model, graph, "l2"), secateurs.Budget(macs=share))
        assert all(count % block == 0 for count in kept(plan, graph).values())
        small = secateurs.apply(model, plan)
        assert small(x).shape == (8, 2)
        secateurs.verify(model, small, plan, x).raise_if_failed()
    with pytest.raises(PlanError, match=f"multiple of {block}"):
        secateurs.apply(model, Plan.of(graph, {"up": [0]}))


def test_memoised_functions_are_put_back_and_keep_their_contents() -> None:
    memo = library_models._memoised_parts
    memo.cache_clear()
    memo((2, 12), 3)
    model = library_models.MemoisedSizes().eval()
    secateurs.trace(model, model.example())
    assert library_models._memoised_parts is memo
    misses = memo.cache_info().misses
    assert memo((2, 12), 3) == (3, 4) and memo.cache_info().misses == misses
    with pytest.raises(ValueError, match="of the model's own"), memos_opened(model):
        assert library_models._memoised_parts is not memo
        raise ValueError("an error of the model's own")
    assert library_models._memoised_parts is memo


class MemoisedMethod(library_models.MemoisedSizes._Layer):
    """The sizes come from a memoised method."""

    @functools.lru_cache  # noqa: B019
    def parts(self, width: int) -> tuple[int, int]:
        return self.heads, width // self.heads

    def forward(self, x: Tensor) -> Tensor:
        made = self.make(x)
        each = made.view(*made.shape[:-1], *self.parts(made.shape[-1]))
        return self.read((each * self.gain).relu().flatten(-2))


def test_memoised_methods_compute_anew_as_well() -> None:
    x = torch.randn(2, 5, 6)
    model = MemoisedMethod().eval()
    model(x)  # so that the memo holds an answer
    graph = secateurs.trace(model, x)
    assert [(group.name, group.size) for group in graph.groups] == [("make", 3), ("make#2", 4)]


class SizesTwice(nn.Module):
    """States a size in a dictionary, computes with its items, and rebuilds these when it is copied."""

    def __init__(self, **sizes: int) -> None:
        super().__init__()
        self.sizes = sizes
        self.items = tuple(sizes.items())
        self.names = tuple(sizes)  # no items
        self.table, self.rows = {"a": torch.ones(2), "b": 1}, [("a", torch.ones(2)), ("b", 1)]  # no sizes

    def __getstate__(self) -> dict[str, object]:
        return {"sizes": self.sizes}

    def __setstate__(self, state: dict[str, dict[str, int]]) -> None:
        self.__init__(**state["sizes"])  # type: ignore[misc]

    def forward(self, x: Tensor) -> Tensor:
        ((_, heads),) = self.items
        return x.view(*x.shape[:-1], heads, x.shape[-1] // heads)


class ReadsItems(nn.Module):
    """Heads by a layer as einops builds them."""

    def __init__(self) -> None:
        super().__init__()
        self.make, self.parts, self.read = nn.Linear(6, 12), SizesTwice(h=3), nn.Linear(12, 4)
        self.gain = nn.Parameter(torch.rand(3, 1) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        return self.read((self.parts(self.make(x)) * self.gain).relu().flatten(-2))


def test_the_items_of_a_dictionary_beside_it_change_with_it() -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 5, 6)
    model = ReadsItems().eval()
    graph = secateurs.trace(model, x)
    assert [(group.name, group.size) for group in graph.groups] == [("make", 3), ("make#2", 4)]
    plan = secateurs.Plan.of(graph, {"make": [1], "make#2": [0]})
    small = secateurs.apply(model, plan)
    assert (small.parts.sizes, small.parts.items, small.parts.names) == ({"h": 2}, (("h", 2),), ("h",))
    assert (model.parts.sizes, model.parts.items) == ({"h": 3}, (("h", 3),))
    assert secateurs.verify(model, small, plan, x).ok
    assert torch.equal(copy.deepcopy(small)(x), small(x))


@functools.lru_cache
def _table(count: int) -> Tensor:
    return torch.arange(count) / count


class ReadsMemo(nn.Module):
    """A memoised table of numbers, whose arguments no cut can change."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.last = nn.Linear(6, 8), nn.LayerNorm(8), nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.norm(self.first(x)).relu()) + _table(2)


@pytest.mark.parametrize("is_filled", [False, True])
def test_memos_keep_nothing_of_what_is_computed_to_look_at_a_model(is_filled: bool) -> None:
    torch.manual_seed(0)
    model, x = ReadsMemo().eval(), torch.randn(3, 6)
    _table.cache_clear()
    before = model(x) if is_filled else None
    plan = Plan.of(secateurs.trace(model, x), {"first": [1, 2]})
    assert secateurs.verify(model, secateurs.apply(model, plan), plan, x).ok
    assert _table.cache_info().currsize == is_filled
    after = model(x)
    assert after.dtype == torch.float32 and after.isfinite().all()
    assert before is None or torch.equal(after, before)


# -- the pieces ---------------------------------------------------------------------------------------


def test_arithmetic_remembers_where_it_came_from() -> None:
    book = Book()
    width = Traced.of(24, Length(Dim(24)), book)
    heads = Traced.of(4, Attribute("block", "heads", None, 4), book)
    each = width // heads
    assert (each, width - 1, 3 * heads, -heads) == (6, 23, 12, -4)
    assert in_words(each.expression) == "(a length of 24 // heads)"
    assert in_words((3 * heads).expression) == "(3 * heads)"
    assert type(width / heads) is float and type(int(each)) is int
    assert [value for _, value in book.floats] == [24.0]


@pytest.mark.parametrize(
    ("name", "left", "right", "target", "answer"),
    [
        ("mul", 3, None, 12, 4),
        ("mul", 3, None, 13, None),
        ("add", None, 2, 9, 7),
        ("sub", None, 2, 9, 11),
        ("sub", 20, None, 9, 11),
        ("floordiv", 24, None, 6, 4),
        ("floordiv", None, 4, 6, 24),
        ("mod", None, 4, 3, None),
    ],
)
def test_formulas_are_solved_for_one_attribute(
    name: str, left: int | None, right: int | None, target: int, answer: int | None
) -> None:
    unknown = Attribute("", "n", None, 1)
    sides = [unknown if side is None else Constant(side) for side in (left, right)]
    assert solve(Operation(name, *sides), target, lambda leaf: 0) == answer


def test_counts_settle_on_a_solution_at_or_above_what_is_wanted() -> None:
    sizes = [24, 4, 6, 5]
    length = [
        Counted(24, (), 0, ((1.0, (0,)),)),
        Counted(4, (), 0, ((1.0, (1,)),)),
        Counted(6, (), 0, ((1.0, (2,)),)),
    ]
    tie = CountConstraint.of(Operation("mul", length[1], length[2]), length[0], "", "")
    system = CountSystem(sizes, [tie])
    free = [True, False, True, True]
    for wanted in range(1, 25):
        found = system.settle([wanted, 4, max(1, wanted // 4), 3], free, [1] * 4)
        assert found[0] == found[1] * found[2] and found[1] == 4 and found[3] == 3
        assert found[0] >= wanted
    assert system.settle([13, 4, 3, 3], free, [8, 1, 1, 1])[0] == 16
    locked = [True, False, False, True]
    assert system.settle([12, 4, 6, 3], locked, [1] * 4) == [24, 4, 6, 3]


class UnequalPieces(nn.Module):
    """Three pieces of 16 channels: 6, 6 and 4, the last what is left."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how, self.piece = how, 6
        self.make, self.read = nn.Conv2d(3, 16, 1), nn.ModuleList(nn.Conv2d(n, 4, 1) for n in (6, 6, 4))

    def forward(self, x: Tensor) -> Tensor:
        x = self.make(x).relu()
        match self.how:
            case "chunk":
                pieces = x.chunk(3, dim=1)
            case "attribute":
                pieces = torch.split(x, self.piece, 1)
            case "figure":
                pieces = x.split(6, 1)
            case _:
                pieces = x.split(x.shape[1] // 3 + 1, dim=1)
        return sum(read(piece) for read, piece in zip(self.read, pieces, strict=True))


@pytest.mark.parametrize("share", [0.7, 0.5, 0.3])
@pytest.mark.parametrize("how", ["chunk", "attribute", "figure", "formula"])
def test_pieces_of_one_size_stay_so_and_the_last_is_no_longer(how: str, share: float) -> None:
    graph, plan, _ = half(UnequalPieces(how).eval(), torch.randn(2, 3, 4, 4), share)
    first, second, last = (count for name, count in kept(plan, graph).items() if name.startswith("make"))
    assert first == second >= last
    assert how != "chunk" or first == -(-(first + second + last) // 3)


def test_pieces_that_would_be_empty_stay_locked() -> None:
    class Four(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.make, self.read = nn.Linear(3, 5), nn.Linear(2, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.read(self.make(x).chunk(4, dim=1)[0])

    locks = secateurs.trace(Four(), torch.randn(2, 3)).locked
    reason = next(lock.reason for lock in locks if lock.parameter == "make.weight" and lock.dim == 0)
    assert reason == "it is cut into 4 pieces, of which the last are empty"


class Split(nn.Module):
    """A number of branches that another path is taken without, as ResNeSt's radix is."""

    def __init__(self) -> None:
        super().__init__()
        self.radix = 2
        self.make, self.read = nn.Linear(3, 2 * 6), nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.make(x).relu()
        if self.radix > 1:
            x = x.reshape(x.shape[0], self.radix, x.shape[1] // self.radix).sum(1)
        return self.read(x)


def test_an_order_with_a_figure_comes_out_as_it_did() -> None:
    graph, plan, small = half(nn.Sequential(Split(), nn.ReLU(), nn.Linear(2, 2)), torch.randn(4, 3))
    assert small[0].radix == 2 and kept(plan, graph) == {"0.make": 3, "0.read": 1}


class AnotherPath(nn.Module):
    """A path that no comparison of integers tells."""

    def __init__(self) -> None:
        super().__init__()
        self.make, self.read = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        y = self.make(x).relu()
        y = y.sigmoid() if float(y.shape[1]) > 7.5 else y.tanh()
        return x + self.read(y)


def test_a_fault_that_many_blocks_have_is_found_in_a_few_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    runs = []
    monkeypatch.setattr(dry_run, "dry_run", lambda *all, run=dry_run.dry_run: runs.append(1) or run(*all))
    blocks = nn.Sequential(*(AnotherPath() for _ in range(45)))
    graph = secateurs.trace(nn.Sequential(nn.Linear(3, 8), blocks, nn.Linear(8, 2)), torch.randn(2, 3))
    assert [group.name for group in graph.groups] == ["0"]
    assert len(runs) < 12


class TableOfPlaces(nn.Module):
    """Rows and columns as features, in a buffer that is made anew for another number of places."""

    def __init__(self, places: int) -> None:
        super().__init__()
        self.weigh, self.read = nn.Linear(2, 6), nn.Linear(6, 3)
        self.register_buffer("places", self.made(places), persistent=False)

    def made(self, places: int) -> Tensor:
        steps = torch.arange(float(places))
        return torch.stack([steps, steps.square()], -1)

    def forward(self, x: Tensor) -> Tensor:
        if len(self.places) != x.shape[1]:
            self.places = self.made(x.shape[1])
        return self.read(torch.einsum("bn,nc->bc", x, self.weigh(self.places).relu()))


def test_what_a_buffer_without_a_file_gives_stays() -> None:
    graph, plan, _ = half(TableOfPlaces(7), torch.randn(2, 7))
    assert [group.name for group in graph.groups] == ["weigh"]
    other = TableOfPlaces(1)  # as one that is loaded from a file and called first then
    assert secateurs.apply(other, plan)(torch.randn(2, 7)).shape == (2, 3)
