"""Distillation inside the network: where it compares, what it measures, that it teaches."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import secateurs
from secateurs.errors import TrainingError
from secateurs.planning import Plan
from secateurs.progress import Event
from secateurs.recovery import Recipe, finetune
from secateurs.recovery.features import Features, _Share, boundaries
from test_finetune import assert_same, state_of


class StemAndTwoReaders(nn.Module):
    """One cut group with two readers, one of which is cut itself."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.left = nn.Conv2d(8, 6, 3, padding=1)
        self.right = nn.Conv2d(8, 5, 1)
        self.right_norm = nn.BatchNorm2d(5)
        self.fc = nn.Linear(11, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.stem(x)).relu()
        x = torch.cat([self.left(x), self.right_norm(self.right(x))], 1).relu()
        scores: Tensor = self.fc(x.mean((2, 3)))
        return scores


def cut_pair() -> tuple[nn.Module, nn.Module, Plan]:
    torch.manual_seed(0)
    net = StemAndTwoReaders().eval()
    graph = secateurs.trace(net, torch.zeros(1, 3, 6, 6))
    cut = Plan.of(graph, {"stem": [0, 3, 5], "left": [1]})
    return net, secateurs.apply(net, cut), cut


def images(count: int = 16) -> Tensor:
    return torch.randn(count, 3, 6, 6, generator=torch.Generator().manual_seed(1))


def told(net: nn.Module, cut: Plan, inputs: Any) -> dict[str, list[int]]:
    """The modules whose outputs are compared, each with the outputs that both networks have."""
    places = boundaries(net, secateurs.apply(net, cut), cut, inputs)
    return {each.module: each.kept.tolist() for each in places}


def share(one: Tensor, other: Tensor) -> float:
    """The squared difference as a share of the mean square."""
    return float(2 * (one - other).square().sum() / (one.square().sum() + other.square().sum()))


def test_it_compares_behind_each_group_what_both_have() -> None:
    net, _, cut = cut_pair()
    assert told(net, cut, images(1)) == {
        "left": [0, 2, 3, 4, 5],
        "right_norm": [0, 1, 2, 3, 4],
        "fc": [0, 1, 2, 3],
    }


def by_hand(net: Any, small: Any, x: Tensor) -> float:
    """The three differences with the layers called one by one."""
    old, new = net.norm(net.stem(x)).relu(), small.norm(small.stem(x)).relu()
    ends = [
        torch.cat([m.left(h), m.right_norm(m.right(h))], 1).relu().mean((2, 3))
        for m, h in ((net, old), (small, new))
    ]
    pairs = [
        (net.left(old)[:, [0, 2, 3, 4, 5]], small.left(new)),
        (net.right_norm(net.right(old)), small.right_norm(small.right(new))),
        (net.fc(ends[0]), small.fc(ends[1])),
    ]
    return sum(share(a, b) for a, b in pairs) / 3


def test_the_difference_is_the_one_written_out() -> None:
    net, small, cut = cut_pair()
    x = images()
    features = Features(net, small, boundaries(net, small, cut, x))
    with torch.no_grad():
        net(x), small(x)
        assert features.difference().item() == pytest.approx(by_hand(net, small, x), rel=1e-5)
    features.close()


def test_a_repair_that_scales_a_layer_and_its_norm_is_no_difference() -> None:
    net, small, cut = cut_pair()
    x = images()
    features = Features(net, small, boundaries(net, small, cut, x))
    with torch.no_grad():
        net(x), small(x)
        before = features.difference().item()
        small.right.weight *= 3  # type: ignore[operator]
        small.right.bias *= 3  # type: ignore[operator]
        small.right_norm.running_mean *= 3  # type: ignore[operator]
        small.right_norm.weight /= 3  # type: ignore[operator]
        net(x), small(x)
        assert features.difference().item() == pytest.approx(before, rel=1e-4)
    features.close()


def test_the_gradient_of_a_difference_is_that_of_finite_differences() -> None:
    torch.manual_seed(0)
    said = torch.randn(3, 4, 2, dtype=torch.float64, requires_grad=True)
    target = torch.randn(3, 4, 2, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda each: _Share.apply(each, target), said)  # type: ignore[no-untyped-call]
    assert _Share.apply(said, torch.zeros_like(said)).item() == pytest.approx(2)


def test_training_brings_the_features_together() -> None:
    net, small, cut = cut_pair()
    with torch.no_grad():
        before = by_hand(net, small, images())
    recipe = Recipe(epochs=40, lr=0.02, distill_features=1.0, freeze_bn=True)
    finetune(small, [images()], recipe=recipe, teacher=net, plan=cut)
    with torch.no_grad():
        assert by_hand(net, small, images()) < 0.6 * before


def test_hooks_are_gone_and_the_teacher_is_as_it_was() -> None:
    net, small, cut = cut_pair()
    before = state_of(net)
    finetune(small, [images()], recipe=Recipe(epochs=1, distill_features=1.0), teacher=net, plan=cut)
    assert not any(module._forward_hooks for each in (net, small) for module in each.modules())
    assert_same(state_of(net), before)


def test_what_it_needs_is_said() -> None:
    net, small, _ = cut_pair()
    recipe = Recipe(epochs=1, distill_features=0.5)
    with pytest.raises(TrainingError, match=r"distill_features=0\.5 needs a teacher"):
        finetune(small, [images()], recipe=recipe)
    with pytest.raises(TrainingError, match=r"distill_features=0\.5 needs the cut between"):
        finetune(small, [images()], recipe=recipe, teacher=net)
    empty = Plan.of(secateurs.trace(net, images(1)), {})
    with pytest.raises(TrainingError, match="so no features are compared"):
        finetune(small, [images()], recipe=recipe, teacher=net, plan=empty)
    assert not any(module._forward_hooks for module in (*net.modules(), *small.modules()))


class Block(nn.Module):
    """A residual block; its one activation runs twice, and the sum is no module's output but the block's."""

    def __init__(self, *, in_place: bool, dropout: float = 0.0) -> None:
        super().__init__()
        self.one, self.two = nn.Conv2d(6, 8, 3, padding=1), nn.Conv2d(8, 6, 3, padding=1)
        self.one_norm, self.two_norm = nn.BatchNorm2d(8), nn.BatchNorm2d(6)
        self.drop, self.active, self.in_place = nn.Dropout(dropout), nn.ReLU(inplace=in_place), in_place

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.two_norm(self.two(self.active(self.one_norm(self.one(x)))))
        out = self.drop(out)
        if self.in_place:
            out += x
        else:
            out = out + x
        active: Tensor = self.active(out)
        return active


class Blocks(nn.Module):
    """Two residual blocks, so that what the first gives is read twice."""

    def __init__(self, *, in_place: bool) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 3, padding=1)
        self.body = nn.Sequential(Block(in_place=in_place), Block(in_place=in_place, dropout=0.5))
        self.fc = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        scores: Tensor = self.fc(self.body(self.stem(x)).mean((2, 3)))
        return scores


@pytest.mark.parametrize("in_place", [False, True])
def test_a_block_is_compared_behind_its_residual_sum(in_place: bool) -> None:
    torch.manual_seed(0)
    net = Blocks(in_place=in_place).eval()
    cut = Plan.of(secateurs.trace(net, images(1)), {"body.0.one": [1, 2], "body.1.one": [0]})
    whole = [0, 1, 2, 3, 4, 5]
    assert told(net, cut, images(1)) == {"body.0": whole, "body.1": whole}
    small = secateurs.apply(net, cut)
    features, x = Features(net, small, boundaries(net, small, cut, images(1))), images()
    with torch.no_grad():
        pairs = []
        old, new = net.stem(x), small.stem(x)
        for one, other in zip(net.body, small.body, strict=True):
            old, new = one(old), other(new)
            pairs.append(share(old, new))
        features.forget()
        net(x), small(x)
        assert features.difference().item() == pytest.approx(sum(pairs) / 2, rel=1e-5)
    features.close()


def test_a_stream_that_is_cut_is_compared_where_it_is_left() -> None:
    torch.manual_seed(0)
    net = Blocks(in_place=False).eval()
    graph = secateurs.trace(net, images(1))
    cut = Plan.of(graph, {"stem": [0, 4]})
    left = [1, 2, 3, 5]
    found = told(net, cut, images(1))
    assert found == {"body.0.one_norm": [*range(8)], "body.1.one_norm": [*range(8)], "fc": [0, 1, 2, 3]}
    cut = Plan.of(graph, {"stem": [0, 4], "body.0.one": [7]})
    assert told(net, cut, images(1))["body.0"] == left


def test_an_encoder_of_torchs_own_is_compared_without_its_hidden_parts() -> None:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.1, batch_first=True)
    net = nn.Sequential(nn.Linear(3, 8), nn.TransformerEncoder(layer, 2), nn.Linear(8, 3)).eval()
    x = torch.randn(4, 5, 3)
    graph = secateurs.trace(net, x)
    inner = [group.name for group in graph.groups if group.size == 16]
    cut = Plan.of(graph, {name: [0, 3] for name in inner})
    assert list(told(net, cut, x)) == ["1.layers.0.linear2", "1.layers.1.linear2"]  # before the dropout
    small = secateurs.apply(net, cut)
    history = finetune(
        small, [x] * 4, teacher=net, plan=cut, recipe=Recipe(epochs=6, lr=0.05, distill_features=1.0)
    )
    assert history.epochs[-1].loss < history.epochs[0].loss


def test_features_count_by_default_where_a_cut_is_known_and_can_be_told() -> None:
    x = images()

    def loss(plan: Plan | None, **more: Any) -> float | None:
        net, small, _ = cut_pair()
        recipe = Recipe(epochs=1, lr=1e-9, distill=0.5, freeze_bn=True, **more)
        return finetune(small, [x], recipe=recipe, teacher=net, plan=plan).epochs[0].loss

    net, small, cut = cut_pair()
    with torch.no_grad():
        apart = by_hand(net, small, x)
    empty = Plan.of(secateurs.trace(net, images(1)), {})
    alone = loss(None)
    assert alone is not None
    assert loss(cut, distill_features=0.0) == alone == loss(empty)
    assert loss(cut) == pytest.approx(alone + apart, rel=1e-4)
    assert Recipe(distill_features=2.0).features_weight == 2 and Recipe().features_weight == 0


class TokenMixer(nn.Module):
    """Mixes the tokens of each channel, so that its outputs have two dimensions that a cut shortens."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.one, self.two = nn.Linear(3, 8), nn.Linear(5, 6), nn.Linear(6, 5)
        self.fc = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.stem(x)  # (N, 5, 8)
        mixed = self.two(self.one(tokens.transpose(1, 2)).relu()).transpose(1, 2)
        scores: Tensor = self.fc((tokens * mixed.sigmoid()).mean(1))
        return scores


def test_outputs_that_are_cut_in_two_dimensions_are_not_compared() -> None:
    torch.manual_seed(0)
    net, x = TokenMixer().eval(), torch.randn(4, 5, 3)
    graph = secateurs.trace(net, x)
    assert list(told(net, Plan.of(graph, {"one": [0]}), x)) == ["two"]
    cut = Plan.of(graph, {"stem": [2], "one": [0]})
    assert list(told(net, cut, x)) == ["fc"]
    small = secateurs.apply(net, cut)
    finetune(small, [x], teacher=net, plan=cut, recipe=Recipe(epochs=1, distill=0.5))


@pytest.mark.parametrize("compiled", ["model", "teacher"])
def test_compiled_networks_are_compared_as_they_are_without(compiled: str) -> None:
    losses = []
    for wrap in (False, True):
        net, small, cut = cut_pair()
        learns = torch.compile(small, backend="eager") if wrap and compiled == "model" else small
        teaches = torch.compile(net, backend="eager") if wrap and compiled == "teacher" else net
        recipe = Recipe(epochs=2, lr=0.01, distill=0.5)
        batch = images(), torch.arange(16) % 4
        history = finetune(learns, [batch], [batch], recipe=recipe, teacher=teaches, plan=cut)
        losses.append([epoch.loss for epoch in history.epochs])
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)


class Events:
    """Keeps what happens."""

    def __init__(self) -> None:
        self.found: list[Event] = []

    def __call__(self, event: Event) -> None:
        self.found.append(event)


class DropsLayers(nn.Module):
    """In training a layer runs in every other pass alone."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.inner, self.outer, self.fc = (
            nn.Linear(*sizes) for sizes in ((3, 8), (8, 6), (6, 8), (8, 4))
        )
        self.passes = 0

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        self.passes += self.training
        if self.passes % 2 == 0:
            x = x + self.outer(self.inner(x).relu())
        scores: Tensor = self.fc(x)
        return scores


def test_a_layer_that_training_drops_is_not_compared_then() -> None:
    torch.manual_seed(0)
    net, x = DropsLayers().eval(), torch.randn(8, 3)
    cut = Plan.of(secateurs.trace(net, x), {"inner": [0, 1, 2]})
    assert list(told(net, cut, x)) == ["outer"]
    losses = []
    for weight in (0.0, 1.0):
        small, seen = secateurs.apply(net, cut), Events()
        recipe = Recipe(epochs=1, lr=1e-9, distill=1.0, distill_features=weight)
        finetune(small, [x, x], teacher=net, plan=cut, recipe=recipe, observer=seen)
        losses.append([event.facts["loss"] for event in seen.found if event.name == "batch"])
    assert losses[0][0] == losses[1][0] and losses[0][1] < losses[1][1]
