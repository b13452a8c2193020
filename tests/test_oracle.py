"""The oracle against brute force, and what it does with models that cannot be replayed."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.flop_counter import FlopCounterMode

import models
import more_models
import secateurs
import sequence_models
from models import build
from secateurs.errors import PatternError, ScoreError, UnknownNameError
from secateurs.graph.copying import tensors_of
from secateurs.graph.running import call_model
from secateurs.judging import Ledger, Oracle, oracle, sample_units
from secateurs.judging.silencing import Silencing
from secateurs.progress import Event
from toy import Head, Toy, conv


def loss_fn(outputs: Any, targets: Tensor) -> Tensor:
    """Cross-entropy of whatever comes out first."""
    return F.cross_entropy(tree_leaves(outputs)[0].reshape(len(targets), -1)[:, :4], targets)


def batch_of(toy: Toy, count: int = 5) -> tuple[Any, Tensor]:
    torch.manual_seed(1)
    inputs = tree_map(lambda t: t.double() if t.is_floating_point() else t, toy.example(count))
    return inputs, torch.randint(4, (count,))


def silenced_loss(model: nn.Module, plan: secateurs.Plan, inputs: Any, targets: Tensor) -> float:
    """The loss of a copy in which the weights that read the removed units are zero, as in `verify`."""
    silent = copy.deepcopy(model).eval()
    for axis in plan.axes:
        if axis.silenced:
            weight = tensors_of(silent)[axis.parameter]
            weight.data.index_fill_(axis.dim, torch.tensor(axis.silenced), 0)
    with torch.no_grad(), torch.random.fork_rng():
        torch.manual_seed(0)
        inputs = tree_map(lambda t: t.clone(), inputs)
        return float(loss_fn(call_model(silent, inputs), targets))


def by_hand(model: Toy, graph: secateurs.Graph, batch: tuple[Any, Tensor]) -> dict[str, Tensor]:
    graph = replace(graph, constraints=(), conditions=())  # one unit alone, whatever counts are tied
    none = secateurs.Plan.of(graph, {})
    clean = silenced_loss(model, none, *batch)
    changes = {}
    for group in graph.groups:
        plans = [secateurs.Plan.of(graph, {group.name: [unit]}) for unit in range(group.size)]
        losses = [silenced_loss(model, plan, *batch) for plan in plans]
        changes[group.name] = torch.tensor(losses, dtype=torch.float64) - clean
    return changes


class InPlaceStream(Toy):
    """Sums and activations write over their arguments, which earlier readers have to see as they were."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = conv(3, 8), nn.BatchNorm2d(8)
        self.up, self.down, self.head = conv(8, 6), conv(6, 8), Head(8)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.norm(self.stem(x)))
        for _ in range(2):
            out = self.down(self.relu(self.up(x)))
            out += x
            x = self.relu(out)
        return self.head(x)


class KeptBeforeItChanges(Toy):
    """A tensor that one reader sees before it is changed in place and another one after."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.first, self.second, self.head = conv(3, 6), conv(6, 4), conv(6, 4), Head(8)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        before = self.first(x)
        x.relu_().mul_(2.0)
        return self.head(torch.cat([before.relu(), self.second(x).relu()], 1))


REPLAYED = (
    models.PlainVgg,
    models.ResidualStream,
    models.DenseBlock,
    models.ConcatThenAdd,
    models.SharedConv,
    models.BlockCalledThreeTimes,
    models.FlattenHead,
    models.TiedWeights,
    models.UnequalSplit,
    models.ChannelShuffle,
    models.SqueezeExcite,
    models.PaddedShortcut,
    models.GroupedConv,
    models.DepthwiseConv,
    models.LayerNormNet,
    models.SoftmaxOverChannels,
    models.DictInputs,
    models.TwoInputs,
    models.Conv1dNet,
    models.TransposedConv,
    models.TiedAutoencoder,
    models.RawParameters,
    models.UnknownOperator,
    more_models.ListOfMaps,
    sequence_models.ClassToken,
    sequence_models.GatedLinearUnit,
    sequence_models.EmbeddingThenMean,
    InPlaceStream,
    KeptBeforeItChanges,
)


@pytest.mark.parametrize("toy", REPLAYED)
def test_every_change_is_that_of_zeroed_weights(toy: type[Toy]) -> None:
    model = build(toy).double()
    graph = secateurs.trace(model, batch_of(model, 2)[0])
    batch = batch_of(model)
    found = oracle(model, graph, data=[batch], loss_fn=loss_fn)
    expected = by_hand(model, graph, batch)
    assert found.changes.keys() == expected.keys() and found.changes
    for name, changes in expected.items():
        assert torch.allclose(found.changes[name], changes, rtol=0, atol=1e-12), name
    assert set(found.ways.values()) == {"replayed"}
    assert any(bool(changes.abs().max() > 1e-3) for changes in expected.values())


# -- models that cannot be replayed ---------------------------------------------------------------


class DrawsRandomNumbers(Toy):
    """Noise in evaluation too: without care no two passes have the same loss."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.mid, self.head = conv(3, 6), conv(6, 5), Head(5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x) + torch.rand(x.shape[-1]))
        return self.head(F.relu(self.mid(x) + torch.rand(x.shape[-1])))


class BranchOnValue(Toy):
    """Which branch is taken hangs on the activations, so that a silenced unit may lead elsewhere."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.mid, self.head = conv(3, 6), conv(6, 6), Head(6)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.mid(F.relu(self.stem(x))))
        if bool(x.mean() > self.mid.bias.new_tensor(self.limit)):
            x = torch.tanh(x) + 1
        return self.head(x)

    limit = 0.0


class ChangesItsInput(Toy):
    """The first line writes into the batch that it was given."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.head = conv(3, 6), Head(6)

    def forward(self, x: Tensor) -> Tensor:
        x *= 0.5
        return self.head(F.relu(self.stem(x)))


class ViewChangedInPlace(Toy):
    """Half of a tensor is changed in place through a view, after a reader has seen the whole."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.first, self.second, self.head = conv(3, 6), conv(6, 5), conv(6, 5), Head(5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x))
        corner = x[:, :, :4]
        before = self.first(x)
        corner.mul_(3.0)
        return self.head(F.relu(before + self.second(x)) * corner.shape[2])


class PreparedOnFirstCall(Toy):
    """A table that the first call makes and later ones read, so that they call less than the trace."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.head = conv(3, 6), Head(6)
        self.table: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        if self.table is None:
            self.table = torch.linspace(0.5, 1.5, 8, dtype=x.dtype)
        return self.head(F.relu(self.stem(x)) * self.table)


class SumIntoTheCleanSide(Toy):
    """A changed tensor is added in place to one that is the same for all units."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.mid, self.side, self.head = conv(3, 6), conv(6, 5), conv(3, 5), Head(5)

    def forward(self, x: Tensor) -> Tensor:
        side = self.side(x)
        side += self.mid(F.relu(self.stem(x)))
        return self.head(F.relu(side))


AWKWARD = (
    (DrawsRandomNumbers, {"stem": "brute force: replay and brute force found"}),
    (ChangesItsInput, {"stem": "brute force: forward changes its inputs or buffers in place"}),
    (ViewChangedInPlace, {"stem": "brute force: a view is changed in place after call"}),
    (PreparedOnFirstCall, {"stem": "replayed"}),
    (SumIntoTheCleanSide, {"stem": "one by one: output with shape"}),
    (
        sequence_models.AttentionWrittenOut,
        {"qkv#2": "brute force: its units are multiplied with each other, so the weights that make them"},
    ),
    (more_models.WeightNorm, {"first.parametrizations.weight.original1": "brute force: replay and brute"}),
    (
        sequence_models.LstmBetweenLinears,
        {"embed": "one by one: Batching rule not implemented for aten::lstm"},
    ),
)


@pytest.mark.parametrize(("toy", "ways"), AWKWARD)
def test_what_cannot_be_replayed_is_said_and_is_right(toy: type[Toy], ways: dict[str, str]) -> None:
    model = build(toy).double()
    graph = secateurs.trace(model, batch_of(model, 2)[0])
    batch = batch_of(model)
    before = tree_map(lambda t: t.clone(), batch)
    found = oracle(model, graph, data=[batch], loss_fn=loss_fn)
    expected = by_hand(model, graph, batch)
    for name, changes in expected.items():
        assert torch.allclose(found.changes[name], changes, rtol=0, atol=1e-12), name
    for name, way in ways.items():
        assert found.ways[name].startswith(way), found.ways
    assert all(a.equal(b) for a, b in zip(tree_leaves(before), tree_leaves(batch), strict=True))


def test_a_unit_that_leads_to_another_branch_is_measured_there() -> None:
    model = build(BranchOnValue).double()
    inputs, targets = batch_of(model, 16)
    graph = secateurs.trace(model, inputs[:2])
    with torch.no_grad():
        after = F.relu(model.mid(F.relu(model.stem(inputs))))
    model.limit = float(after.mean()) * 0.999  # just above it as it is; below it without the right unit
    found = oracle(model, graph, data=[(inputs, targets)], loss_fn=loss_fn)
    for name, changes in by_hand(model, graph, (inputs, targets)).items():
        assert torch.allclose(found.changes[name], changes, rtol=0, atol=1e-12), name
    assert found.ways["stem"].startswith("brute force: the model takes another path from call")


def test_packed_outputs_are_measured_one_by_one() -> None:
    model = build(more_models.DataclassOutput)
    inputs = model.example(5)
    targets = torch.randint(4, (5,))
    graph = secateurs.trace(model, inputs)

    def of_packed(outputs: Any, targets: Tensor) -> Tensor:
        first = next(v for v in vars(outputs).values() if isinstance(v, Tensor))
        return F.cross_entropy(first.reshape(5, -1)[:, :4], targets)

    found = oracle(model, graph, data=[(inputs, targets)], loss_fn=of_packed)
    assert found.ways["stem"].startswith("one by one: its outputs are packed in an object")


def test_only_what_follows_the_unit_is_run() -> None:
    """Counted by torch's own counter: of twelve layers, the last two units' groups need two."""
    torch.manual_seed(0)
    layers = [nn.Sequential(nn.Linear(16, 16), nn.ReLU()) for _ in range(12)]
    model = nn.Sequential(*layers, nn.Linear(16, 2))
    data = [(torch.randn(8, 16), torch.randint(2, (8,)))]
    graph = secateurs.trace(model, data[0][0])
    last = {"11.0": range(16), "10.0": range(16)}
    with FlopCounterMode(display=False) as counter:
        oracle(model, graph, data=data, loss_fn=F.cross_entropy, units=last)
    with FlopCounterMode(display=False) as whole, torch.no_grad():
        model(data[0][0])
    spared = 32 * whole.get_total_flops()
    assert counter.get_total_flops() < 0.3 * spared  # 32 suffixes of 2 layers, and 5 whole passes


# -- several batches, memory, resuming ------------------------------------------------------------


def small() -> tuple[Toy, secateurs.Graph, list[tuple[Tensor, Tensor]]]:
    model = build(models.ResidualStream)
    torch.manual_seed(3)
    sizes = (7, 4, 1)
    data = [(torch.randn(n, 3, 8, 8), torch.randint(4, (n,))) for n in sizes]
    return model, secateurs.trace(model, data[0][0]), data


def same(a: Oracle, b: Oracle, tolerance: float = 1e-6) -> bool:
    return a.changes.keys() == b.changes.keys() and all(
        torch.allclose(a.changes[name], b.changes[name], rtol=0, atol=tolerance, equal_nan=True)
        for name in a.changes
    )


def test_batches_weigh_as_many_as_their_examples() -> None:
    model, graph, data = small()
    whole = [(torch.cat([x for x, _ in data]), torch.cat([y for _, y in data]))]
    parts, one = (oracle(model, graph, data=d, loss_fn=F.cross_entropy) for d in (data, whole))
    assert same(parts, one) and parts.examples == one.examples == 12
    assert parts.loss == pytest.approx(one.loss, abs=1e-6)


def test_little_memory_changes_nothing_but_the_number_of_passes() -> None:
    model, graph, data = small()
    much = oracle(model, graph, data=data, loss_fn=F.cross_entropy)
    little = oracle(model, graph, data=data, loss_fn=F.cross_entropy, memory_mb=1e-6)
    assert same(much, little) and set(little.ways.values()) == {"replayed"}


def test_both_forms_come_from_the_mean_change() -> None:
    model, graph, data = small()
    found = oracle(model, graph, data=data, loss_fn=F.cross_entropy)
    for name in found.changes:
        assert found.values("oracle-abs")[name].equal(found.changes[name].abs())
        assert found.values("oracle-loss")[name].equal(found.changes[name])
    assert min(float(v.min()) for v in found.changes.values()) < 0  # some units do harm
    plan = secateurs.plan(graph, found.scores("oracle-loss"), secateurs.Remove(2))
    worst = min((float(v), name) for name, values in found.changes.items() for v in values)
    assert worst[1] in {cut.name for cut in plan.groups}


def test_units_that_are_zero_everywhere_cost_nothing() -> None:
    model = build(models.PlainVgg)
    model.conv2.bias.data[3] = -100.0  # the ReLU never lets it through
    graph = secateurs.trace(model, model.example())
    found = oracle(model, graph, data=[batch_of32(model)], loss_fn=F.cross_entropy)
    assert float(found.changes["conv2"][3]) == 0.0
    assert 1 <= found.silent < found.pairs == graph.units


def batch_of32(model: Toy) -> tuple[Any, Tensor]:
    torch.manual_seed(1)
    return model.example(6), torch.randint(4, (6,))


def test_a_sample_is_what_the_whole_says_of_it() -> None:
    model, graph, data = small()
    whole = oracle(model, graph, data=data, loss_fn=F.cross_entropy)
    units = sample_units(graph, 9, seed=5)
    part = oracle(model, graph, data=data, loss_fn=F.cross_entropy, units=units)
    assert sum(map(len, units.values())) == 9 and not part.is_complete
    for name, values in part.changes.items():
        measured = (~values.isnan()).nonzero().flatten().tolist()
        assert measured == units[name]
        assert torch.allclose(values[measured], whole.changes[name][measured], rtol=0, atol=1e-6)
    with pytest.raises(ScoreError, match="measured for a sample of the units, and a ranking needs all"):
        part.scores()


def test_samples_follow_from_the_seed_and_the_names_alone() -> None:
    _, graph, _ = small()
    first = sample_units(graph, 12, seed=1)
    assert first == sample_units(graph, 12, seed=1) != sample_units(graph, 12, seed=2)
    only = sample_units(graph, layers=["*1*"])
    assert only and all("1" in name and len(u) == graph.by_name[name].size for name, u in only.items())
    assert sum(map(len, sample_units(graph, 3).values())) == 3
    assert sum(map(len, sample_units(graph, 10**6).values())) == graph.units


class Killed(Exception):
    pass


def killed_after(events: int) -> Callable[[Event], None]:
    seen: list[Event] = []

    def observer(event: Event) -> None:
        seen.append(event)
        if len(seen) == events:
            raise Killed

    return observer


def test_a_killed_oracle_goes_on_where_it_was(tmp_path: Path) -> None:
    model, graph, data = small()
    expected = oracle(model, graph, data=data, loss_fn=F.cross_entropy)
    path = tmp_path / "oracle.jsonl"
    with pytest.raises(Killed):
        oracle(
            *(model, graph), data=data, loss_fn=F.cross_entropy, ledger=Ledger(path), observer=killed_after(4)
        )
    lines = path.read_text().splitlines()
    assert len(lines) == 4
    path.write_text("\n".join(lines) + "\n" + lines[0][:20])  # a line that the kill tore
    events: list[Event] = []
    resumed = oracle(
        *(model, graph), data=data, loss_fn=F.cross_entropy, ledger=Ledger(path), observer=events.append
    )
    assert same(resumed, expected, 1e-7)
    assert len(events) == len(graph.groups) * len(data) - 4
    assert len(path.read_text().splitlines()) == len(graph.groups) * len(data)
    again: list[Event] = []
    oracle(*(model, graph), data=data, loss_fn=F.cross_entropy, ledger=Ledger(path), observer=again.append)
    assert not again


def test_another_sample_is_not_taken_from_the_ledger(tmp_path: Path) -> None:
    model, graph, data = small()
    path = tmp_path / "oracle.jsonl"
    first, second = (sample_units(graph, 8, seed=seed) for seed in (1, 2))
    oracle(model, graph, data=data, loss_fn=F.cross_entropy, units=first, ledger=Ledger(path))
    found = oracle(model, graph, data=data, loss_fn=F.cross_entropy, units=second, ledger=Ledger(path))
    fresh = oracle(model, graph, data=data, loss_fn=F.cross_entropy, units=second)
    assert same(found, fresh)


# -- leaves no trace; bad input -------------------------------------------------------------------


def state_of(model: nn.Module) -> Any:
    tensors = {name: tensor.clone() for name, tensor in tensors_of(model).items()}
    return tensors, [m.training for m in model.modules()], torch.get_rng_state()


@pytest.mark.parametrize("loss", [F.cross_entropy, lambda outputs, targets: outputs.sum() * float("nan")])
def test_nothing_is_left_in_the_model(loss: Any) -> None:
    model, graph, data = small()
    model.train()
    before = state_of(model)
    try:
        oracle(model, graph, data=data, loss_fn=loss)
    except ScoreError:
        assert loss is not F.cross_entropy
    after = state_of(model)
    assert all(before[0][name].equal(after[0][name]) for name in before[0])
    assert before[1] == after[1] and before[2].equal(after[2])
    assert all(parameter.requires_grad and parameter.grad is None for parameter in model.parameters())


def nothing() -> Iterator[Any]:
    yield from ()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"data": []}, "the data has no batches"),
        ({"data": nothing()}, "the data has no batches"),
        ({"data": [torch.zeros(2, 3, 8, 8)]}, r"each batch is a pair \(inputs, targets\), got Tensor"),
        ({"loss_fn": lambda o, t: o.sum() * float("nan")}, "the loss is nan on a batch of 7 examples"),
        ({"loss_fn": lambda o, t: o}, "loss_fn must give one number"),
        ({"units": {"steam": [0]}}, "unknown group 'steam'; did you mean 'stem'"),
        ({"units": {"stem": [99]}}, "group 'stem' has units 0 to 7, got 99 to 99"),
    ],
)
def test_bad_input_is_one_clear_sentence(options: dict[str, Any], message: str) -> None:
    model, graph, data = small()
    given = {"data": data, "loss_fn": F.cross_entropy, **options}
    with pytest.raises((ScoreError, UnknownNameError), match=message):
        oracle(model, graph, **given)


def test_a_loss_that_a_unit_makes_infinite_is_named() -> None:
    model, graph, data = small()
    whole = oracle(model, graph, data=data[:1], loss_fn=F.cross_entropy)
    high = max(float(values.max()) for values in whole.changes.values()) + whole.loss

    def breaks(outputs: Tensor, targets: Tensor) -> Tensor:
        loss = F.cross_entropy(outputs, targets)
        return loss / float(loss < high - 1e-4)

    with pytest.raises(ScoreError, match=r"with unit \d+ of group '.+' silenced the loss is inf"):
        oracle(model, graph, data=data[:1], loss_fn=breaks)


def test_a_batch_of_one_and_no_such_oracle() -> None:
    model, graph, data = small()
    found = oracle(model, graph, data=data[2:], loss_fn=F.cross_entropy)
    assert found.examples == 1 and found.is_complete
    with pytest.raises(UnknownNameError, match="unknown oracle 'oracle-ab'; did you mean 'oracle-abs'"):
        found.values("oracle-ab")  # type: ignore[arg-type]
    with pytest.raises(PatternError, match="layers 'nowhere' matches no group"):
        sample_units(graph, layers=["*", "nowhere"])
    with pytest.raises(ScoreError, match=r"`units >= 1` must hold, got units=0"):
        sample_units(graph, 0)


def test_groups_that_nothing_reads_are_left_out_with_the_reason() -> None:
    _, graph, _ = small()
    silencing = Silencing(graph)
    assert [silencing.cannot(group) for group in graph.groups] == [None] * len(graph.groups)
