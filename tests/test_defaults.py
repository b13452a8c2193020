"""What a pruning job does where nothing is said: the criterion by the network, one cut, its repair."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import secateurs
import test_jobs
from machines import known_machine
from secateurs.criteria.unit_reads import unrankable
from secateurs.errors import BudgetError, PlanError
from secateurs.jobs import PruneSettings, prune_job, train_job
from secateurs.progress import Event
from secateurs.runs import Run, load
from test_jobs import FAST, pruning, training
from tiny_net import RowsNet, TangledNet, TinyNet

pytestmark = pytest.mark.usefixtures("no_pictures")
images, trained, no_pictures = test_jobs.images, test_jobs.trained, test_jobs.no_pictures
CUT_ALONE: dict[str, Any] = {"iterations": 1, "final_epochs": 0, "recipe": replace(FAST, epochs=0)}


@pytest.fixture(scope="module")
def compared(images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A trained network of which reconstruction cannot rank every group."""
    settings = replace(training(images), model="tiny_net:RowsNet")
    return train_job(settings, tmp_path_factory.mktemp("runs") / "compared").path


def test_a_target_is_met_where_the_readers_miss_least_and_a_number_of_units_the_article_s_way() -> None:
    def chosen(**given: Any) -> tuple[str | None, str | None, int | None]:
        found = PruneSettings(source="run", **given).for_images(are_labelled=True)
        return found.criterion, found.allocation, found.rank_images

    assert chosen(target=("macs", 0.5)) == ("reconstruction", "error", 2000)
    assert chosen(target=("macs", 0.5), scope="local") == ("reconstruction", "none", 2000)
    assert chosen(target=("macs", 0.5), allocation="none", rank_images=9) == ("reconstruction", "none", 9)
    assert chosen(shares={"*": 0.5}) == ("reconstruction", "error", 2000)
    assert chosen(target=("macs", 0.5), normalization="l2") == ("taylor", "none", None)
    assert chosen(target=("macs", 0.5), criterion="l1") == ("l1", "none", None)
    assert chosen(target=("macs", 0.5), criterion="reconstruction") == ("reconstruction", "none", 2000)
    assert chosen(remove=512) == ("taylor", "none", None)


def encoder() -> nn.Module:
    return nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)


@pytest.mark.parametrize("make", [TinyNet, RowsNet, TangledNet, encoder])
def test_what_cannot_be_ranked_is_known_without_ranking(make: Callable[[], nn.Module]) -> None:
    torch.manual_seed(0)
    model = make().eval()
    x = torch.randn(2, 5, 8) if make is encoder else torch.randn(2, 3, 8, 8)
    graph = secateurs.trace(model, x)
    found = unrankable(model, graph, x)
    missing = secateurs.score(model, graph, "reconstruction", data=[x]).missing
    assert {name: str(error) for name, error in found.items()} == {
        name: str(error) for name, error in missing.items()
    }
    assert bool(found) == (make is RowsNet)


def test_what_cannot_be_ranked_stays_whole_and_is_told(compared: Path, tmp_path: Path) -> None:
    seen: list[Event] = []
    settings = pruning(compared, target=("macs", 0.5), **{**CUT_ALONE, "iterations": 2})
    result = prune_job(settings, tmp_path / "pruned", observer=seen.append)
    notes = seen[0].facts["notes"]
    assert any("not ranked by reconstruction, so left whole: rows, marks (" in note for note in notes)
    assert Run(result.path).config["settings"]["criterion"] == "reconstruction"
    assert result.metrics["after"]["macs"] <= 0.5 * result.metrics["before"]["macs"]
    small = load(result.path)
    assert (small.rows.out_features, small.marks.out_features) == (10, 12)
    lost = {layer["name"]: layer["removed"] for layer in result.iterations[0]["layers"]}
    assert lost["rows"] == lost["marks"] == 0 < lost["features.0"] + lost["features.4"]


def test_units_of_a_target_are_those_that_can_be_ranked(compared: Path, tmp_path: Path) -> None:
    settings = pruning(compared, target=("units", 0.5), **{**CUT_ALONE, "iterations": 2})
    rows = prune_job(settings, tmp_path / "pruned").iterations
    assert sum(row["removed"] for row in rows) == 14  # of 12 and 16 channels


def test_taylor_ranks_a_network_that_reconstruction_cannot_cut_far_enough(
    compared: Path, tmp_path: Path
) -> None:
    settings = pruning(compared, target=("params", 0.05), **CUT_ALONE)
    with pytest.raises(BudgetError, match=r"params=0\.05 is out of reach"):
        prune_job(replace(settings, criterion="reconstruction"), tmp_path / "refused")
    assert not (tmp_path / "refused").exists()
    seen: list[Event] = []
    result = prune_job(settings, tmp_path / "pruned", observer=seen.append)
    assert any(
        "ranked by taylor, not by reconstruction: params=0.05 is out" in note
        for note in seen[0].facts["notes"]
    )
    asked = Run(result.path).config["settings"]
    assert (asked["criterion"], asked["allocation"], asked["rank_images"]) == ("taylor", "none", None)
    assert result.metrics["after"]["params"] <= 0.05 * result.metrics["before"]["params"]


def test_a_share_for_what_cannot_be_ranked_says_why(compared: Path, tmp_path: Path) -> None:
    settings = pruning(compared, target=None, shares={"rows": 0.5}, **CUT_ALONE)
    with pytest.raises(PlanError, match=r"reconstruction needs weights that read the units of group 'rows'"):
        prune_job(replace(settings, criterion="reconstruction"), tmp_path / "pruned")
    assert not (tmp_path / "pruned").exists()
    result = prune_job(settings, tmp_path / "pruned")
    assert Run(result.path).config["settings"]["criterion"] == "taylor"
    assert load(result.path).rows.out_features == 5


def test_a_target_in_time_leaves_whole_what_cannot_be_ranked(
    compared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    known_machine(monkeypatch, block=1)
    settings = pruning(compared, target=("latency", 0.9), **CUT_ALONE)
    result = prune_job(settings, tmp_path / "pruned")
    assert result.iterations[0]["latency_share"] <= 0.9 * 1.02
    assert (load(result.path).rows.out_features, load(result.path).marks.out_features) == (10, 12)
