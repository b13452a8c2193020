"""The cut itself: what it gives, what it leaves alone, what it refuses."""

from __future__ import annotations

import copy
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_model, save_model
from torch import Tensor, nn

import models
import secateurs
from models import TOYS, build
from secateurs import Plan
from secateurs.errors import ApplyError
from secateurs.graph.packed import tensors_in
from secateurs.graph.running import call_model
from secateurs.testing import fitting
from toy import Toy


def halved(model: nn.Module, inputs: Any) -> Plan:
    """Every second unit of every group that is cut by default."""
    graph = secateurs.trace(model, inputs)
    crossing = {name for group in graph.groups for name in group.crosses if name < group.name}
    wanted = {g.name: range(0, g.size - g.size % 2, 2) for g in graph.groups if g.name not in crossing}
    return Plan.of(graph, fitting(graph, wanted))


def tensors(model: nn.Module) -> dict[str, Tensor]:
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


def outputs(model: nn.Module, inputs: Any) -> list[Tensor]:
    return tensors_in(call_model(model, inputs))


def loss(model: nn.Module, inputs: Any) -> Tensor:
    return sum(out.square().sum() for out in outputs(model, inputs))


@pytest.mark.parametrize("toy", TOYS)
def test_the_original_is_untouched_and_shares_nothing_with_the_result(toy: type[Toy]) -> None:
    model = build(toy)
    inputs = model.example()
    before = {name: t.clone() for name, t in tensors(model).items()}
    answer = [out.detach().clone() for out in outputs(model, inputs)]
    small = secateurs.apply(model, halved(model, inputs))
    for tensor in tensors(small).values():
        tensor.data.fill_(0)
    assert all(torch.equal(before[name], t) for name, t in tensors(model).items())
    assert all(torch.equal(a, b) for a, b in zip(answer, outputs(model, inputs), strict=True))
    assert isinstance(small, type(model)) and type(small).__name__ == type(model).__name__


@pytest.mark.parametrize("toy", TOYS)
def test_in_place_gives_the_same_and_keeps_the_parameters_objects(toy: type[Toy]) -> None:
    model = build(toy)
    inputs = model.example()
    plan = halved(model, inputs)
    apart = secateurs.apply(model, plan)
    loss(model, inputs).backward()
    parameters = dict(model.named_parameters())
    same = secateurs.apply(model, plan, inplace=True)
    assert same is model
    for name, parameter in model.named_parameters():
        assert parameter is parameters[name]
        assert parameter.grad is None or parameter.grad.shape == parameter.shape
    assert all(
        torch.equal(a, b) for a, b in zip(tensors(apart).values(), tensors(same).values(), strict=True)
    )
    assert repr(apart) == repr(same)
    assert all(torch.equal(a, b) for a, b in zip(outputs(apart, inputs), outputs(same, inputs), strict=True))


@pytest.mark.parametrize("inplace", [False, True])
def test_a_plan_for_another_model_is_refused_and_changes_nothing(inplace: bool) -> None:
    plan = halved(build(models.PlainVgg), torch.randn(1, 3, 8, 8))
    for other, words in (
        (build(models.ResidualStream), "cuts 'conv1.weight', which this model does not have"),
        (build(models.Conv1dNet), "which this model does not have"),
        (Widened(), r"dimension 0 of 'conv1.weight' from length 8, but its shape here is \(9, 3, 3, 3\)"),
        (WithMore(), "was made for a model with fingerprint"),
    ):
        before = {name: (id(t), t.clone()) for name, t in tensors(other).items()}
        with pytest.raises(ApplyError, match=words):
            secateurs.apply(other, plan, inplace=inplace)
        for name, tensor in tensors(other).items():
            assert id(tensor) == before[name][0]
            assert torch.equal(tensor, before[name][1])


class Widened(models.PlainVgg):
    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 9, 3)


class WithMore(models.PlainVgg):
    def __init__(self) -> None:
        super().__init__()
        self.more = nn.Linear(2, 2)


def test_a_wrong_fingerprint_alone_is_enough_to_refuse() -> None:
    model = build(models.PlainVgg)
    plan = replace(halved(model, model.example()), fingerprint="0" * 16)
    with pytest.raises(ApplyError, match="fingerprint 0000000000000000, this one has"):
        secateurs.apply(model, plan)


@pytest.mark.parametrize("toy", TOYS)
def test_gradients_reach_every_parameter_and_an_optimiser_steps(toy: type[Toy]) -> None:
    model = build(toy)
    inputs = model.example(4)
    loss(model, inputs).backward()
    reached = {name for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    small = secateurs.apply(model, halved(model, inputs))
    optimiser = torch.optim.SGD([p for p in small.parameters() if p.requires_grad], lr=1e-2, momentum=0.9)
    for _ in range(2):
        optimiser.zero_grad()
        loss(small, inputs).backward()
        optimiser.step()
    got = {name for name, p in small.named_parameters() if p.grad is not None}
    assert got == reached
    for name, parameter in small.named_parameters():
        assert parameter.is_leaf
        assert parameter.grad is None or parameter.grad.shape == parameter.shape, name
        assert parameter.isfinite().all()
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize(
    "toy", [models.PlainVgg, models.DepthwiseConv, models.InstanceNormRunning, models.PreluNet]
)
def test_training_mode_works_after_the_cut(toy: type[Toy]) -> None:
    model = build(toy)
    small = secateurs.apply(model, halved(model, model.example())).train()
    loss(small, model.example(4)).backward()
    assert all(t.isfinite().all() for t in tensors(small).values())


@pytest.mark.parametrize("toy", TOYS)
def test_a_deep_copy_and_a_state_dict_give_the_same_outputs(toy: type[Toy]) -> None:
    model = build(toy)
    inputs = model.example()
    plan = halved(model, inputs)
    small = secateurs.apply(model, plan)
    fresh = secateurs.apply(build(toy, seed=7), plan)
    missing = fresh.load_state_dict(small.state_dict())
    assert not missing.missing_keys
    for name, buffer in small.named_buffers():  # those that are in no state_dict
        fresh.get_buffer(name).copy_(buffer)
    for other in (copy.deepcopy(small), fresh):
        assert all(
            torch.equal(a, b) for a, b in zip(outputs(small, inputs), outputs(other, inputs), strict=True)
        )


@pytest.mark.parametrize(
    "toy", [models.PlainVgg, models.TiedWeights, models.ResidualStream, models.GroupedConv]
)
def test_architecture_plan_and_safetensors_rebuild_it_bit_by_bit(toy: type[Toy], tmp_path: Path) -> None:
    model = build(toy)
    inputs = model.example()
    plan = halved(model, inputs)
    small = secateurs.apply(model, plan)
    save_model(small, str(tmp_path / "model.safetensors"))
    plan.save(tmp_path / "plan.json")
    again = secateurs.apply(build(toy, seed=9), Plan.load(tmp_path / "plan.json"))
    load_model(again, str(tmp_path / "model.safetensors"))
    assert all(torch.equal(a, b) for a, b in zip(outputs(small, inputs), outputs(again, inputs), strict=True))


def test_what_is_kept_keeps_its_values() -> None:
    model = build(models.PlainVgg)
    graph = secateurs.trace(model, model.example())
    small = secateurs.apply(model, Plan.of(graph, {"conv1": [0, 5], "conv2": [11]}))
    kept = [1, 2, 3, 4, 6, 7]
    assert torch.equal(small.conv1.weight, model.conv1.weight[kept])
    assert torch.equal(small.bn1.running_var, model.bn1.running_var[kept])
    assert torch.equal(small.conv2.weight, model.conv2.weight[:11, kept])
    assert torch.equal(small.fc1.weight, model.fc1.weight[:, :44])
    assert torch.equal(small.fc2.weight, model.fc2.weight)


def test_tied_weights_stay_tied() -> None:
    model = build(models.TiedWeights)
    small = secateurs.apply(model, halved(model, model.example()))
    assert small.head.weight is small.embed.weight
    shared = build(models.SharedConv)
    small = secateurs.apply(shared, halved(shared, shared.example()))
    assert small.shared.weight.shape == (4, 4, 3, 3)


def test_modules_state_their_new_sizes() -> None:
    expected = {
        models.PlainVgg: {
            "conv1": "Conv2d(3, 4,",
            "bn1": "BatchNorm2d(4,",
            "fc1": "Linear(in_features=24, out_features=5",
        },
        models.DepthwiseConv: {
            "depth": "Conv2d(4, 4, kernel_size=(3, 3), stride=(1, 1), padding=(1, 1), groups=4"
        },
        models.TransposedConv: {"up": "ConvTranspose2d(4, 3,"},
        models.LayerNormNet: {"norm": "LayerNorm((5,)"},
        models.InstanceNormRunning: {"norm": "InstanceNorm2d(4,"},
        models.PreluNet: {"each": "PReLU(num_parameters=4)"},
        models.TiedWeights: {"embed": "Embedding(11, 3)"},
        models.IntegerAttribute: {"fc": "Linear(in_features=10, out_features=147"},
    }
    for toy, modules in expected.items():
        model = build(toy)
        small = secateurs.apply(model, halved(model, model.example()))
        for path, text in modules.items():
            assert repr(small.get_submodule(path)).startswith(text)


def test_integers_of_the_model_itself_follow_and_the_originals_stay() -> None:
    model = build(models.IntegerAttribute)
    small = secateurs.apply(model, halved(model, model.example()))
    assert (small.channels, model.channels) == (3, 6)
    assert type(small.channels) is int
    split = build(models.UnequalSplit)
    small = secateurs.apply(split, halved(split, split.example()))
    assert (small.sizes, split.sizes) == ([2, 4], [4, 8])


@pytest.mark.parametrize("inplace", [False, True])
def test_flags_modes_and_hooks_are_kept(inplace: bool) -> None:
    model = build(models.FrozenParameters)
    model.train()
    model.bn1.eval()
    calls: list[str] = []
    model.fc1.register_forward_hook(lambda *_: calls.append("fc1"))
    model.register_forward_pre_hook(lambda *_: calls.append("model"))
    flags = {name: p.requires_grad for name, p in model.named_parameters()}
    modes = {name: m.training for name, m in model.named_modules()}
    small = secateurs.apply(model, halved(model, model.example()), inplace=inplace)
    assert {name: p.requires_grad for name, p in small.named_parameters()} == flags
    assert {name: m.training for name, m in small.named_modules()} == modes
    assert not calls
    small(model.example())
    assert calls == ["model", "fc1"]
    assert all(isinstance(p, nn.Parameter) for _, p in small.named_parameters())


def test_a_buffer_that_is_not_saved_stays_unsaved() -> None:
    model = build(models.NonPersistentBuffer)
    small = secateurs.apply(model, halved(model, model.example()))
    assert small.scale.shape == (4, 1, 1)
    assert "scale" not in small.state_dict()


class MadeAtTheFirstCall(nn.Module):
    """A table that a module keeps from its first forward pass on."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(4, 6), nn.Linear(6, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.first(x)
        if not hasattr(self, "table"):
            self.table = torch.arange(1.0, 1.0 + h.shape[-1])[None].sqrt()
        return self.last(h * self.table)


@pytest.mark.parametrize("was_called", [False, True])
def test_a_constant_is_cut_where_it_is_there_already(was_called: bool) -> None:
    model, x = MadeAtTheFirstCall().eval(), torch.randn(2, 4)
    if was_called:
        model(x)
    graph = secateurs.trace(model, x)
    plan = Plan.of(graph, {"first": [0, 3]} if was_called else {})
    fresh = MadeAtTheFirstCall().eval()
    fresh.load_state_dict(model.state_dict())
    for original in (model, fresh):  # the fingerprint is that of the architecture, with or without the table
        small = secateurs.apply(original, plan)
        assert small.first.out_features == (4 if was_called else 6)
        if original is model:
            assert secateurs.verify(original, small, plan, x).ok
    assert [group.name for group in graph.groups] == (["first"] if was_called else [])


class GrownAtTheFirstCall(nn.Module):
    """A buffer that no file holds, of one entry until the first pass knows how many tokens there are."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(4, 6), nn.Linear(6, 3)
        self.register_buffer("places", torch.zeros(1), persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if len(self.places) != x.shape[1]:
            self.places = torch.arange(1.0, 1.0 + x.shape[1])
        return self.last(self.first(x).relu() * self.places[:, None])


@pytest.mark.parametrize("called", ["neither", "traced", "cut"])
def test_a_buffer_that_grows_at_the_first_call_does_not_tell_models_apart(called: str) -> None:
    model, other, x = GrownAtTheFirstCall().eval(), GrownAtTheFirstCall().eval(), torch.randn(2, 5, 4)
    other.load_state_dict(model.state_dict())
    if called != "neither":
        (model if called == "traced" else other)(x)
    plan = Plan.of(secateurs.trace(model, x), {"first": [0, 3]})
    small = secateurs.apply(other, plan)
    assert small.first.out_features == 4
    secateurs.verify(other, small, plan, x).raise_if_failed()


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_dtypes_are_kept(dtype: torch.dtype) -> None:
    model = build(models.PlainVgg).to(dtype)
    inputs = model.example().to(dtype)
    plan = halved(model, inputs)
    small = secateurs.apply(model, plan)
    assert {t.dtype for t in tensors(small).values()} == {dtype, torch.int64}
    assert small(inputs).dtype == dtype
    secateurs.verify(model, small, plan, inputs).raise_if_failed()


def test_a_model_without_data_is_cut_too() -> None:
    model = build(models.ResidualStream).to("meta")
    plan = halved(model, torch.empty(1, 3, 8, 8, device="meta"))
    small = secateurs.apply(model, plan)
    assert {t.device.type for t in tensors(small).values()} == {"meta"}
    assert small(torch.empty(5, 3, 8, 8, device="meta")).shape == (5, 4)


def test_a_plan_from_a_model_without_data_fits_the_real_one() -> None:
    model = build(models.ResidualStream)
    plan = halved(copy.deepcopy(model).to("meta"), torch.empty(1, 3, 8, 8))
    secateurs.verify(model, secateurs.apply(model, plan), plan, model.example()).raise_if_failed()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_model_on_a_gpu_stays_there() -> None:
    model = build(models.PlainVgg).cuda()
    inputs = model.example().cuda()
    plan = halved(model, inputs)
    small = secateurs.apply(model, plan)
    assert {t.device.type for t in tensors(small).values()} == {"cuda"}
    secateurs.verify(model, small, plan, inputs).raise_if_failed()


def test_the_memory_format_is_kept() -> None:
    model = build(models.PlainVgg).to(memory_format=torch.channels_last)
    assert model.conv2.weight.is_contiguous(memory_format=torch.channels_last)
    small = secateurs.apply(model, halved(model, model.example()))
    assert small.conv2.weight.is_contiguous(memory_format=torch.channels_last)


def test_other_batch_sizes_and_images_run_after_the_cut() -> None:
    model = build(models.ResidualStream)
    small = secateurs.apply(model, halved(model, model.example(2)))
    for shape in ((1, 3, 8, 8), (7, 3, 16, 12)):
        assert small(torch.randn(shape)).shape == (shape[0], 4)


def test_the_result_traces_and_cuts_again_down_to_one_unit_each() -> None:
    model: nn.Module = build(models.ResidualStream)
    inputs = torch.randn(2, 3, 8, 8)
    for _ in range(5):
        graph = secateurs.trace(model, inputs)
        if not graph.groups:
            break
        plan = Plan.of(graph, {g.name: range(g.size // 2) for g in graph.groups})
        small = secateurs.apply(model, plan)
        secateurs.verify(model, small, plan, inputs).raise_if_failed()
        model = small
    assert {p.shape[0] for name, p in model.named_parameters() if name.endswith("into.weight")} == {1}
    assert model(inputs).shape == (2, 4)


def test_a_cut_model_exports_like_any_other() -> None:
    model = build(models.PlainVgg)
    inputs = model.example()
    small = secateurs.apply(model, halved(model, inputs)).eval()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        exported = torch.export.export(small, (inputs,))
    assert torch.allclose(exported.module()(inputs), small(inputs), atol=1e-6)


def test_parameters_that_are_computed_from_others_are_cut_or_locked_but_never_wrong() -> None:
    torch.manual_seed(0)
    for dress in (
        lambda layer: nn.utils.parametrizations.weight_norm(layer),
        lambda layer: nn.utils.parametrizations.weight_norm(layer, dim=None),
        lambda layer: nn.utils.parametrizations.spectral_norm(layer),
        lambda layer: nn.utils.parametrizations.orthogonal(layer),
    ):
        model = nn.Sequential(
            dress(nn.Linear(6, 8)), nn.ReLU(), dress(nn.Linear(8, 8)), nn.ReLU(), nn.Linear(8, 4)
        )
        model.eval()
        inputs = torch.randn(3, 6)
        graph = secateurs.trace(model, inputs)
        plan = Plan.of(graph, {g.name: [0, 3] for g in graph.groups})
        small = secateurs.apply(model, plan)
        secateurs.verify(model, small, plan, inputs).raise_if_failed()
        assert small(inputs).shape == (3, 4)


def test_recurrent_layers_are_cut_or_locked_but_never_wrong() -> None:
    for kind in (nn.LSTM, nn.GRU, nn.RNN):
        model = Recurrent(kind).eval()
        inputs = torch.randn(2, 5, 6)
        graph = secateurs.trace(model, inputs)
        plan = Plan.of(graph, {g.name: [0] for g in graph.groups})
        small = secateurs.apply(model, plan)
        secateurs.verify(model, small, plan, inputs).raise_if_failed()
        assert small(inputs).shape == (2, 4)


class Recurrent(nn.Module):
    """An LSTM between two linear layers."""

    def __init__(self, kind: type[nn.RNNBase]) -> None:
        super().__init__()
        self.into, self.middle, self.out = nn.Linear(6, 8), kind(8, 7, batch_first=True), nn.Linear(7, 4)

    def forward(self, x: Tensor) -> Tensor:
        states, _ = self.middle(F.relu(self.into(x)))
        return self.out(states[:, -1])
