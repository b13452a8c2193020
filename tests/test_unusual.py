"""What is asked of designs that are seldom seen, beyond their groups."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention.flex_attention import flex_attention
from torch.nn.functional import multi_head_attention_forward

import secateurs
from models import build
from secateurs.graph.running import attention_as_written
from unusual_models import AttentionAsFunction


def test_what_reads_heads_is_seen_inside_attention_called_as_a_function() -> None:
    model = build(AttentionAsFunction)
    x, targets = model.example(4), torch.randn(4, 5, 4)
    graph = secateurs.trace(model, x)
    singles = [(x[n : n + 1], targets[n : n + 1]) for n in range(4)]
    got = secateurs.score(
        model, graph, "taylor-signed", data=singles, loss_fn=F.mse_loss, normalization="none"
    )["query"]
    F.mse_loss(model(x), targets).backward()
    weight = model.proj.weight
    change = (weight * weight.grad).sum(0).reshape(3, 4).sum(1).abs().detach()  # (heads,)
    torch.testing.assert_close(got / got.sum(), (change / change.sum()).to(got.dtype), rtol=1e-4, atol=1e-7)


def test_the_function_is_put_back_whatever_happens() -> None:
    before = F.multi_head_attention_forward
    with pytest.raises(ValueError, match="of the model's own"), attention_as_written():
        assert F.multi_head_attention_forward is not before
        raise ValueError("an error of the model's own")
    assert F.multi_head_attention_forward is before


class AttentionByName(AttentionAsFunction):
    """The function is imported by its name: another in its place in `torch.nn.functional` is not met."""

    def forward(self, x: Tensor) -> Tensor:
        attention = F.multi_head_attention_forward
        F.multi_head_attention_forward = multi_head_attention_forward
        try:
            return super().forward(x)
        finally:
            F.multi_head_attention_forward = attention


def test_attention_imported_by_its_name_is_seen_through() -> None:
    model = build(AttentionByName)
    graph = secateurs.trace(model, model.example())
    found = {(group.name, group.size, group.kind) for group in graph.groups}
    assert found == {("embed", 12, "neuron"), ("query", 3, "head")}
    assert multi_head_attention_forward is F.multi_head_attention_forward


class FunctionalOperator(nn.Module):
    """`flex_attention` takes functions, and no schema says what it does: only its neighbourhood is lost."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.qkv, self.out = nn.Linear(8, 6), nn.Linear(6, 96), nn.Linear(32, 6)
        self.up, self.down = nn.Linear(6, 10), nn.Linear(10, 4)

    def forward(self, x: Tensor) -> Tensor:
        stream = self.first(x)
        query, key, value = self.qkv(stream).unflatten(-1, (3, 2, 16)).permute(2, 0, 3, 1, 4)
        heads = flex_attention(query, key, value)
        assert isinstance(heads, Tensor)
        stream = stream + self.out(heads.transpose(1, 2).flatten(2))
        return self.down(self.up(stream).relu())


@pytest.mark.filterwarnings("ignore")  # torch says that it runs uncompiled
def test_an_operator_that_takes_functions_locks_what_it_touches_alone() -> None:
    torch.manual_seed(0)
    model, x = FunctionalOperator().eval().requires_grad_(False), torch.randn(2, 16, 8)
    graph = secateurs.trace(model, x)
    assert {group.name: group.size for group in graph.groups} == {"first": 6, "up": 10}
    assert list(graph.unknown) == ["flex_attention"]
    locked = {(each.parameter, each.dim) for each in graph.locked}
    assert {("qkv.weight", 0), ("qkv.bias", 0), ("out.weight", 1)} <= locked
    plan = secateurs.Plan.of(graph, {"first": [0, 4], "up": [1, 2, 7]})
    small = secateurs.apply(model, plan)
    assert small.qkv.weight.shape == (96, 4) and small.out.weight.shape == (4, 32)
    assert secateurs.verify(model, small, plan, x).raise_if_failed().exact_expected


class ReadsItselfByAFunction(nn.Module):
    """The output is a function that an attribute holds and that knows the model by its closure."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.up, self.down = nn.Embedding(11, 8), nn.Linear(8, 12), nn.Linear(12, 8)
        scale, weight = 0.5, self.up.bias
        self.to_logits = lambda x: x @ self.embedding.weight.t() * scale
        self.shifted = lambda x: x + weight

    def forward(self, x: Tensor) -> Tensor:
        x = self.embedding(x)
        hidden = self.shifted(self.up(x)).relu()
        logits: Tensor = self.to_logits(x + self.down(hidden))
        return logits


def test_functions_that_know_the_model_know_the_pruned_one() -> None:
    torch.manual_seed(0)
    model, x = ReadsItselfByAFunction().eval(), torch.randint(11, (2, 5))
    graph = secateurs.trace(model, x)
    assert [(group.name, group.size) for group in graph.groups] == [("embedding", 8), ("up", 12)]
    plan = secateurs.Plan.of(graph, {"embedding": [1, 2], "up": [0, 5, 7]})
    small = secateurs.apply(model, plan)
    assert secateurs.verify(model, small, plan, x).ok
    before = model(x)
    with torch.no_grad():
        for parameter in small.parameters():
            parameter.zero_()
    assert not small(x).any() and torch.equal(model(x), before)
    assert small.to_logits is not model.to_logits and small.to_logits(torch.ones(6)).shape == (11,)


class Gated(nn.Module):
    """A recurrent cell joins a branch and the stream; its output is shaped like the branch."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.branch, self.cell = nn.Linear(5, 8), nn.Linear(8, 8), nn.GRUCell(8, 8)
        self.bias, self.last = nn.Parameter(torch.rand(1, 1, 8)), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        stream = self.first(x)
        branch = self.branch(stream.relu())
        joined = self.cell(branch.reshape(-1, branch.shape[-1]), stream.flatten(0, 1))
        return self.last(joined.view_as(branch) + self.bias.expand_as(stream))


def test_a_tensor_that_stands_for_its_shape_ties_counts() -> None:
    torch.manual_seed(0)
    model, x = Gated().eval(), torch.randn(2, 3, 5)
    graph = secateurs.trace(model, x)
    assert {(group.name, group.size) for group in graph.groups} == {("first", 8), ("branch", 8)}
    scores = secateurs.score(model, graph, "l2")
    plan = secateurs.plan(graph, scores, secateurs.Budget(units=0.5), scope="local")
    small = secateurs.apply(model, plan)
    assert small.branch.out_features == small.first.out_features == 4
    assert secateurs.verify(model, small, plan, x).ok


class LengthsAsList(nn.Module):
    """How much of each sample counts is read as a list; which channel is loudest depends on weights."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(5, 8), nn.Linear(8, 4)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        x = self.first(x).relu()
        rows = [each[:length].mean(0) for each, length in zip(x, mask.sum(1).tolist(), strict=True)]
        order = torch.stack(rows).sum(1).argsort().tolist()
        return self.last(torch.stack([rows[place] for place in order]))


def test_values_may_be_read_as_a_list() -> None:
    torch.manual_seed(0)
    model = LengthsAsList().eval()
    inputs = torch.randn(3, 6, 5), torch.arange(6) < torch.tensor([[2], [6], [4]])
    graph = secateurs.trace(model, inputs)
    assert [(group.name, group.size) for group in graph.groups] == [("first", 8)]
    plan = secateurs.Plan.of(graph, {"first": [1, 2, 6]})
    assert secateurs.verify(model, secateurs.apply(model, plan), plan, inputs).ok
