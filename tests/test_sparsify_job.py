"""Training for sparsity as a job and as a command: what the run holds, and that it goes on after a kill."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import secateurs
from secateurs.errors import RunError, SecateursError, TrainingError, UnknownNameError
from secateurs.jobs import SparsifySettings, prune_job, sparsify_job
from secateurs.recovery import Recipe
from secateurs.runs import Run, load
from test_cli import TINY, run, train_tiny
from test_jobs import FAST, images, interrupted_at, no_pictures, pruning, saved, trained

__all__ = ["images", "no_pictures", "trained"]  # fixtures

pytestmark = pytest.mark.usefixtures("no_pictures")


def sparsifying(source: Path, **changes: Any) -> SparsifySettings:
    usual: dict[str, Any] = {"method": "sfp", "options": {"rate": 0.5}, "recipe": FAST}
    return SparsifySettings(source=str(source), threads=1, **{**usual, **changes})


def test_the_run_holds_a_model_of_the_same_shape_and_says_what_fits(trained: Path, tmp_path: Path) -> None:
    result = sparsify_job(sparsifying(trained), tmp_path / "sparse")
    names = {path.name for path in result.path.iterdir()} - {".lock"}
    assert names == {"config.json", "events.jsonl", "metrics.json", "model.safetensors"}
    before, after = load(trained).state_dict(), load(result.path).state_dict()
    assert {name: value.shape for name, value in before.items()} == {
        name: value.shape for name, value in after.items()
    }
    made = Run(result.path)
    assert made.config["prune"] == {"criterion": "l2", "scope": "local", "rate": 0.5}
    epochs = [event for event in made.events() if event["event"] == "epoch"]
    assert [event["zeroed"] for event in epochs] == [14, 14]
    assert result.metrics["after"]["params"] == result.metrics["before"]["params"]


def test_what_is_zero_is_what_prune_cuts(trained: Path, tmp_path: Path) -> None:
    sparse = sparsify_job(sparsifying(trained), tmp_path / "sparse").path
    settings = pruning(sparse, target=("units", 0.5), criterion="l2", scope="local", iterations=1)
    pruned = prune_job(settings, tmp_path / "pruned")
    model = load(sparse)
    (plan,) = Run(pruned.path).plans()
    assert [len(group.removed) for group in plan.groups] == [6, 8]
    for group in plan.groups:
        filters = model.get_parameter(f"{group.name}.weight").flatten(1)
        assert (filters == 0).all(1).nonzero().flatten().tolist() == list(group.removed)


def test_the_norms_behind_zeros_hold_what_they_see(trained: Path, tmp_path: Path) -> None:
    """A filter of zeros gives its bias everywhere; the statistics of before would shift it."""
    result = sparsify_job(sparsifying(trained), tmp_path / "sparse")
    model = load(result.path)
    modules = dict(model.named_modules())
    norms = [name for name, module in modules.items() if isinstance(module, nn.BatchNorm2d)]
    convs = [name for name, module in modules.items() if isinstance(module, nn.Conv2d)]
    assert norms
    for norm, conv in ((modules[a], modules[b]) for a, b in zip(norms, convs, strict=True)):
        zero = ~conv.weight.flatten(1).any(1)
        bias = torch.zeros(len(zero)) if conv.bias is None else conv.bias
        torch.testing.assert_close(norm.running_mean[zero], bias[zero])
        assert norm.running_var[zero].max() < 1e-6
        assert norm.running_var[~zero].min() > 1e-6


def test_a_pruned_run_can_be_trained_for_sparsity_too(trained: Path, tmp_path: Path) -> None:
    pruned = prune_job(pruning(trained, iterations=1, final_epochs=0), tmp_path / "pruned").path
    sparse = sparsify_job(sparsifying(pruned), tmp_path / "sparse").path
    assert Run(sparse).plans() == Run(pruned).plans()
    image = torch.zeros(1, 3, 16, 16)
    assert (
        secateurs.trace(load(sparse), image).fingerprint == secateurs.trace(load(pruned), image).fingerprint
    )


@pytest.mark.parametrize("method", ["growing", "fpgm"])
def test_stopped_at_any_file_it_ends_alike(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    settings = sparsifying(trained, method=method, options={}, recipe=replace(FAST, epochs=3))
    expected = saved(sparsify_job(settings, tmp_path / "whole").path)
    write = 2
    while True:
        out = tmp_path / f"at-{write}"
        if not interrupted_at(write, True, monkeypatch, lambda out=out: sparsify_job(settings, out)):
            break
        assert saved(sparsify_job(settings, out, resume=True).path) == expected, write
        write += 3
    assert write > 8


def test_it_is_resumed_with_its_own_settings_alone(trained: Path, tmp_path: Path) -> None:
    first = sparsify_job(sparsifying(trained), tmp_path / "sparse")
    assert sparsify_job(sparsifying(trained), tmp_path / "sparse", resume=True) == first
    with pytest.raises(RunError, match=r"settings\.options = \{'rate': 0\.5\}.* cannot be resumed"):
        sparsify_job(sparsifying(trained, options={"rate": 0.3}), tmp_path / "sparse", resume=True)


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        ({"method": "sft"}, UnknownNameError, "did you mean 'sfp'"),
        ({"options": {"strength": 1.0}}, TrainingError, r"sfp has no option strength, got strength=1\.0"),
        ({"options": {"rate": 1.5}}, TrainingError, r"`0 < rate < 1` must hold, got rate=1\.5"),
        ({"recipe": Recipe(epochs=0)}, TrainingError, "`1 <= epochs` must hold, got epochs=0"),
        ({"recipe": Recipe(distill=0.5)}, TrainingError, r"distill must be 0, got 0\.5"),
        ({"skip": ("*",)}, SecateursError, "no group is left to cut"),
    ],
)
def test_bad_settings_are_met_before_there_is_a_directory(
    trained: Path, tmp_path: Path, changes: dict[str, Any], error: type[Exception], words: str
) -> None:
    with pytest.raises(error, match=words):
        sparsify_job(sparsifying(trained, **changes), tmp_path / "sparse")
    assert not (tmp_path / "sparse").exists()


def test_the_command_ends_with_the_one_that_cuts(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    train_tiny(images)
    result = run("sparsify", "trained", "--method", "sfp", "--rate", 0.5, "--epochs", 2, *TINY[-2:])
    assert result.exit_code == 0, result.output
    assert "14 units zero, 0 grew" in result.output
    *_, place, following = result.output.splitlines()
    assert place == "run directory: trained-sparse"
    assert following == (
        "next: secateurs prune trained-sparse --iterations 1 --criterion l2 --scope local --target units=0.5"
    )
    cut = run(*following.split()[2:], "--finetune-epochs", 0, "--final-epochs", 0, *TINY[-2:])
    assert cut.exit_code == 0, cut.output
    assert "14 units leave" in cut.output
    lasso = run("sparsify", "trained", "--strength", 0.01, "--epochs", 1, *TINY[-2:], "--out", "lasso")
    assert "penalty" in lasso.output and "--target macs=0.5" in lasso.output
    wrong = run("sparsify", "trained", "--method", "slim")
    assert wrong.exit_code == 2
    assert "did you mean 'slimming'" in wrong.stderr
