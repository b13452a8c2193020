"""Whole jobs on a tiny network: what they leave, what they promise, and killing them at any moment."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import secateurs
from machines import REST, known_machine, ms_of
from secateurs.errors import BudgetError, DataError, RunError, SecateursError, TrainingError, VerifyError
from secateurs.jobs import DataSettings, PruneSettings, TrainSettings, prune_job, train_job
from secateurs.measure.size import macs, parameters
from secateurs.progress import Event, State
from secateurs.recovery import Recipe
from secateurs.runs import Run, load

pytestmark = pytest.mark.usefixtures("no_pictures")

COUNTS = {"train/cat": 14, "train/dog": 14, "train/owl": 14, "test/cat": 4, "test/dog": 4, "test/owl": 4}
FAST = Recipe(epochs=2, lr=0.05)


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three classes that differ in brightness."""
    root, chance = tmp_path_factory.mktemp("images"), np.random.default_rng(0)
    for place, count in COUNTS.items():
        (root / place).mkdir(parents=True)
        level = {"cat": 60, "dog": 120, "owl": 180}[place.partition("/")[2]]
        for number in range(count):
            pixels = chance.normal(level, 30, (18, 20, 3)).clip(0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(root / place / f"{number}.png")
    return root


@pytest.fixture(scope="module")
def trained(images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished training run; tests leave it as it is."""
    return train_job(training(images), tmp_path_factory.mktemp("runs") / "trained").path


@pytest.fixture
def no_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pictures are the slowest part of a tiny job: write their files, draw nothing."""
    monkeypatch.setattr("matplotlib.figure.Figure.savefig", lambda self, file, **_: file.write(b"PNG"))


def training(images: Path) -> TrainSettings:
    data = DataSettings(path=str(images), image_size=16, val_share=0.2)
    return TrainSettings(data=data, model="tiny_net:TinyNet", recipe=replace(FAST, epochs=3), threads=1)


def pruning(source: Path, **changes: Any) -> PruneSettings:
    usual: dict[str, Any] = {"target": ("macs", 0.3), "iterations": 2, "final_epochs": 1, "recipe": FAST}
    return PruneSettings(source=str(source), threads=1, **{**usual, **changes})


def saved(run: Path) -> dict[str, Any]:
    """All that a job decides: plans and weights, byte by byte."""
    names = sorted([*run.glob("plan-*.json"), run / "model.safetensors"])
    return {path.name: path.read_bytes() for path in names}


def test_a_run_holds_all_that_it_should(trained: Path, tmp_path: Path) -> None:
    seen: list[Event] = []
    result = prune_job(pruning(trained), tmp_path / "pruned", observer=seen.append)
    names = {path.name for path in result.path.iterdir()} - {".lock"}
    assert names == {
        *("config.json", "events.jsonl", "iterations.json", "metrics.json", "model.safetensors"),
        *("plan-01.json", "plan-02.json", "removed-01.png", "removed-02.png"),
        *("removed.png", "before-after.png", "accuracy.png"),
    }
    metrics = json.loads((result.path / "metrics.json").read_text())
    assert list(metrics) == ["before", "after"]
    for part in metrics.values():
        assert {"accuracy", "params", "macs", "file_bytes", "latency_ms", "threads"} <= part.keys()
    assert metrics["after"]["macs"] <= 0.3 * metrics["before"]["macs"]
    assert [event.name for event in seen if event.name in ("cut", "healed", "finished")] == [
        *("cut", "healed", "cut", "healed", "healed", "finished")
    ]
    logged = [event["event"] for event in Run(result.path).events()]
    assert logged == [event.name for event in seen if event.name not in ("batch", "doing")]


def test_one_of_several_processes_refuses_and_leaves_nothing(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(RunError, match="one process, but a launcher started 2"):
        train_job(training(images), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_shares_are_reached_in_equal_steps_and_resumed(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wishes = {"features.0": 0.5, "features.4": 0.25}
    settings = pruning(trained, target=None, shares=wishes, min_units=2, criterion="l1", selection="greedy")
    whole = prune_job(settings, tmp_path / "whole")
    first, second = Run(whole.path).plans()
    assert [{cut.name: cut.kept for cut in plan.groups} for plan in (first, second)] == [
        {"features.0": 9, "features.4": 8},
        {"features.0": 6, "features.4": 4},
    ]
    assert first.source["selection"] == "greedy"
    assert Run(whole.path).config["settings"]["shares"] == wishes
    assert interrupted_at(9, True, monkeypatch, lambda: prune_job(settings, tmp_path / "killed"))
    prune_job(settings, tmp_path / "killed", resume=True)
    assert saved(tmp_path / "killed") == saved(whole.path)
    with pytest.raises(RunError, match=r"settings\.shares = .* cannot be resumed with"):
        prune_job(replace(settings, shares={"features.0": 0.5}), tmp_path / "killed", resume=True)


def test_particles_choose_whom_and_the_ranking_how_many(trained: Path, tmp_path: Path) -> None:
    few: dict[str, Any] = {"iterations": 1, "final_epochs": 0, "criterion": "l1"}
    alone = Run(prune_job(pruning(trained, **few), tmp_path / "alone").path).plans()[0]
    settings = pruning(trained, **few, selection="particles")
    chosen = Run(prune_job(settings, tmp_path / "chosen").path).plans()[0]
    again = Run(prune_job(settings, tmp_path / "again").path).plans()[0]
    assert [(cut.name, cut.kept) for cut in alone.groups] == [(cut.name, cut.kept) for cut in chosen.groups]
    assert chosen == again
    assert chosen.source["selection"] == "particles"
    assert any(event["event"] == "generation" for event in Run(tmp_path / "chosen").events())


def test_a_target_is_met_beside_a_share(trained: Path, tmp_path: Path) -> None:
    settings = pruning(trained, shares={"features.4": 0.5}, final_epochs=0, normalization="mean")
    result = prune_job(settings, tmp_path / "pruned")
    _, second = Run(result.path).plans()
    assert {cut.name: cut.kept for cut in second.groups}["features.4"] == 8
    assert result.metrics["after"]["macs"] <= 0.3 * result.metrics["before"]["macs"]


def test_the_pruned_model_is_the_one_that_was_measured(trained: Path, tmp_path: Path) -> None:
    result = prune_job(pruning(trained), tmp_path / "pruned")
    model = load(result.path)
    image = torch.zeros(1, 3, 16, 16)
    after = result.metrics["after"]
    assert (parameters(model), macs(model, image)) == (after["params"], after["macs"])
    weights = (result.path / "model.safetensors").stat().st_size
    assert abs(weights - after["file_bytes"]) < 200
    first, second = Run(result.path).plans()
    together = secateurs.apply(load(trained), first.then(second))
    assert parameters(together) == after["params"]


def test_the_shares_on_the_way_are_geometric(trained: Path, tmp_path: Path) -> None:
    rows = prune_job(pruning(trained, target=("macs", 0.25)), tmp_path / "pruned").iterations
    assert rows[0]["macs_share"] == pytest.approx(0.5, abs=0.08)
    assert rows[1]["macs_share"] <= 0.25
    assert rows[2]["iteration"] is None


def test_remove_takes_filters_alone_and_that_many(trained: Path, tmp_path: Path) -> None:
    settings = pruning(trained, remove=5, target=None, criterion="l1")
    result = prune_job(settings, tmp_path / "pruned")
    assert [row["removed"] for row in result.iterations] == [5, 5, 0]
    for plan in Run(result.path).plans():
        assert {group.kind for group in plan.groups} == {"channel"}


@pytest.mark.parametrize("target", ["params", "units"])
def test_every_target_is_met(trained: Path, tmp_path: Path, target: str) -> None:
    metrics = prune_job(pruning(trained, target=(target, 0.5)), tmp_path / "pruned").metrics
    assert metrics["after"][target] <= 0.5 * metrics["before"][target]


@pytest.mark.parametrize("target", ["params", "bytes", "macs"])
def test_what_there_may_be_at_most_is_met(trained: Path, tmp_path: Path, target: str) -> None:
    before = Run(trained).metrics()["after"]
    key = "file_bytes" if target == "bytes" else target
    limit = round(0.6 * before[key])
    result = prune_job(pruning(trained, target=(target, limit)), tmp_path / "pruned")
    assert 0.4 * limit < result.metrics["after"][key] <= limit
    assert Run(result.path).config["settings"]["target"] == [target, limit]  # as it was asked for
    with pytest.raises(
        BudgetError, match=f"{target}=90,000,000 at most, where the model has .* nothing to cut"
    ):
        prune_job(pruning(trained, target=(target, 9e7)), tmp_path / "none")
    assert not (tmp_path / "none").exists()


def test_a_file_that_its_header_alone_fills_is_refused(trained: Path, tmp_path: Path) -> None:
    with pytest.raises(BudgetError, match="are the file's header"):
        prune_job(pruning(trained, target=("bytes", 100)), tmp_path / "pruned")


def test_milliseconds_are_met_and_resumed(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    known_machine(monkeypatch, block=1)
    model = load(trained)
    whole = float(ms_of(model, torch.zeros(1, 3, 16, 16), 1).sum() + REST)
    settings = pruning(trained, target=("latency_ms", 0.8 * whole))
    result = prune_job(settings, tmp_path / "pruned")
    assert (
        0.8 * 0.9 <= [row["latency_share"] for row in result.iterations if row["removed"]][-1] <= 0.8 * 1.02
    )
    with pytest.raises(BudgetError, match=r"latency=0\.1 is out of reach"):
        prune_job(pruning(trained, target=("latency_ms", 0.1 * whole)), tmp_path / "far")
    with pytest.raises(BudgetError, match="leaves nothing to cut"):
        prune_job(pruning(trained, target=("latency_ms", 2 * whole)), tmp_path / "none")


def test_a_target_in_time_is_measured_and_resumed(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    known_machine(monkeypatch, block=1)
    settings = pruning(trained, target=("latency", 0.8))
    result = prune_job(settings, tmp_path / "pruned")
    rows = [row for row in result.iterations if row["removed"]]
    shares = [row["latency_share"] for row in rows]
    assert len(rows) == 2 and 0.8**0.5 * 0.93 <= shares[0] <= 0.8**0.5 * 1.02
    assert 0.8 * 0.93 <= shares[1] <= 0.8 * 1.02
    assert result.metrics["after"]["latency_share"] > 0
    plans = Run(result.path).plans()
    assert [plan.source["latency"]["goal"] for plan in plans] == pytest.approx(
        [0.8**0.5, 0.8 / shares[0]], rel=1e-3
    )
    with pytest.raises(
        BudgetError, match=r"latency=0.1 is out of reach: with every group at its smallest, 0\.\d"
    ):
        prune_job(pruning(trained, target=("latency", 0.1)), tmp_path / "far")
    assert interrupted_at(9, True, monkeypatch, lambda: prune_job(settings, tmp_path / "stopped"))
    again = prune_job(settings, tmp_path / "stopped", resume=True)
    assert saved(again.path) == saved(result.path)


def test_a_pruned_run_can_be_pruned_again(trained: Path, tmp_path: Path) -> None:
    once = prune_job(pruning(trained, target=("macs", 0.6), iterations=1), tmp_path / "once")
    twice = prune_job(pruning(once.path, target=("macs", 0.5), iterations=1), tmp_path / "twice")
    assert len(list(twice.path.glob("plan-*.json"))) == 2
    assert twice.metrics["before"]["params"] == once.metrics["after"]["params"]
    assert parameters(load(twice.path)) == twice.metrics["after"]["params"]


def test_a_job_is_a_function_of_its_settings(trained: Path, tmp_path: Path) -> None:
    runs = []
    for name in ("first", "second"):
        torch.manual_seed(len(runs))
        runs.append(saved(prune_job(pruning(trained), tmp_path / name).path))
    assert runs[0] == runs[1]
    other = saved(prune_job(pruning(trained, seed=1), tmp_path / "third").path)
    assert other["model.safetensors"] != runs[0]["model.safetensors"]


def test_a_job_leaves_torch_as_it_was(images: Path, tmp_path: Path) -> None:
    torch.set_num_threads(2)
    state = torch.get_rng_state()
    trained = train_job(training(images), tmp_path / "trained").path
    prune_job(pruning(trained), tmp_path / "pruned")
    assert torch.get_num_threads() == 2
    assert torch.equal(torch.get_rng_state(), state)
    torch.set_num_threads(1)


def test_the_test_images_are_read_once_before_and_once_after(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from secateurs.jobs.workplace import Job

    reads = []
    original = Job.test_batches
    monkeypatch.setattr(Job, "test_batches", lambda self: reads.append(1) or original(self))
    prune_job(pruning(trained), tmp_path / "pruned")
    assert len(reads) == 2


def test_sizes_in_the_code_are_cut_with_the_rest_and_loaded(images: Path, tmp_path: Path) -> None:
    source = train_job(replace(training(images), model="tiny_net:FlatNet"), tmp_path / "flat").path
    result = prune_job(pruning(source), tmp_path / "pruned")
    plan = secateurs.Plan.load(result.path / "plan-01.json")
    assert [size.text for size in plan.written] == ["16 * 4 * 4"]
    model, before = load(result.path), load(source)
    assert isinstance(model, type(before)) and model(torch.zeros(2, 3, 16, 16)).shape == (2, 3)
    assert 16 * model.features[4].out_channels == model.fc.in_features < 256


def test_zero_epochs_wrap_a_network_as_it_is(images: Path, tmp_path: Path) -> None:
    settings = replace(training(images), recipe=Recipe(epochs=0))
    result = train_job(settings, tmp_path / "run")
    assert result.metrics["before"]["accuracy"] == result.metrics["after"]["accuracy"]
    result = prune_job(pruning(result.path, recipe=Recipe(epochs=0), final_epochs=0), tmp_path / "pruned")
    assert result.metrics["after"]["macs"] < result.metrics["before"]["macs"]


def test_a_failed_proof_stops_the_job(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from secateurs import pruning as engine

    def wrong(model: Any, plan: Any) -> Any:
        smaller = secateurs.apply(model, plan)
        with torch.no_grad():
            next(smaller.parameters()).mul_(1.1)
        return smaller

    monkeypatch.setattr(engine, "apply", wrong)
    with pytest.raises(VerifyError, match="verify failed"):
        prune_job(pruning(trained), tmp_path / "pruned")
    assert not list((tmp_path / "pruned").glob("plan-*.json"))


def test_refusals(trained: Path, images: Path, tmp_path: Path) -> None:
    with pytest.raises(RunError, match="is not empty"):
        train_job(training(images), trained)
    with pytest.raises(RunError, match="does not exist"):
        prune_job(pruning(tmp_path / "nowhere"), tmp_path / "pruned")
    with pytest.raises(DataError, match="nowhere"):
        prune_job(pruning(trained, data=str(tmp_path / "nowhere")), tmp_path / "pruned")
    with pytest.raises(SecateursError, match="unknown criterion 'tailor'; did you mean 'taylor'"):
        prune_job(pruning(trained, criterion="tailor"), tmp_path / "pruned")
    with pytest.raises(BudgetError, match="exactly one of remove and target"):
        pruning(trained, remove=3)
    with pytest.raises(SecateursError, match="unknown selection 'greedi'; did you mean 'greedy'"):
        pruning(trained, selection="greedi")
    with pytest.raises(SecateursError, match="unknown normalization 'men'; did you mean 'mean'"):
        prune_job(pruning(trained, normalization="men"), tmp_path / "pruned")
    with pytest.raises(SecateursError, match=r"skip 'features\.9' matches no group; did you mean 'features"):
        prune_job(pruning(trained, skip=("features.9",)), tmp_path / "pruned")
    with pytest.raises(BudgetError, match="got units=50"):
        pruning(trained, target=("units", 50.0))
    with pytest.raises(BudgetError, match="iterations >= 1"):
        pruning(trained, iterations=0)
    with pytest.raises(SecateursError, match="unknown repair 'reconstuct'; did you mean 'reconstruct'"):
        pruning(trained, repair="reconstuct")
    with pytest.raises(SecateursError, match="unknown pace 'geometrical'; did you mean 'geometric'"):
        pruning(trained, pace="geometrical")
    with pytest.raises(BudgetError, match="one-shot is one iteration, got iterations=2"):
        pruning(trained, pace="one-shot")
    with pytest.raises(BudgetError, match="pace='linear' has no effect: remove=3 is the same"):
        pruning(trained, remove=3, target=None, pace="linear")
    with pytest.raises(SecateursError, match="unknown stopping rule 'accuracy'"):
        pruning(trained, until=("accuracy", 0.1))
    with pytest.raises(BudgetError, match=r"`0 <= accuracy-drop < 1` must hold, got accuracy-drop=1\.0"):
        pruning(trained, until=("accuracy-drop", 1.0))


def test_other_classes_are_refused(trained: Path, images: Path, tmp_path: Path) -> None:
    for place in COUNTS:
        if not place.endswith("owl"):
            (tmp_path / "other" / place).parent.mkdir(exist_ok=True, parents=True)
            (tmp_path / "other" / place).symlink_to(images / place)
    with pytest.raises(DataError, match=r"the model knows the classes .*'owl'.*, but .* has .*'dog'\]"):
        prune_job(pruning(trained, data=str(tmp_path / "other")), tmp_path / "pruned")


def test_a_finished_job_is_not_done_again(trained: Path, tmp_path: Path) -> None:
    first = prune_job(pruning(trained), tmp_path / "pruned")
    seen: list[Event] = []
    again = prune_job(pruning(trained), tmp_path / "pruned", resume=True, observer=seen.append)
    assert again == first
    assert seen == []
    killed_at_the_very_end = Run.resume(tmp_path / "pruned")
    killed_at_the_very_end.save_state(State({"stage": 3}, {}))
    killed_at_the_very_end.release()
    assert prune_job(pruning(trained), tmp_path / "pruned", resume=True) == first
    assert not list((tmp_path / "pruned").glob("state*"))


def test_a_job_is_resumed_with_its_own_settings_alone(trained: Path, tmp_path: Path) -> None:
    prune_job(pruning(trained), tmp_path / "pruned")
    with pytest.raises(
        RunError, match=r"settings\.criterion = 'reconstruction'.* cannot be resumed with 'l1'"
    ):
        prune_job(pruning(trained, criterion="l1"), tmp_path / "pruned", resume=True)
    Run.resume(tmp_path / "pruned").release()  # the refusal has let go of the lock


class Killed(BaseException):
    """Stands for a kill: nothing of ours catches it."""


def interrupted_at(write: int, after: bool, monkeypatch: pytest.MonkeyPatch, job: Callable[[], Any]) -> bool:
    """Run a job until its ``write``-th file is about to be in place, or just is; whether it got there."""
    calls = [0]
    replace_file = os.replace

    def replace_then_die(source: Any, target: Any) -> None:
        calls[0] += 1
        if calls[0] == write and not after:
            raise Killed
        replace_file(source, target)
        if calls[0] == write:
            raise Killed

    with monkeypatch.context() as patched:
        patched.setattr("secateurs.files.os.replace", replace_then_die)
        try:
            job()
        except Killed:
            return True
    return False


@pytest.mark.parametrize("healing", ["distil", "reconstruct"])
def test_healing_by_the_unpruned_network_changes_the_weights_alone(
    trained: Path, tmp_path: Path, healing: str
) -> None:
    usual = pruning(
        trained,
        iterations=1,
        final_epochs=0,
        recipe=replace(FAST, epochs=1),
        repair="none",
        criterion="taylor",
    )
    plain = saved(prune_job(usual, tmp_path / "plain").path)
    recipe = replace(usual.recipe, distill=0.5)
    other = replace(usual, recipe=recipe) if healing == "distil" else replace(usual, repair="reconstruct")
    healed = prune_job(other, tmp_path / "healed")
    assert saved(healed.path)["plan-01.json"] == plain["plan-01.json"]
    assert saved(healed.path)["model.safetensors"] != plain["model.safetensors"]
    assert ("accuracy_repaired" in healed.iterations[0]) == (healing == "reconstruct")


def test_training_from_nothing_has_no_teacher(images: Path) -> None:
    with pytest.raises(TrainingError, match=r"distill must be 0, got 0\.5"):
        replace(training(images), recipe=Recipe(distill=0.5))


@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
def test_stopped_at_any_file_a_job_ends_alike(
    images: Path, trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, after: bool
) -> None:
    recipe = replace(FAST, epochs=1, optimizer="adamw", lr=0.002, distill=0.5, ema=0.9, checkpoint_minutes=0)
    settings = pruning(trained, recipe=recipe, repair_images=20)
    expected = saved(prune_job(settings, tmp_path / "whole").path)
    write = 0
    while True:
        write += 1
        out = tmp_path / f"at-{write}"
        if not interrupted_at(write, after, monkeypatch, lambda out=out: prune_job(settings, out)):
            break
        result = prune_job(settings, out, resume=True)
        assert saved(result.path) == expected, write
        assert {p.name for p in out.iterdir()} == {p.name for p in (tmp_path / "whole").iterdir()}, write
        assert [row["removed"] for row in result.iterations] == [
            row["removed"] for row in Run(tmp_path / "whole").table()
        ]
        if not os.environ.get("SECATEURS_ALL_STOPS"):
            write += 3  # `SECATEURS_ALL_STOPS=1 make test` stops at every file, `make test` at every fourth
    assert write > 15


def test_training_stopped_at_any_file_ends_alike(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = saved(train_job(training(images), tmp_path / "whole").path)
    write = 1
    while True:
        out = tmp_path / f"at-{write}"
        if not interrupted_at(write, True, monkeypatch, lambda out=out: train_job(training(images), out)):
            break
        assert saved(train_job(training(images), out, resume=True).path) == expected
        write += 2
    assert write > 8


def command(source: Path, out: Path) -> list[str]:
    options = ["--target", "macs=0.2", "--iterations", "3", "--finetune-epochs", "3", "--final-epochs", "4"]
    main = "from secateurs.cli import main; main()"
    return [
        *(sys.executable, "-c", main, "prune", str(source), *options),
        *("--lr", "0.05", "--threads", "1", "--out", str(out), "--resume"),
    ]


def killed_and_resumed(source: Path, out: Path, kills: int, chance: random.Random) -> int:
    """Run a job in a process of its own, killed so many times at random moments; how often it was hit."""
    places = [str(Path(secateurs.__file__).parents[1]), str(Path(__file__).parent)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(places)}
    hits = 0
    for _ in range(kills):
        events = out / "events.jsonl"
        length = events.stat().st_size if events.exists() else 0
        with subprocess.Popen(
            command(source, out), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=environment
        ) as job:
            lines = chance.randrange(0, 4)
            started = time.monotonic()
            while job.poll() is None and time.monotonic() - started < 60:
                grown = events.read_bytes()[length:].count(b"\n") if events.exists() else 0
                if grown > lines:
                    break
                time.sleep(0.001)
            time.sleep(chance.random() * 0.03)
            if job.poll() is None:
                job.send_signal(signal.SIGKILL)
                hits += 1
            job.wait()
    subprocess.run(command(source, out), check=True, stdout=subprocess.DEVNULL, env=environment)
    return hits


@pytest.mark.parametrize("kills", [3, pytest.param(10, marks=pytest.mark.slow)])
def test_killed_at_random_a_job_ends_alike(
    trained: Path, tmp_path: Path, kills: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = pruning(
        trained,
        target=("macs", 0.2),
        iterations=3,
        final_epochs=4,
        recipe=Recipe(epochs=3, lr=0.05),
    )
    whole = prune_job(settings, tmp_path / "whole")
    chance = random.Random(kills)
    assert killed_and_resumed(trained, tmp_path / "killed", kills, chance) > 0
    assert saved(tmp_path / "killed") == saved(whole.path)
    killed = Run(tmp_path / "killed")
    assert killed.is_finished
    assert not [path for path in killed.path.iterdir() if path.name.startswith((".tmp-", "state"))]
    assert {"before", "after"} == killed.metrics().keys()
    image = torch.randn(2, 3, 16, 16)
    assert torch.equal(load(killed.path)(image), load(whole.path)(image))
    assert "finished" in [event["event"] for event in killed.events()]
