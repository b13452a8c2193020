"""Linear streams: which are found, and what a cut leaves of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import secateurs
from secateurs.recovery import Repair, repair
from secateurs.recovery.features import boundaries
from secateurs.recovery.readers import Reader, Watching
from secateurs.recovery.recording import Recorder
from secateurs.recovery.streams import Stream, StreamRank, streams_in

WIDTH, INNER = 8, 24
IMAGES = torch.randn(64, 3, 8, 8, generator=torch.Generator().manual_seed(3))


def unit(inputs: int, outputs: int, kernel: int = 1, **settings: int) -> nn.Sequential:
    """A convolution and its batch norm."""
    convolution = nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2, bias=False, **settings)
    return nn.Sequential(convolution, nn.BatchNorm2d(outputs))


class Bottleneck(nn.Module):
    """An inverted residual block."""

    def __init__(self) -> None:
        super().__init__()
        self.expand, self.depthwise = unit(WIDTH, INNER), unit(INNER, INNER, 3, groups=INNER)
        self.project = unit(INNER, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = x + self.project(self.depthwise(self.expand(x).relu()).relu())
        return out


class Mobile(nn.Module):
    """Two blocks, from a linear layer to one with an activation behind it."""

    def __init__(
        self, between: Callable[[Tensor], Tensor] = torch.Tensor.contiguous, kernel: int = 1
    ) -> None:
        super().__init__()
        self.stem, self.narrow = unit(3, 12, 3), unit(12, WIDTH)
        self.blocks = nn.Sequential(Bottleneck(), Bottleneck())
        self.head, self.out, self.between = unit(WIDTH, 16, kernel), nn.Linear(16, 4), between

    def forward(self, x: Tensor) -> Tensor:
        x = self.blocks(self.narrow(self.stem(x).relu()))
        return self.out(self.head(self.between(x)).relu().mean((2, 3)))  # type: ignore[no-any-return]

    def reading(self) -> list[nn.Conv2d]:
        """What reads the stream."""
        found = [self.blocks[0].expand[0], self.blocks[1].expand[0], self.head[0]]  # type: ignore[index]
        return [each for each in found if isinstance(each, nn.Conv2d)]


def settled(model: nn.Module, images: Tensor = IMAGES) -> nn.Module:
    """Its batch norms have seen the data; their scales and shifts are none of 1 and 0."""
    chance = torch.Generator().manual_seed(5)
    for norm in model.modules():
        if isinstance(norm, nn.BatchNorm2d) and norm.affine:
            norm.momentum = None
            norm.weight.data.uniform_(0.5, 1.5, generator=chance)
            norm.bias.data.uniform_(-0.5, 0.5, generator=chance)
    with torch.no_grad():
        model.train()(images)
    return model.eval()


def narrow(directions: int, **settings: Any) -> Mobile:
    """A network whose stream is read in so many directions alone."""
    torch.manual_seed(0)
    model = Mobile(**settings)
    basis = torch.randn(directions, WIDTH)
    for layer in model.reading():
        weight = torch.randn(layer.out_channels, *layer.kernel_size, directions) @ basis / directions
        layer.weight.data.copy_(weight.movedim(-1, 1))
    settled(model)
    return model


def streams_of(model: nn.Module, inputs: Tensor = IMAGES[:4]) -> tuple[Stream, ...]:
    with torch.no_grad():
        return streams_in(model, inputs, Recorder(model, inputs, written_out=True))


def cut(model: nn.Module, plan_of: dict[str, list[int]]) -> tuple[secateurs.Plan, nn.Module]:
    plan = secateurs.Plan.of(secateurs.trace(model, IMAGES[:4]), plan_of)
    return plan, secateurs.apply(model, plan)


def told(done: Repair) -> dict[str, str]:
    return {each.name: each.what for each in done.layers}


def test_a_stream_is_found_with_all_that_writes_and_reads_it() -> None:
    (stream,) = streams_of(narrow(WIDTH))
    assert (len(stream.writers), len(stream.readers), stream.depth, stream.channel) == (3, 3, WIDTH, -3)
    assert all(end > call for call, end in stream.writers.items())  # the norm's
    assert all(has_bias and len(scale) in (INNER, 16) for scale, has_bias in stream.readers.values())


@pytest.mark.parametrize(
    "between",
    [
        torch.relu,
        F.gelu,
        lambda x: x * 2,
        lambda x: x * x.mean((2, 3), keepdim=True),
        lambda x: F.max_pool2d(x, 2),
        lambda x: x + x.amax(1, keepdim=True),
        lambda x: x + torch.ones(1, WIDTH, 1, 1),
        lambda x: x.flip(1),
        lambda x: torch.cat([x[:, :4], x[:, 4:]], 1),
    ],
    ids=["relu", "gelu", "scale", "gate", "pool", "largest", "constant", "flip", "parts"],
)
def test_what_looks_at_single_channels_makes_it_no_stream(between: Callable[[Tensor], Tensor]) -> None:
    assert streams_of(narrow(WIDTH, between=between)) == ()


class Variant(Mobile):
    """The network with something else in it."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name
        if name == "reader with groups":
            self.head = unit(WIDTH, 16, groups=2)
        if name == "reader with activations":
            self.blocks[1].expand.insert(0, nn.Hardswish())  # type: ignore[union-attr,operator]
        if name == "writer with groups":
            self.narrow = unit(12, WIDTH, groups=2)
        if name == "norm without scale":
            self.narrow[1] = nn.BatchNorm2d(WIDTH, affine=False)
        if name == "shared writer":
            self.blocks[1].project[0] = self.blocks[0].project[0]  # type: ignore[index]
        if name == "shared norm":
            self.blocks[1].project[1] = self.blocks[0].project[1]  # type: ignore[index]

    def forward(self, x: Tensor) -> Tensor:
        if self.name != "given away":
            return super().forward(x)
        x = self.blocks(self.narrow(self.stem(x).relu()))
        return torch.cat([self.out(self.head(x).relu().mean((2, 3))), x.mean((2, 3))], 1)


@pytest.mark.parametrize(
    "name",
    [
        *("reader with groups", "reader with activations", "writer with groups", "norm without scale"),
        *("shared writer", "shared norm", "given away"),
    ],
)
def test_layers_that_cannot_turn_make_it_no_stream(name: str) -> None:
    torch.manual_seed(0)
    assert streams_of(settled(Variant(name))) == ()


@pytest.mark.parametrize("kernel", [1, 3])
def test_channels_that_are_in_no_direction_leave_without_a_trace(kernel: int) -> None:
    model = narrow(5, kernel=kernel)
    plan, small = cut(model, {"narrow.0": [0, 3, 6]})
    with torch.no_grad():
        wanted = model(IMAGES)
        assert (small(IMAGES) - wanted).abs().max() > 0.05
        done = repair(model, small, plan, IMAGES.split(16), ridge=1e-9)
        torch.testing.assert_close(small(IMAGES), wanted, rtol=1e-4, atol=1e-5)
        # a pass in training mode finds the statistics that the norms have, but for those of single batches
        torch.testing.assert_close(small.train()(IMAGES), model.train()(IMAGES), rtol=1e-2, atol=1e-2)
    writers = ["narrow.0.weight", "blocks.0.project.0.weight", "blocks.1.project.0.weight"]
    assert [name for name, what in told(done).items() if what == "combinations"] == writers


def test_layers_without_norms_are_a_stream_too() -> None:
    class Plain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.wide, self.narrow = nn.Linear(6, 8), nn.Linear(8, 24), nn.Linear(24, 8)
            self.one, self.two = nn.Linear(8, 2), nn.Linear(8, 1, bias=False)

        def forward(self, x: Tensor) -> Tensor:
            x = self.stem(x.tanh())
            x = x + self.narrow(self.wide(x).relu())
            return torch.cat([self.one(x).relu(), self.two(x).relu()], -1)

    torch.manual_seed(0)
    model, rows = Plain().eval(), torch.randn(300, 6)
    model.wide.weight.data = torch.randn(24, 2) @ torch.cat([model.one.weight, model.one.weight[:1]])[1:]
    (stream,) = streams_of(model, rows)
    assert (len(stream.writers), [each for _, each in stream.readers.values()]) == (2, [True, True, False])
    plan = secateurs.Plan.of(secateurs.trace(model, rows), {"stem": [1, 2, 5, 6, 7]})
    small = secateurs.apply(model, plan)  # three directions are read
    with torch.no_grad():
        done = repair(model, small, plan, rows.split(100), ridge=1e-9)
        torch.testing.assert_close(small(rows), model(rows), rtol=1e-3, atol=1e-4)
    assert told(done)["narrow.weight"] == "combinations"


def test_several_readers_share_channels_that_serve_all() -> None:
    """Against what single channels leave, refitted for each reader, at every width."""
    model = narrow(WIDTH)
    (stream,) = streams_of(model)
    rank = StreamRank(stream, torch.device("cpu"))
    read: dict[int, tuple[Tensor, Tensor]] = {}

    def see(call: int, reader: Reader, result: Tensor) -> None:
        rank.see(call, reader, result)
        rows = reader.vectors()
        if call in stream.readers and rows is not None:
            rows, weight = rows.double(), stream.readers[call][0][:, None] * reader.matrix()[0].double()
            read[call] = rows - rows.mean(0), weight.detach()

    with torch.no_grad(), Watching(see):
        model(IMAGES)

    def missed(basis: Tensor) -> float:
        total = 0.0
        for rows, weight in read.values():
            wanted, given = rows @ weight.T, rows @ basis
            left = wanted - given @ torch.linalg.lstsq(given, wanted).solution
            total += float(left.square().sum() / wanted.square().sum())
        return total

    for kept in (2, 4, 6):
        own = missed(rank.combinations(kept)[0][0])
        units = min(missed(torch.eye(WIDTH).double()[:, list(few)]) for few in subsets(kept))
        assert own < 0.9 * units


def subsets(kept: int) -> list[Tensor]:
    return list(torch.combinations(torch.arange(WIDTH), kept))


def test_constants_are_mended_unless_there_are_combinations() -> None:
    model = narrow(WIDTH)
    plan, small = cut(model, {"narrow.0": [0, 3], "blocks.0.expand.0": [1, 2, 3]})
    done = repair(model, small, plan, IMAGES.split(16), how="compensate")
    assert "blocks.0.project.0.weight" in told(done)
    done = repair(model, small, plan, IMAGES.split(16))
    assert told(done)["blocks.0.project.0.weight"] == "combinations"
    done = repair(model, small, plan, IMAGES.split(16), how="compensate")
    assert "combinations" in done.left["blocks.0.project.0.weight"]


def test_distillation_compares_no_channels_of_a_stream_that_is_cut() -> None:
    model = narrow(WIDTH)
    inner = {"blocks.0.expand.0": [1, 2, 3]}
    for removed, is_compared in ((inner, True), (inner | {"narrow.0": [0, 3]}, False)):
        plan, small = cut(model, removed)
        modules = {each.module for each in boundaries(model, small, plan, IMAGES[:4])}
        assert bool({"blocks.0.project", "blocks.0.project.1", "blocks.0"} & modules) == is_compared


def test_a_stream_that_is_whole_keeps_its_channels() -> None:
    model = narrow(WIDTH)
    plan, small = cut(model, {"blocks.0.expand.0": [1, 2, 3]})
    done = repair(model, small, plan, IMAGES.split(16))
    assert set(told(done).values()) == {"weights"}
