"""The proof must also fail: a model that was cut wrongly in any way is found out."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import models
import secateurs
from models import TOYS, build
from secateurs import Plan
from secateurs.errors import ApplyError, VerifyError
from secateurs.graph.rules import registry
from secateurs.testing import fitting
from toy import Toy

CUT = {"conv1": [0, 5], "conv2": [1, 2], "fc1": [9]}


def pruned(cut: dict[str, list[int]] | None = None) -> tuple[models.PlainVgg, nn.Module, Plan, Tensor]:
    model = build(models.PlainVgg)
    inputs = model.example()
    plan = Plan.of(secateurs.trace(model, inputs), CUT if cut is None else cut)
    return model, secateurs.apply(model, plan), plan, inputs


def test_a_right_cut_passes_and_says_what_it_compared() -> None:
    model, small, plan, inputs = pruned()
    report = secateurs.verify(model, small, plan, inputs)
    assert report.ok
    assert report.exact_expected
    assert report.max_error <= 1e-12
    assert report.effect > 1e-3
    assert report.raise_if_failed() is report
    assert str(report).startswith("verified: pruned and silenced output")


def test_the_comparison_is_with_the_silenced_original_computed_by_hand() -> None:
    model, small, plan, inputs = pruned()
    with torch.no_grad():
        x = F.relu(model.bn1(model.conv1(inputs)))
        x[:, [0, 5]] = 0
        x = F.relu(model.conv2(F.max_pool2d(x, 2)))
        x[:, [1, 2]] = 0
        x = F.relu(model.fc1(F.max_pool2d(x, 2).flatten(1)))
        x[:, 9] = 0
        by_hand = model.fc2(x)
        assert torch.allclose(by_hand, small(inputs), atol=1e-6)
        effect = (model(inputs) - by_hand).abs().max()
    assert secateurs.verify(model, small, plan, inputs).effect == pytest.approx(float(effect), rel=1e-4)


Corruption = Callable[[nn.Module, nn.Module], None]


def _wrong_index(model: Any, small: Any) -> None:
    small.conv1.weight.data.copy_(model.conv1.weight[[0, 2, 3, 4, 6, 7]])


def _next_column(model: Any, small: Any) -> None:
    small.fc1.weight.data.copy_(small.fc1.weight.roll(1, 1))


CORRUPTIONS: dict[str, Corruption] = {
    "wrong index": _wrong_index,
    "wrong sign of one filter": lambda _, small: small.conv2.weight.data[0].neg_(),
    "wrong sign of one weight": lambda _, small: small.fc2.weight.data[0, 0].neg_(),
    "columns off by one": _next_column,
    "filters in another order": lambda _, small: small.conv1.weight.data.copy_(small.conv1.weight.flip(0)),
    "bias not cut along": lambda model, small: small.conv2.bias.data.copy_(model.conv2.bias[:10]),
    "scale of the norm": lambda model, small: small.bn1.weight.data.copy_(model.bn1.weight[:6]),
    "running mean": lambda model, small: small.bn1.running_mean.copy_(model.bn1.running_mean[:6]),
    "running variance": lambda model, small: small.bn1.running_var.copy_(model.bn1.running_var[:6]),
    "one weight by a thousandth": lambda _, small: small.fc2.bias.data[0].mul_(1.001),
    "a consumer's plane": lambda model, small: small.conv2.weight.data[:, 0].copy_(
        model.conv2.weight[[0, *range(3, 12)], 0]
    ),
}


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_a_corrupted_model_is_found_out(name: str) -> None:
    model, small, plan, inputs = pruned()
    CORRUPTIONS[name](model, small)
    report = secateurs.verify(model, small, plan, inputs)
    assert not report.ok
    with pytest.raises(VerifyError, match=r"verify failed: pruned and silenced output.* differ by"):
        report.raise_if_failed()


def test_a_plan_that_silences_other_units_than_it_removes_is_found_out() -> None:
    model, small, plan, inputs = pruned({"conv2": [1, 2]})
    axes = [
        replace(axis, silenced=tuple(i + 4 for i in axis.silenced))
        if axis.parameter == "fc1.weight"
        else axis
        for axis in plan.axes
    ]
    assert not secateurs.verify(model, small, replace(plan, axes=tuple(axes)), inputs).ok


def test_outputs_that_are_not_finite_are_found_out() -> None:
    model, small, plan, inputs = pruned()
    small.fc2.bias.data[0] = float("nan")
    report = secateurs.verify(model, small, plan, inputs)
    assert not report.ok
    assert "not finite" in str(report)


def test_an_original_without_a_finite_output_proves_nothing() -> None:
    model, small, plan, inputs = pruned()
    for each in (model, small):
        each.fc2.bias.data.fill_(float("nan"))  # type: ignore[union-attr, operator]
    report = secateurs.verify(model, small, plan, inputs)
    assert not report.ok
    assert "the original itself gives no finite number" in str(report)


def test_outputs_of_another_shape_are_found_out() -> None:
    model, small, plan, inputs = pruned()
    small.fc2 = nn.Linear(9, 3)
    report = secateurs.verify(model, small, plan, inputs)
    assert not report.ok
    with pytest.raises(VerifyError, match=r"output shapes \[\(2, 3\)\] instead of \[\(2, 4\)\]"):
        report.raise_if_failed()


def test_a_model_that_does_not_run_is_an_error() -> None:
    model, small, plan, inputs = pruned()
    small.fc2 = nn.Linear(10, 4)
    with pytest.raises(VerifyError, match="the pruned model could not be run: RuntimeError"):
        secateurs.verify(model, small, plan, inputs)
    with pytest.raises(VerifyError, match="the original could not be run"):
        secateurs.verify(model, small, plan, torch.randn(1, 4, 8, 8))


def test_another_original_is_refused() -> None:
    model, small, plan, inputs = pruned()
    with pytest.raises(ApplyError, match="shape here is"):
        secateurs.verify(small, small, plan, inputs)
    assert not secateurs.verify(build(models.PlainVgg, seed=5), small, plan, inputs).ok
    assert model is not small


def test_an_empty_plan_is_the_identity() -> None:
    model, small, plan, inputs = pruned({})
    report = secateurs.verify(model, small, plan, inputs)
    assert report.ok
    assert report.effect == 0
    assert report.max_error == 0


@pytest.mark.parametrize("toy", TOYS)
def test_both_models_are_left_as_they_were(toy: type[Toy]) -> None:
    model = build(toy).train()
    inputs = model.example()
    graph = secateurs.trace(model, inputs)
    plan = Plan.of(graph, fitting(graph, {g.name: [0] for g in graph.groups[:1]}))
    small = secateurs.apply(model, plan).train()
    before = [
        {name: (id(t), t.dtype, t.clone()) for name, t in m.state_dict(keep_vars=True).items()}
        for m in (model, small)
    ]
    for m in (model, small):
        m.register_forward_hook(lambda *_: pytest.fail("verify ran the model itself"))
    secateurs.verify(model, small, plan, inputs)
    assert torch.get_default_dtype() == torch.float32
    for m, known in zip((model, small), before, strict=True):
        assert m.training
        for name, tensor in m.state_dict(keep_vars=True).items():
            identity, dtype, values = known[name]
            assert (id(tensor), tensor.dtype) == (identity, dtype)
            assert torch.equal(tensor, values)


@pytest.mark.parametrize("toy", [models.LayerNormNet, models.SoftmaxOverChannels, models.MeanOverChannels])
def test_where_channels_are_mixed_the_kept_ones_are_gathered(toy: type[Toy]) -> None:
    model = build(toy)
    inputs = model.example()
    graph = secateurs.trace(model, inputs)
    name = graph.groups[0].name
    plan = Plan.of(graph, {name: [0, 1]})
    report = secateurs.verify(model, secateurs.apply(model, plan), plan, inputs)
    assert report.ok
    assert report.exact_expected
    assert report.way == "gathered"
    assert report.mixed == {name: graph.mixers[name]}
    assert report.effect > 1e-3
    assert report.max_error < 1e-12
    assert str(report).startswith("verified: pruned and gathered output")


def test_what_is_not_mixed_in_a_mixed_model_is_exact() -> None:
    model = build(models.LayerNormNet)
    inputs = model.example()
    plan = Plan.of(secateurs.trace(model, inputs), {"second": [0, 5]})
    report = secateurs.verify(model, secateurs.apply(model, plan), plan, inputs)
    assert report.way == "silenced"
    assert report.ok


# -- the engine broken on purpose -----------------------------------------------------------------

aten = torch.ops.aten


def _swapped_cat(t: Any, args: Any, kwargs: Any, out: Tensor) -> None:
    dims = list(t.dims(args[0][0]))
    dims[1] = t.labels.concatenate([t.dims(part)[1] for part in reversed(args[0])])
    t.set(out, dims)


def _norm_that_forgets(t: Any, args: Any, kwargs: Any, out: Any) -> None:
    for result in out:
        t.set(result, t.dims(args[0]) if result.dim() == args[0].dim() else [t.labels.fresh(result.shape[0])])


def _reversed_view(t: Any, args: Any, kwargs: Any, out: Tensor) -> None:
    batch, channels, *space = t.dims(args[0])
    pixels = int(np.prod([dim.size for dim in space]))
    wrong = t.labels.merge([type(channels)(pixels), channels])
    t.set(out, [batch, wrong] if out.dim() == 2 else [batch, channels, type(channels)(pixels)])


def _roll_off_by_one(t: Any, args: Any, kwargs: Any, out: Tensor) -> None:
    dims = list(t.dims(args[0]))
    dims[1] = t.labels.take(dims[1], np.roll(np.arange(dims[1].size), 1)) if dims[1].factors else dims[1]
    t.set(out, dims)


BROKEN: dict[str, tuple[Any, Any, type[Toy]]] = {
    "parts of a cat change places": (aten.cat, _swapped_cat, models.ConcatThenAdd),
    "flatten is column-major": (aten.view, _reversed_view, models.FlattenHead),
    "relu shifts by one": (aten.relu, _roll_off_by_one, models.PlainVgg),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_rule_is_found_out(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    operator, wrong, toy = BROKEN[name]
    monkeypatch.setattr(registry, "_RULES", {**registry._RULES, operator: wrong})
    monkeypatch.setattr(registry, "_FOUND", {})
    model = build(toy)
    inputs = model.example()
    graph = secateurs.trace(model, inputs)
    plan = Plan.of(graph, {group.name: [0] for group in graph.groups})
    assert len(plan) > 0
    report = secateurs.verify(model, secateurs.apply(model, plan), plan, inputs)
    assert not report.ok
    assert report.max_error > 1e-3


def test_a_rule_that_forgets_a_parameter_cannot_be_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    names = ("native_batch_norm", "_native_batch_norm_legit_no_training", "_batch_norm_no_update")
    broken = {getattr(aten, name): _norm_that_forgets for name in names}
    monkeypatch.setattr(registry, "_RULES", {**registry._RULES, **broken})
    monkeypatch.setattr(registry, "_FOUND", {})
    model = build(models.PlainVgg)
    graph = secateurs.trace(model, model.example())
    assert all(part.parameter != "conv1.weight" for group in graph.groups for part in group.slices)


class Detector(nn.Module):
    """Ranks rows by a score; rows that hold the same numbers in another order differ by rounding alone."""

    def __init__(self, most: int | None, norm: nn.Module) -> None:
        super().__init__()
        self.most, self.norm = most, norm
        self.first, self.last = nn.Linear(32, 32, bias=False), nn.Linear(32, 1, bias=False)
        nn.init.eye_(self.first.weight)
        nn.init.ones_(self.last.weight)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        scores = self.last(self.norm(self.first(x)).square()).squeeze(1)
        order = scores.argsort(descending=True) if self.most is None else scores.topk(self.most).indices
        return x[order]


@pytest.mark.parametrize("most", [None, 30])
@pytest.mark.parametrize("way", ["silenced", "gathered"])
def test_what_rounding_alone_would_decide_otherwise_is_decided_alike(most: int | None, way: str) -> None:
    norm = nn.LayerNorm(32) if way == "gathered" else nn.Identity()
    model, lost = Detector(most, norm).double().eval(), 11
    for seed in range(50):  # until rounding decides: how a machine adds up is its own affair
        torch.manual_seed(seed)
        values = torch.randn(32 - lost, dtype=torch.float64)
        rows = [torch.cat([torch.zeros(lost), values[torch.randperm(len(values))]]) for _ in range(100)]
        x = torch.stack(rows)
        plan = Plan.of(secateurs.trace(model, x), {"first": list(range(lost))})
        small = secateurs.apply(model, plan)
        if not torch.equal(small(x), model(x)):  # although the units that left were zero
            break
    else:
        pytest.skip("this machine rounds the sums of both networks alike")
    report = secateurs.verify(model, small, plan, x)
    assert (report.max_error, report.way, report.unproved) == (0, way, {})
    with torch.no_grad():
        small.last.weight[0, 3] = 2.0
    assert not secateurs.verify(model, small, plan, x).ok


class Threshold(nn.Module):
    """As many outputs as scores above zero."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(4, 6), nn.Linear(6, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        scores = self.last(self.first(x).relu()).squeeze(1)
        return scores[scores > 0]


def test_a_cut_that_changes_how_many_outputs_there_are_is_compared() -> None:
    model, x = Threshold().eval(), torch.randn(50, 4)
    with torch.no_grad():
        model.last.weight[0] = torch.tensor([4.0, -1.0, -1.0, -1.0, -1.0, -1.0])
    plan = Plan.of(secateurs.trace(model, x), {"first": [0]})
    report = secateurs.verify(model, secateurs.apply(model, plan), plan, x)
    assert report.ok and report.effect == float("inf")
    assert "changed how many outputs there are" in str(report)
