"""Reconstruction as a criterion: against least squares on stored activations, and where outputs matter."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention, unfold

import models
import secateurs
from models import build
from secateurs.criteria import consumers, places
from secateurs.criteria.consumers import Consumers
from secateurs.criteria.elimination import contributions
from secateurs.criteria.observed import Batch
from secateurs.criteria.readings import scoring_mode
from secateurs.criteria.unit_reads import unrankable
from secateurs.errors import ScoreError
from toy import Toy, conv


class TwoReaders(Toy):
    """A convolution with groups and one with a stride read the same channels: a unit is two of them."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = conv(3, 6)
        self.one, self.two = conv(6, 4, groups=2, bias=False), nn.Conv2d(6, 5, 3, stride=2, bias=False)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = self.stem(x).relu()
        return self.one(x), self.two(x)


class OneOutput(Toy):
    """A batch norm before the point of one reader; one output, so that a sketch of the outputs is exact."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm, self.body = conv(3, 5), nn.BatchNorm2d(6), conv(5, 6)
        self.fc = nn.Linear(6 * 64, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.norm(self.body(self.stem(x).relu())).relu_().flatten(1))


class NormThenSum(Toy):
    """What a layer lacks is seen after its batch norm, beside a stream that has everything."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.outer, self.norm = conv(3, 6), conv(6, 3, bias=False), nn.BatchNorm2d(3)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.norm(self.outer(self.inner(x).relu()))
        return x.relu()


class Compared(Toy):
    """Units that no weight reads, and no product of matrices."""

    PIXELS = (5, 6)

    def __init__(self) -> None:
        super().__init__()
        self.first, self.query, self.key = nn.Linear(6, 7), nn.Linear(7, 8), nn.Linear(7, 8)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x).relu()
        return self.product(self.query(x), self.key(x))

    def product(self, query: Tensor, key: Tensor) -> Tensor:
        return (query * key).sum(-1)


class QueriesAndKeys(Compared):
    """Units that no weight reads, and a product of matrices does."""

    def product(self, query: Tensor, key: Tensor) -> Tensor:
        return query @ key.mT


class Bounded(QueriesAndKeys):
    """Queries that go through an activation, so that no combination of them can take their place."""

    def product(self, query: Tensor, key: Tensor) -> Tensor:
        return query.tanh() @ key.mT


class Heads(Compared):
    """The same in heads of attention, of which two share their keys and values."""

    def __init__(self) -> None:
        super().__init__()
        self.key = nn.Linear(7, 4)

    def product(self, query: Tensor, key: Tensor) -> Tensor:
        heads, shared = query.unflatten(-1, (2, 4)).transpose(1, 2), key[:, None]
        return scaled_dot_product_attention(heads, shared, shared.sum(-1, keepdim=True), enable_gqa=True)


def ready(toy: type[Toy], examples: int = 24) -> tuple[Toy, secateurs.Graph, list[Tensor]]:
    model = build(toy)
    torch.manual_seed(1)
    return model, secateurs.trace(model, model.example(2)), list(model.example(examples).split(9))


def test_the_curve_is_that_of_least_squares_on_stored_activations() -> None:
    model, graph, data = ready(TwoReaders, examples=200)  # so many that covariances are as they are
    scores = secateurs.score(model, graph, "reconstruction", data=data)
    assert scores.curves is not None
    with torch.no_grad():
        hidden = model.stem(torch.cat(data)).relu()  # type: ignore[operator]
        wanted = [each.flatten(2).movedim(1, 2).double() for each in model(torch.cat(data))]
    whole = [float((each - each.mean((0, 1))).square().sum()) for each in wanted]
    rows = [  # (examples, positions, channels, 9)
        unfold(hidden, 3, stride=step, padding=pad).unflatten(1, (6, 9)).movedim(-1, 1).double()
        for step, pad in ((1, 1), (2, 0))
    ]
    group = pairs(graph)
    order = scores[group.name].argsort().tolist()
    for gone in range(3):
        kept = sorted(channels_of(group, order[gone:]))
        error = missed(rows[1][:, :, kept], wanted[1]) / whole[1]
        for half in (0, 1):  # the groups of the convolution are problems of their own
            own = [unit for unit in kept if unit // 3 == half]
            error += missed(rows[0][:, :, own], wanted[0][:, :, 2 * half : 2 * half + 2]) / whole[0]
        assert float(scores.curves[group.name][gone]) == pytest.approx(error, rel=1e-3, abs=1e-9)


def pairs(graph: secateurs.Graph) -> secateurs.Group:
    """The group whose units are a channel in each group of the convolution."""
    return next(group for group in graph.groups if group.size == 3)


def channels_of(group: secateurs.Group, units: list[int]) -> list[int]:
    """The channels of some units."""
    return group.by_role("producer")[0].indices[units].flatten().tolist()


def missed(rows: Tensor, wanted: Tensor) -> float:
    """The squared error of the best weights with a bias."""
    inputs = rows.flatten(0, 1).flatten(1)
    inputs = torch.cat([inputs, torch.ones(len(inputs), 1).double()], dim=1)
    targets = wanted.flatten(0, 1)
    best = torch.linalg.lstsq(inputs, targets, driver="gelsd").solution
    return float((inputs @ best - targets).square().sum())


def test_thinet_is_the_change_of_the_outputs_where_units_read_as_zero() -> None:
    model, graph, data = ready(TwoReaders)
    scores = secateurs.score(model, graph, "thinet", data=data)
    assert scores.curves is not None
    group = pairs(graph)
    order = scores[group.name].argsort().tolist()
    with torch.no_grad():
        hidden = model.stem(torch.cat(data)).relu()  # type: ignore[operator]
        for gone in range(3):
            silenced = hidden.clone()
            silenced[:, channels_of(group, order[:gone])] = 0
            change = sum(
                float((layer(hidden) - layer(silenced)).square().sum() / layer(hidden).square().sum())
                for layer in (model.one, model.two)  # type: ignore[operator]
            )
            assert float(scores.curves[group.name][gone]) == pytest.approx(change, rel=1e-4, abs=1e-9)


def read_in(model: Toy, graph: secateurs.Graph, data: list[Tensor]) -> Consumers:
    found = Consumers(graph, torch.device("cpu"), at_points=True)
    with scoring_mode(model):
        for each in data:
            found.read(Batch(model=model, inputs=each, targets=None, examples=len(each), loss_fn=None))
    return found


def test_an_error_counts_after_the_norm_and_the_sum() -> None:
    model, graph, data = ready(NormThenSum)
    norm = model.norm
    with torch.no_grad():
        norm.weight.uniform_(0.5, 2)  # type: ignore[union-attr, operator]
        norm.running_var.uniform_(0.5, 2)  # type: ignore[union-attr, operator]
        hidden = model.inner(torch.cat(data)).relu()  # type: ignore[operator]
        at_sum = norm(model.outer(hidden)) + torch.cat(data)  # type: ignore[operator]
        scale = norm.weight / (norm.running_var + norm.eps).sqrt()  # type: ignore[union-attr, operator]
    found = read_in(model, graph, data).regressions(graph.by_name["inner"], centred=True)
    whole = at_sum.double().var((0, 2, 3), correction=0).sum()
    wanted = model.outer.weight.flatten(1) * scale[:, None] / whole.sqrt()  # type: ignore[union-attr, operator]
    torch.testing.assert_close(found[0].weight, wanted.double().detach(), rtol=1e-5, atol=1e-7)


def test_permuting_units_permutes_importances() -> None:
    model, graph, data = ready(models.PlainVgg)
    before = secateurs.score(model, graph, ["reconstruction", "thinet"], data=data)
    name = graph.groups[0].name
    shuffled = torch.randperm(graph.groups[0].size)
    with torch.no_grad():
        tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
        for part in graph.groups[0].slices:
            tensor, places = tensors[part.parameter], torch.from_numpy(part.indices)
            kept = tensor.index_select(part.dim, places[shuffled].flatten())
            tensor.index_copy_(part.dim, places.flatten(), kept)
    after = secateurs.score(model, graph, ["reconstruction", "thinet"], data=data)
    for criterion in before:
        torch.testing.assert_close(
            after[criterion][name], before[criterion][name][shuffled], rtol=1e-4, atol=1e-9
        )


@pytest.mark.parametrize(
    "toy", [models.PlainVgg, models.ResidualStream, models.DenseBlock, models.SharedConv, models.FlattenHead]
)
def test_curves_rise_from_zero_and_a_budget_can_be_spent(toy: type[Toy]) -> None:
    model, graph, data = ready(toy)
    scores = secateurs.score(model, graph, "reconstruction", data=data)
    assert scores.curves is not None
    for group in graph.groups:
        curve = scores.curves[group.name]
        assert curve[0] == 0
        assert bool((curve.diff() >= 0).all())
        assert torch.equal(scores[group.name].sort().values[:-1], curve[1:].clamp(min=1e-300)) or bool(
            (scores[group.name].sort().values[:-1] >= curve[1:]).all()
        )
    decided = secateurs.plan(graph, scores, secateurs.Budget(macs=0.5), allocation="error")
    small = secateurs.apply(model, decided)
    assert secateurs.verify(model, small, decided, data[0][:2]).ok


def test_a_wide_reader_keeps_products_of_contributions(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(places, "_FEW", 0)  # covariances are as they are, also of few rows
    model, graph, data = ready(OneOutput)
    group = graph.by_name["body"]

    def problems() -> list[Tensor]:
        return [contributions(each) for each in read_in(model, graph, data).regressions(group, centred=True)]

    exact = problems()
    monkeypatch.setattr(consumers, "_WIDEST", 100)
    wide = problems()  # one output: every random combination of the outputs is the output
    torch.testing.assert_close(wide, exact, rtol=1e-4, atol=1e-9)
    scores = secateurs.score(model, graph, "reconstruction", data=data)
    assert scores.curves is not None
    assert bool((scores.curves["body"].diff() >= 0).all())


def test_units_that_no_weight_reads_are_refused() -> None:
    model, graph, data = ready(Compared)
    for criterion in ("reconstruction", "thinet"):
        scores = secateurs.score(model, graph, criterion, data=data)
        assert list(scores) == ["first"]
        assert "weights that read the units of group 'query'" in str(scores.missing["query"])


def test_queries_and_keys_are_worth_what_the_best_combinations_miss() -> None:
    model, graph, data = ready(QueriesAndKeys)
    scores = secateurs.score(model, graph, "reconstruction", data=data)
    assert scores.curves is not None
    with torch.no_grad():
        x = model.first(torch.cat(data)).relu()  # type: ignore[operator]
        query, key = (layer(x).double().flatten(0, -2) for layer in (model.query, model.key))  # type: ignore[operator]
    squares = torch.linalg.svdvals(query @ key.mT).square()[: graph.by_name["query"].size]
    missed = squares.flip(0).cumsum(0)[:-1] / squares.sum()
    assert scores.curves["query"][1:].tolist() == pytest.approx(missed.tolist(), rel=1e-3, abs=1e-6)
    assert bool((scores.curves["query"].diff() >= 0).all())


@pytest.mark.parametrize("toy", [Bounded, Heads])
def test_a_unit_of_queries_and_keys_is_worth_what_their_products_miss_without_it(toy: type[Compared]) -> None:
    model, graph, data = ready(toy)
    assert not unrankable(model, graph, data[0])
    scores = secateurs.score(model, graph, "reconstruction", data=data)
    assert scores.curves is not None
    with torch.no_grad():
        x = model.first(torch.cat(data)).relu()  # type: ignore[operator]
        query, key = model.query(x).double(), model.key(x).double()  # type: ignore[operator]
    if toy is Heads:
        query, key = query.unflatten(-1, (2, 4)).transpose(1, 2), key[:, None]
    else:
        query = query.tanh()
    group = next(group for group in graph.groups if group.name.startswith("query"))
    order, wanted = scores[group.name].argsort(), query @ key.mT
    for gone in range(1, group.size):
        kept = order[gone:]
        error = (wanted - query[..., kept] @ key[..., kept].mT).square().mean() / wanted.var(correction=0)
        assert float(scores.curves[group.name][gone]) == pytest.approx(float(error), rel=1e-3)


class AttentionInStream(Bounded):
    """Attention whose output is a part of a stream."""

    PIXELS = (5, 7)

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(7, 7)
        self.value, self.out = nn.Linear(7, 5), nn.Linear(5, 7, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        mixed = self.product(self.query(x), self.key(x)).softmax(-1) @ self.value(x)
        return x + self.out(mixed)


def test_an_error_of_attention_counts_as_much_as_attention_does_in_the_stream() -> None:
    model, graph, data = ready(AttentionInStream)
    scores = secateurs.score(model, graph, "reconstruction", data=data)
    assert scores.curves is not None
    with torch.no_grad():
        x = torch.cat(data)
        query, key = model.query(x).double().tanh(), model.key(x).double()  # type: ignore[operator]
        stream = model(x).double()
        wanted = query @ key.mT
        gives = stream - x.double()
    share = gives.var((0, 1), correction=0).sum() / stream.var((0, 1), correction=0).sum()
    order = scores["query"].argsort()
    for gone in (1, 4, 7):
        kept = order[gone:]
        error = (wanted - query[..., kept] @ key[..., kept].mT).square().mean() / wanted.var(correction=0)
        assert float(scores.curves["query"][gone]) == pytest.approx(float(error * share), rel=1e-3)


def test_data_is_needed_and_no_loss() -> None:
    model, graph, _ = ready(models.PlainVgg)
    with pytest.raises(ScoreError, match="reconstruction needs activations, but data was not given"):
        secateurs.score(model, graph, "reconstruction")


def test_few_images_do_not_make_units_look_needless() -> None:
    """Of 60 values that have nothing to do with each other any 40 are all of 40 images, by chance."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(60, 60), nn.ReLU(), nn.Linear(60, 10)).eval()
    model[0].weight.data, model[0].bias.data = torch.eye(60), torch.zeros(60)
    few, many = torch.randn(40, 60), torch.randn(4000, 60)
    graph = secateurs.trace(model, few)
    found = [secateurs.score(model, graph, "reconstruction", data=[data]).curves for data in (few, many)]
    seen, true = (curves["0"] for curves in found if curves is not None)
    assert 0.5 * true[30] < seen[30] < 2 * true[30]
    assert 0.5 * true[15] < seen[15] < 2 * true[15]
