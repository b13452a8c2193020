"""Importances against a second computation, and what a pass over the data must not leave behind."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

import models
import secateurs
from library_models import CountedTokens
from models import build
from secateurs import Criterion, Graph, Scores
from secateurs.criteria import NORMALIZATIONS, names, register, unit_rows
from secateurs.errors import PlanError, ScoreError, UnknownNameError
from secateurs.graph.running import call_model
from toy import Toy, conv

Batch = tuple[Any, Tensor]


class Vgg(Toy):
    """Convolution, ReLU and pooling of both sorts, then a classifier with dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2, self.conv3 = conv(3, 6), conv(6, 8), conv(8, 7)
        self.fc1, self.drop, self.fc2 = nn.Linear(28, 9), nn.Dropout(0.5), nn.Linear(9, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(self.conv1(x).relu(), 2)
        x = F.avg_pool2d(self.conv2(x).relu(), 2)
        x = self.conv3(x).relu()
        return self.fc2(self.drop(self.fc1(x.flatten(1)).relu()))


LAYERS = ("conv1", "conv2", "conv3", "fc1")


def examples(toy: nn.Module, count: int = 12, seed: int = 0) -> Batch:
    torch.manual_seed(seed)
    dtype = next(toy.parameters()).dtype
    return tree_map(lambda t: t.to(dtype), toy.example(count)), torch.randint(4, (count,))


def batches(batch: Batch, sizes: list[int]) -> list[Batch]:
    """One batch cut into several."""
    inputs, targets = batch
    cut, start = [], 0
    for size in sizes:
        where = slice(start, start + size)
        cut.append((tree_map(lambda t, w=where: t[w], inputs), targets[where]))
        start += size
    return cut


def loss_fn(outputs: Any, targets: Tensor) -> Tensor:
    """Cross-entropy of whatever comes out first."""
    first = tree_leaves(outputs)[0]
    return F.cross_entropy(first.reshape(len(targets), -1)[:, :4], targets)


def scored(model: Toy, criterion: Any, data: list[Batch], **options: Any) -> Scores:
    graph = secateurs.trace(model, examples(model, 2)[0])
    return secateurs.score(model, graph, criterion, data=data, loss_fn=loss_fn, **options)


def hooked(model: nn.Module, layers: tuple[str, ...], inputs: Any) -> tuple[Any, dict[str, Tensor]]:
    """Run a model and keep the outputs of some layers, with their gradients."""
    kept: dict[str, Tensor] = {}

    def keep(name: str) -> Callable[..., None]:
        def hook(_module: nn.Module, _inputs: Any, out: Tensor) -> None:
            out.retain_grad()
            kept[name] = out

        return hook

    handles = [model.get_submodule(name).register_forward_hook(keep(name)) for name in layers]
    out = call_model(model, inputs)
    for handle in handles:
        handle.remove()
    return out, kept


# -- taylor, a second way -------------------------------------------------------------------------


def test_taylor_is_the_papers_formula() -> None:
    model = build(Vgg).double()
    inputs, targets = examples(model)
    scores = scored(model, "taylor", batches((inputs, targets), [5, 4, 3]))
    total = {name: torch.zeros(1).double() for name in LAYERS}
    for number in range(len(targets)):  # one example at a time: the gradient of its own loss
        out, kept = hooked(model, LAYERS, inputs[number : number + 1])
        F.cross_entropy(out, targets[number : number + 1]).backward()
        for name, z in kept.items():
            product = (
                (z * z.grad).detach()[0].flatten(1) if z.dim() == 4 else (z * z.grad).detach()[0][:, None]
            )
            total[name] = total[name] + product.mean(1).abs() / len(targets)
    for name in LAYERS:
        expected = total[name] / total[name].square().sum().sqrt()
        assert torch.allclose(scores[name], expected, rtol=1e-9, atol=1e-12)


def test_taylor_signed_is_the_articles_code() -> None:
    """For each batch: sum of activation x gradient over examples and space, divided by their number; summed
    over batches; absolute value; divided by the layer's norm."""
    model = build(Vgg).double()
    inputs, targets = examples(model)
    data = batches((inputs, targets), [4, 4, 4])
    scores = scored(model, "taylor-signed", data)
    ranks: dict[str, Tensor] = {}
    for x, y in data:
        model.zero_grad()
        out, kept = hooked(model, ("conv1", "conv2", "conv3"), x)
        F.cross_entropy(out, y).backward()
        for name, z in kept.items():
            values = (z * z.grad).sum(0).sum(1).sum(1).detach()
            values = values / (z.shape[0] * z.shape[2] * z.shape[3])
            ranks[name] = ranks.get(name, 0) + values
    for name, rank in ranks.items():
        expected = rank.abs() / rank.abs().square().sum().sqrt()
        assert torch.allclose(scores[name], expected, rtol=1e-9, atol=1e-12)


READERS = (
    Vgg,
    models.PlainVgg,
    models.ResidualStream,
    models.DenseBlock,
    models.SharedConv,
    models.BlockCalledThreeTimes,
    models.ConcatThenAdd,
    models.ChunkToTwoConvs,
    models.DepthwiseConv,
    models.GroupedConv,
    models.ChannelShuffle,
    models.PixelUnshuffle,
    models.SqueezeExcite,
    models.TransposedConv,
    models.PreluNet,
    models.Conv1dNet,
    models.Conv3dNet,
    models.TwoInputs,
    models.DictInputs,
    models.RawParameters,
    models.LayerNormNet,
    models.Gpt2Linear,
    models.PaddedShortcut,
)


@pytest.mark.parametrize("toy", READERS)
def test_first_order_taylor_is_the_slope_of_the_loss_in_a_gate(toy: type[Toy]) -> None:
    """Scale all that reads a unit by 1 +- e, and see how the loss changes."""
    model = build(toy, seed=3).double()
    inputs, targets = examples(model, 3)
    graph = secateurs.trace(model, inputs)
    scores = secateurs.score(
        model, graph, "taylor-signed", data=[(inputs, targets)], loss_fn=loss_fn, normalization="none"
    )
    for group in graph.groups:
        slopes = torch.tensor([_slope(model, group, unit, inputs, targets) for unit in range(group.size)])
        positions = slopes.abs().sum() / scores[group.name].sum()  # the mean over space, the same for all
        assert torch.allclose(scores[group.name] * positions, slopes.abs().double(), rtol=1e-4, atol=1e-7)
        assert float(positions) == pytest.approx(round(float(positions)), rel=1e-4)
        assert slopes.abs().max() > 1e-6


def _slope(
    model: nn.Module, group: Any, unit: int, inputs: Any, targets: Tensor, step: float = 1e-5
) -> float:
    losses = []
    weights = dict(model.named_parameters())
    for sign in (1, -1):
        kept = {}
        for part in group.by_role("consumer"):
            weight = weights[part.parameter]
            kept[part.parameter] = weight.data.clone()
            places = torch.from_numpy(part.indices[unit])
            scaled = weight.data.index_select(part.dim, places) * (1 + sign * step)
            weight.data.index_copy_(part.dim, places, scaled)
        with torch.no_grad():
            losses.append(float(loss_fn(call_model(model, inputs), targets)))
        for name, values in kept.items():
            weights[name].data.copy_(values)
    return (losses[0] - losses[1]) / (2 * step)


@pytest.mark.parametrize("toy", READERS)
def test_taylor_does_not_depend_on_how_the_data_is_cut_into_batches(toy: type[Toy]) -> None:
    model = build(toy).double()
    whole = examples(model, 6)
    graph = secateurs.trace(model, whole[0])
    results = [
        secateurs.score(model, graph, "taylor", data=batches(whole, sizes), loss_fn=loss_fn)
        for sizes in ([6], [3, 3], [1, 5], [1] * 6)
    ]
    for other in results[1:]:
        for name, values in results[0].items():
            assert torch.allclose(values, other[name], rtol=1e-8, atol=1e-12)


def test_of_one_example_both_forms_are_the_same() -> None:
    model = build(Vgg)
    one = [examples(model, 1)]
    taylor, signed = scored(model, "taylor", one), scored(model, "taylor-signed", one)
    assert all(torch.allclose(taylor[name], signed[name]) for name in LAYERS)
    several = batches(examples(model, 8), [4, 4])
    raw = {c: scored(model, c, several, normalization="none") for c in ("taylor", "taylor-signed")}
    for name in LAYERS:
        assert (raw["taylor"][name] >= raw["taylor-signed"][name] - 1e-12).all()


def test_a_unit_that_is_never_read_has_no_importance() -> None:
    model = build(Vgg)
    model.conv2.weight.data[:, 3] = 0
    scores = scored(model, "taylor", [examples(model)])
    assert scores["conv1"][3] == 0
    assert (scores["conv1"][:3] > 0).all()


# -- criteria on weights --------------------------------------------------------------------------


def test_l1_and_l2_add_up_all_that_makes_a_unit() -> None:
    model = build(models.ResidualStream)
    graph = secateurs.trace(model, model.example())
    makers = [model.stem.weight, model.blocks[0].out.weight, model.blocks[1].out.weight]
    rows = torch.cat([weight.detach().double().flatten(1) for weight in makers], 1)
    assert torch.allclose(secateurs.score(model, graph, "l1")["stem"], rows.abs().sum(1))
    assert torch.allclose(secateurs.score(model, graph, "l2")["stem"], rows.square().sum(1).sqrt())


def test_l1_of_a_transposed_convolution_reads_its_filters() -> None:
    model = build(models.TransposedConv)
    graph = secateurs.trace(model, model.example())
    expected = model.up.weight.detach().double().abs().sum((0, 2, 3))
    assert torch.allclose(secateurs.score(model, graph, "l1")["up"], expected)


def test_random_is_the_same_each_time_and_leaves_the_random_state_alone() -> None:
    model = build(Vgg)
    graph = secateurs.trace(model, model.example())
    state = torch.get_rng_state()
    one = secateurs.score(model, graph, "random")
    assert torch.equal(state, torch.get_rng_state())
    torch.manual_seed(99)
    two = secateurs.score(model, graph, "random")
    assert all(torch.equal(one[name], two[name]) for name in one)
    values = torch.cat(list(one.values()))
    assert len(values.unique()) == len(values)
    assert ((values >= 0) & (values < 1)).all()


@pytest.mark.parametrize("criterion", ["taylor", "taylor-signed", "l1", "l2"])
def test_permuting_units_permutes_their_importances(criterion: str) -> None:
    model = build(models.PlainVgg).double()
    order = torch.tensor([3, 1, 7, 0, 2, 6, 5, 4])
    other = copy.deepcopy(model)
    for tensor in (other.conv1.weight, other.conv1.bias, *other.bn1.parameters()):
        tensor.data = tensor.data[order]
    other.bn1.running_mean, other.bn1.running_var = (
        other.bn1.running_mean[order],
        other.bn1.running_var[order],
    )
    other.conv2.weight.data = other.conv2.weight.data[:, order]
    data = [examples(model)]
    one, two = scored(model, criterion, data), scored(other, criterion, data)
    assert torch.allclose(one["conv1"][order], two["conv1"])
    assert torch.allclose(one["conv2"], two["conv2"])


# -- what score takes and gives -------------------------------------------------------------------


@pytest.mark.parametrize("criterion", names())
def test_every_criterion_keeps_its_promises(criterion: str) -> None:
    toys = (models.PlainVgg, models.ResidualStream, models.DenseBlock, models.ChunkToTwoConvs)
    for toy in toys[: 1 if criterion == "bn-scale" else 4]:  # the others have no batch norm
        model = build(toy)
        graph = secateurs.trace(model, model.example())
        data = [examples(model, 4)]
        scores = secateurs.score(model, graph, criterion, data=data, loss_fn=loss_fn)
        assert scores.criterion == criterion
        ranked = [group for group in graph.groups if group.name not in scores.missing]
        assert list(scores) == [group.name for group in ranked]
        assert ranked == list(graph.groups) or criterion == "bn-scale"
        for group in ranked:
            values = scores[group.name]
            assert values.shape == (group.size,)
            assert values.dtype == torch.float64
            assert values.device.type == "cpu"
            assert not values.requires_grad
            assert values.isfinite().all()
            assert (values >= 0).all() or criterion in ("mean-activation", "obd", "hessian")
        again = secateurs.score(model, graph, criterion, data=data, loss_fn=loss_fn)
        assert all(torch.equal(scores[name], again[name]) for name in scores)


def test_several_criteria_take_one_pass() -> None:
    model = build(Vgg)
    graph = secateurs.trace(model, model.example())
    data = batches(examples(model), [6, 6])
    passes: list[int] = []

    def counted() -> Iterator[Batch]:
        passes.append(1)
        yield from data

    together = secateurs.score(
        model, graph, ["taylor", "l2", "taylor-signed"], data=counted(), loss_fn=loss_fn
    )
    assert passes == [1]
    assert list(together) == ["taylor", "l2", "taylor-signed"]
    for name, scores in together.items():
        alone = secateurs.score(model, graph, name, data=data, loss_fn=loss_fn)
        assert all(torch.equal(scores[group], alone[group]) for group in alone)


@pytest.mark.parametrize("name", NORMALIZATIONS)
def test_normalisations_divide_each_group_by_one_number(name: str) -> None:
    model = build(Vgg)
    raw = scored(model, "l1", [], normalization="none")
    values = scored(model, "l1", [], normalization=name)
    for group in raw:
        norm = {
            "none": torch.ones(()),
            "l2": raw[group].square().sum().sqrt(),
            "l1": raw[group].sum(),
            "max": raw[group].max(),
            "mean": raw[group].mean(),
        }[name]
        assert torch.allclose(values[group] * norm, raw[group])


def test_importances_of_zero_stay_zero_when_normalised() -> None:
    model = build(Vgg)
    model.conv2.weight.data.zero_()
    scores = scored(model, "taylor", [examples(model)])
    assert (scores["conv1"] == 0).all()


def test_a_function_of_ones_own() -> None:
    model = build(Vgg)

    def last_bias(group: secateurs.Group, weights: Any) -> Tensor:
        return weights[f"{group.name}.bias"]

    scores = scored(model, last_bias, [])
    assert scores.criterion == "last_bias"
    assert torch.equal(scores["conv2"], model.conv2.bias.detach().double())


def test_a_criterion_of_ones_own(monkeypatch: pytest.MonkeyPatch) -> None:
    from secateurs.criteria import protocol

    monkeypatch.setattr(protocol, "_CRITERIA", dict(protocol._CRITERIA))

    @register
    class SizeOfActivation(Criterion):
        name = "size-of-activation"
        needs_data = True

        def start(self, graph: Graph, device: torch.device) -> None:
            self.total = torch.zeros(graph.units + 1, dtype=torch.float64)

        def observe(self, reading: Any) -> None:
            self.total += reading.per_example(reading.activation.abs()).sum(0)

        def importance(self, group: Any, weights: Any) -> Tensor:
            return self.total[group.first : group.first + group.size]

    model = build(Vgg)
    inputs, targets = examples(model)
    scores = scored(model, "size-of-activation", [(inputs, targets)])
    expected = F.max_pool2d(model.conv1(inputs).relu(), 2).sum((0, 2, 3))
    assert torch.allclose(scores["conv1"], expected.double(), rtol=1e-5)
    assert torch.equal(scores["conv1"], scored(model, SizeOfActivation(), [(inputs, targets)])["conv1"])


def test_unit_rows_are_copies_of_what_each_unit_owns() -> None:
    model = build(models.FlattenHead)
    (group,) = secateurs.trace(model, model.example()).groups
    (reader,) = group.by_role("consumer")
    rows = unit_rows(model.fc.weight, reader)
    assert torch.equal(rows[2].reshape(49, 4), model.fc.weight.detach()[:, 98:147].T)
    rows.zero_()
    assert model.fc.weight.abs().sum() > 0


def test_frozen_models_and_no_grad_make_no_difference() -> None:
    model = build(models.PlainVgg)
    frozen = build(models.FrozenParameters).requires_grad_(False)
    data = [examples(model)]
    expected = scored(model, "taylor", data)
    with torch.no_grad():
        found = scored(frozen, "taylor", data)
    assert all(torch.allclose(expected[name], found[name]) for name in expected)


@pytest.mark.parametrize("traced_in_training", [False, True])
def test_scoring_runs_in_evaluation_mode(traced_in_training: bool) -> None:
    model = build(models.PlainVgg)
    data = [examples(model)]
    expected = scored(model, "taylor", data)
    graph = secateurs.trace(model.train(traced_in_training), model.example())
    found = secateurs.score(model.train(), graph, "taylor", data=data, loss_fn=loss_fn)
    assert all(torch.equal(expected[name], found[name]) for name in expected)


@pytest.mark.parametrize("criterion", ["taylor", "apoz", "reconstruction", "thinet", "obd"])
def test_hooks_of_the_user_run_and_make_no_difference(criterion: str) -> None:
    """They call torch functions, which are none of the model's own; one removes itself."""
    model = build(models.PlainVgg)
    data = batches(examples(model), [6, 6])
    expected = scored(model, criterion, data)
    seen: list[Any] = []
    for layer in (model.conv1, model.fc1):
        layer.register_forward_pre_hook(lambda _, inputs: seen.append((inputs[0] + 1).mean()))
        layer.register_forward_hook(
            lambda _, inputs, options, out: seen.append(out.relu().sum()), with_kwargs=True
        )
    once = model.bn1.register_forward_hook(lambda _, inputs, out: (seen.append(out.sum()), once.remove())[0])
    found = scored(model, criterion, data)
    assert all(torch.equal(expected[name], found[name]) for name in expected)
    assert seen and not model.bn1._forward_hooks
    assert len(model.conv1._forward_hooks) == 1


# -- no trace, in three modes ---------------------------------------------------------------------


def state(model: nn.Module) -> Any:
    return {
        "tensors": [(id(t), t._version, t.tolist()) for t in [*model.parameters(), *model.buffers()]],
        "gradients": [None if p.grad is None else (id(p.grad), p.grad.tolist()) for p in model.parameters()],
        "flags": [p.requires_grad for p in model.parameters()],
        "modes": [m.training for m in model.modules()],
        "hooks": [
            (list(m._forward_hooks), list(m._forward_pre_hooks), list(m._backward_hooks))
            for m in model.modules()
        ],
        "attributes": [sorted(m.__dict__) for m in model.modules()],
        "random": torch.get_rng_state().tolist(),
        "grad mode": torch.is_grad_enabled(),
        "fast path": torch.backends.mha.get_fastpath_enabled(),
    }


def _raise(*_: Any) -> Tensor:
    raise KeyError("mine")


def _failing_loader(batch: Batch) -> Iterator[Batch]:
    yield batch
    raise KeyError("mine")


@pytest.mark.parametrize(
    "mode", ["success", "bad argument", "bad batch", "loss raises", "model raises", "data raises"]
)
def test_nothing_is_left_behind(mode: str) -> None:
    model = build(models.PlainVgg)
    model.conv2.requires_grad_(False)
    model.train()
    model.bn1.eval()
    batch = examples(model, 4)
    loss_fn(model(batch[0]), batch[1]).backward()  # gradients of the user's own
    graph = secateurs.trace(model, model.example())
    call: dict[str, Any] = {"criterion": "taylor", "data": [batch], "loss_fn": loss_fn}
    wrong: type[Exception] | None = None
    if mode == "bad argument":
        call["criterion"], wrong = "tailor", UnknownNameError
    elif mode == "bad batch":
        call["data"], wrong = [batch, batch[0]], ScoreError
    elif mode == "loss raises":
        call["loss_fn"], wrong = _raise, KeyError
    elif mode == "model raises":
        model.fc2.register_forward_hook(_raise)
        wrong = KeyError
    elif mode == "data raises":
        call["data"], wrong = _failing_loader(batch), KeyError
    before = state(model)
    if wrong is None:
        secateurs.score(model, graph, **call)
    else:
        with pytest.raises(wrong):
            secateurs.score(model, graph, **call)
    assert state(model) == before


# -- errors ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({}, "taylor needs .*, but data and loss_fn w"),
        ({"data": []}, "taylor needs .*, but loss_fn w"),
        ({"loss_fn": loss_fn}, "taylor needs .*, but data w"),
        ({"data": [], "loss_fn": loss_fn}, "the data has no batches"),
        ({"data": iter(()), "loss_fn": loss_fn}, "the data has no batches"),
        ({"data": [torch.zeros(2, 3, 8, 8)], "loss_fn": loss_fn}, r"a pair \(inputs, targets\), got Tensor"),
        ({"data": [(1, 2, 3)], "loss_fn": loss_fn}, r"a pair \(inputs, targets\), got tuple of 3"),
        ({"data": [{"image": 1}], "loss_fn": loss_fn}, r"a pair \(inputs, targets\), got dict"),
    ],
)
def test_missing_or_bad_data_is_refused_in_words(options: dict[str, Any], words: str) -> None:
    model = build(Vgg)
    graph = secateurs.trace(model, model.example())
    with pytest.raises(ScoreError, match=words):
        secateurs.score(model, graph, "taylor", **options)


def test_a_loss_that_is_not_a_number_is_refused() -> None:
    model = build(Vgg)
    model.fc2.bias.data[0] = float("nan")
    with pytest.raises(ScoreError, match="the loss is nan on a batch of 12 examples"):
        scored(model, "taylor", [examples(model)])


def test_a_loss_that_ignores_the_model_is_refused() -> None:
    model = build(Vgg)
    graph = secateurs.trace(model, model.example())
    with pytest.raises(ScoreError, match="the loss does not depend on any unit"):
        secateurs.score(
            model, graph, "taylor", data=[examples(model)], loss_fn=lambda out, targets: torch.tensor(1.0)
        )


def test_a_loss_for_each_example_is_refused() -> None:
    model = build(Vgg)
    graph = secateurs.trace(model, model.example())
    with pytest.raises(ScoreError, match="loss"):
        secateurs.score(
            model,
            graph,
            "taylor",
            data=[examples(model)],
            loss_fn=lambda out, targets: F.cross_entropy(out, targets, reduction="none"),
        )


def test_data_of_another_shape_is_refused() -> None:
    model = build(models.LayerNormNet)
    graph = secateurs.trace(model, model.example())
    other = build(models.Gpt2Linear)
    with pytest.raises(ScoreError, match="takes another path on this data than in the trace"):
        secateurs.score(other, graph, "taylor", data=[examples(other)], loss_fn=loss_fn)


def test_an_unknown_name_gets_the_nearest() -> None:
    model = build(Vgg)
    with pytest.raises(
        UnknownNameError, match=re.escape("unknown criterion 'tailor'; did you mean 'taylor'?")
    ):
        scored(model, "tailor", [])
    with pytest.raises(UnknownNameError, match=r"use one of: activation, apoz, .*, l1, l2, .*taylor-signed"):
        scored(model, "zzz", [])
    with pytest.raises(
        UnknownNameError, match=re.escape("unknown normalization 'meen'; did you mean 'mean'?")
    ):
        scored(model, "l1", [], normalization="meen")


def test_what_is_no_criterion_is_refused() -> None:
    with pytest.raises(ScoreError, match="a criterion is a name, a Criterion or a function, got 3"):
        scored(build(Vgg), 3, [])


def test_a_function_with_the_wrong_number_of_values_is_refused() -> None:
    with pytest.raises(ScoreError, match=r"group 'conv1' has 6 units, got shape \(5,\)"):
        scored(build(Vgg), lambda group, weights: torch.zeros(5), [])


class CarrierOnly(Toy):
    """Units that no weight makes: a learned vector, spread over the image."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.read = nn.Parameter(torch.randn(1, 6, 1, 1)), conv(6, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.read(x.mean(1, keepdim=True) * self.query).mean((2, 3))


def test_units_that_nothing_makes_are_ranked_by_the_values_that_they_hold() -> None:
    model = build(CarrierOnly)
    expected = model.query.detach().flatten().abs().argsort()
    assert scored(model, "l2", [])["query"].argsort().tolist() == expected.tolist()
    assert (scored(model, "taylor", [examples(model)])["query"] > 0).any()


def test_a_table_of_whole_numbers_has_no_say_in_the_ranking() -> None:
    model = build(CountedTokens)
    graph = secateurs.trace(model, model.example())
    expected = model.tokens.detach().norm(dim=1)  # one token a row
    got = secateurs.score(model, graph, "l2", normalization="none")["tokens"]
    torch.testing.assert_close(got, expected.to(got.dtype))


class NeverRead(Toy):
    """Units that are summed without weights, beside others that weights read."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.other, self.read = conv(3, 6), conv(3, 5), conv(5, 1)

    def forward(self, x: Tensor) -> Tensor:
        total = self.conv(x).relu().sum(1, keepdim=True)
        return (self.read(self.other(x).relu()) + total).flatten(1)


def test_a_group_that_no_weight_reads_is_refused_by_taylor() -> None:
    model = build(NeverRead)
    words = "taylor needs activations that weights read, but group 'conv' has none"
    graph = secateurs.trace(model, model.example())
    scores = secateurs.score(model, graph, "taylor", data=[examples(model)], loss_fn=loss_fn)
    assert list(scores) == ["other"]
    assert repr(scores) == "Scores('taylor', 1 groups, 5 units, 1 groups without)"
    with pytest.raises(ScoreError, match=words):
        scores["conv"]
    with pytest.raises(PlanError, match=words):
        secateurs.plan(graph, scores, secateurs.Budget(units=0.5))
    assert secateurs.plan(graph, scores, secateurs.Budget(units=0.6), skip=["conv"]).groups[0].name == "other"
    assert (scored(model, "l2", [])["conv"] > 0).all()
