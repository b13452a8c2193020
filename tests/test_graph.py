"""What the trace finds: groups, roles, locks with reasons, and costs counted a second way."""

from __future__ import annotations

import copy
import inspect
import json
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only
from torch.utils.flop_counter import FlopCounterMode

import models
import secateurs
from models import TOYS, build
from secateurs import Plan
from secateurs.errors import TraceError
from secateurs.graph.running import call_model
from secateurs.testing import fitting
from toy import Toy, Units

WRONG_GROUPS: dict[type[Toy], str] = {}


def known(wrong: dict[type[Toy], str], toys: tuple[type[Toy], ...] = TOYS) -> list[Any]:
    """The toys as parameters, those with a known fault marked."""
    return [
        pytest.param(
            toy,
            id=toy.__name__,
            marks=[pytest.mark.xfail(strict=True, reason=wrong[toy])] if toy in wrong else [],
        )
        for toy in toys
    ]


def written(graph: secateurs.Graph) -> set[Units]:
    """The groups of a graph in the form in which the toys state theirs."""
    return {
        Units(
            group.name,
            group.kind,
            group.size,
            frozenset((f"{p.parameter}:{p.dim}", p.role, p.indices.shape[1]) for p in group.slices),
            group.name in graph.mixers,
        )
        for group in graph.groups
    }


def counted(model: nn.Module, inputs: Any, batch: int) -> int:
    """Multiply-accumulates of one sample by torch's own counter."""
    model, inputs = tree_map_only((nn.Module, Tensor), _in_float64, (model, inputs))
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        call_model(model, inputs)
    return counter.get_total_flops() // 2 // batch


def _in_float64(value: Any) -> Any:
    """Where a recurrent layer is no kernel of its own, but made of products that the counter sees."""
    if isinstance(value, nn.Module):
        twin = copy.deepcopy(value).double()
        for parameter in twin.parameters():
            if parameter.is_complex():
                parameter.data = parameter.data.to(torch.complex128)
        return twin
    return value.double() if value.is_floating_point() else value


def halves(graph: secateurs.Graph) -> dict[str, list[int]]:
    """Every second unit of every group, from the first, or nearly so where counts are tied."""
    return fitting(graph, {group.name: range(0, group.size - group.size % 2, 2) for group in graph.groups})


# -- groups ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("toy", known(WRONG_GROUPS))
def test_the_groups_are_those_written_by_hand(toy: type[Toy]) -> None:
    model = build(toy)
    assert written(secateurs.trace(model, model.example())) == set(toy.GROUPS)


@pytest.mark.parametrize("toy", TOYS)
def test_the_counts_that_are_tied_are_those_written_by_hand(toy: type[Toy]) -> None:
    model = build(toy)
    graph = secateurs.trace(model, model.example())
    tied = {frozenset(graph.groups[place].name for place in each.groups) for each in graph.constraints}
    assert tied == set(toy.TIED)
    assert all(each.reason and each.where for each in graph.constraints)


@pytest.mark.parametrize("toy", TOYS)
def test_slices_of_a_group_are_consistent(toy: type[Toy]) -> None:
    model = build(toy)
    graph = secateurs.trace(model, model.example())
    shapes = {name: tuple(t.shape) for name, t in model.state_dict(keep_vars=True).items()}
    covered = np.zeros(graph.units, int)
    for group in graph.groups:
        covered[group.first : group.first + group.size] += 1
        for part in group.slices:
            assert part.indices.shape[0] == group.size
            assert len(np.unique(part.indices)) == part.indices.size, "one index belongs to one unit"
            if part.parameter in shapes:
                assert part.indices.max() < shapes[part.parameter][part.dim]
    assert (covered == 1).all()
    assert len({group.name for group in graph.groups}) == len(graph.groups)


def test_indices_say_where_each_unit_lives() -> None:
    flat = build(models.FlattenHead)
    (group,) = secateurs.trace(flat, flat.example()).groups
    (reader,) = group.by_role("consumer")
    assert np.array_equal(reader.indices, np.arange(6 * 49).reshape(6, 49))

    chunk = build(models.ChunkToTwoConvs)
    group = secateurs.trace(chunk, chunk.example()).by_name["wide"]
    assert np.array_equal(group.by_role("producer")[0].indices, np.stack([np.arange(6), np.arange(6, 12)], 1))

    padded = build(models.PaddedShortcut)
    group = secateurs.trace(padded, padded.example()).by_name["stem"]
    inner = {part.parameter: part.indices[:, 0].tolist() for part in group.slices}
    assert inner["out.weight"] == [2, 3, 4, 5]
    assert inner["head.fc.weight"] == [2, 3, 4, 5]


@pytest.mark.parametrize(
    "toy", [models.PlainVgg, models.ResidualStream, models.DenseBlock, models.LayerNormNet]
)
def test_groups_do_not_depend_on_batch_size_or_mode(toy: type[Toy]) -> None:
    model = build(toy)
    alone = secateurs.trace(model, model.example(1))
    assert written(alone) == written(secateurs.trace(model, model.example(5)))
    assert written(alone) == written(secateurs.trace(model.train(), model.example(3)))


def test_a_batch_as_large_as_the_channels_is_not_mistaken_for_them() -> None:
    model = build(models.BatchOfOne)
    assert written(secateurs.trace(model, model.example(8))) == set(models.BatchOfOne.GROUPS)


def test_a_model_in_training_mode_sees_its_second_head() -> None:
    model = build(models.AuxHeadInTraining).train()
    assert written(secateurs.trace(model, model.example())) == set(models.AuxHeadInTraining.GROUPS)


def test_a_model_on_the_meta_device_is_traced_alike() -> None:
    model = build(models.ResidualStream)
    empty = copy.deepcopy(model).to("meta")
    graph = secateurs.trace(empty, torch.empty(2, 3, 8, 8, device="meta"))
    assert written(graph) == set(models.ResidualStream.GROUPS)


# -- locks ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "toy",
    known(
        {},
        tuple(toy for toy in TOYS if toy.LOCKED),
    ),
)
def test_what_is_locked_says_why_and_where(toy: type[Toy]) -> None:
    model = build(toy)
    graph = secateurs.trace(model, model.example())
    locked = {f"{lock.parameter}:{lock.dim}": lock for lock in graph.locked}
    lines, first = inspect.getsourcelines(toy)
    for place, words in toy.LOCKED.items():
        assert words in locked[place].reason
        if toy.LOCKED_AT:
            line = first + max(n for n, text in enumerate(lines) if toy.LOCKED_AT in text)
            assert locked[place].source == f"{toy.__module__}.py:{line} in forward"


@pytest.mark.parametrize("toy", TOYS)
def test_each_dimension_is_either_in_a_group_or_locked(toy: type[Toy]) -> None:
    model = build(toy)
    graph = secateurs.trace(model, model.example())
    cut = {(part.parameter, part.dim) for group in graph.groups for part in group.slices}
    locked = {(lock.parameter, lock.dim) for lock in graph.locked}
    every = {(n, d) for n, shape in graph.parameters.items() for d, size in enumerate(shape) if size > 1}
    assert cut | locked == every
    assert not cut & locked
    assert all(lock.reason for lock in graph.locked)


def test_unknown_operators_are_listed() -> None:
    model = build(models.UnknownOperator)
    graph = secateurs.trace(model, model.example())
    assert list(graph.unknown) == ["secateurs_tests.double.default"]
    assert graph.unknown["secateurs_tests.double.default"].startswith("models.py:")


@pytest.mark.parametrize(
    ("toy", "place"), [(models.HardCodedFunction, "fc.weight:0"), (models.UnknownOperator, "second.weight:1")]
)
def test_the_reason_reaches_all_that_it_locks(toy: type[Toy], place: str) -> None:
    model = build(toy)
    graph = secateurs.trace(model, model.example())
    lock = next(lock for lock in graph.locked if f"{lock.parameter}:{lock.dim}" == place)
    assert lock.source.startswith("models.py:")


def test_a_rule_of_ones_own_frees_what_an_unknown_operator_locks(monkeypatch: pytest.MonkeyPatch) -> None:
    from secateurs.graph.rules import registry

    monkeypatch.setattr(registry, "_RULES", dict(registry._RULES))
    monkeypatch.setattr(registry, "_FOUND", {})

    @secateurs.rule(torch.ops.secateurs_tests.double)
    def same_places(tracer: Any, args: Any, kwargs: Any, out: Any) -> None:
        tracer.set(out, tracer.dims(args[0]))

    model = build(models.UnknownOperator)
    graph = secateurs.trace(model, model.example())
    assert [group.name for group in graph.groups] == ["first", "second", "third"]
    plan = Plan.of(graph, halves(graph))
    secateurs.verify(model, secateurs.apply(model, plan), plan, model.example()).raise_if_failed()


# -- costs ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("toy", TOYS)
def test_macs_are_those_written_by_hand_and_those_that_torch_counts(toy: type[Toy]) -> None:
    model = build(toy)
    inputs = model.example(3)
    cost = secateurs.trace(model, inputs).cost()
    assert cost.macs == toy.MACS
    assert cost.macs == counted(model, inputs, 3)
    assert cost.params == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("toy", TOYS)
@pytest.mark.parametrize("which", ["halves", "one", "all but one"])
def test_the_forecast_is_what_is_counted_after_the_cut(toy: type[Toy], which: str) -> None:
    model = build(toy)
    inputs = model.example(2)
    graph = secateurs.trace(model, inputs)
    removed = {
        "halves": halves(graph),
        "one": {group.name: [group.size - 1] for group in graph.groups},
        "all but one": {group.name: list(range(1, group.size)) for group in graph.groups},
    }[which]
    removed = fitting(graph, removed)
    plan = Plan.of(graph, removed)
    small = secateurs.apply(model, plan)
    assert plan.after == graph.cost(removed)
    assert plan.after.params == sum(p.numel() for p in small.parameters())
    assert plan.after.macs == counted(small, inputs, 2)
    assert plan.after.bytes == data_bytes(small)


def data_bytes(model: nn.Module) -> int:
    """The bytes behind the header of the file, in which tied tensors are written once."""
    kept = {tensor.data_ptr() or name: (name, tensor) for name, tensor in model.state_dict().items()}
    file = save({name: tensor.clone() for name, tensor in kept.values()})
    return len(file) - 8 - int.from_bytes(file[:8], "little")


def test_bytes_are_those_of_the_types_and_of_what_a_file_holds() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 1).half())
    model[3].forward = lambda x: F.conv2d(x, model[3].weight.float(), model[3].bias.float())  # type: ignore[method-assign]
    model.register_buffer("unsaved", torch.zeros(1000), persistent=False)
    graph = secateurs.trace(model, torch.zeros(1, 3, 8, 8))
    assert graph.cost().bytes == 4 * (3 * 8 * 9 + 8 + 4 * 8) + 8 + 2 * (8 * 4 + 4) == data_bytes(model)
    plan = Plan.of(graph, {"0": [0, 1]})
    assert plan.after.bytes == data_bytes(secateurs.apply(model, plan))
    older = json.loads(plan.to_json())
    del older["after"]["bytes"]
    assert Plan.from_json(json.dumps(older)).after.bytes == 0


@pytest.mark.parametrize("toy", TOYS)
def test_group_cost_is_what_one_unit_saves(toy: type[Toy]) -> None:
    model = build(toy)
    graph = secateurs.trace(model, model.example())
    for group in graph.groups:
        if graph.tied(group):
            continue
        small = secateurs.apply(model, Plan.of(graph, {group.name: [0]}))
        saved = graph.group_cost(group)
        assert saved.params == sum(p.numel() for p in model.parameters()) - sum(
            p.numel() for p in small.parameters()
        )
        assert saved.macs == counted(model, model.example(), 2) - counted(small, model.example(), 2)
        assert saved.bytes == data_bytes(model) - data_bytes(small)


# -- the call itself ------------------------------------------------------------------------------


def test_the_fingerprint_names_the_architecture_and_nothing_else() -> None:
    one, other = build(models.PlainVgg, seed=0), build(models.PlainVgg, seed=1)
    first = secateurs.trace(one, one.example()).fingerprint
    assert first == secateurs.trace(other.train(), other.example(7)).fingerprint
    other.fc2 = nn.Linear(10, 5)
    assert first != secateurs.trace(other, other.example()).fingerprint
    assert first != secateurs.trace(build(models.ResidualStream), one.example()).fingerprint


@pytest.mark.parametrize("toy", TOYS)
@pytest.mark.parametrize("training", [True, False])
def test_the_trace_leaves_nothing_behind(toy: type[Toy], training: bool) -> None:
    model = build(toy).train(training)
    hook = model.register_forward_hook(lambda *_: pytest.fail("the trace ran the model itself"))
    before, inputs = snapshot(model), model.example()
    random_state = torch.get_rng_state()
    secateurs.trace(model, inputs)
    assert torch.equal(random_state, torch.get_rng_state())
    assert snapshot(model) == before
    hook.remove()


def snapshot(model: nn.Module) -> dict[str, Any]:
    """All that a careless tool might leave behind in a model."""
    return {
        "ids": [(name, id(p), p._version) for name, p in [*model.named_parameters(), *model.named_buffers()]],
        "values": [t.detach().flatten().tolist() for t in [*model.parameters(), *model.buffers()]],
        "flags": [p.requires_grad for p in model.parameters()],
        "gradients": [p.grad is None for p in model.parameters()],
        "modes": [m.training for m in model.modules()],
        "attributes": [sorted(m.__dict__) for m in model.modules()],
        "integers": [
            (name, type(v), v)
            for m in model.modules()
            for name, v in m.__dict__.items()
            if isinstance(v, int | tuple)
        ],
        "fast path": torch.backends.mha.get_fastpath_enabled(),
    }


def test_a_trace_that_fails_leaves_nothing_behind() -> None:
    model = build(models.PlainVgg)
    before = snapshot(model)
    with pytest.raises(TraceError, match=r"PlainVgg could not be run on the example inputs: RuntimeError"):
        secateurs.trace(model, torch.randn(2, 5, 8, 8))
    assert snapshot(model) == before


class ReadsValues(nn.Module):
    """A branch on a value that depends on the weights, which no trace without data can take."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.fc = nn.Conv2d(3, 8, 3), nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.conv(x)).mean((2, 3))
        return self.fc(x if x.sum().item() > 0 else -x)


def _source(line: str) -> str:
    """The text of a line named as ``file.py:12 in forward`` in this file."""
    number = int(line.rpartition(":")[2].split()[0])
    return Path(__file__).read_text().splitlines()[number - 1]


def test_a_model_that_reads_values_is_run_once_on_the_example() -> None:
    model = ReadsValues().eval()
    for image in (torch.randn(1, 3, 8, 8), -torch.randn(1, 3, 8, 8)):
        graph = secateurs.trace(model, image)
        assert [(group.name, group.size) for group in graph.groups] == [("conv", 8)]
        (line,) = graph.example_only
        assert line.endswith("in forward") and _source(line).strip().startswith("return self.fc(x if x.sum()")
        plan = secateurs.Plan.of(graph, {"conv": [0, 5]})
        secateurs.verify(model, secateurs.apply(model, plan), plan, image).raise_if_failed()


def test_a_model_without_data_that_reads_values_is_refused_in_words() -> None:
    with pytest.raises(TraceError, match=r"ReadsValues could not be run on the example inputs: .*meta"):
        secateurs.trace(ReadsValues().to("meta"), torch.randn(1, 3, 8, 8))


class ReadsTheInput(nn.Module):
    """A branch on a value of the input, and a mask made of it."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.fc = nn.Embedding(20, 8), nn.Linear(8, 2)

    def forward(self, ids: Tensor) -> Tensor:
        mask = ids != 0
        x = self.embed(ids)
        if not mask.all():
            x = x[mask].mean(0, keepdim=True) + x[:, : int(mask.sum(1).max())].mean(1)
        return self.fc(x)


def test_values_of_the_input_are_known_without_data_in_the_model() -> None:
    ids = torch.tensor([[3, 4, 5, 0], [6, 7, 0, 0]])
    graph = secateurs.trace(ReadsTheInput().to("meta"), ids)
    assert [(group.name, group.size) for group in graph.groups] == [("embed", 8)]
    assert not graph.example_only  # what follows from the input alone is the same for every weight
    model = ReadsTheInput()
    plan = secateurs.Plan.of(secateurs.trace(model, ids), {"embed": [1, 2]})
    secateurs.verify(model, secateurs.apply(model, plan), plan, ids).raise_if_failed()


def test_older_weight_norm_and_spectral_norm_are_part_of_the_model() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        first = nn.utils.weight_norm(nn.Conv1d(3, 8, 3))
        second = nn.utils.spectral_norm(nn.Conv1d(8, 6, 1))
    model, x = nn.Sequential(first, nn.ReLU(), second, nn.ReLU(), nn.Conv1d(6, 2, 1)), torch.randn(2, 3, 16)
    model(x).sum().backward()
    graph = secateurs.trace(model.eval(), x)
    assert [(group.name, group.size) for group in graph.groups] == [("0.weight_v", 8), ("2.weight_orig", 6)]
    plan = secateurs.Plan.of(graph, {"0.weight_v": [0, 3], "2.weight_orig": [1]})
    small = secateurs.apply(model, plan)
    secateurs.verify(model, small, plan, x).raise_if_failed()
    assert (small[0].out_channels, small[2].in_channels, small[2].out_channels) == (6, 6, 5)
    small.train()(x).sum().backward()


class MakesATableAtTheFirstCall(nn.Module):
    """A buffer that the first call fills, and a head that only training uses."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.fc, self.extra = nn.Conv2d(3, 8, 3), nn.Linear(8, 2), nn.Linear(8, 2)
        self.register_buffer("table", torch.zeros(1), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        if self.table.shape[0] != x.shape[-1]:
            self.table = torch.arange(float(x.shape[-1]))
        x = F.relu(self.conv(x * self.table)).mean((2, 3))
        return self.fc(x) + self.extra(x) if self.training else self.fc(x)


def test_what_the_first_call_leaves_behind_is_there_in_the_second() -> None:
    graph = secateurs.trace(MakesATableAtTheFirstCall(), torch.randn(1, 3, 8, 8))
    assert [(group.name, group.size) for group in graph.groups] == [("conv", 8)]


def test_wrong_arguments_are_refused_in_words() -> None:
    with pytest.raises(TraceError, match="unexpected keyword argument"):
        secateurs.trace(build(models.DictInputs), {"picture": torch.randn(1, 3, 8, 8)})


def test_a_graph_prints_its_groups() -> None:
    model = build(models.FlattenHead)
    (group,) = secateurs.trace(model, model.example()).groups
    assert repr(group) == "Group('conv', channel, 6 units, 3 slices)"
    assert repr(group.by_role("consumer")) == "(Slice('fc.weight', dim=1, consumer, 6 units x 49),)"
