"""A folder of images without classes: the original network's own answers are the labels."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import test_jobs
from secateurs.cli.text import measured_by
from secateurs.errors import DataError
from secateurs.jobs import (
    DataSettings,
    PruneSettings,
    RankSettings,
    RecoverSettings,
    prune_job,
    rank_job,
    recover_job,
    train_job,
)
from secateurs.jobs.answers import answered
from secateurs.progress import Event
from secateurs.report import measured_in
from secateurs.report.charts import quantities
from secateurs.runs import Run, load
from test_jobs import FAST, interrupted_at, pruning, saved, training

pytestmark = pytest.mark.usefixtures("no_pictures")
images, trained, no_pictures = test_jobs.images, test_jobs.trained, test_jobs.no_pictures
SAID = "the original network's own answers"
ONCE = replace(FAST, epochs=1, checkpoint_minutes=0)


@pytest.fixture(scope="module")
def photos(images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The training images of all classes in one folder, under names that say nothing."""
    folder = tmp_path_factory.mktemp("photos")
    for number, file in enumerate(sorted((images / "train").glob("*/*.png"))):
        (folder / f"{number * 37 % 100:02}.png").write_bytes(file.read_bytes())
    return folder


def one_cut(trained: Path, photos: Path, **changes: Any) -> PruneSettings:
    usual: dict[str, Any] = {"iterations": 1, "final_epochs": 0, "recipe": ONCE, "data": str(photos)}
    return pruning(trained, **{**usual, **changes})


def test_each_image_is_labelled_as_the_network_answers_to_it_alone(trained: Path, photos: Path) -> None:
    source = DataSettings(path=str(photos), image_size=16).load()
    model, names = load(trained), ("cat", "dog", "owl")
    found = answered(source, model, names, batch_size=7)
    for part in ("ranking", "val", "test"):
        before, after = getattr(source, part), getattr(found, part)
        with torch.no_grad():
            alone = [int(model(before[index][0][None]).argmax()) for index in range(len(before))]
        assert list(after.labels) == alone
        assert after.numbers == before.numbers
    assert found.train.labels == found.ranking.labels
    assert len(set(found.ranking.labels)) > 1
    assert found.class_names == names and not found.is_labelled


def test_pruning_and_recovering_need_no_labels(trained: Path, photos: Path, tmp_path: Path) -> None:
    seen: list[Event] = []
    result = prune_job(one_cut(trained, photos), tmp_path / "pruned", observer=seen.append)
    run = Run(result.path)
    settings = run.config["settings"]
    assert (settings["criterion"], settings["allocation"]) == ("reconstruction", "error")
    assert settings["recipe"]["distill"] == 1.0
    assert run.config["class_names"] == ["cat", "dog", "owl"]
    assert any(f"labels: {SAID} (" in note for note in seen[0].facts["notes"])
    assert result.metrics["before"]["accuracy"] == result.metrics["before"]["val_accuracy"] == 1.0
    assert {part["labels"] for part in result.metrics.values()} == {SAID}
    measured = next(event for event in seen if event.name == "measured")
    assert measured_by(measured.facts) == "agreement with the original"
    assert result.metrics["after"]["macs"] <= 0.3 * result.metrics["before"]["macs"]
    source = DataSettings.from_dict(run.config["data"]).load()
    whole, small = load(trained), load(result.path)
    with torch.no_grad():
        agree = [
            bool(whole(image[None]).argmax() == small(image[None]).argmax())
            for image in (source.test[index][0] for index in range(len(source.test)))
        ]
    assert result.metrics["after"]["accuracy"] == pytest.approx(sum(agree) / len(agree))
    later = recover_job(RecoverSettings(source=str(result.path), recipe=ONCE, threads=1), tmp_path / "healed")
    assert later.metrics["before"]["accuracy"] == result.metrics["after"]["accuracy"]
    assert later.metrics["after"]["labels"] == SAID
    for each in (result.metrics, later.metrics):
        assert each["after"]["kept"].startswith(("epoch 1 of 1 kept: the best", "no epoch kept: none was"))
    assert Run(later.path).config["settings"]["recipe"]["distill"] == 1.0


def test_the_teacher_alone_gives_the_loss(
    trained: Path, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Answers that are all wrong change nothing of what is learnt, but where a user asks for them."""
    from secateurs.jobs import workplace

    def turned(source: Any, model: nn.Module, names: Any, **how: Any) -> Any:
        found = answered(source, model, names, **how)
        train = found.train.labelled([(label + 1) % 3 for label in found.train.labels])
        return replace(found, train=train)

    outcomes = {}
    for share in (None, 0.0):
        for kind in (answered, turned):
            monkeypatch.setattr(workplace, "answered", kind)
            out = tmp_path / f"{share}-{kind.__name__}"
            settings = one_cut(trained, photos, recipe=replace(ONCE, distill=share, patience=None))
            events = prune_job(settings, out).iterations[0]["epochs"]
            outcomes[share, kind.__name__] = events[0]["loss"]
    assert outcomes[None, "answered"] == outcomes[None, "turned"]
    assert outcomes[0.0, "answered"] != outcomes[0.0, "turned"]


def test_a_criterion_that_is_given_stays(trained: Path, photos: Path, tmp_path: Path) -> None:
    settings = one_cut(trained, photos)
    given = replace(settings, criterion="l1").for_images(are_labelled=False)
    assert (given.criterion, given.allocation) == ("l1", "none")
    both = replace(settings, criterion="l1", allocation="error").for_images(are_labelled=False)
    assert (both.criterion, both.allocation) == ("l1", "error")
    labelled = settings.for_images(are_labelled=True)
    assert (labelled.criterion, labelled.allocation, labelled.recipe.distill) == (
        "reconstruction",
        "error",
        0.0,
    )
    removal = replace(settings, criterion=None, target=None, remove=4)
    assert prune_job(removal, tmp_path / "removed").iterations[0]["removed"] == 4


def test_neither_a_kill_nor_the_order_of_the_files_changes_the_result(
    trained: Path, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = one_cut(trained, photos)
    expected = saved(prune_job(settings, tmp_path / "whole").path)
    assert interrupted_at(6, True, monkeypatch, lambda: prune_job(settings, tmp_path / "killed"))
    walk, listed = os.walk, Path.iterdir
    monkeypatch.setattr(
        os, "walk", lambda top: ((place, dirs, names[::-1]) for place, dirs, names in walk(top))
    )
    monkeypatch.setattr(Path, "iterdir", lambda self: reversed(list(listed(self))))
    prune_job(settings, tmp_path / "killed", resume=True)
    assert saved(tmp_path / "killed") == expected


@pytest.mark.parametrize(
    ("work", "sentence"),
    [
        (lambda photos, out: train_job(training(photos), out), "training needs images with classes"),
        (
            lambda photos, out: rank_job(RankSettings(source="tiny_net:TinyNet", data=str(photos))),
            "the architecture tiny_net:TinyNet needs images with classes, but .* has no folders of classes",
        ),
    ],
    ids=["train", "architecture"],
)
def test_what_needs_classes_says_so(
    photos: Path, tmp_path: Path, work: Callable[[Path, Path], Any], sentence: str
) -> None:
    with pytest.raises(DataError, match=sentence):
        work(photos, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_ranking_takes_the_same_answers(trained: Path, photos: Path) -> None:
    seen: list[Event] = []
    settings = RankSettings(source=str(trained), data=str(photos), threads=1)
    rows = rank_job(settings, observer=seen.append)
    assert seen[0].name == "noted" and any(f"labels: {SAID} (" in note for note in seen[0].facts["notes"])
    assert len(rows) == 28 and rows[0]["score"] < rows[-1]["score"]


def test_pictures_say_agreement() -> None:
    measured = {"accuracy": 1.0, "macs": 10}
    assert quantities(measured, measured)[0].title == "accuracy, %"
    answered_by = measured | {"labels": SAID}
    assert quantities(answered_by, answered_by)[0].title == "agreement, %"
    assert (measured_in(measured), measured_in(answered_by)) == ("accuracy", "agreement")
