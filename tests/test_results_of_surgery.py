"""One table: kinds of networks x what is promised of a cut one: it is an ordinary model, and stays so."""

from __future__ import annotations

import copy
import shutil
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torchvision
from torch import Tensor, nn

import models
import more_models
import secateurs
import sequence_models
from models import build
from secateurs import Budget, Graph, Plan


def small_vit() -> nn.Module:
    model = torchvision.models.VisionTransformer(32, 8, 2, 4, 32, 48, num_classes=5)
    nn.init.normal_(model.heads.head.weight)  # torch starts it at zero, and then no gradient comes through
    return model


def small_swin() -> nn.Module:
    return torchvision.models.SwinTransformer(
        [2, 2], embed_dim=24, depths=[2, 2], num_heads=[2, 4], window_size=[4, 4], num_classes=5
    )


def image(side: int) -> Callable[[], Tensor]:
    return lambda: torch.randn(2, 3, side, side)


def positions() -> Tensor:
    return torch.randn(2, sequence_models.PLACES, 6)


MODELS: dict[str, tuple[Callable[[], nn.Module], Callable[[], Tensor]]] = {
    "plain": (lambda: build(models.PlainVgg), image(8)),
    "grouped": (lambda: build(more_models.SixConvGroups), image(8)),
    "attention written out": (lambda: build(sequence_models.AttentionWrittenOut), positions),
    "windows": (lambda: build(sequence_models.ShiftedWindows), image(4)),
    "ViT": (small_vit, image(32)),
    "Swin": (small_swin, image(32)),
    "LSTM": (lambda: build(sequence_models.LstmBetweenLinears), positions),
}
EVERY = pytest.mark.parametrize("name", MODELS)


def cut(name: str, **options: Any) -> tuple[nn.Module, Plan, nn.Module, Tensor, Graph]:
    """A model, a plan that leaves about half of each group, the result, and an input."""
    torch.manual_seed(0)
    make, example = MODELS[name]
    model, inputs = make().eval(), example()
    graph = secateurs.trace(model, inputs)
    scores = secateurs.score(model, graph, "random")
    plan = secateurs.plan(graph, scores, Budget(units=0.5), scope="local", **options)
    small = secateurs.apply(model, plan)
    secateurs.verify(model, small, plan, inputs).raise_if_failed()
    return model, plan, small, inputs, graph


# -- an ordinary model ----------------------------------------------------------------------------


@EVERY
def test_a_deep_copy_is_equal_and_stands_apart(name: str) -> None:
    *_, small, inputs, _ = cut(name)
    twin = copy.deepcopy(small)
    answer = small(inputs)
    assert repr(twin) == repr(small)
    assert torch.equal(twin(inputs), answer)
    for parameter in twin.parameters():
        parameter.data.zero_()
    assert torch.equal(small(inputs), answer)


@EVERY
def test_a_state_dict_goes_into_a_fresh_instance_that_the_plan_was_applied_to(name: str) -> None:
    _, plan, small, inputs, _ = cut(name)
    fresh = secateurs.apply(MODELS[name][0](), Plan.from_json(plan.to_json())).eval()
    assert repr(fresh) == repr(small)
    for parameter in fresh.parameters():
        parameter.data.zero_()
    assert not torch.equal(fresh(inputs), small(inputs))
    fresh.load_state_dict(small.state_dict())
    assert torch.equal(fresh(inputs), small(inputs))


@EVERY
def test_it_is_exported(name: str) -> None:
    *_, small, inputs, _ = cut(name)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.export.export(small, (inputs,))
    torch.testing.assert_close(program.module()(inputs), small(inputs))


@EVERY
def test_it_is_compiled_without_a_break(name: str) -> None:
    *_, small, inputs, _ = cut(name)
    check_compiled(small, inputs, "aot_eager")


@pytest.mark.skipif(
    shutil.which("g++") is None and shutil.which("clang++") is None, reason="needs a C++ compiler"
)
def test_it_is_compiled_to_machine_code() -> None:
    *_, small, inputs, _ = cut("plain")
    check_compiled(small, inputs, "inductor")


def check_compiled(model: nn.Module, inputs: Tensor, backend: str) -> None:
    whole = not any(isinstance(module, nn.RNNBase) for module in model.modules())  # torch refuses these
    torch._dynamo.reset()
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        compiled = torch.compile(model, backend=backend, fullgraph=whole)
        torch.testing.assert_close(compiled(inputs), model(inputs))


@EVERY
def test_a_step_of_an_optimiser_changes_every_parameter(name: str) -> None:
    model, _, small, inputs, _ = cut(name)
    assert {n for n, _ in small.named_parameters()} == {n for n, _ in model.named_parameters()}
    before = {n: parameter.detach().clone() for n, parameter in small.named_parameters()}
    optimiser = torch.optim.SGD(small.parameters(), lr=0.1)
    small(inputs).square().sum().backward()
    optimiser.step()
    still = [n for n, parameter in small.named_parameters() if torch.equal(parameter, before[n])]
    assert not still


@EVERY
def test_the_whole_chain_leaves_modes_hooks_and_flags_of_both_models(name: str) -> None:
    torch.manual_seed(0)
    make, example = MODELS[name]
    model, inputs = make().train(), example()
    part = next(m for m in model.modules() if any(True for _ in m.parameters(recurse=False)))
    part.eval().requires_grad_(False)
    calls: list[str] = []
    model.register_forward_hook(lambda *_: calls.append("forward"))
    part.register_forward_pre_hook(lambda *_: calls.append("part"))

    def state(net: nn.Module) -> Any:
        modes = {
            n: (m.training, len(m._forward_hooks), len(m._forward_pre_hooks)) for n, m in net.named_modules()
        }
        return modes, {n: (p.requires_grad, p.grad) for n, p in net.named_parameters()}

    before = state(model)
    graph = secateurs.trace(model, inputs)
    scores = secateurs.score(
        model, graph, "taylor", data=[(inputs, model(inputs).detach() + 1)], loss_fn=nn.functional.mse_loss
    )
    plan = secateurs.plan(graph, scores, Budget(units=0.6), scope="local")
    small = secateurs.apply(model, plan)
    secateurs.verify(model, small, plan, inputs).raise_if_failed()
    assert state(model) == before
    assert state(small) == before
    calls.clear()
    small(inputs)
    assert sorted(set(calls)) == ["forward", "part"]


# -- a plan keeps to what it is told, and to what the model can be -----------------------------------


def test_heads_alone_are_cut() -> None:
    model, plan, small, *_ = cut("ViT", kinds={"head"})
    assert {each.kind for each in plan.groups} == {"head"}
    layer = small.encoder.layers[0].self_attention
    assert (layer.num_heads, layer.head_dim, layer.embed_dim) == (2, 8, 32)
    assert model.encoder.layers[0].self_attention.num_heads == 4


def test_the_width_of_heads_alone_is_cut() -> None:
    _, plan, small, *_ = cut("ViT", kinds={"head_dim"})
    assert {each.kind for each in plan.groups} == {"head_dim"}
    layer = small.encoder.layers[0].self_attention
    assert (layer.num_heads, layer.head_dim, layer.embed_dim) == (4, 4, 32)


def test_convolution_groups_alone_are_cut() -> None:
    _, plan, small, *_ = cut("grouped", kinds={"conv_group"})
    assert {each.kind for each in plan.groups} == {"conv_group"}
    assert (small.grouped.groups, small.grouped.in_channels, small.grouped.out_channels) == (3, 6, 9)


@pytest.mark.parametrize("share", [0.9, 0.7, 0.5, 0.3])
@pytest.mark.parametrize("round_to", [1, 2, 4])
def test_the_stream_is_a_multiple_and_heads_divide_it(share: float, round_to: int) -> None:
    model = build(sequence_models.AttentionWrittenOut)
    inputs = model.example()
    graph = secateurs.trace(model, inputs)
    plan = secateurs.plan(
        graph, secateurs.score(model, graph, "l2"), Budget(units=share), scope="local", round_to=round_to
    )
    small = secateurs.apply(model, plan)
    width = small.embed.out_features
    assert width % round_to == 0 and width % small.heads == 0
    assert small.qkv.out_features == 3 * width
    secateurs.verify(model, small, plan, inputs).raise_if_failed()


@pytest.mark.parametrize("kinds", [None, {"channel"}])
@pytest.mark.parametrize("share", [0.8, 0.5, 0.3])
def test_the_groups_of_a_group_norm_divide_its_channels(share: float, kinds: set[str] | None) -> None:
    model = build(models.GroupNormNet)
    inputs = model.example()
    graph = secateurs.trace(model, inputs)
    scores = secateurs.score(model, graph, "l2")
    plan = secateurs.plan(graph, scores, Budget(units=share), kinds=kinds)
    small = secateurs.apply(model, plan)
    assert small.norm.num_channels == small.conv.out_channels < 12
    assert small.norm.num_channels % small.norm.num_groups == 0
    secateurs.verify(model, small, plan, inputs).raise_if_failed()
