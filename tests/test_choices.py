"""What a network chooses by its activations: other rows, and other calls, on other batches."""

from __future__ import annotations

import socket
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch.nn import functional as F

import secateurs
from mixtures import SPELLINGS, STACKED, Mixture, net
from secateurs.errors import ScoreError, UnrankedError
from secateurs.graph.paths import CallPath, numbers_along
from secateurs.recovery import Recipe, Repair, finetune, repair
from secateurs.recovery.choices import Choices
from secateurs.recovery.features import boundaries
from secateurs.recovery.recording import Recorder
from secateurs.recovery.written_out import WrittenOut

ROWS = torch.randn(96, 8, generator=torch.Generator().manual_seed(1))
LABELS = torch.randint(3, (96,), generator=torch.Generator().manual_seed(2))


def batches(size: int) -> list[tuple[Tensor, Tensor]]:
    return list(zip(ROWS.split(size), LABELS.split(size), strict=True))


def half(model: nn.Module, x: Tensor = ROWS) -> tuple[nn.Module, secateurs.Plan]:
    graph = secateurs.trace(model, x)
    scores = secateurs.score(model, graph, "l2")
    remove = {
        name: scores[name].argsort()[: group.size // 2].tolist() for name, group in graph.by_name.items()
    }
    plan = secateurs.Plan.of(graph, remove)
    return secateurs.apply(model, plan), plan


def repaired(model: nn.Module, data: list[Any], **settings: Any) -> tuple[nn.Module, Repair]:
    small, plan = half(model)
    return small, repair(model, small, plan, data, **settings)


# -- what is chosen ---------------------------------------------------------------------------------


def followed(func: Any, first: tuple[Any, ...], second: tuple[Any, ...], **kwargs: Any) -> Any:
    """What a call gives on the second arguments where it chooses as on the first."""
    choices = Choices()
    choices.note(0, func, first, kwargs, func(*first, **kwargs))
    return choices.follow(0, func, second, kwargs, func(*second, **kwargs))


ONE, OTHER = torch.randn(2, 3, 5), torch.randn(2, 3, 5)


@pytest.mark.parametrize(
    ("func", "rest", "kwargs"),
    [
        (torch.topk, (2, 1), {}),
        (torch.topk, (2,), {}),
        (torch.sort, (), {"dim": 1}),
        (torch.sort, (0,), {}),
        (torch.kthvalue, (2, 1), {}),
        (torch.max, (1,), {}),
        (torch.min, (2, True), {}),
        (torch.mode, (), {}),
    ],
)
def test_values_are_those_of_the_second_where_the_first_found_its_own(
    func: Any, rest: tuple[Any, ...], kwargs: dict[str, Any]
) -> None:
    values, indices = followed(func, (ONE, *rest), (OTHER, *rest), **kwargs)
    want = func(ONE, *rest, **kwargs)
    assert torch.equal(indices, want.indices)
    again, _ = followed(func, (ONE, *rest), (ONE, *rest), **kwargs)
    assert torch.equal(again, want.values)  # gathered, they are what the function itself found
    assert values.shape == want.values.shape and not torch.equal(values, want.values)


def test_rows_follow_however_many_the_second_would_have_found() -> None:
    assert torch.equal(followed(torch.nonzero, (ONE > 0,), (OTHER > 9,)), (ONE > 0).nonzero())
    first, second, third = followed(torch.where, (ONE > 0,), (OTHER > 0,))
    assert torch.equal(torch.stack([first, second, third], 1), (ONE > 0).nonzero())
    assert followed(Tensor.tolist, (ONE.argmax(1),), (OTHER.argmax(1),)) == ONE.argmax(1).tolist()
    assert followed(Tensor.__bool__, (torch.tensor(True),), (torch.tensor(False),)) is True


def test_a_call_that_is_given_another_shape_chooses_by_itself() -> None:
    fewer = OTHER[:, :2]
    assert torch.equal(followed(torch.argmax, (ONE, 1), (fewer, 1)), fewer.argmax(1))


def test_sums_and_sizes_are_no_choices() -> None:
    assert torch.equal(followed(torch.sum, (ONE, 1), (OTHER, 1)), OTHER.sum(1))
    assert followed(Tensor.size, (ONE,), (OTHER[:, :1],)) == OTHER[:, :1].shape


def test_what_is_done_to_a_choice_in_place_is_done_once() -> None:
    choices, places = Choices(), ONE.argmax(1)
    choices.note(0, torch.argmax, (ONE, 1), {}, places)
    places += 7
    found = choices.follow(0, torch.argmax, (OTHER, 1), {}, OTHER.argmax(1))
    assert torch.equal(found, ONE.argmax(1))
    found += 7
    assert torch.equal(choices.follow(0, torch.argmax, (OTHER, 1), {}, OTHER.argmax(1)), ONE.argmax(1))


class Chooses(nn.Module):
    def __init__(self, how: str) -> None:
        super().__init__()
        self.layer, self.how = nn.Linear(4, 4), how

    def forward(self, x: Tensor) -> Tensor:
        x = self.layer(x)
        if self.how == "activation":
            return torch.where(x > 0, x, 0.1 * x) * (x > -1)
        if self.how == "unread":
            return x.max(1).values
        if self.how == "rows":
            return x[x.sum(1) > 0]
        if self.how == "branch":
            return -x if bool((x > 0).all()) else x
        return x[torch.arange(2), x.argmax(1)]


@pytest.mark.parametrize(
    ("how", "names"),
    [
        ("activation", set()),
        ("unread", set()),
        ("rows", {"gt"}),
        ("branch", {"gt"}),
        ("largest", {"argmax"}),
    ],
)
def test_only_what_picks_is_a_choice(how: str, names: set[str]) -> None:
    record = Recorder(Chooses(how), torch.randn(2, 4))
    assert {record.names[call].strip("_") for call in record.choices} == names


# -- repair -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [SPELLINGS, STACKED])
def test_a_mixture_is_repaired_the_same_however_it_is_written(kind: tuple[str, ...]) -> None:
    first, *others = (repaired(net(spelling), [ROWS]) for spelling in kind)
    assert not first[1].left and {"first.gate.weight", "head.weight"} < {
        each.name for each in first[1].layers
    }
    assert (
        len(first[1].layers) == 1 + 1 + 2 * 9
    )  # the stem's, the head; a gate and four experts of two layers
    for small, done in others:
        assert [each.what for each in done.layers] == [each.what for each in first[1].layers]
        for name, tensor in small.state_dict().items():
            assert torch.allclose(tensor, first[0].state_dict()[name], atol=1e-4), name


@pytest.mark.parametrize("spelling", [*SPELLINGS, *STACKED])
def test_an_expert_is_fitted_on_the_rows_that_the_original_gives_it(spelling: str) -> None:
    """By a second way: least squares on the rows, and the hidden units, of one expert."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), Mixture(spelling)).eval()
    graph = secateurs.trace(model, ROWS)
    [hidden] = [group.name for group in graph.groups if group.name in ("1.experts.1.0", "1.up")]
    plan = secateurs.Plan.of(graph, {hidden: list(range(12))})
    small = secateurs.apply(model, plan)
    done = repair(model, small, plan, [(ROWS, None)], ridge=1e-9)
    with torch.no_grad():
        x = model[0](ROWS)
        rows = (model[1].gate(x).topk(2, -1).indices == 1).any(-1)
        inward, outward = weights(model[1], 1)
        target = F.gelu(x[rows] @ inward[0] + inward[1]) @ outward[0] + outward[1]
        own, given = weights(small[1], 1)
        read = F.gelu(x[rows] @ own[0] + own[1])
        has_bias = spelling in SPELLINGS
        columns = torch.cat([read, torch.ones(len(read), 1)], 1) if has_bias else read
        best = torch.linalg.lstsq(columns.double(), target.double()).solution
    assert torch.allclose(given[0].double(), best[:12], atol=1e-3)
    assert not has_bias or torch.allclose(given[1].double(), best[12], atol=1e-3)
    assert any(each.name in ("1.experts.1.2.weight", "1.down[1]") for each in done.layers)


def weights(mixture: Mixture, number: int) -> list[tuple[Tensor, Tensor]]:
    """Both layers of an expert, as the matrix that rows are multiplied with, and the bias."""
    if mixture.spelling in SPELLINGS:
        return [(mixture.experts[number][at].weight.T, mixture.experts[number][at].bias) for at in (0, 2)]
    up, down = mixture.up[number], mixture.down[number]
    return [(up, torch.zeros(up.shape[1])), (down, torch.zeros(down.shape[1]))]


@pytest.mark.parametrize("spelling", ["skipped", "masked", "grouped", "stacked"])
def test_batches_that_leave_experts_out_repair_as_one_that_does_not(spelling: str) -> None:
    whole, _ = repaired(net(spelling), [ROWS])
    parts = [ROWS[:3], ROWS[3:5], ROWS[5:30], ROWS[30:]]
    assert len({len(CallPath(net(spelling), part, WrittenOut()).calls) for part in parts}) > 1 or (
        spelling == "grouped"
    )
    small, done = repaired(net(spelling), parts)
    assert not done.left and done.images == 96
    for name, tensor in small.state_dict().items():
        assert torch.allclose(tensor, whole.state_dict()[name], atol=1e-3), name


def test_an_expert_without_rows_is_left_and_said() -> None:
    model = net("picked")
    with torch.no_grad():
        model.first.gate.bias[2] = -100.0
    small, plan = half(model)
    before = small.first.experts[2][2].weight.clone()
    done = repair(model, small, plan, [ROWS])
    assert done.left == {f"first.experts.2.{at}.weight": "no input comes to it" for at in (0, 2)}
    assert torch.equal(small.first.experts[2][2].weight, before)


def test_a_repaired_mixture_is_closer_than_the_cut_one() -> None:
    model = net("grouped")
    small, plan = half(model)
    fresh = torch.randn(400, 8)
    with torch.no_grad():
        before = (model(fresh) - small(fresh)).square().mean()
        repair(model, small, plan, [ROWS])
        after = (model(fresh) - small(fresh)).square().mean()
    assert after < 0.6 * before


class TwoStages(nn.Module):
    """Scores all places, and looks again at the best of them, as a detector does."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 16, 3, padding=1))
        self.score, self.box = (
            nn.Conv2d(16, 1, 1),
            nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 4)),
        )

    def forward(self, x: Tensor) -> Tensor:
        x = self.body(x)
        best = self.score(x).flatten(1).topk(6).indices
        return self.box(x.flatten(2).mT.gather(1, best[..., None].expand(-1, -1, x.shape[1])))


def test_what_looks_at_the_best_places_is_compared_at_the_original_ones() -> None:
    torch.manual_seed(0)
    model, images = TwoStages().eval(), torch.randn(64, 3, 8, 8)
    graph = secateurs.trace(model, images)
    cut = {name: list(range(graph.by_name[name].size // 2)) for name in ("body.0", "box.0")}
    plan = secateurs.Plan.of(graph, cut)
    small = secateurs.apply(model, plan)
    done = {each.name: each for each in repair(model, small, plan, images.split(16)).layers}
    assert done["box.0.weight"].before < 0.8 > done["box.0.weight"].after
    with torch.no_grad():
        shared = model.score(model.body(images)).flatten(1).topk(6).indices
        own = small.score(small.body(images)).flatten(1).topk(6).indices
    assert not torch.equal(shared, own)  # after the repair too it goes its own way


# -- training ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("spelling", [*SPELLINGS, *STACKED])
def test_a_mixture_learns_from_the_one_before_the_cut_without_comparing_its_experts(spelling: str) -> None:
    model = net(spelling)
    small, plan = half(model)
    compared = {each.module for each in boundaries(model, small, plan, ROWS)}
    assert compared and not any("experts" in name for name in compared)
    recipe = Recipe(epochs=2, lr=0.01, distill=0.7, distill_features=1.0)
    history = finetune(small, batches(12), recipe=recipe, teacher=model, plan=plan)
    assert history.epochs[1].loss < history.epochs[0].loss


# -- paths ------------------------------------------------------------------------------------------


def test_a_trace_and_a_pass_make_the_same_calls() -> None:
    for spelling in (*SPELLINGS, *STACKED):
        model = net(spelling)
        graph = secateurs.trace(model, ROWS)
        assert graph.path == tuple(CallPath(model, ROWS).calls)
        assert graph.numbers_in(model, ROWS) is None


def test_calls_that_are_left_out_do_not_shift_the_others() -> None:
    model = net("skipped")
    known, few = CallPath(model, ROWS).calls, CallPath(model, ROWS[:2]).calls
    assert len(few) < len(known)
    numbers = numbers_along(few, known)
    assert numbers == sorted(numbers)
    assert all(known[number] == few[at] for at, number in enumerate(numbers))


def test_a_model_that_does_not_choose_has_no_path() -> None:
    graph = secateurs.trace(nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2)), torch.zeros(1, 4))
    assert graph.path == ()


@pytest.mark.parametrize("spelling", [*SPELLINGS, *STACKED])
def test_experts_that_the_example_passes_over_shrink_with_the_stream(spelling: str) -> None:
    model = net(spelling)
    graph = secateurs.trace(model, ROWS[:1])  # a single row, which comes to two experts of four
    over = {each.name for each in graph.locked if each.reason == "the example does not come to it"}
    assert len(over) == (8 if spelling in ("skipped", "masked") else 0)  # two layers of each expert
    plan = secateurs.Plan.of(graph, {"stem.2": [0, 3, 7, 9]})
    small = secateurs.apply(model, plan)
    secateurs.verify(model, small, plan, ROWS).raise_if_failed()  # the other rows come to all
    if spelling in SPELLINGS:
        assert {expert[0].in_features for expert in small.first.experts} == {12}


def test_one_hot_is_traced_as_often_as_it_runs() -> None:
    graph = secateurs.trace(net("stacked"), ROWS)
    assert {"first.up", "second.up"} < {group.name for group in graph.groups}


@pytest.mark.parametrize("spelling", ["skipped", "stacked"])
def test_cuts_are_timed_on_the_way_that_the_whole_network_goes(spelling: str) -> None:
    model = net(spelling)
    graph = secateurs.trace(model, ROWS[:2])
    timed = secateurs.latency_model(model, graph, ROWS[:2], samples=6, repeats=1)
    assert timed.ms() > 0 and len(timed.calls) == len(graph.path)


# -- criteria ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("criterion", ["mean-activation", "taylor", "fisher", "thinet", "reconstruction"])
def test_scores_of_a_mixture_do_not_depend_on_how_it_is_written(criterion: str) -> None:
    """Nor on which experts a batch comes to, nor on whether its examples lie apart."""
    found = []
    for spelling, size in (("picked", 96), ("skipped", 4), ("masked", 4)):
        model = net(spelling)
        graph = secateurs.trace(model, ROWS)
        data = batches(size)
        found.append(secateurs.score(model, graph, criterion, data=data, loss_fn=F.cross_entropy))
    assert {len(found[0][name]) for name in found[0]} == {16, 24, 32}
    for scores in found[1:]:
        for name in scores:
            assert torch.allclose(scores[name], found[0][name], rtol=1e-3, atol=1e-6), name


def test_experts_of_one_parameter_count_for_the_rows_they_are_dealt() -> None:
    curves = []
    for spelling in STACKED:
        model = net(spelling)
        graph = secateurs.trace(model, ROWS)
        curves.append(secateurs.score(model, graph, "reconstruction", data=batches(24)).curves)
    assert curves[0] is not None and curves[1] is not None
    for name, curve in curves[0].items():
        assert torch.allclose(curve, curves[1][name], rtol=1e-4, atol=1e-7), name
    assert 0.3 < curves[0]["first.up"][-1] < 1.0  # a share of what all experts give


def test_experts_count_for_the_rows_they_are_dealt() -> None:
    model = net("picked")
    graph = secateurs.trace(model, ROWS)
    curves = secateurs.score(model, graph, "reconstruction", data=batches(24)).curves
    assert curves is not None
    dealt = model.first.gate(model.stem(ROWS)).topk(2, -1).indices.flatten().bincount(minlength=4) / 192
    for number, share in enumerate(dealt.tolist()):
        assert share * 0.3 < float(curves[f"first.experts.{number}.0"][-1]) < share


@pytest.mark.parametrize("spelling", ["picked", "skipped", "grouped"])
def test_one_call_cuts_a_mixture_and_leaves_an_expert_without_rows_whole(spelling: str) -> None:
    model = net(spelling, count=8, best=1)
    with torch.no_grad():
        model.first.gate.bias[2] = -100.0
    step = secateurs.prune(model, ROWS.split(48), secateurs.Budget(macs=0.7))
    step.verified.raise_if_failed()
    cut = {group.name for group in step.plan.groups}
    assert "first.experts.2.0" not in cut
    of_experts = {name for name in cut if "experts" in name}
    assert len(of_experts) > 5 or spelling == "grouped"  # two rows, on which others are traced, come to four
    assert step.model(torch.randn(500, 8)).shape == (500, 3)


def test_a_stream_is_ranked_by_the_experts_that_examples_come_to() -> None:
    model = net("skipped")
    graph = secateurs.trace(model, ROWS)
    with torch.no_grad():
        model.first.gate.bias[2] = -100.0
    scores = secateurs.score(model, graph, "reconstruction", data=batches(24))
    assert list(scores.missing) == ["first.experts.2.0"]


def test_what_no_example_comes_to_is_not_ranked() -> None:
    model = net("picked")
    with torch.no_grad():
        model.first.gate.bias[2] = -100.0
    scores = secateurs.score(model, secateurs.trace(model, ROWS), "reconstruction", data=batches(24))
    assert list(scores.missing) == ["first.experts.2.0"]
    with pytest.raises(UnrankedError, match="none of the examples comes to the weights"):
        scores["first.experts.2.0"]


def _worker(rank: int, port: int, out: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    model = net("skipped")
    graph = secateurs.trace(model, ROWS)
    found = secateurs.score(model, graph, "reconstruction", data=batches(12)[rank::2])
    refused = ""
    try:  # a single row here comes to two experts of each mixture
        secateurs.score(model, graph, "reconstruction", data=batches(96) if rank else batches(1)[:1])
    except ScoreError as error:
        refused = str(error)
    torch.save(({name: values.tolist() for name, values in found.items()}, refused), f"{out}/{rank}.pt")
    dist.destroy_process_group()
    threads = [path.read_text().strip() for path in Path("/proc/self/task").glob("*/comm")]
    assert not [name for name in threads if "gloo" in name], "nothing may keep the group of processes alive"


def test_two_processes_score_a_mixture_as_one(tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    mp.spawn(_worker, (port, str(tmp_path)), nprocs=2)
    model = net("skipped")
    expected = secateurs.score(model, secateurs.trace(model, ROWS), "reconstruction", data=batches(12))
    for rank in (0, 1):
        found, refused = torch.load(tmp_path / f"{rank}.pt")
        assert "take another path through the model than those of another" in refused
        for name, values in expected.items():
            assert torch.allclose(torch.tensor(found[name]).double(), values, rtol=1e-5), name
