"""Correlations with the oracle against scipy and by hand; the commands compare and rank."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy import stats
from torch import nn
from typer.testing import CliRunner, Result

import models
import secateurs
from models import build
from secateurs.cli import app
from secateurs.criteria import Scores
from secateurs.errors import ScoreError, UnknownNameError
from secateurs.jobs import CompareSettings, compare_job
from secateurs.judging import Oracle, agree, judge, spearman
from secateurs.judging.agreement import Values
from secateurs.progress import Event
from secateurs.report.agreement import ranks_chart

TINY = ["--model", "tiny_net:TinyNet", "--image-size", "16", "--threads", "1"]


# -- correlations ---------------------------------------------------------------------------------


def layers(**values: list[float]) -> Values:
    return {name: np.array(each, np.float64) for name, each in values.items()}


TRUTH = layers(a=[0.1, 0.4, 0.2, 0.9], b=[5.0, 5.0, 1.0, 3.0, 2.0], c=[7.0, 8.0])
SCORES = layers(a=[1.0, 2.0, 3.0, 4.0], b=[9.0, 8.0, 8.0, 1.0, 1.0], c=[2.0, 1.0])


def test_correlations_are_those_of_scipy_with_ties() -> None:
    found = agree(SCORES, SCORES, TRUTH)
    by_scipy = {name: float(stats.spearmanr(SCORES[name], TRUTH[name]).statistic) for name in "ab"}
    assert found.layers == {**{n: pytest.approx(v) for n, v in by_scipy.items()}, "c": None}
    assert found.per_layer.value == pytest.approx(np.mean(list(by_scipy.values())))
    assert found.spread == pytest.approx(np.std(list(by_scipy.values()), ddof=1))
    both = [np.concatenate(list(values.values())) for values in (SCORES, TRUTH)]
    assert found.all_layers.value == pytest.approx(float(stats.spearmanr(*both).statistic))


def test_two_units_say_nothing_and_constants_have_no_correlation() -> None:
    flat = layers(a=[3.0] * 4, b=[1.0, 2.0, 3.0, 4.0, 5.0], c=[1.0, 2.0])
    found = agree(flat, flat, TRUTH)
    assert found.layers["a"] is None and found.layers["c"] is None
    assert found.per_layer.value == found.layers["b"] and found.spread is None
    nothing = agree(layers(a=[1.0] * 4), layers(a=[1.0] * 4), layers(a=[1.0, 2.0, 3.0, 4.0]))
    assert nothing.per_layer.value is None and nothing.all_layers.value is None
    assert nothing.all_layers.low is None
    assert spearman(np.array([1.0]), np.array([2.0])) is None


def test_the_interval_is_that_of_scipys_bootstrap() -> None:
    chance = np.random.default_rng(0)
    truth = chance.normal(size=150)
    scores = truth + chance.normal(size=150)
    found = agree({"a": scores}, {"a": scores}, {"a": truth}, resamples=2000).all_layers
    by_scipy = stats.bootstrap(
        (scores, truth),
        lambda x, y: stats.spearmanr(x, y).statistic,
        paired=True,
        vectorized=False,
        n_resamples=400,
        method="percentile",
        rng=np.random.default_rng(1),
    ).confidence_interval
    assert found.low == pytest.approx(by_scipy.low, abs=0.03)
    assert found.high == pytest.approx(by_scipy.high, abs=0.03)
    assert found.low < found.value < found.high
    again = agree({"a": scores}, {"a": scores}, {"a": truth}, resamples=2000).all_layers
    other = agree({"a": scores}, {"a": scores}, {"a": truth}, resamples=2000, seed=1).all_layers
    assert again == found != other


def judged_oracle() -> Oracle:
    nan = float("nan")
    changes = {
        "small": torch.tensor([-0.3, 0.1, 0.2, nan]).double(),
        "large": torch.tensor([4.0, 5.0, -6.0]).double(),
    }
    return Oracle(changes=changes, loss=1.0, examples=1, ways={})


def test_l2_and_sign_and_units_that_were_not_measured() -> None:
    """Right within layers, at scales that contradict the oracle; the unmeasured unit counts in the l2."""
    scores = Scores(
        "own", {"small": torch.tensor([3e3, 1e3, 2e3, 9e9]), "large": torch.tensor([4.0, 5.0, 6.0])}
    )
    absolute = judge(scores, judged_oracle()).agreement["oracle-abs"]
    assert absolute.per_layer.value == pytest.approx(1.0)
    assert absolute.all_layers.value < 0 < absolute.all_layers_l2.value
    assert absolute.all_layers_l2.value == pytest.approx(1.0)  # the unit that was not measured is 9e9
    signed = judge(scores, judged_oracle()).agreement["oracle-loss"]
    by_hand = np.mean(
        [stats.spearmanr(a, b).statistic for a, b in (([3, 1, 2], [-3, 1, 2]), ([4, 5, 6], [4, 5, -6]))]
    )
    assert signed.per_layer.value == pytest.approx(by_hand)


# -- compare in a program -------------------------------------------------------------------------


def small() -> tuple[Any, secateurs.Graph, list[Any]]:
    model = build(models.ResidualStream)
    torch.manual_seed(3)
    data = [(torch.randn(6, 3, 8, 8), torch.randint(4, (6,))) for _ in range(2)]
    return model, secateurs.trace(model, data[0][0]), data


def test_the_oracle_agrees_with_itself_and_chance_with_nothing() -> None:
    model, graph, data = small()
    found = secateurs.oracle(model, graph, data=data, loss_fn=F.cross_entropy)
    own = found.values()

    def perfect(group: Any, weights: Any) -> Any:
        return own[group.name]

    def reversed_(group: Any, weights: Any) -> Any:
        return -own[group.name]

    def constant(group: Any, weights: Any) -> Any:
        return torch.ones(group.size)

    judged = secateurs.compare(
        model, graph, data=data, loss_fn=F.cross_entropy, criteria=[reversed_, constant, perfect], found=found
    )
    assert [each.criterion for each in judged.judgements] == ["perfect", "reversed_", "constant"]
    values = [each.agreement["oracle-abs"].all_layers.value for each in judged.judgements]
    assert values == [pytest.approx(1.0), pytest.approx(-1.0), None]
    rows = list(judged.units())
    assert len(rows) == graph.units
    assert rows[0].keys() == {"layer", "unit", "oracle-loss", "perfect", "reversed_", "constant"}
    assert all(row["perfect"] == abs(row["oracle-loss"]) for row in rows)
    assert json.loads(json.dumps(judged.to_dict(), allow_nan=False))["units"] == graph.units


def test_all_names_those_that_this_model_does_not_admit(monkeypatch: pytest.MonkeyPatch) -> None:
    model, graph, data = small()
    monkeypatch.setattr("secateurs.judging.comparing.names", lambda: ["l1", "fails"])

    class Fails(secateurs.Criterion):
        name = "fails"

        def importance(self, group: Any, weights: Any) -> Any:
            raise ScoreError("fails needs what this model has not")

    monkeypatch.setitem(__import__("secateurs.criteria.protocol").criteria.protocol._CRITERIA, "fails", Fails)
    judged = secateurs.compare(model, graph, data=data, loss_fn=F.cross_entropy)
    assert [each.criterion for each in judged.judgements] == ["l1"]
    assert judged.failed == {"fails": "fails needs what this model has not"}
    with pytest.raises(ScoreError, match="fails needs what this model has not"):
        secateurs.compare(model, graph, data=data, loss_fn=F.cross_entropy, criteria=["fails"])


def test_a_criterion_is_judged_on_the_layers_that_it_can_rank(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 2)
    ).eval()
    nn.init.uniform_(model[1].weight)
    graph = secateurs.trace(model, torch.zeros(2, 4))
    data = [(torch.randn(32, 4), torch.randint(2, (32,)))]
    found = secateurs.oracle(model, graph, data=data, loss_fn=F.cross_entropy)
    judged = secateurs.compare(
        model, graph, data=data, loss_fn=F.cross_entropy, criteria=["bn-scale", "l1"], found=found
    )
    assert list(judged.unranked) == ["bn-scale"]
    reason = "bn-scale reads the scales of batch norms, but group '3' has none"
    assert judged.unranked["bn-scale"] == {"3": reason}
    own = next(each for each in judged.judgements if each.criterion == "bn-scale").agreement["oracle-abs"]
    truth = found.values("oracle-abs")["0"]
    expected = stats.spearmanr(model[1].weight.detach().abs(), truth).statistic
    assert own.layers == {"0": pytest.approx(expected)}
    assert own.all_layers.value == pytest.approx(expected)
    rows = list(judged.units())
    assert [row["bn-scale"] is None for row in rows] == [row["layer"] == "3" for row in rows]
    ranks_chart(rows, tmp_path / "ranks.png", title="one layer without scales")
    assert (tmp_path / "ranks.png").stat().st_size > 0
    found = replace(found, changes={"3": found.changes["3"]})
    with pytest.raises(ScoreError, match=reason):
        secateurs.compare(
            model, graph, data=data, loss_fn=F.cross_entropy, criteria=["bn-scale"], found=found
        )


def test_bad_input_of_compare() -> None:
    model, graph, data = small()
    with pytest.raises(ScoreError, match="gone through once for each criterion, but a list_iterator can be"):
        secateurs.compare(model, graph, data=iter(data), loss_fn=F.cross_entropy)
    with pytest.raises(UnknownNameError, match="unknown criterion 'tailor'; did you mean 'taylor'"):
        secateurs.compare(model, graph, data=data, loss_fn=F.cross_entropy, criteria=["tailor"])


# -- the commands ---------------------------------------------------------------------------------


@pytest.fixture
def trained(make_folder: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    images = make_folder({"train/cat": 10, "train/dog": 10, "test/cat": 3, "test/dog": 3})
    assert run("train", "--data", images, *TINY, "--epochs", 1, "--out", "trained").exit_code == 0
    return Path("trained")


def run(*arguments: object) -> Result:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result


def table(path: str) -> list[dict[str, str]]:
    return list(csv.DictReader(Path(path).read_text().splitlines()))


def test_compare_writes_tables_and_pictures(trained: Path) -> None:
    result = run("compare", trained, "--criteria", "taylor,l1,random", "--threads", 1, "--out", "judged")
    assert result.exit_code == 0, result.output
    assert "oracle: 28 units of 2 layers on 18 images" in result.output
    lines = [
        line.split()[0] for line in result.output.splitlines() if line.startswith(("taylor", "l1", "random"))
    ]
    assert sorted(lines) == ["l1", "random", "taylor"]
    facts = json.loads(Path("judged/comparison.json").read_text())
    units = table("judged/units.csv")
    assert len(units) == facts["units"] == 28
    rows = table("judged/comparison.csv")
    assert {(row["criterion"], row["oracle"]) for row in rows} == {
        (name, kind) for name in ("taylor", "l1", "random") for kind in ("oracle-abs", "oracle-loss")
    }
    taylor = next(row for row in rows if row["criterion"] == "taylor" and row["oracle"] == "oracle-abs")
    both = ([float(row["taylor"]) for row in units], [abs(float(row["oracle-loss"])) for row in units])
    assert float(taylor["all_layers"]) == pytest.approx(stats.spearmanr(*both).statistic, abs=1e-3)
    for picture in ("comparison.png", "ranks.png"):
        assert Path("judged", picture).read_bytes()[1:4] == b"PNG"
    again = run(
        "compare", trained, "--criteria", "taylor,l1,random", "--threads", 1, "--out", "judged", "--resume"
    )
    assert again.exit_code == 0 and "oracle, batch" not in again.output
    printed = run(
        "compare", trained, "--criteria", "l1", "--units", 9, "--threads", 1, "--out", "other", "--json"
    )
    assert json.loads(printed.output)["units"] == 9


def test_a_killed_compare_goes_on(trained: Path) -> None:
    settings = CompareSettings(source=str(trained), criteria=("l1",), batch_size=9, threads=1)
    whole = compare_job(settings, "whole")

    def killed(event: Event) -> None:
        if event.name == "silenced" and event.facts["batch"] == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        compare_job(settings, "parts", observer=killed)
    seen: list[Event] = []
    parts = compare_job(settings, "parts", resume=True, observer=seen.append)
    assert sum(event.name == "silenced" for event in seen) == 1
    agreements = [found["criteria"][0]["agreement"]["oracle-abs"]["layers"] for found in (whole, parts)]
    assert agreements[0] == agreements[1]


def test_rank_writes_every_unit_lowest_first(trained: Path) -> None:
    result = run("rank", trained, "--criterion", "l2", "--out", "ranking.csv", "--threads", 1)
    assert result.exit_code == 0, result.output
    assert "... and 8 more in ranking.csv" in result.output
    rows = table("ranking.csv")
    scores = [float(row["score"]) for row in rows]
    assert len(rows) == 28 and scores == sorted(scores)
    model = secateurs.load(trained)
    first = next(row for row in rows if row["layer"] == "features.0" and row["unit"] == "5")
    assert float(first["score"]) == pytest.approx(
        float(model.features[0].weight[5].detach().norm()), rel=1e-6
    )
    # 16 x 16 pixels of 3 x 9 weights, 8 x 8 pixels of 16 filters' plane of 9 weights
    assert int(first["macs_saved"]) == 256 * 27 + 64 * 16 * 9
    assert int(first["params_saved"]) == 27 + 1 + 2 + 16 * 9
    assert (
        run("rank", trained, "--criterion", "oracle-abs", "--out", "oracle.json", "--threads", 1).exit_code
        == 0
    )
    truth = json.loads(Path("oracle.json").read_text())
    assert len(truth) == 28 and truth[0]["score"] >= 0
    assert json.loads(run("rank", trained, "--criterion", "l2", "--json").output)[0]["layer"]


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["compare", "nowhere"], 2, "'nowhere' is neither a run directory that exists nor"),
        (["compare", "trained", "--criteria", "tailor"], 2, "did you mean 'taylor'"),
        (["compare", "trained", "--data", "nowhere"], 2, "nowhere"),
        (["compare", "trained", "--layers", "nothing.*"], 2, "layers 'nothing.*' matches no group"),
        (["rank", "trained", "--criterion", "tailor"], 2, "did you mean 'taylor'"),
        (["rank", "trained", "--normalization", "l3"], 2, "unknown normalization 'l3'"),
        (["rank", "trained", "--out", "ranking.txt"], 2, "ranking.txt must end in .csv or .json"),
        (
            ["rank", "trained", "--criterion", "oracle-abs", "--normalization", "l2"],
            2,
            "takes no normalization",
        ),
    ],
)
def test_mistakes_are_met_with_one_sentence(
    trained: Path, arguments: list[str], code: int, message: str
) -> None:
    result = run(*arguments)
    assert result.exit_code == code, result.output
    assert message in result.output


@pytest.mark.parametrize("command", ["compare", "rank"])
def test_help_has_an_example(command: str) -> None:
    assert f"secateurs {command} runs/train-vgg16" in run(command, "--help").output
