"""Recurrent layers, attention kernels and tables: which groups there are, and that every cut is exact."""

from __future__ import annotations

from math import prod
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from secateurs.graph import Tracer, find_rule
from secateurs.graph.rules import find_call_rule
from secateurs.graph.running import empty_copy
from secateurs.testing import check_model


def groups_of(model: nn.Module, inputs: Any) -> dict[str, tuple[str, int]]:
    graph = check_model(model.eval(), inputs)
    assert not graph.unknown
    return {group.name: (group.kind, group.size) for group in graph.groups}


class Recurrent(nn.Module):
    """A recurrent layer between two linear ones, whose Python code compares sizes with shapes."""

    def __init__(self, layer: nn.RNNBase) -> None:
        super().__init__()
        width = (layer.proj_size or layer.hidden_size) * (2 if layer.bidirectional else 1)
        self.embed, self.layer, self.read = nn.Linear(5, 8), layer, nn.Linear(width, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.read(self.layer(self.embed(x))[0])


class Stepwise(nn.Module):
    """A recurrent cell, called once a step."""

    def __init__(self, cell: nn.RNNCellBase) -> None:
        super().__init__()
        self.embed, self.cell, self.read = nn.Linear(5, 8), cell, nn.Linear(cell.hidden_size, 3)

    def forward(self, x: Tensor) -> Tensor:
        state = None
        for step in self.embed(x).unbind(1):
            state = self.cell(step, state)
        return self.read(state[0] if isinstance(state, tuple) else state)


LAYERS = {
    "LSTM": nn.LSTM(8, 7),
    "LSTM, batch first": nn.LSTM(8, 7, batch_first=True),
    "LSTM of two layers and directions": nn.LSTM(8, 7, 2, bidirectional=True),
    "GRU": nn.GRU(8, 7, batch_first=True),
    "GRU without bias": nn.GRU(8, 7, 2, bias=False),
    "RNN": nn.RNN(8, 7),
    "RNN of two directions": nn.RNN(8, 7, nonlinearity="relu", bidirectional=True),
}


@pytest.mark.parametrize("name", LAYERS)
def test_input_and_hidden_size_of_a_recurrent_layer_are_cut(name: str) -> None:
    found = groups_of(Recurrent(LAYERS[name]), torch.randn(2, 6, 5))
    assert found == {"embed": ("neuron", 8), "layer.weight_ih_l0": ("neuron", 7)}


@pytest.mark.parametrize("name", LAYERS)
def test_a_long_sequence_costs_its_length_and_is_traced_in_few_steps(name: str) -> None:
    """The sum over the weights, counted by hand: each is multiplied once a step, input and state."""
    layer, steps = LAYERS[name], 40
    network = Recurrent(layer)
    size = (3, steps, 5) if layer.batch_first else (steps, 3, 5)
    tracer = Tracer(find_rule, find_call_rule)
    tracer.trace(empty_copy(network).eval(), torch.randn(size))
    assert len(tracer.passes[0].records) < 20 * steps
    weights = [w for w in network.parameters() if w.dim() == 2]
    assert sum(prod((c.multiplier, *(d.size for d in c.dims))) for c in tracer.contractions) == (
        3 * steps * sum(weight.numel() for weight in weights)
    )
    check_model(network.eval(), torch.randn(size))


class Texts(nn.Module):
    """A classifier of padded token sequences of several lengths, as tutorials write it."""

    def __init__(self, layer: nn.RNNBase, *, is_sorted: bool = False, total: int | None = None) -> None:
        super().__init__()
        self.is_sorted, self.total = is_sorted, total
        self.table, self.layer = nn.Embedding(20, 8, padding_idx=0), layer
        self.read, self.tag = nn.Linear(7 * (2 if layer.bidirectional else 1), 3), nn.Linear(14, 4)

    def forward(self, tokens: Tensor, lengths: Any = None) -> Any:
        lengths = (tokens != 0).sum(1).cpu() if lengths is None else lengths
        first = self.layer.batch_first
        words = self.table(tokens if first else tokens.T)
        packed = pack_padded_sequence(words, lengths, batch_first=first, enforce_sorted=self.is_sorted)
        given, state = self.layer(packed)
        state = state[0] if isinstance(state, tuple) else state
        padded, _ = pad_packed_sequence(given, batch_first=True, total_length=self.total)
        return self.read(padded.sum(1)), self.tag(torch.cat([state[-1], state[0]], -1))


TOKENS = torch.tensor([[4, 5, 6, 7, 8], [3, 9, 2, 0, 0], [12, 0, 0, 0, 0]])


@pytest.mark.parametrize(
    ("layer", "inputs", "options"),
    [
        (nn.LSTM(8, 7, batch_first=True), TOKENS, {}),
        (nn.LSTM(8, 7, 2, bidirectional=True), (TOKENS, [5, 3, 1]), {"is_sorted": True}),
        (nn.GRU(8, 7, bidirectional=True), (TOKENS[[1, 0, 2]], torch.tensor([3, 5, 1])), {"total": 6}),
        (nn.RNN(8, 7, batch_first=True), (TOKENS[:, :3], [1, 3, 1]), {}),
    ],
    ids=["counted", "listed and sorted", "given", "plain"],
)
def test_packed_sequences_are_cut(layer: nn.RNNBase, inputs: Any, options: dict[str, Any]) -> None:
    model = Texts(layer, **options)
    found = groups_of(model, inputs)
    assert found == {"table": ("embedding", 8), "layer.weight_ih_l0": ("neuron", 7)}
    tracer = Tracer(find_rule, find_call_rule)
    tracer.trace(empty_copy(model).eval(), inputs)
    steps = 9 if not isinstance(inputs, tuple) else sum(int(length) for length in inputs[1])
    each = sum(weight.numel() for weight in layer.parameters() if weight.dim() == 2)
    others = 3 * (model.read.weight.numel() + model.tag.weight.numel())
    cost = sum(prod((c.multiplier, *(d.size for d in c.dims))) for c in tracer.contractions)
    assert cost == pytest.approx(max(steps, 6) * each + others)  # two steps are run


def test_as_many_packed_sequences_as_hidden_units() -> None:
    found = groups_of(Texts(nn.LSTM(8, 7)), (TOKENS[[0] * 7], [5] * 7))
    assert found == {"table": ("embedding", 8), "layer.weight_ih_l0": ("neuron", 7)}


def test_a_projected_lstm_keeps_its_cell_and_loses_projections() -> None:
    found = groups_of(Recurrent(nn.LSTM(8, 7, proj_size=4)), torch.randn(2, 6, 5))
    assert found == {"embed": ("neuron", 8), "layer.weight_hr_l0": ("neuron", 4)}


@pytest.mark.parametrize("cell", [nn.LSTMCell(8, 7), nn.GRUCell(8, 7), nn.RNNCell(8, 7)])
def test_a_cell_is_cut(cell: nn.RNNCellBase) -> None:
    found = groups_of(Stepwise(cell), torch.randn(2, 6, 5))
    assert found == {"embed": ("neuron", 8), "cell.weight_ih": ("neuron", 7)}


class Attention(nn.Module):
    """Attention whose code states the heads' width, or their number, and derives the other."""

    def __init__(
        self, *, heads: int = -1, width: int = -1, shared: int = 1, table: bool = False, **options: Any
    ) -> None:
        super().__init__()
        self.query, self.out = nn.Linear(8, 24), nn.Linear(24, 3)
        self.key, self.value = nn.Linear(8, 24 // shared), nn.Linear(8, 24 // shared)
        self.shape, self.shared, self.options = (heads, width), shared, options
        self.table = nn.Parameter(torch.randn(11, 4)) if table else None
        self.register_buffer("places", torch.arange(6)[:, None] - torch.arange(6) + 5)

    def forward(self, x: Tensor) -> Tensor:
        heads, width = self.shape
        few = heads // self.shared if heads > 0 else heads
        query = self.query(x).unflatten(-1, (heads, width)).transpose(1, 2)
        key = self.key(x).unflatten(-1, (few, width)).transpose(1, 2)
        value = self.value(x).unflatten(-1, (few, width)).transpose(1, 2)
        options = dict(self.options)
        if self.table is not None:
            options["attn_mask"] = self.table[self.places.view(-1)].view(6, 6, -1).permute(2, 0, 1)[None]
        mixed = F.scaled_dot_product_attention(query, key, value, enable_gqa=self.shared > 1, **options)
        return self.out(mixed.transpose(1, 2).flatten(2))


MASKS = {
    "none": {},
    "causal": {"is_causal": True},
    "of positions": {"attn_mask": torch.zeros(6, 6)},
    "spread over heads": {"attn_mask": torch.zeros(1, 1, 6, 6)},
    "of truth, one a sample": {"attn_mask": torch.ones(2, 1, 6, 6, dtype=torch.bool)},
}


@pytest.mark.parametrize("mask", MASKS)
def test_heads_are_cut_whatever_the_mask(mask: str) -> None:
    found = groups_of(Attention(width=6, **MASKS[mask]), torch.randn(2, 6, 8))
    assert found["query"] == ("head", 4)


def test_a_table_of_relative_positions_loses_the_columns_of_heads() -> None:
    model = Attention(width=6, table=True)
    graph = check_model(model.eval(), torch.randn(2, 6, 8))
    heads = graph.by_name["query"]
    assert heads.size == 4
    assert ("table", 1) in {(part.parameter, part.dim) for part in heads.slices}


def test_a_mask_with_heads_of_its_own_locks_them() -> None:
    graph = check_model(Attention(width=6, attn_mask=torch.zeros(4, 6, 6)).eval(), torch.randn(2, 6, 8))
    assert not any(group.kind == "head" for group in graph.groups)


@pytest.mark.parametrize("options", [{"scale": 0.4}, {}])
def test_the_width_of_heads_is_cut_whether_the_scale_is_stated_or_not(options: dict[str, float]) -> None:
    found = groups_of(Attention(heads=4, **options), torch.randn(2, 6, 8))
    assert list(found.values()) == [("head", 4), ("head_dim", 6), ("neuron", 6)]


@pytest.mark.parametrize(("shared", "cut"), [(2, [2]), (4, [4])])
def test_heads_go_with_their_key_and_where_many_share_it_one_by_one(shared: int, cut: list[int]) -> None:
    """Half of two heads that share a key share nothing, which the kernel tells by the length."""
    graph = check_model(Attention(width=6, shared=shared).eval(), torch.randn(2, 6, 8))
    assert [group.size for group in graph.groups if group.kind == "head"] == cut


class Einsum(nn.Module):
    """Attention written with einsum, perhaps with heads that talk to each other."""

    def __init__(self, talking: bool) -> None:
        super().__init__()
        self.query, self.key, self.value = nn.Linear(8, 24), nn.Linear(8, 24), nn.Linear(8, 24)
        self.out = nn.Linear(24, 3)
        self.talk = nn.Parameter(torch.randn(4, 4)) if talking else None

    def forward(self, x: Tensor) -> Tensor:
        layers = (self.query, self.key, self.value)
        query, key, value = (layer(x).unflatten(-1, (4, -1)).transpose(1, 2) for layer in layers)
        weights = torch.einsum("bhid,bhjd->bhij", query, key) * 0.4
        if self.talk is not None:
            weights = torch.einsum("bhij,hg->bgij", weights, self.talk)
        mixed = torch.einsum("bhij,bhjd->bhid", weights.softmax(-1), value)
        return self.out(mixed.transpose(1, 2).flatten(2))


@pytest.mark.parametrize("talking", [False, True])
def test_attention_by_einsum_loses_heads_and_width(talking: bool) -> None:
    found = groups_of(Einsum(talking), torch.randn(2, 6, 8))
    heads = 1 + talking  # what talks need not be what listens
    assert sorted(found.values()) == [*[("head", 4)] * heads, ("head_dim", 6), ("neuron", 6)]


class Looked(nn.Module):
    """A table of embeddings and a reader."""

    def __init__(self, table: nn.Module) -> None:
        super().__init__()
        self.table, self.read = table, nn.Linear(8, 3)

    def forward(self, words: Tensor) -> Tensor:
        return self.read(self.table(words))


TABLES = {
    "sum": lambda: nn.EmbeddingBag(20, 8, mode="sum"),
    "mean": lambda: nn.EmbeddingBag(20, 8, mode="mean"),
    "max": lambda: nn.EmbeddingBag(20, 8, mode="max"),
    "padded": lambda: nn.Embedding(20, 8, padding_idx=0),
    "of bounded norm": lambda: nn.Embedding(20, 8, max_norm=0.5),
}


@pytest.mark.parametrize("name", TABLES)
def test_columns_of_a_table_are_cut_and_rows_are_not(name: str) -> None:
    graph = check_model(Looked(TABLES[name]()).eval(), torch.randint(0, 20, (3, 6)))
    assert [(group.name, group.kind, group.size) for group in graph.groups] == [("table", "embedding", 8)]
    assert bool(graph.mixers) == (name == "of bounded norm")
