"""Sizes that stand in a model's code: attributes take their place where a cut needs it, and nowhere else."""

from __future__ import annotations

import copy
import importlib.util
import inspect
import io
import pickle
import traceback
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import secateurs
from secateurs import Budget, Plan
from secateurs.errors import ApplyError, PlanError

WIDTH, HEADS = 16, 4


class LeNet(nn.Module):
    """The network that torch's own tutorial begins with."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2, self.pool = nn.Conv2d(3, 6, 5), nn.Conv2d(6, 16, 5), nn.MaxPool2d(2, 2)
        self.fc1, self.fc2 = nn.Linear(16 * 5 * 5, 120), nn.Linear(120, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Two convolutions and two linear layers."""
        x = self.pool(F.relu(self.conv1(x)))
        x = self.pool(F.relu(self.conv2(x)))
        x = x.view(-1, 16 * 5 * 5)
        return self.fc2(F.relu(self.fc1(x)))

    image = (2, 3, 32, 32)


class Parts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.make, self.first, self.second = nn.Linear(5, 32), nn.Linear(12, 3), nn.Linear(20, 4)

    image = (2, 5)


class Ranges(Parts):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        made = F.relu(self.make(x))
        return self.first(made[:, :12]), self.second(made[:, 12:])


class RangesFromTheEnd(Parts):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        made = F.relu(self.make(x))
        return self.first(made[..., -12:]), self.second(made[..., :-12])


class Split(Parts):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        first, second = F.relu(self.make(x)).split([12, 20], dim=1)
        return self.first(first), self.second(second)


class Global(nn.Module):
    image = (2, 5)

    def __init__(self) -> None:
        super().__init__()
        self.make, self.read = nn.Linear(5, 16), nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.read(torch.reshape(self.make(x).relu(), (-1, WIDTH)))


class LocalVariables(nn.Module):
    image = (2, 5)

    def __init__(self) -> None:
        super().__init__()
        self.wide, self.mix, self.tall = nn.Linear(5, 24), nn.Conv2d(6, 8, 1), nn.Linear(5, 24)
        self.read, self.rows = nn.Linear(32, 3), nn.Linear(6, 2)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        maps = (6, 2, 2)
        mixed = F.relu(self.mix(self.wide(x).view(x.shape[:1] + maps)))
        flat = 8 * 2 * 2
        shape = (x.shape[0], 4, 6)
        return self.read(mixed.view(-1, flat)), self.rows(self.tall(x).relu().view(*shape))


class Unflatten(nn.Module):
    image = (2, 5)

    def __init__(self) -> None:
        super().__init__()
        self.wide, self.mix = nn.Linear(5, 24), nn.Conv2d(6, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.mix(F.relu(self.wide(x)).unflatten(1, (6, 2, 2)))


class State(nn.Module):
    image = (2, 3, 5)

    def __init__(self) -> None:
        super().__init__()
        self.cell, self.read = nn.GRUCell(5, 12), nn.Linear(12, 3)

    def forward(self, x: Tensor) -> Tensor:
        state = torch.zeros(x.size(0), 12)
        for step in range(x.size(1)):
            state = self.cell(x[:, step], state)
        return self.read(state)


class Spread(nn.Module):
    """Figures before and behind sizes that are taken over as a whole."""

    image = (2, 3, 4, 6)

    def __init__(self) -> None:
        super().__init__()
        self.gates, self.read = nn.Conv1d(4 + 12, 36, 3, padding=1), nn.Linear(12, 3)

    def forward(self, x: Tensor) -> Tensor:
        state = x.new_zeros(len(x), 12, *x.shape[3:])
        for step in x.unbind(1):
            keep, take, new = self.gates(torch.cat([step, state], 1)).chunk(3, 1)
            state = keep.sigmoid() * state + take.sigmoid() * new.tanh()
        return self.read(state.transpose(1, 2) + torch.zeros((*x.shape[:1], 1, 12)))


class Within(nn.Module):
    """Sizes in a comprehension and in a function within the method, whose own variables are no figures."""

    image = (2, 5)

    def __init__(self) -> None:
        super().__init__()
        self.make = nn.ModuleList(nn.Linear(5, 24) for _ in range(2))
        self.read, self.other = nn.Linear(6, 2), nn.Linear(16, 3)
        self.third = nn.Linear(5, 16)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        def flat(y: Tensor) -> Tensor:
            return y.relu().view(-1, 16)

        parts = [make(x).relu().reshape(x.shape[0], 4, 6) for make in self.make]
        return self.read(sum(parts)), self.other(flat(self.third(x)))


class Product(nn.Module):
    """Only the figure in a product with sizes of the input is an attribute."""

    image = (2, 3, 8, 8)

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.read = nn.Conv2d(3, 8, 3), nn.Linear(8 * 36, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.conv(x))
        return self.read(x.view(x.size(0), 8 * x.size(2) * x.size(3)))


class Attention(nn.Module):
    """Heads by figures, and the width of the stream where all heads together are meant."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(32, 96), nn.Linear(32, 32)

    def forward(self, x: Tensor) -> Tensor:
        b, n, c = x.shape
        q, k, v = self.qkv(x).reshape(b, n, 3, 4, 8).permute(2, 0, 3, 1, 4)
        mixed = (q @ k.transpose(-1, -2) * 8**-0.5).softmax(-1) @ v
        return x + self.out(mixed.transpose(1, 2).reshape(b, n, c))


class Stack(nn.Module):
    image = (2, 7, 5)

    def __init__(self, kind: Any) -> None:
        super().__init__()
        self.embed, self.blocks = nn.Linear(5, 32), nn.Sequential(kind(), kind())


class Features(Stack):
    """The stream is an output, so it stays, and only a class of another kind lets heads leave."""

    def __init__(self) -> None:
        super().__init__(Attention)
        self.norm = nn.LayerNorm(32)

    def forward(self, x: Tensor) -> Tensor:
        x = self.blocks(self.embed(x))
        return F.layer_norm(x, (32,), self.norm.weight, self.norm.bias)


ALL = (
    *(LeNet, Ranges, RangesFromTheEnd, Split, Global, LocalVariables, Unflatten, State, Within, Product),
    *(Features, Spread),
)


def halves(model: nn.Module, inputs: Tensor) -> Plan:
    graph = secateurs.trace(model, inputs)
    scores = secateurs.score(model, graph, "l2")
    return secateurs.plan(graph, scores, Budget(units=0.5), scope="local")


def built(kind: Any) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    return kind().eval(), torch.randn(kind.image)


def outputs(model: nn.Module, inputs: Tensor) -> list[Tensor]:
    out = model(inputs)
    return list(out) if isinstance(out, tuple) else [out]


@pytest.mark.parametrize("kind", ALL)
def test_what_figures_in_the_code_locked_is_cut_and_proved(kind: Any) -> None:
    model, inputs = built(kind)
    plan = halves(model, inputs)
    assert plan.after.params < 0.75 * plan.before.params
    small = secateurs.apply(model, plan)
    assert plan.written and type(small).__name__ == kind.__name__ and isinstance(small, kind)
    secateurs.verify(model, small, plan, inputs).raise_if_failed()
    sum(out.square().sum() for out in outputs(small, inputs)).backward()
    assert all(parameter.grad is not None for parameter in small.parameters())


@pytest.mark.parametrize("kind", ALL)
def test_copies_pickles_and_exports_compute_the_same(kind: Any) -> None:
    model, inputs = built(kind)
    small = secateurs.apply(model, Plan.from_json(halves(model, inputs).to_json()))
    expected = outputs(small, inputs)
    buffer = io.BytesIO()
    torch.save(small, buffer)
    buffer.seek(0)
    others = [
        copy.deepcopy(small),
        pickle.loads(pickle.dumps(small)),
        torch.load(buffer, weights_only=False),
        torch.compile(small, backend="eager"),
        torch.export.export(small, (inputs,)).module(),
    ]
    for other in others:
        for one, two in zip(expected, outputs(other, inputs), strict=True):
            torch.testing.assert_close(one, two)


def test_torchscript_and_tracebacks_read_the_code_with_the_attribute() -> None:
    model, inputs = built(LeNet)
    small = secateurs.apply(model, halves(model, inputs))
    assert "x.view(-1, self.forward_size_4_23)" in inspect.getsource(type(small).forward)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.jit is deprecated
        scripted = torch.jit.script(small)
    torch.testing.assert_close(scripted(inputs), small(inputs))
    with pytest.raises(RuntimeError) as caught:
        small(torch.zeros(1, 3, 31, 31))
    lines = [frame.line for frame in traceback.extract_tb(caught.value.__traceback__)]
    assert "x = x.view(-1, self.forward_size_4_23)" in lines
    assert type(small).forward.__doc__ == LeNet.forward.__doc__


def test_two_cuts_are_one() -> None:
    model, inputs = built(LeNet)
    first = halves(model, inputs)
    once = secateurs.apply(model, first)
    second = halves(once, inputs)
    assert first.written and not second.written
    twice, together = secateurs.apply(once, second), secateurs.apply(model, first.then(second))
    assert type(twice) is type(together)
    assert torch.equal(twice(inputs), together(inputs))
    secateurs.verify(model, together, first.then(second), inputs).raise_if_failed()


def test_a_cut_that_does_not_need_it_leaves_the_class_alone() -> None:
    model, inputs = built(LeNet)
    plan = Plan.of(secateurs.trace(model, inputs), {"conv1": [0], "fc1": [3, 4]})
    assert not plan.written and type(secateurs.apply(model, plan)) is LeNet


def test_in_place_the_module_is_the_same_object() -> None:
    model, inputs = built(LeNet)
    plan = halves(model, inputs)
    expected = secateurs.apply(model, plan)(inputs)
    assert secateurs.apply(model, plan, inplace=True) is model
    assert torch.equal(model(inputs), expected) and LeNet.forward is not type(model).forward


def test_only_modules_that_need_it_have_another_class() -> None:
    model, inputs = built(Features)
    graph = secateurs.trace(model, inputs)
    heads = next(group for group in graph.groups if group.kind == "head")
    plan = Plan.of(graph, {heads.name: [1]})
    small = secateurs.apply(model, plan)
    first, second = small.get_submodule("blocks.0"), small.get_submodule("blocks.1")
    assert type(first) is not Attention and type(second) is Attention
    secateurs.verify(model, small, plan, inputs).raise_if_failed()


class DerivedHeads(Attention):
    """The length of a head is derived from the stream, and the stream's width is what all heads are."""

    def forward(self, x: Tensor) -> Tensor:
        b, n, c = x.shape
        q, k, v = self.qkv(x).reshape(b, n, 3, 4, c // HEADS).permute(2, 0, 3, 1, 4)
        mixed = (q @ k.transpose(-1, -2) * 8**-0.5).softmax(-1) @ v
        return x + self.out(mixed.transpose(1, 2).reshape(b, n, c))


class Tied(Stack):
    """Streams and heads of two blocks have counts that agree."""

    def __init__(self) -> None:
        super().__init__(DerivedHeads)
        self.read = nn.Linear(32, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.read(self.blocks(self.embed(x)))


def cut(model: nn.Module, inputs: Tensor, **options: Any) -> tuple[Plan, nn.Module]:
    graph = secateurs.trace(model, inputs)
    plan = secateurs.plan(graph, secateurs.score(model, graph, "l2"), Budget(units=0.5), **options)
    small = secateurs.apply(model, plan)
    secateurs.verify(model, small, plan, inputs).raise_if_failed()
    return plan, small


def test_tied_counts_shrink_together_where_all_may_and_need_no_other_class() -> None:
    model, inputs = built(Tied)
    plan, small = cut(model, inputs, scope="local")
    assert {size.text for size in plan.written} <= {"4"}  # the number of heads is a figure
    assert small.embed.out_features == small.blocks[0].out.in_features == small.blocks[1].out.in_features


@pytest.mark.parametrize("kind", ["head", "head_dim"])
def test_attributes_stand_in_for_ties_to_what_may_not_leave(kind: str) -> None:
    model, inputs = built(Tied)
    plan, small = cut(model, inputs, scope="local", kinds={kind})
    assert small.embed.out_features == 32 and small.blocks[1].out.in_features == 16
    assert {group.kind for group in plan.groups} == {kind}
    assert {size.text for size in plan.written} == {"c", "4" if kind == "head" else "c // HEADS"}


def test_single_heads_leave_by_hand_from_one_block_alone() -> None:
    model, inputs = built(Tied)
    graph = secateurs.trace(model, inputs)
    heads = [group.name for group in graph.groups if group.kind == "head"]
    plan = Plan.of(graph, {heads[1]: [2]})
    small = secateurs.apply(model, plan)
    assert type(small.blocks[0]) is DerivedHeads and small.blocks[1].out.in_features == 24
    secateurs.verify(model, small, plan, inputs).raise_if_failed()


def test_code_that_has_changed_since_is_refused_and_nothing_is_cut() -> None:
    model, inputs = built(LeNet)
    text = halves(model, inputs).to_json().replace("16 * 5 * 5", "16 * 25")
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ApplyError, match=r"the code of LeNet is not what .* '16 \* 25' is not in line 5"):
        secateurs.apply(model, Plan.from_json(text), inplace=True)
    after = model.state_dict()
    assert type(model) is LeNet and all(torch.equal(before[name], after[name]) for name in before)


def test_a_file_that_was_edited_after_its_import_is_not_read_for_its_code(tmp_path: Path) -> None:
    file = tmp_path / "edited.py"
    text = """
from torch import nn

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.make, self.read = nn.Linear(5, 8), nn.Linear(8, 3)

    def forward(self, x):
        return self.read(self.make(x).relu().view(-1, 8))
"""
    file.write_text(text)
    spec = importlib.util.spec_from_file_location("edited", file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    file.write_text(text.replace(".relu()", ".tanh()"))
    graph = secateurs.trace(module.Net(), torch.randn(2, 5))
    assert not graph.groups
    assert any(lock.reason == "aten.view.default is given the fixed length 8" for lock in graph.locked)


class Checked(nn.Module):
    """A derived size that the code checks in a way that no trace sees."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.make = nn.Linear(5, 8), nn.Linear(8, 8)
        self.read, self.other = nn.Linear(8, 2), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = self.embed(x).relu()
        b, c = x.shape
        y = self.make(x).relu().reshape(b, c)
        if y.shape[1] / 2 != c / 2:
            raise ValueError("other widths")
        return self.read(y), self.other(x)


def test_where_attributes_fail_the_tie_stays() -> None:
    model, inputs = Checked().eval(), torch.randn(2, 5)
    graph = secateurs.trace(model, inputs)
    assert [group.name for group in graph.groups] == ["embed", "make"]
    assert [each.instead for each in graph.constraints] == [()]
    with pytest.raises(PlanError, match="do not fit together"):
        Plan.of(graph, {"make": [0]})
    plan = Plan.of(graph, {"make": [0], "embed": [3]})
    secateurs.verify(model, secateurs.apply(model, plan), plan, inputs).raise_if_failed()


class SizesOfTheInput(nn.Module):
    """Places and examples are read off the input, before and after."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.mix, self.read = nn.Conv2d(3, 8, 3), nn.Linear(8, 6), nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.conv(x))
        n, _, h, w = x.shape
        x = x.permute(0, 2, 3, 1).reshape(n * h * w, 8)
        return self.read(F.relu(self.mix(x)).reshape(n, h * w, 6)).mean(1)


def test_sizes_of_the_input_stay_free() -> None:
    model = SizesOfTheInput().eval()
    plan = halves(model, torch.randn(2, 3, 8, 8))
    small = secateurs.apply(model, plan)
    assert {size.text for size in plan.written} == {"8", "6"}
    secateurs.verify(model, small, plan, torch.randn(3, 3, 12, 10)).raise_if_failed()


class Twice(nn.Module):
    """One method reads streams of two widths, so no attribute can hold its size."""

    def __init__(self) -> None:
        super().__init__()
        self.narrow, self.wide = nn.Linear(5, 8), nn.Linear(5, 12)
        self.left, self.right = nn.Linear(8, 8), nn.Linear(12, 12)

    def through(self, x: Tensor, layer: nn.Module) -> Tensor:
        b, c = x.shape
        return layer(x).reshape(b, c)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.through(self.narrow(x), self.left), self.through(self.wide(x), self.right)


def test_a_place_that_is_given_several_sizes_stays_as_it_is() -> None:
    model, inputs = Twice(), torch.randn(2, 5)
    graph = secateurs.trace(model, inputs)
    assert all(tie.written is None for tie in graph.ties)
    plan = Plan.of(graph, {group.name: [0] for group in graph.groups[:1]})
    secateurs.verify(model, secateurs.apply(model, plan), plan, inputs).raise_if_failed()


class Inherited(Ranges):
    """The code with the figures runs as that of a parent, which no class of ours takes the place of."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return super().forward(x)


class Decorated(LeNet):
    @torch.no_grad()
    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.fc1(self.pool(self.conv2(self.pool(self.conv1(x)))).view(-1, 400)))


@pytest.mark.parametrize(("kind", "words"), [(Inherited, "fixed place 12"), (Decorated, "fixed length 400")])
def test_what_cannot_be_rewritten_is_locked_with_its_line(kind: Any, words: str) -> None:
    model, inputs = built(kind)
    reasons = [lock for lock in secateurs.trace(model, inputs).locked if words in lock.reason]
    assert reasons and all(lock.source.startswith("test_written.py:") for lock in reasons)


class Closure(nn.Module):
    """Names from an enclosing function, default arguments, and ``super()`` in a rewritten method."""


def closed(width: int, gain: float) -> nn.Module:
    class Inner(Closure):
        def __init__(self) -> None:
            super().__init__()
            self.make, self.read = nn.Linear(5, width), nn.Linear(width, 3)

        def forward(self, x: Tensor, /, shift: float = 0.5, *, scale: float = 2.0) -> Tensor:
            super().train(self.training)
            return self.read((self.make(x) * gain + shift).relu().view(-1, width) * scale)

    return Inner().eval()


def test_a_rewritten_method_keeps_what_the_original_knows() -> None:
    torch.manual_seed(0)
    model, inputs = closed(8, 1.5), torch.randn(2, 5)
    plan = halves(model, inputs)
    small = secateurs.apply(model, plan)
    assert plan.written[0].text == "width"
    secateurs.verify(model, small, plan, inputs).raise_if_failed()
    before, after = inspect.signature(type(model).forward), inspect.signature(type(small).forward)
    assert before == after and type(small).forward.__qualname__ == type(model).forward.__qualname__
    assert not torch.allclose(small(inputs), small(inputs, scale=3.0))
