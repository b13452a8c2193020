"""Recurrent layers: their products as calls of their own, and how these are refitted after a cut."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

import secateurs
from secateurs.criteria.unit_reads import unrankable
from secateurs.graph.running import Inputs
from secateurs.recovery import repair
from secateurs.recovery.written_out import WrittenOut

LAYERS: dict[str, Callable[[], nn.RNNBase]] = {
    "LSTM": lambda: nn.LSTM(6, 5),
    "LSTM of two levels and directions": lambda: nn.LSTM(6, 5, 2, bidirectional=True, batch_first=True),
    "LSTM that projects": lambda: nn.LSTM(6, 5, 2, proj_size=3, bidirectional=True),
    "GRU": lambda: nn.GRU(6, 5, batch_first=True, dropout=0.5, num_layers=2),
    "GRU without bias": lambda: nn.GRU(6, 5, bias=False, bidirectional=True),
    "tanh": lambda: nn.RNN(6, 5, 3),
    "relu": lambda: nn.RNN(6, 5, nonlinearity="relu", bidirectional=True),
}


def packed() -> PackedSequence:
    return pack_padded_sequence(torch.randn(7, 4, 6), torch.tensor([3, 7, 1, 5]), enforce_sorted=False)


def tensors(given: Any) -> list[Tensor]:
    if isinstance(given, PackedSequence):
        return [given.data]
    return [given] if isinstance(given, Tensor) else [each for part in given for each in tensors(part)]


@pytest.mark.filterwarnings("ignore:LSTM with projections:UserWarning")
@pytest.mark.parametrize(
    "inputs", [torch.randn(4, 7, 6), torch.randn(7, 6), packed()], ids=["three", "two", "packed"]
)
@pytest.mark.parametrize("name", LAYERS)
def test_a_layer_written_out_gives_what_it_gives(name: str, inputs: Inputs) -> None:
    layer = LAYERS[name]().eval()
    with torch.no_grad(), WrittenOut():
        given = layer(inputs)
    with torch.no_grad():
        for one, other in zip(tensors(layer(inputs)), tensors(given), strict=True):
            torch.testing.assert_close(one, other, atol=1e-6, rtol=1e-5)


def test_a_layer_that_drops_out_runs_as_it_is() -> None:
    layer, x = LAYERS["GRU"](), torch.randn(4, 7, 6)
    torch.manual_seed(0)
    plainly = layer(x)[0]
    torch.manual_seed(0)
    with WrittenOut():
        assert torch.equal(layer(x)[0], plainly)


class Sequences(nn.Module):
    """A recurrent layer between two linear ones."""

    def __init__(self, kind: type[nn.RNNBase] = nn.GRU, **settings: Any) -> None:
        super().__init__()
        self.first, self.rows = nn.Linear(5, 8), kind(8, 12, batch_first=True, **settings)
        self.last = nn.Linear(24 if settings.get("bidirectional") else 12, 3)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.last(self.rows(self.first(x).relu())[0])
        return out


class Packed(Sequences):
    """The same for sequences of several lengths."""

    def forward(self, x: Tensor) -> Tensor:
        lengths = [1 + place % x.shape[1] for place in range(len(x))]
        rows = pack_padded_sequence(self.first(x).relu(), lengths, batch_first=True, enforce_sorted=False)
        given, _ = pad_packed_sequence(self.rows(rows)[0], batch_first=True)
        out: Tensor = self.last(given)
        return out


class Twice(Sequences):
    """The layer runs over two sequences, the second from where the first ended."""

    def forward(self, x: Tensor) -> Tensor:
        one, state = self.rows(self.first(x).relu())
        two, _ = self.rows(self.first(x.flip(1)).relu(), state)
        out: Tensor = self.last(one + two)
        return out


class Stepwise(Sequences):
    """A cell, called once a step."""

    def __init__(self, kind: type[nn.RNNCellBase]) -> None:
        super().__init__()
        self.rows = kind(8, 12)

    def forward(self, x: Tensor) -> Tensor:
        state, given = None, []
        for step in self.first(x).relu().unbind(1):
            state = self.rows(step, state)
            given.append(state[0] if isinstance(state, tuple) else state)
        out: Tensor = self.last(torch.stack(given, 1))
        return out


class Decoder(Stepwise):
    """A cell that reads what it gave a step before, beside the inputs."""

    def __init__(self, kind: type[nn.RNNCellBase]) -> None:
        super().__init__(kind)
        self.rows = kind(8 + 12, 12)

    def forward(self, x: Tensor) -> Tensor:
        state, given = None, [x.new_zeros(len(x), 12)]
        for step in self.first(x).relu().unbind(1):
            state = self.rows(torch.cat([step, given[-1]], 1), state)
            given.append(state[0] if isinstance(state, tuple) else state)
        out: Tensor = self.last(torch.stack(given[1:], 1))
        return out


class OfMaps(Sequences):
    """A recurrence of one's own: gates by a convolution of the inputs and the state."""

    def __init__(self) -> None:
        super().__init__()
        self.rows = nn.Conv1d(8 + 12, 36, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        state = x.new_zeros(len(x), 12, 4)
        for step in self.first(x).relu().unbind(1):
            maps = torch.cat([step[..., None].expand(-1, -1, 4), state], 1)
            keep, take, new = self.rows(maps).chunk(3, 1)
            state = torch.sigmoid(keep) * state + torch.sigmoid(take) * torch.tanh(new)
        out: Tensor = self.last(state.mean(2))
        return out


def with_doubles(model: Sequences) -> Sequences:
    """Each unit of the second half of a layer's units, and of what it reads, is the double of one before."""
    linear, layer = model.first, model.rows
    linear.weight.data[4:], linear.bias.data[4:] = linear.weight[:4], linear.bias[:4]
    for name, tensor in layer.named_parameters():
        gates = tensor.data.view(-1, 12, *tensor.shape[1:])
        gates[:, 6:] = gates[:, :6]
        if name.startswith("weight_hh"):
            tensor.data *= 2  # recurrences that matter
    return model.eval()


CASES: dict[str, Callable[[], Sequences]] = {
    "LSTM": lambda: Sequences(nn.LSTM),
    "GRU": Sequences,
    "RNN": lambda: Sequences(nn.RNN),
    "without bias": lambda: Sequences(bias=False),
    "two levels and directions": lambda: Sequences(nn.LSTM, num_layers=2, bidirectional=True),
    "packed": lambda: Packed(bidirectional=True),
    "packed, two levels": lambda: Packed(nn.LSTM, num_layers=2),
    "run twice": lambda: Twice(nn.LSTM),
    "LSTM cell": lambda: Stepwise(nn.LSTMCell),
    "GRU cell": lambda: Stepwise(nn.GRUCell),
    "RNN cell": lambda: Stepwise(nn.RNNCell),
    "LSTM cell in a loop": lambda: Decoder(nn.LSTMCell),
    "convolution in a loop": OfMaps,
}


@pytest.mark.parametrize("name", CASES)
def test_what_left_is_made_up_for_where_its_double_stays(name: str) -> None:
    torch.manual_seed(0)
    model, x = with_doubles(CASES[name]()), torch.randn(40, 9, 5)
    graph = secateurs.trace(model, x[:8])
    hidden = next(group.name for group in graph.groups if group.name.startswith("rows"))
    plan = secateurs.Plan.of(graph, {"first": [0, 5, 2, 3], hidden: [0, 1, 8, 9, 4, 5]})
    small = secateurs.apply(model, plan)
    with torch.no_grad():
        cut = float((model(x) - small(x)).abs().max())
    done = repair(model, small, plan, x.split(8), ridge=1e-10)
    with torch.no_grad():
        assert float((model(x) - small(x)).abs().max()) < 1e-3 * cut
    names = {layer.name for layer in done.layers}
    assert {name for name, _ in small.named_parameters() if name.startswith("rows.weight")} <= names
    assert not done.left


def products_of(model: Sequences, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """What a layer reads, its states one step earlier, and its product with these."""
    read = model.first(x).relu()
    states = model.rows(read)[0]
    before = torch.cat([torch.zeros_like(states[:, :1]), states[:, :-1]], 1)
    return read, before, before @ model.rows.weight_hh_l0.T + model.rows.bias_hh_l0  # type: ignore[operator, union-attr]


def test_the_weights_are_those_of_lstsq_on_stored_activations() -> None:
    torch.manual_seed(0)
    model, x = Sequences(nn.LSTM).eval(), torch.randn(30, 9, 5)
    model.first.bias.data += 0.5  # no unit is dead
    graph = secateurs.trace(model, x[:2])
    hidden = next(group.name for group in graph.groups if group.name.startswith("rows"))
    plan = secateurs.Plan.of(graph, {"first": [1, 4], hidden: [0, 5, 7]})
    small = secateurs.apply(model, plan)
    repair(model, small, plan, x.split(10), ridge=1e-10)
    kept = [unit for unit in range(12) if unit not in (0, 5, 7)]
    rows = [12 * gate + unit for gate in range(4) for unit in kept]
    with torch.no_grad():
        read, before, product = products_of(model, x)
        given = read @ model.rows.weight_ih_l0.T + model.rows.bias_ih_l0  # type: ignore[operator, union-attr]
        pairs = [
            (read[..., [0, 2, 3, 5, 6, 7]], given, small.rows.weight_ih_l0, small.rows.bias_ih_l0),  # type: ignore[union-attr]
            (before[..., kept], product, small.rows.weight_hh_l0, small.rows.bias_hh_l0),  # type: ignore[union-attr]
        ]
    for reads, wanted, weight, bias in pairs:
        system = torch.cat([reads, torch.ones_like(reads[..., :1])], 2).flatten(0, 1).double()
        best = torch.linalg.lstsq(system, wanted[..., rows].flatten(0, 1).double()).solution
        torch.testing.assert_close(weight.double(), best[:-1].T, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(bias.double(), best[-1], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", CASES)
def test_units_are_ranked_by_all_that_reads_them(name: str) -> None:
    """What a unit with a double gives is read from the other: one of each pair leaves first, at no error."""
    torch.manual_seed(0)
    model, x = with_doubles(CASES[name]()), torch.randn(40, 9, 5)
    graph = secateurs.trace(model, x[:8])
    assert not unrankable(model, graph, x[:8])
    scores = secateurs.score(model, graph, "reconstruction", data=list(x.split(10)))
    assert scores.curves is not None
    hidden = next(group.name for group in graph.groups if group.name.startswith("rows"))
    for group, pairs in ((hidden, 6), ("first", 4)):
        gone = scores[group].argsort()[:pairs]
        assert set((gone % pairs).tolist()) == set(range(pairs))
        assert float(scores.curves[group][pairs]) < 1e-4 < float(scores.curves[group][pairs + 1])


def test_the_curve_is_that_of_least_squares_on_stored_activations() -> None:
    torch.manual_seed(0)
    model, x = Sequences(nn.LSTM).eval(), torch.randn(30, 9, 5)
    graph = secateurs.trace(model, x[:2])
    hidden = next(group.name for group in graph.groups if group.name.startswith("rows"))
    scores = secateurs.score(model, graph, "reconstruction", data=list(x.split(10)))
    assert scores.curves is not None
    with torch.no_grad():
        read, before, product = products_of(model, x)
        states, wanted = model.rows(read)[0], model(x)
    order = scores[hidden].argsort().tolist()
    for gone in (1, 4, 8):
        kept = sorted(order[gone:])
        error = missed(before[..., kept], product) + missed(states[..., kept], wanted)
        assert float(scores.curves[hidden][gone]) == pytest.approx(error, rel=1e-3)


def missed(rows: Tensor, wanted: Tensor) -> float:
    """The share of the variance that the best weights with a bias miss."""
    system = torch.cat([rows, torch.ones_like(rows[..., :1])], -1).flatten(0, 1).double()
    targets = wanted.flatten(0, 1).double()
    best = system @ torch.linalg.lstsq(system, targets, driver="gelsd").solution
    return float((best - targets).square().sum() / (targets - targets.mean(0)).square().sum())


@pytest.mark.parametrize("name", ["GRU", "two levels and directions"])
def test_a_unit_that_is_constant_is_compensated(name: str) -> None:
    """With its update gate open and no product, a unit of a GRU keeps one value; so does an LSTM's."""
    torch.manual_seed(0)
    model, x = CASES[name]().eval(), torch.randn(20, 9, 5)
    for key, tensor in model.rows.named_parameters():
        gates = tensor.data.view(-1, 12, *tensor.shape[1:])
        gates[:, 3] = 0 if key.startswith("weight") else torch.tensor([9.0, -40, 9, 9][: len(gates)])
    graph = secateurs.trace(model, x[:2])
    hidden = next(group.name for group in graph.groups if group.name.startswith("rows"))
    plan = secateurs.Plan.of(graph, {hidden: [3]})
    small = secateurs.apply(model, plan)
    with torch.no_grad():
        before = float((model(x) - small(x)).abs().max())
    repair(model, small, plan, [x], how="compensate")
    with torch.no_grad():
        assert float((model(x) - small(x))[:, 1:-1].abs().max()) < 0.2 * before
