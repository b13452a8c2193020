"""Attention that derives its scale from the length of a head: what makes the queries is rescaled."""

from __future__ import annotations

import json
from math import sqrt
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import secateurs
from secateurs import Plan
from secateurs.graph import Graph
from secateurs.planning import RowScale
from secateurs.pruning import prune_steps
from secateurs.recovery import repair
from secateurs.testing import check_model

X = torch.randn(2, 6, 8, generator=torch.Generator().manual_seed(0))
REASON = "attention derives its scale from this length"


class Attention(nn.Module):
    """Fused queries, keys and values; subclasses do something to the queries."""

    def __init__(self) -> None:
        super().__init__()
        self.heads = 3
        self.qkv, self.out = nn.Linear(8, 36), nn.Linear(12, 2)

    def split(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        return q, k, v

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.attend(*self.split(x)).transpose(1, 2).flatten(2))


def three_heads(x: Tensor) -> Tensor:
    """A number of heads that nothing can change, in a function outside of modules."""
    return x.unflatten(-1, (3, -1)).transpose(1, 2)


class Separate(Attention):
    """Queries, keys and values of layers of their own."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = nn.Linear(8, 12), nn.Linear(8, 12, bias=False), nn.Linear(8, 12)

    def split(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = (three_heads(make(x)) for make in (self.q, self.k, self.v))
        return q, k, v


class OneHead(Separate):
    """A single head, without a dimension for it."""

    def split(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return self.q(x), self.k(x), self.v(x)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.attend(*self.split(x)))


class RmsNorm(nn.Module):
    """An RMS norm written out."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.rand(width) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6))


class Normed(Attention):
    """Queries and keys are normalised per head, so that scaling what makes them changes nothing."""

    def __init__(self, norm: Any, keys_too: bool = True) -> None:
        super().__init__()
        self.q_norm, self.k_norm = norm(4), norm(4) if keys_too else nn.Identity()
        for parameter in self.q_norm.parameters():
            nn.init.uniform_(parameter, 0.5, 1.5)

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return super().attend(self.q_norm(q), self.k_norm(k), v)


class Rotary(Attention):
    """Halves of queries and keys turn into one another, by a table."""

    def __init__(self) -> None:
        super().__init__()
        angles = torch.linspace(0, 1, 6)[:, None]
        self.register_buffer("table", torch.cat([angles.cos(), angles.sin()], -1))

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        def turned(x: Tensor) -> Tensor:
            (first, second), (cos, sin) = x.chunk(2, -1), self.table.chunk(2, -1)
            return x * cos + torch.cat([-second, first], -1) * sin

        return super().attend(turned(q), turned(k), v)


class GroupedQueries(Attention):
    """Twelve query heads share three key heads."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.kv, self.out = nn.Linear(8, 48), nn.Linear(8, 24), nn.Linear(48, 2)

    def split(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        k, v = self.kv(x).unflatten(-1, (2, 3, -1)).permute(2, 0, 3, 1, 4)
        return self.q(x).unflatten(-1, (12, -1)).transpose(1, 2), k, v

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, enable_gqa=True)


class ConvQuery(Separate):
    """Queries are made by a depthwise convolution, with or without a batch norm behind it."""

    def __init__(self, norm: bool) -> None:
        super().__init__()
        self.conv = nn.Conv1d(12, 12, 3, padding=1, groups=12)
        self.norm: nn.Module = nn.BatchNorm1d(12) if norm else nn.Identity()
        if norm:
            nn.init.uniform_(self.norm.weight, 0.5, 1.5)
            nn.init.normal_(self.norm.bias)

    def split(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        _, k, v = super().split(x)
        q = self.norm(self.conv(self.q(x).transpose(1, 2)))
        return q.unflatten(1, (3, -1)).transpose(-1, -2), k, v


class Columns(Separate):
    """The weight that makes the queries is used as it is, ``x @ weight``."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(8, 12)), nn.Parameter(torch.randn(12))

    def split(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        _, k, v = super().split(x)
        return (x @ self.weight + self.bias).unflatten(-1, (3, -1)).transpose(1, 2), k, v


class JoinedBias(Separate):
    """One weight, and a bias that is put together of two parameters and a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(36, 8))
        self.q_bias, self.v_bias = nn.Parameter(torch.randn(12)), nn.Parameter(torch.randn(12))
        self.register_buffer("k_bias", torch.zeros(12))

    def split(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        bias = torch.cat([self.q_bias, self.k_bias, self.v_bias])
        q, k, v = F.linear(x, self.weight, bias).unflatten(-1, (3, 3, -1)).permute(2, 0, 3, 1, 4)
        return q, k, v


class LearnedQueries(Separate):
    """The queries are a parameter, the same for all samples."""

    def __init__(self) -> None:
        super().__init__()
        self.queries = nn.Parameter(torch.randn(5, 12))

    def split(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        _, k, v = super().split(x)
        q = self.queries.unflatten(-1, (3, -1)).transpose(0, 1)[None].expand(len(x), -1, -1, -1)
        return q, k, v


class Biased(Separate):
    """Queries also make a bias of the scores, so that they must stay as they are: the keys are scaled."""

    def __init__(self) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.randn(4, 6))

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=q @ self.bias)


class Twice(Attention):
    """One layer, called two times."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.attend(*self.split(x)).transpose(1, 2).flatten(2)
        return self.out(y + self.attend(*self.split(x.flip(1))).transpose(1, 2).flatten(2))


MODELS: dict[str, tuple[Any, set[str]]] = {  # and what is rescaled
    "fused": (Attention, {"qkv.weight", "qkv.bias"}),
    "separate": (Separate, {"q.weight", "q.bias"}),
    "one head": (OneHead, {"q.weight", "q.bias"}),
    "layer norm": (lambda: Normed(nn.LayerNorm), {"q_norm.weight", "q_norm.bias"}),
    "RMS norm": (lambda: Normed(nn.RMSNorm), {"q_norm.weight"}),
    "RMS norm written out": (lambda: Normed(RmsNorm), {"q_norm.weight"}),
    "norm without weight": (
        lambda: Normed(lambda n: nn.LayerNorm(n, elementwise_affine=False), keys_too=False),
        {"qkv.weight", "qkv.bias"},
    ),
    "rotary": (Rotary, {"qkv.weight", "qkv.bias"}),
    "grouped queries": (GroupedQueries, {"q.weight", "q.bias"}),
    "convolution": (lambda: ConvQuery(norm=False), {"conv.weight", "conv.bias"}),
    "batch norm": (lambda: ConvQuery(norm=True), {"norm.weight", "norm.bias"}),
    "columns": (Columns, {"weight", "bias"}),
    "joined bias": (JoinedBias, {"weight", "q_bias"}),
    "learned queries": (LearnedQueries, {"queries"}),
    "keys": (Biased, {"k.weight"}),
    "called twice": (Twice, {"qkv.weight", "qkv.bias"}),
}


def head_dims(graph: Graph) -> list[str]:
    return [group.name for group in graph.groups if group.kind == "head_dim"]


def made(name: str) -> nn.Module:
    torch.manual_seed(1)
    return MODELS[name][0]().eval()


@pytest.mark.parametrize("name", MODELS)
def test_what_makes_the_queries_is_rescaled(name: str) -> None:
    model = made(name)
    graph = check_model(model, X)
    (rescaling,) = graph.rescalings
    (group,) = (graph.groups[place] for place in rescaling.length.groups)
    plan = Plan.of(graph, {group.name: [0]})
    assert {scale.parameter for scale in plan.rescaled} == MODELS[name][1]
    assert {scale.factor for scale in plan.rescaled} == {sqrt((group.size - 1) / group.size)}
    bare = secateurs.apply(model, Plan.from_json(json.dumps({**json.loads(plan.to_json()), "rescaled": []})))
    assert not secateurs.verify(model, bare, plan, X).ok  # and the proof would notice its absence


def test_only_the_rows_of_queries_are_rescaled() -> None:
    graph = secateurs.trace(made("fused"), X)
    plan = Plan.of(graph, {head_dims(graph)[0]: [1]})
    rows = tuple(row for row in range(12) if row % 4 != 1)
    assert plan.rescaled == tuple(
        RowScale(parameter=name, dim=0, indices=rows, factor=sqrt(3 / 4))
        for name in ("qkv.weight", "qkv.bias")
    )


class Shared(Separate):
    """Queries and keys are the same rows."""

    def split(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, _, v = super().split(x)
        return q, q.flip(-2), v


class QueriesReadToo(Separate):
    """Queries and keys are read elsewhere."""

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.split(x)
        y = self.attend(q, k, v) + q.sigmoid() * k.sigmoid()
        return self.out(y.transpose(1, 2).flatten(2))


class TwoScales(Separate):
    """A second call states a scale of its own for the same queries and keys."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return super().attend(q, k, v) + F.scaled_dot_product_attention(q, k, v, scale=0.3)


class Squared(Separate):
    """Neither queries nor keys grow in proportion to a weight."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return super().attend(q * q, k.relu(), v)


class Overwritten(Separate):
    """Queries and keys are written in place."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k = q.clone(), k.clone()
        q[..., :1] += 1
        k[..., :1, :] = 0
        return super().attend(q, k, v)


class TiedWeight(Separate):
    """The weights of queries and keys are read as a matrix of their own."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + (self.q.weight.tanh() + self.k.weight.tanh()).mean()


@pytest.mark.parametrize("model", [Shared, QueriesReadToo, TwoScales, Squared, Overwritten, TiedWeight])
def test_head_dimensions_stay_where_nothing_can_be_rescaled(model: type[nn.Module]) -> None:
    torch.manual_seed(1)
    graph = check_model(model().eval(), X)
    assert not head_dims(graph) and not graph.rescalings
    assert any(lock.reason == REASON and "attend" in lock.source for lock in graph.locked)


def test_a_plan_with_factors_is_saved_and_old_plans_load() -> None:
    graph = secateurs.trace(made("fused"), X)
    plan = Plan.of(graph, {head_dims(graph)[0]: [1]})
    assert Plan.from_json(plan.to_json()) == plan
    data = json.loads(plan.to_json())
    del data["rescaled"]
    assert Plan.from_json(json.dumps(data)).rescaled == ()


def test_factors_of_two_cuts_multiply() -> None:
    model = made("fused")
    whole = secateurs.trace(model, X)
    name = head_dims(whole)[0]
    first = Plan.of(whole, {name: [1]})
    small = secateurs.apply(model, first)
    again = secateurs.trace(small, X)
    heads = next(group.name for group in again.groups if group.kind == "head")
    second = Plan.of(again, {head_dims(again)[0]: [0], heads: [2]})
    both = first.then(second)
    at_once = Plan.of(whole, {name: [0, 1], heads: [2]})
    for one, other in zip(both.rescaled, at_once.rescaled, strict=True):
        assert (one.parameter, one.indices) == (other.parameter, other.indices)
        assert one.factor == pytest.approx(other.factor)
    direct = secateurs.apply(model, both)
    torch.testing.assert_close(direct.state_dict(), secateurs.apply(small, second).state_dict())
    assert secateurs.verify(model, direct, both, X).ok


def test_a_cut_in_place_and_in_a_fresh_instance_are_the_same() -> None:
    model = made("layer norm")
    graph = secateurs.trace(model, X)
    plan = Plan.of(graph, {head_dims(graph)[0]: [2]})
    fresh = Normed(nn.LayerNorm).eval()
    fresh.load_state_dict(model.state_dict())
    wanted = secateurs.apply(model, plan)(X)
    torch.testing.assert_close(secateurs.apply(fresh, plan)(X), wanted)
    assert secateurs.apply(model, plan, inplace=True) is model
    torch.testing.assert_close(model(X), wanted)


def test_steps_rescale_again_and_gradients_do_not_mind() -> None:
    def loss(out: Tensor, target: Tensor) -> Tensor:
        return ((out - target) ** 2).mean()

    model = made("rotary")
    graph = secateurs.trace(model, X)
    scores = secateurs.score(model, graph, "taylor", data=[(X, torch.ones(2, 6, 2))], loss_fn=loss)
    assert all(torch.as_tensor(scores[name]).isfinite().all() for name in head_dims(graph))
    steps = list(
        prune_steps(
            made("fused"), X, criterion="taylor", budget=secateurs.Remove(1), steps=2, kinds={"head_dim"},
            data=[(X, torch.ones(2, 6, 2))], loss_fn=loss,
        )
    )  # fmt: skip
    assert [step.plan.rescaled[0].factor for step in steps] == [sqrt(3 / 4), sqrt(2 / 3)]
    assert all(step.verified.ok for step in steps)


@pytest.mark.parametrize("name", ["fused", "layer norm"])
def test_rounding_of_narrow_weights_is_no_fault(name: str) -> None:
    model = made(name).bfloat16()
    graph = secateurs.trace(model, X.bfloat16())
    plan = Plan.of(graph, {head_dims(graph)[0]: [0, 2]})
    report = secateurs.verify(model, secateurs.apply(model, plan), plan, X.bfloat16())
    assert report.ok and report.max_error < 1e-12


class Bounded(Separate):
    """Keys go through an activation, so that a repair keeps the units of queries and keys."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return super().attend(q, k.tanh(), v)


class Embedded(nn.Module):
    """Attention behind a layer that can be cut, whose readers may be refitted."""

    def __init__(self, attention: type[Separate]) -> None:
        super().__init__()
        self.embed, self.attention = nn.Linear(3, 8), attention()

    def forward(self, x: Tensor) -> Tensor:
        return self.attention(self.embed(x))


def test_refitted_projections_stay_rescaled() -> None:
    torch.manual_seed(1)
    model, data = Embedded(Bounded).eval(), torch.randn(40, 6, 3)
    graph = secateurs.trace(model, data)
    plan = Plan.of(
        graph, {"embed": [0, 2, 4], head_dims(graph)[0]: [1]}
    )  # three inputs: five units are enough
    narrow = secateurs.apply(model, Plan.of(graph, {head_dims(graph)[0]: [1]}))
    small = secateurs.apply(model, plan)
    repair(model, small, plan, [data], ridge=1e-9)
    for name in ("q", "k", "v"):
        given, wanted = (each.attention.get_submodule(name)(each.embed(data)) for each in (small, narrow))
        torch.testing.assert_close(given, wanted, rtol=1e-3, atol=1e-4)
    gone = model(data) - narrow(data)  # the output projection makes up for a part of it
    assert (model(data) - small(data)).square().mean() < 0.9 * gone.square().mean()


@torch.no_grad()
def test_combinations_are_rescaled_too() -> None:
    torch.manual_seed(1)
    model, data = Embedded(Separate).eval(), torch.randn(40, 6, 3)
    graph = secateurs.trace(model, data)
    plan = Plan.of(graph, {"embed": [0, 2, 4], head_dims(graph)[0]: [1]})
    narrow = secateurs.apply(model, Plan.of(graph, {head_dims(graph)[0]: [1]}))
    small = secateurs.apply(model, plan)
    repair(model, small, plan, [data], ridge=1e-9)

    def logits(net: nn.Module) -> Tensor:
        q, k, _ = net.attention.split(net.embed(data))  # type: ignore[union-attr, operator]
        found: Tensor = q @ k.mT / sqrt(q.shape[-1])
        return found - found.mean(-1, keepdim=True)

    wanted = logits(model)
    missed, cut = ((logits(net) - wanted).square().mean() / wanted.var() for net in (small, narrow))
    assert missed < 0.02 < 0.05 < cut


class SquaredWeight(nn.Module):
    """A weight times itself makes the queries, so scaling its rows would scale them twice."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.key, self.value = nn.Linear(5, 8), nn.Linear(8, 8), nn.Linear(8, 6)
        self.weight, self.read = nn.Parameter(torch.randn(8, 8) * 0.5), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        query = F.linear(x, self.weight @ self.weight)
        return self.read(F.scaled_dot_product_attention(query, self.key(x), self.value(x)))


class WrittenIntoAView(nn.Module):
    """The keys are overwritten by queries through a view of them, so neither can be scaled alone."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.key, self.value = nn.Linear(5, 8), nn.Linear(5, 8), nn.Linear(5, 6)
        self.read = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        query, key = self.query(x), self.key(x)
        torch.mul(query, 0.5, out=key.view(key.shape))
        return self.read(F.scaled_dot_product_attention(query, key, self.value(x)))


@pytest.mark.parametrize(
    ("model", "rescaled"), [(SquaredWeight, {"key.weight", "key.bias"}), (WrittenIntoAView, set())]
)
def test_rows_that_reach_a_product_in_two_ways_are_not_rescaled(
    model: type[nn.Module], rescaled: set[str]
) -> None:
    torch.manual_seed(0)
    network, x = model().eval(), torch.randn(2, 4, 5)
    with torch.no_grad():
        graph = check_model(network, x)
    assert {name for each in graph.rescalings for name, _, _ in each.places} == rescaled
