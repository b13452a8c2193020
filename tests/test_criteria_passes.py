"""What one pass shows: where examples lie, forward only where that will do, sums over several processes."""

from __future__ import annotations

import socket
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from torch import Tensor, nn

import secateurs
from models import PlainVgg, build
from secateurs.criteria import Criterion, Scores, names
from secateurs.criteria.layouts import find_layouts
from secateurs.criteria.observed import Layout
from secateurs.criteria.protocol import resolve
from secateurs.criteria.readings import scoring_mode
from secateurs.criteria.sweep import needs_loss
from secateurs.errors import ScoreError
from toy import Toy

FORWARD_ONLY = [
    name
    for name in names()
    if (each := resolve(name)[1]).needs_data and each.readings == "activations" and not needs_loss(each)
]


class SequenceFirst(Toy):
    """Positions before examples, as torch's recurrent and attention layers have them by default."""

    PIXELS = (5, 6)

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.norm = nn.Linear(6, 8), nn.LayerNorm(8)
        self.attend, self.read = nn.MultiheadAttention(8, 2), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x.transpose(0, 1)).relu()  # (L, N, 8)
        x = x + self.attend(self.norm(x), self.norm(x), self.norm(x), need_weights=False)[0]
        return self.read(x).mean(0)


class PositionsThenExamplesInRows(Toy):
    """All rows of all examples in one dimension, positions first."""

    PIXELS = (5, 6)

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.mix, self.read = nn.Linear(6, 8), nn.Linear(8, 9), nn.Linear(9, 4)

    def forward(self, x: Tensor) -> Tensor:
        count = x.shape[0]
        rows = self.embed(x).relu().transpose(0, 1).flatten(0, 1)  # (L x N, 8)
        rows = self.mix(rows).relu().unflatten(0, (-1, count)).transpose(0, 1)
        return self.read(rows).mean(1)


class SortedRows(Toy):
    """Rows in an order that depends on their values: nothing says whose they are."""

    PIXELS = (5, 6)

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.read = nn.Linear(6, 8), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        rows = self.embed(x).relu().flatten(0, 1)
        order = rows.detach().sum(1).argsort()
        back = order.argsort()
        return self.read(rows[order])[back].view(len(x), -1, 4).mean(1)


def data_for(model: Toy, sizes: list[int], seed: int = 0) -> list[tuple[Tensor, Tensor]]:
    torch.manual_seed(seed)
    dtype = next(model.parameters()).dtype
    whole = model.example(sum(sizes)).to(dtype), torch.randint(4, (sum(sizes),))
    return list(zip(whole[0].split(sizes), whole[1].split(sizes), strict=True))


@pytest.mark.parametrize("toy", [SequenceFirst, PositionsThenExamplesInRows])
@pytest.mark.parametrize("criterion", ["taylor", "activation"])
def test_batches_are_sums_of_their_examples_wherever_these_lie(toy: type[Toy], criterion: str) -> None:
    model = build(toy).double()
    graph = secateurs.trace(model, model.example(1).double())
    one_by_one, whole = data_for(model, [1] * 6), data_for(model, [4, 2])
    expected = secateurs.score(model, graph, criterion, data=one_by_one, loss_fn=F.cross_entropy)
    found = secateurs.score(model, graph, criterion, data=whole, loss_fn=F.cross_entropy)
    for name in expected:
        assert torch.allclose(found[name], expected[name], rtol=1e-8, atol=1e-12)


def test_layouts_are_found_by_turning_two_examples_round() -> None:
    for toy, wanted in (
        (SequenceFirst, {Layout(0), Layout(1)}),  # attention itself runs with the examples first
        (PositionsThenExamplesInRows, {Layout(0), Layout(0, 1)}),
        (SortedRows, {None}),
    ):
        model = build(toy)
        inputs = model.example(6)
        graph = secateurs.trace(model, model.example(1))
        with scoring_mode(model):
            found = find_layouts(model, graph, torch.device("cpu"), inputs, 6)
        assert set(found.values()) == wanted


@pytest.mark.parametrize("criterion", ["taylor", "fisher", "hessian", "mutual-information", "taylor-2019"])
def test_examples_that_cannot_be_told_apart_are_shown_one_by_one(criterion: str) -> None:
    model = build(SortedRows)
    graph = secateurs.trace(model, model.example(1))
    whole, single = (
        secateurs.score(model, graph, criterion, data=data_for(model, sizes), loss_fn=F.cross_entropy)[
            "embed"
        ]
        for sizes in ([6], [1] * 6)
    )
    is_of_batches = criterion == "taylor-2019"  # the square of a batch's gradient
    assert torch.allclose(whole, single, rtol=1e-4, atol=1e-9) != is_of_batches
    assert (whole > 0).any()


class BesideATable(nn.Module):
    """Also takes what counts no examples."""

    def __init__(self) -> None:
        super().__init__()
        self.rows = build(SortedRows)

    def forward(self, x: Tensor, table: Tensor) -> Tensor:
        found: Tensor = self.rows(x) + table.sum()
        return found


def test_examples_that_can_be_neither_told_apart_nor_shown_one_by_one_are_refused() -> None:
    model = BesideATable().eval()
    inputs = (model.rows.example(6), torch.ones(3))
    graph = secateurs.trace(model, inputs)
    call = {"data": [(inputs, torch.randint(4, (6,)))], "loss_fn": F.cross_entropy}
    with pytest.raises(ScoreError, match="the examples of a batch cannot be told apart"):
        secateurs.score(model, graph, "taylor", **call)
    assert (secateurs.score(model, graph, "apoz", **call)["rows.embed"] > 0).any()


# -- forward only ---------------------------------------------------------------------------------


class NoBackward(nn.Module):
    """Cannot be differentiated."""

    def forward(self, x: Tensor) -> Tensor:
        assert not torch.is_grad_enabled()
        return x


def test_activations_alone_need_neither_loss_nor_backward() -> None:
    model = build(PlainVgg)
    model.bn1.register_forward_pre_hook(lambda _, inputs: NoBackward()(inputs[0]))
    graph = secateurs.trace(model, model.example())
    assert {"apoz", "mean-activation", "std-activation", "activation"} <= set(FORWARD_ONLY)
    labelled = data_for(model, [3, 2])
    known = secateurs.score(model, graph, FORWARD_ONLY, data=labelled)
    unlabelled = [name for name in FORWARD_ONLY if name != "mutual-information"]
    bare = secateurs.score(model, graph, unlabelled, data=[inputs for inputs, _ in labelled])
    for name in unlabelled:
        assert all(torch.equal(known[name][group], bare[name][group]) for group in known[name])


def test_beside_gradients_activations_give_the_same() -> None:
    model = build(PlainVgg)
    graph = secateurs.trace(model, model.example())
    data = data_for(model, [3, 2])
    alone = secateurs.score(model, graph, FORWARD_ONLY, data=data)
    beside = secateurs.score(model, graph, ["taylor", *FORWARD_ONLY], data=data, loss_fn=F.cross_entropy)
    for name in FORWARD_ONLY:
        assert all(torch.equal(alone[name][group], beside[name][group]) for group in alone[name])


def test_without_data_activations_are_asked_for_in_words() -> None:
    model = build(PlainVgg)
    graph = secateurs.trace(model, model.example())
    with pytest.raises(ScoreError, match="apoz needs activations, but data was not given"):
        secateurs.score(model, graph, "apoz")
    with pytest.raises(ScoreError, match="a batch holds no example"):
        secateurs.score(model, graph, "apoz", data=[torch.zeros(0, 3, 8, 8)])
    with pytest.raises(ScoreError, match="the data has no batches"):
        secateurs.score(model, graph, "apoz", data=[])


@pytest.mark.parametrize("criterion", names())
def test_one_example_under_batch_norm_will_do(criterion: str) -> None:
    model = build(PlainVgg).train()
    graph = secateurs.trace(model, model.example())
    scores = secateurs.score(model, graph, criterion, data=data_for(model, [1]), loss_fn=F.cross_entropy)
    assert all(values.isfinite().all() for values in scores.values())


# -- several processes ----------------------------------------------------------------------------


class OfOnesOwn(Criterion):
    """Says nothing of processes."""

    needs_data = True
    readings = "activations"

    def importance(self, group: Any, weights: Any) -> Tensor:
        return torch.ones(group.size)


def _score_all(data: list[tuple[Tensor, Tensor]]) -> dict[str, Scores]:
    model = build(PlainVgg).double()
    graph = secateurs.trace(model, model.example().double())
    return secateurs.score(model, graph, names(), data=data, loss_fn=F.cross_entropy)


def _worker(rank: int, port: int, out: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    data = data_for(build(PlainVgg).double(), [4, 3, 2])
    scores = _score_all(data[rank::2])  # two batches here, one there
    refused = ""
    try:
        model = build(PlainVgg)
        graph = secateurs.trace(model, model.example())
        secateurs.score(model, graph, OfOnesOwn(), data=[model.example()])
    except ScoreError as error:
        refused = str(error)
    found = {
        name: {group: values.tolist() for group, values in each.items()} for name, each in scores.items()
    }
    torch.save((found, refused), f"{out}/{rank}.pt")
    dist.destroy_process_group()
    threads = [path.read_text().strip() for path in Path("/proc/self/task").glob("*/comm")]
    assert not [name for name in threads if "gloo" in name], "nothing may keep the group of processes alive"


def test_two_processes_give_what_one_gives(tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    mp.spawn(_worker, (port, str(tmp_path)), nprocs=2)
    expected = _score_all(data_for(build(PlainVgg).double(), [4, 3, 2]))
    for rank in (0, 1):
        found, refused = torch.load(tmp_path / f"{rank}.pt")
        assert "OfOnesOwn does not say what adds up over several processes" in refused
        for name, scores in expected.items():
            for group, values in scores.items():
                assert torch.allclose(torch.tensor(found[name][group]).double(), values, rtol=1e-6), name
