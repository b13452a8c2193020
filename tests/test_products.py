"""Queries and keys with fewer dimensions: which may be exchanged for combinations, and what that leaves."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

import secateurs
from secateurs.criteria.unit_reads import unrankable
from secateurs.recovery import Repair, repair
from secateurs.recovery.factor_search import factors_in
from secateurs.recovery.features import boundaries
from secateurs.recovery.low_rank import LowRank
from secateurs.recovery.recording import Recorder
from test_rescaling import MODELS, QueriesReadToo, Shared, TwoScales, X, head_dims, made

OTHERS = {"read too": QueriesReadToo, "shared": Shared, "two scales": TwoScales}
FREE = {"fused", "separate", "one head", "grouped queries", "joined bias"}
VALUES_READ_TOO = {"called twice", "read too"}
DATA = torch.randn(64, 6, 8, generator=torch.Generator().manual_seed(3))


class Packed(nn.Module):
    """Torch's own attention."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.attention = nn.Linear(8, 8), nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        out: Tensor = x + self.attention(x, x, x, need_weights=False)[0]
        return out


def network(name: str) -> nn.Module:
    torch.manual_seed(1)
    return OTHERS[name]().eval() if name in OTHERS else made(name)


def keys_of(model: nn.Module, name: str) -> Tensor:
    """The weight that makes the keys; ``(heads, 4, 8)``, a view."""
    if name == "fused":
        return model.qkv.weight.data[12:24].view(3, 4, 8)  # type: ignore[union-attr]
    if name == "grouped queries":
        return model.kv.weight.data[:12].view(3, 4, 8)  # type: ignore[union-attr]
    return model.k.weight.data.view(-1, 12 if name == "one head" else 4, 8)  # type: ignore[union-attr]


def healed(model: nn.Module, plan: secateurs.Plan) -> Repair:
    """What a repair does that leaves nothing of a cut."""
    small = secateurs.apply(model, plan)
    with torch.no_grad():
        wanted, cut = model(DATA), small(DATA)
        assert not torch.allclose(cut, wanted, atol=1e-2)
        done = repair(model, small, plan, DATA.split(16), ridge=1e-9)
        torch.testing.assert_close(small(DATA), wanted, rtol=1e-3, atol=1e-4)
    return done


@pytest.mark.parametrize("name", [*MODELS, *OTHERS])
def test_what_may_be_exchanged_is_found(name: str) -> None:
    model = network(name)
    with torch.no_grad():
        found = factors_in(model, X, Recorder(model, X, written_out=True))
    products = [each for each in found if not each.is_read]
    assert len(products) == (name in FREE)
    assert all(each.is_centred for each in products)
    values = [each for each in found if each.is_read]
    assert len(values) == (name not in VALUES_READ_TOO)


class ByLetters(nn.Module):
    """Attention in two einsums; the values come first in the second."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.out = (
            nn.Linear(8, 12),
            nn.Linear(8, 12),
            nn.Linear(8, 12),
            nn.Linear(12, 2),
        )

    def split(self, x: Tensor) -> list[Tensor]:
        return [layer(x).unflatten(-1, (3, -1)) for layer in (self.q, self.k, self.v)]  # (N, n, heads, d)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.split(x)
        weights = torch.einsum("bihd,bjhd->bhij", q, k).softmax(-1)
        out: Tensor = self.out(torch.einsum("bjhd,bhij->bihd", v, weights).flatten(2))
        return out


def test_products_by_letters_are_found_and_ranked() -> None:
    torch.manual_seed(1)
    model = ByLetters().eval()
    with torch.no_grad():
        keys, values = factors_in(model, X, Recorder(model, X, written_out=True))
        q, k, _ = (each.double().movedim(2, 0).flatten(1, 2) for each in model.split(DATA))
    assert keys.first.channels.tolist() == values.second.channels.tolist()
    assert keys.first.channels.tolist() == torch.arange(12).view(3, 4).tolist()
    assert (keys.is_read, values.is_read) == (False, True)
    graph = secateurs.trace(model, X)
    assert len(graph.products) == 1
    scores = secateurs.score(model, graph, "reconstruction", data=DATA.split(16))
    of_keys = (each for each in graph.groups if any(part.parameter == "k.weight" for part in each.slices))
    (group,) = (each for each in of_keys if each.size == 4)
    squares = sum(
        torch.linalg.svdvals(one @ (two - two.mean(0)).mT).square()[:4] for one, two in zip(q, k, strict=True)
    )
    assert isinstance(squares, Tensor) and scores.curves is not None
    missed = squares.flip(0).cumsum(0)[:3] / squares.sum()
    share = scores.curves[group.name][1:] / missed  # of the stream's variance
    assert share.tolist() == pytest.approx([float(share[0])] * 3, rel=1e-3)
    plan = secateurs.Plan.of(graph, {group.name: [0]})
    small = secateurs.apply(model, plan)
    done = repair(model, small, plan, DATA.split(16))
    assert [each.what for each in done.layers] == ["combinations", "combinations", "weights"]


def test_heads_that_share_keys_are_one_part() -> None:
    model = made("grouped queries")
    with torch.no_grad():
        found, *_ = factors_in(model, X, Recorder(model, X, written_out=True))
    assert found.first.channels.tolist() == torch.arange(48).view(12, 4).tolist()
    assert found.second.channels.tolist() == torch.arange(12).view(3, 4).tolist()
    assert found.heads.tolist() == [[head, head // 4] for head in range(12)]
    assert found.parts.tolist() == [head // 4 for head in range(12)]


@pytest.mark.parametrize("name", sorted(FREE - {"joined bias"}))
def test_dimensions_that_keys_do_not_need_leave_without_a_trace(name: str) -> None:
    model, chance = network(name), torch.Generator().manual_seed(5)
    keys, layers = keys_of(model, name), 1 if name == "fused" else 2
    for head in keys:  # two directions of four
        head.copy_(torch.randn(len(head), 2, generator=chance) @ torch.randn(2, 8, generator=chance) / 2)
    both = {"fused": ("qkv", 24), "grouped queries": ("kv", 12)}.get(name)
    if both is not None:  # values lose the same dimensions: there is nothing in them
        layer = model.get_submodule(both[0])
        for parameter in layer.parameters():
            parameter.data[both[1] :].unflatten(0, (3, 4))[:, [0, 3]] = 0
    graph = secateurs.trace(model, X)
    group = head_dims(graph)[0]
    plan = secateurs.Plan.of(graph, {group: [0, graph.by_name[group].size - 1]})
    done = healed(model, plan)
    assert [each.what for each in done.layers if "out" not in each.name] == ["combinations"] * layers


def test_torchs_own_attention_gives_combinations() -> None:
    torch.manual_seed(1)
    model = Packed().eval()
    keys, values = model.attention.in_proj_weight.data[8:].view(2, 2, 4, 8)
    keys.copy_(torch.randn(2, 4, 2) @ torch.randn(2, 2, 8))
    values[:, [1, 2]] = 0
    graph = secateurs.trace(model, X)
    group = next(group for group in graph.groups if group.kind == "head_dim")
    plan = secateurs.Plan.of(graph, {group.name: [1, 2]})
    small = secateurs.apply(model, plan)
    with torch.no_grad():
        repair(model, small, plan, DATA.split(16), ridge=1e-9)
        torch.testing.assert_close(small(DATA), model(DATA), rtol=1e-3, atol=1e-4)


def test_heads_may_be_gone_too() -> None:
    torch.manual_seed(1)
    model = Packed().eval()
    keys, values = model.attention.in_proj_weight.data[8:].view(2, 2, 4, 8)
    keys.copy_(torch.randn(2, 4, 2) @ torch.randn(2, 2, 8))
    values[:, [1, 2]] = values[0] = 0
    plans, small = [], model
    for kind, removed in (("head_dim", [1, 2]), ("head", [0])):
        graph = secateurs.trace(small, X)
        group = next(group for group in graph.groups if group.kind == kind)
        plans.append(secateurs.Plan.of(graph, {group.name: removed}))
        small = secateurs.apply(small, plans[-1])
    with torch.no_grad():
        repair(model, small, plans[0].then(plans[1]), DATA.split(16), ridge=1e-9)
        torch.testing.assert_close(small(DATA), model(DATA), rtol=1e-3, atol=1e-4)


def test_no_combinations_miss_less() -> None:
    torch.manual_seed(2)
    model = made("one head")
    with torch.no_grad():
        found, *_ = factors_in(model, X, Recorder(model, X, written_out=True))
        query, key = (layer(DATA).double().flatten(0, 1) for layer in (model.q, model.k))  # type: ignore[operator]
    rank = LowRank(found, torch.device("cpu"))
    one = torch.tensor([0])
    rank.take(0, query[:200, None], one), rank.take(0, query[200:, None], one)
    rank.take(1, key[:, None], one)
    key = key - key.mean(0)
    squares = torch.linalg.svdvals(query @ key.mT).square()[:12]
    for left in (1, 3, 6):  # of eight, as there are eight inputs
        one, other = rank.combinations(left)
        missed = (query @ key.mT - (query @ one[0]) @ (key @ other[0]).mT).square().sum()
        assert float(missed / squares[left:].sum()) == pytest.approx(1, rel=1e-3)
        assert float(rank.missed()[12 - left]) == pytest.approx(float(missed / squares.sum()), rel=1e-3)


def test_few_rows_leave_no_dimension_empty() -> None:
    torch.manual_seed(4)
    model = made("one head")
    graph = secateurs.trace(model, X)
    plan = secateurs.Plan.of(graph, {head_dims(graph)[0]: [0, 4, 5, 6]})
    small = secateurs.apply(model, plan)
    with torch.no_grad():
        repair(model, small, plan, [DATA[:1, :3]])  # three rows for eight dimensions that stay
        logits = [net.q(DATA) @ net.k(DATA).mT / net.q.out_features**0.5 for net in (model, small)]  # type: ignore[union-attr, operator]
    wanted, given = (each - each.mean(-1, keepdim=True) for each in logits)
    assert bool((small.q.weight.norm(dim=1) > 1e-3).all())  # type: ignore[union-attr, operator]
    assert (given - wanted).square().mean() < 0.2 * wanted.square().mean()


def test_keys_that_are_all_zero_are_no_matter() -> None:
    model = made("separate")
    model.k.weight.data.zero_()  # type: ignore[union-attr]
    graph = secateurs.trace(model, X)
    plan = secateurs.Plan.of(graph, {head_dims(graph)[0]: [1]})
    small = secateurs.apply(model, plan)
    with torch.no_grad():
        repair(model, small, plan, DATA.split(16))
        torch.testing.assert_close(small(DATA), model(DATA))


@pytest.mark.parametrize("name", ["keys", "called twice", "joined bias", "batch norm"])
def test_a_repair_leaves_units_where_they_cannot_be_exchanged(name: str) -> None:
    model = network(name)
    graph = secateurs.trace(model, X)
    group = head_dims(graph)[0]
    plan = secateurs.Plan.of(graph, {group: [0]})
    small = secateurs.apply(model, plan)
    done = repair(model, small, plan, DATA.split(16))
    assert "combinations" not in {each.what for each in done.layers}


def values_of(model: nn.Module, name: str) -> Tensor:
    """The weight that makes the values; ``(heads, 4, 8)``, a view."""
    if name == "grouped queries":
        return model.kv.weight.data[12:].view(3, 4, 8)  # type: ignore[union-attr]
    return model.v.weight.data.view(-1, 12 if name == "one head" else 4, 8)  # type: ignore[union-attr]


@pytest.mark.parametrize("name", ["separate", "one head", "batch norm", "two scales"])
def test_dimensions_that_values_do_not_need_leave_without_a_trace(name: str) -> None:
    model, chance = network(name), torch.Generator().manual_seed(5)
    for head in values_of(model, name):  # two directions of many
        head.copy_(torch.randn(len(head), 2, generator=chance) @ torch.randn(2, 8, generator=chance) / 2)
    graph = secateurs.trace(model, X)
    (group,) = (each for each in graph.groups if any(part.parameter == "v.weight" for part in each.slices))
    plan = secateurs.Plan.of(graph, {group.name: [0, group.size - 1]})
    done = healed(model, plan)
    assert [(each.name, each.what) for each in done.layers] == [
        ("v.weight", "combinations"),
        ("out.weight", "weights"),
    ]


@pytest.mark.parametrize(("name", "bias"), [("one head", True), ("one head", False), ("separate", True)])
def test_values_are_worth_what_the_best_combinations_miss(name: str, bias: bool) -> None:
    model = network(name)
    if not bias:
        model.out.bias = None  # type: ignore[union-attr]
    graph = secateurs.trace(model, X)
    scores = secateurs.score(model, graph, "reconstruction", data=DATA.split(16))
    (group,) = (each for each in graph.groups if any(part.parameter == "v.weight" for part in each.slices))
    with torch.no_grad():
        q, k, v = model.split(DATA)  # type: ignore[operator]
        read = model.attend(q, k, v).double()  # type: ignore[operator]
        outputs = model(DATA).flatten(0, 1).double()
        heads = [read] if name == "one head" else read.unbind(1)
    squares = torch.zeros(group.size)
    for place, head in enumerate(heads):
        weight = model.out.weight.data.double()[:, place * group.size :][:, : group.size]  # type: ignore[union-attr]
        rows = head.flatten(0, 1)
        values = torch.linalg.svdvals((rows - rows.mean(0)) @ weight.T).square()
        squares[: len(values)] += values  # there are two outputs, so two directions count
    whole = (outputs - outputs.mean(0)).square().sum()
    missed = squares.flip(0).cumsum(0) / whole
    assert scores.curves is not None
    found = scores.curves[group.name]
    assert found[1:].tolist() == pytest.approx(missed[:-1].tolist(), rel=1e-3, abs=1e-6)


def test_values_of_shared_heads_are_fitted_for_all_that_read_them() -> None:
    model, errors = made("grouped queries"), []
    graph = secateurs.trace(model, X)
    plan = secateurs.Plan.of(graph, {head_dims(graph)[0]: [1, 2]})
    for how in ("compensate", "reconstruct"):
        small = secateurs.apply(model, plan)
        done = repair(model, small, plan, DATA.split(16), how=how)
        with torch.no_grad():
            errors.append(float((small(DATA) - model(DATA)).square().mean()))
    assert errors[1] < 0.2 * errors[0]
    assert [each.what for each in done.layers] == ["combinations", "combinations", "weights"]


def test_constants_and_distillation_pass_over_what_may_give_combinations() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), made("separate")).eval()
    graph = secateurs.trace(model, X)
    plan = secateurs.Plan.of(graph, {"0": [1, 2], head_dims(graph)[0]: [1]})
    small = secateurs.apply(model, plan)
    done = repair(model, small, plan, DATA.split(16))
    names = {each.name: each.what for each in done.layers}
    assert names["2.q.weight"] == names["2.k.weight"] == "combinations"
    queries = small.get_submodule("2.q").weight.clone()
    done = repair(model, small, plan, DATA.split(16), how="compensate")
    assert "2.q.weight" not in {each.name for each in done.layers}
    assert "combinations" in done.left["2.q.weight"]
    assert torch.equal(small.get_submodule("2.q").weight, queries)


class Narrow(nn.Module):
    """A stream that is cut too, so that queries and keys read what left."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.attention, self.head = nn.Linear(8, 8), made("separate"), nn.Linear(2, 2)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.attention(self.stem(x).relu()))
        return out


def test_distillation_compares_no_combinations() -> None:
    torch.manual_seed(0)
    model = Narrow().eval()
    graph = secateurs.trace(model, X)
    stem, dims = "stem", head_dims(graph)[0]
    for removed, named in (({stem: [1]}, True), ({stem: [1], dims: [1]}, False)):
        plan = secateurs.Plan.of(graph, removed)
        places = {each.module for each in boundaries(model, secateurs.apply(model, plan), plan, X)}
        assert ("attention.q" in places, "attention.k" in places) == (named, named)
        assert "attention.v" in places


@pytest.mark.parametrize(
    "between", [nn.ReLU(), nn.GELU(), nn.LeakyReLU(), nn.Hardswish(), nn.Tanh(), nn.ELU(), nn.LayerNorm(6)]
)
def test_an_activation_lets_no_combinations_through(between: nn.Module) -> None:
    for module, count in ((between, 0), (nn.Identity(), 1)):
        model = nn.Sequential(nn.Linear(8, 6), module, nn.Linear(6, 3)).eval()
        with torch.no_grad():
            assert len(factors_in(model, X, Recorder(model, X, written_out=True))) == count


def test_a_model_that_gives_no_real_numbers_proves_nothing() -> None:
    class Answers(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = made("separate")

        def forward(self, x: Tensor) -> Tensor:
            return self.net(x).argmax(-1)  # type: ignore[no-any-return]

    model = Answers().eval()
    with torch.no_grad():
        assert factors_in(model, X, Recorder(model, X, written_out=True)) == ()


def test_a_layer_behind_a_layer_gives_combinations() -> None:
    torch.manual_seed(1)
    model = nn.Sequential(nn.Conv2d(3, 12, 3), nn.Conv2d(12, 5, 1, stride=2), nn.ReLU()).eval()
    images = torch.randn(20, 3, 9, 9)
    graph = secateurs.trace(model, images)
    plan = secateurs.Plan.of(graph, {"0": [0, 1, 3, 5, 7, 8, 10]})  # five outputs need no more than five
    small = secateurs.apply(model, plan)
    with torch.no_grad():
        done = repair(model, small, plan, images.split(10), ridge=1e-9)
        torch.testing.assert_close(small(images), model(images), rtol=1e-3, atol=1e-4)
    assert [each.what for each in done.layers] == ["combinations", "weights"]


class Registers(nn.Module):
    """Attention over learned tokens as well, so that the call sums over positions that may leave."""

    def __init__(self) -> None:
        super().__init__()
        self.registers = nn.Parameter(torch.randn(1, 3, 12))
        self.make, self.read = nn.Linear(5, 12), nn.Linear(12, 2)
        self.query, self.key, self.value = (nn.Linear(12, 12) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        x = torch.cat([self.registers.expand(len(x), -1, -1), self.make(x).relu()], 1)
        mixed = scaled_dot_product_attention(self.query(x), self.key(x), self.value(x))
        return self.read(mixed[:, self.registers.shape[1] :])  # type: ignore[no-any-return]


def test_queries_and_keys_are_ranked_beside_learned_tokens() -> None:
    torch.manual_seed(0)
    model, x = Registers().eval(), torch.randn(50, 4, 5)
    with torch.no_grad():
        model.key.weight[[2, 7]] *= 1e-3
        model.key.bias[[2, 7]] *= 1e-3
    graph = secateurs.trace(model, x[:2])
    assert graph.by_name["registers"].kind == "position"
    (group,) = [each for each in graph.groups if each.name in ("query", "key")]
    assert [set(each.units) for each in graph.products] == [{*range(group.first, group.first + 12)}]
    assert group.name not in unrankable(model, graph, x[:2])
    scores = secateurs.score(model, graph, "reconstruction", data=[x])
    assert scores.curves is not None
    curve = scores.curves[group.name]
    assert curve[2] < 1e-3 * curve[3]  # two dimensions that keys do not use leave for nothing
