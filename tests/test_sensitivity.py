"""Sensitivity: silenced and cut agree, what follows for a plan, the job, the command, and what is refused."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import models
import secateurs
from models import TOYS, build
from secateurs.errors import DataError, PlanError, RunError
from secateurs.jobs import SensitivitySettings, sensitivity_job
from secateurs.measure import accuracy
from secateurs.progress import Event
from secateurs.sensitivities import Point, Sensitivity, sensitivity
from test_cli import images, run, train_tiny  # noqa: F401  (a fixture)
from toy import Toy

NETS = (models.PlainVgg, models.ResidualStream, models.DepthwiseConv, models.GroupNormNet, models.FlattenHead)


def labelled(model: Toy, count: int = 96) -> list[Any]:
    """Batches whose labels are what the model says, but for a few."""
    torch.manual_seed(3)
    inputs = model.example(count)
    with torch.no_grad():
        labels = model(inputs).argmax(1)
    labels[::7] = 0
    return [(inputs[:64], labels[:64]), (inputs[64:], labels[64:])]


# -- the numbers ----------------------------------------------------------------------------------


@pytest.mark.parametrize("toy", NETS)
def test_every_point_is_what_the_cut_model_does(toy: type[Toy]) -> None:
    model = build(toy)
    batches = labelled(model)
    graph = secateurs.trace(model, model.example())
    scores = secateurs.score(model, graph, "l2")
    found = sensitivity(model, graph, batches, criterion="l2", ratios=[0.3, 0.5, 0.8])
    assert found.accuracy == accuracy(model, batches).top1
    for point in found.points:
        gone = torch.sort(scores[point.group]).indices[: point.size - point.kept].tolist()
        small = secateurs.apply(model, secateurs.Plan.of(graph, {point.group: gone}))
        truth = accuracy(small, batches)
        assert point.accuracy == truth.top1
        assert point.loss == pytest.approx(truth.loss, rel=1e-5)
        assert point.macs == secateurs.trace(small, model.example()).cost().macs
        mixed = graph.mixed_by(graph.by_name[point.group])
        assert point.way == ("cut" if mixed else "silenced")


def test_ratios_that_come_to_the_same_count_once_and_none_empties_a_group() -> None:
    model = build(models.PlainVgg)
    graph = secateurs.trace(model, model.example())
    found = sensitivity(model, graph, labelled(model), skip=["fc1"])
    kept = {name: [point.kept for point in points] for name, points in found.curves().items()}
    assert kept == {"conv1": [8 - n for n in range(1, 8)], "conv2": [11, 10, 9, 8, 6, 5, 4, 3, 2]}


@pytest.mark.parametrize("toy", [toy for toy in TOYS if toy.TIED])
def test_groups_that_are_tied_shrink_along(toy: type[Toy]) -> None:
    model = build(toy)
    graph = secateurs.trace(model, model.example())
    inputs = model.example(8)
    with torch.no_grad():
        outputs = model(inputs)
    if not isinstance(outputs, torch.Tensor) or outputs.dim() != 2:
        pytest.skip("no classifier")
    found = sensitivity(model, graph, [(inputs, outputs.argmax(1))], ratios=[0.5])
    together = {name for rule in graph.constraints for name in (graph.groups[g].name for g in rule.groups)}
    assert any(point.along for point in found.points if point.group in together)


def test_scores_at_hand_decide_who_leaves() -> None:
    model = build(models.PlainVgg)
    graph = secateurs.trace(model, model.example())
    batches = labelled(model)
    scores = secateurs.score(model, graph, "random")
    one = sensitivity(model, graph, batches, criterion=scores, ratios=[0.5])
    other = sensitivity(model, graph, batches, criterion="random", ratios=[0.5])
    assert one == other
    assert one.criterion == "random"


def test_the_model_is_left_as_it_was() -> None:
    model = build(models.PlainVgg).train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    graph = secateurs.trace(model, model.example())
    sensitivity(model, graph, labelled(build(models.PlainVgg)), ratios=[0.5])
    assert model.training
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


# -- what follows ---------------------------------------------------------------------------------


def curves(**falls: list[float]) -> Sensitivity:
    """Groups of 10 units that lose so much accuracy at 10 %, 20 %, ..."""
    points = tuple(
        Point(group=name, size=10, kept=9 - place, accuracy=0.9 - fall, loss=0.0, macs=1, way="silenced")
        for name, drops in falls.items()
        for place, fall in enumerate(drops)
    )
    return Sensitivity(accuracy=0.9, loss=0.0, macs=1, images=100, criterion="l1", points=points)


def test_the_last_point_before_the_first_that_falls_counts() -> None:
    found = curves(calm=[0, 0, 0.005], steep=[0.2, 0.3, 0.4], odd=[0, 0.2, 0.001], gains=[-0.1, -0.2, 0.5])
    shares, skip = found.within(0.01)
    assert shares == {"calm": 0.7, "odd": 0.9, "gains": 0.8}
    assert skip == ["steep"]


@pytest.mark.parametrize(("drop", "words"), [(-0.1, "0 <= max_drop < 1"), (0.01, "every group loses more")])
def test_a_drop_that_leaves_nothing_is_refused(drop: float, words: str) -> None:
    with pytest.raises(PlanError, match=words):
        curves(steep=[0.2, 0.3]).within(drop)


def test_shares_that_follow_are_met_by_the_plan() -> None:
    model = build(models.PlainVgg)
    graph = secateurs.trace(model, model.example())
    scores = secateurs.score(model, graph, "l1")
    found = sensitivity(model, graph, labelled(model), criterion=scores)
    shares, skip = found.within(0.08)
    plan = secateurs.plan(graph, scores, shares=shares, skip=skip)
    kept = {cut.name: cut.kept / cut.size for cut in plan.groups}
    assert kept == {name: share for name, share in shares.items() if share < 1}


def test_a_file_is_read_back_and_another_one_refused(tmp_path: Path) -> None:
    found = curves(calm=[0, 0.1], steep=[0.5, 0.5])
    found.save(tmp_path / "sensitivity.json")
    assert Sensitivity.load(tmp_path / "sensitivity.json") == found == Sensitivity.load(tmp_path)
    (tmp_path / "other.json").write_text('{"format": 1, "points": [{}]}')
    with pytest.raises(RunError, match=r"other\.json holds no sensitivities"):
        Sensitivity.load(tmp_path / "other.json")
    with pytest.raises(RunError, match=r"none\.json"):
        Sensitivity.load(tmp_path / "none.json")


@pytest.mark.parametrize("ratio", [0.0, 1.0, -0.5])
def test_a_ratio_out_of_range_is_refused(ratio: float) -> None:
    model = build(models.PlainVgg)
    graph = secateurs.trace(model, model.example())
    with pytest.raises(PlanError, match="0 < ratio < 1 must hold"):
        sensitivity(model, graph, labelled(model), ratios=[ratio])
    with pytest.raises(DataError, match="at least one sample"):
        sensitivity(model, graph, [])


# -- the job and the command ----------------------------------------------------------------------


def test_the_job_goes_on_where_it_was_stopped_and_feeds_prune(
    images: Path,  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    trained = train_tiny(images)
    settings = SensitivitySettings(source=str(trained), threads=1, ratios=(0.25, 0.5, 0.75))
    whole = sensitivity_job(settings, "whole")
    stop_after(2, settings, "stopped")
    told: list[Event] = []
    again = sensitivity_job(settings, "stopped", resume=True, observer=told.append)
    assert again == whole
    assert len({(point.group, point.kept) for point in again.points}) == 6
    with Path("stopped/sensitivity.csv").open() as file:
        lines = list(csv.DictReader(file))
    assert [int(line["kept"]) for line in lines] == [9, 6, 3, 12, 8, 4]
    assert [float(line["accuracy"]) for line in lines] == pytest.approx([p.accuracy for p in whole.points])
    assert Path("stopped/sensitivity.png").read_bytes()[1:4] == b"PNG"
    result = run("prune", trained, "--sensitivity", "whole", "--max-drop", 0.9, "--iterations", 1,
                 "--finetune-epochs", 0, "--final-epochs", 0, "--threads", 1, "--out", "pruned")  # fmt: skip
    assert result.exit_code == 0, result.output
    plan = json.loads(Path("pruned/plan-01.json").read_text())
    assert {cut["name"]: len(cut["removed"]) for cut in plan["groups"]} == {"features.0": 9, "features.4": 12}
    assert json.loads(Path("pruned/config.json").read_text())["settings"]["shares"] == {
        "features.0": 0.25,
        "features.4": 0.25,
    }


def stop_after(points: int, settings: SensitivitySettings, out: str) -> None:
    class Killed(BaseException):
        pass

    seen: list[Event] = []

    def observer(event: Event) -> None:
        seen.append(event)
        if sum(each.name == "point" for each in seen) == points:
            raise Killed

    with pytest.raises(Killed):
        sensitivity_job(settings, out, observer=observer)


def test_the_command_prints_a_table_or_json(
    images: Path,  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    trained = train_tiny(images)
    options = ("--ratios", "0.5,0.25", "--threads", 1, "--images", 2, "--skip", "features.0")
    first = run("sensitivity", trained, *options)
    assert first.exit_code == 0, first.output
    assert "group 1/1 features.4: 12 of 16 units" in first.output
    assert "on 2 validation images" in first.output
    assert any(line.split()[:2] == ["features.4", "16"] for line in first.output.splitlines())
    second = run("sensitivity", trained, *options, "--json", "--out", "second")
    facts = json.loads(second.output)
    assert [point["kept"] for point in facts["points"]] == [12, 8]
    assert run("sensitivity", trained, *options).exit_code == 2  # the run directory is taken


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("nowhere",), "neither a run directory that exists nor the name of an architecture"),
        (("trained", "--criterion", "tailor"), "unknown criterion 'tailor'; did you mean 'taylor'"),
        (("trained", "--ratios", "few"), "ratios are numbers with commas, got 'few'"),
        (("trained", "--ratios", "1.5"), "the share that leaves, in (0, 1), got 1.5"),
    ],
)
def test_mistakes_are_one_sentence(
    arguments: tuple[str, ...],
    words: str,
    make_folder: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    if arguments[0] == "trained" and "--criterion" in arguments:
        train_tiny(make_folder({"train/cat": 10, "train/dog": 10, "test/cat": 3, "test/dog": 3}))
    result = run("sensitivity", *arguments, "--threads", 1)
    assert result.exit_code == 2
    assert words in " ".join(result.stderr.split())
