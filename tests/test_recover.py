"""Cuts that are undone, trainings that go wrong, and healing a finished run later."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import test_jobs
from secateurs.errors import RunError, TrainingError, TrainingStoppedError
from secateurs.jobs import RecoverSettings, prune_job, recover_job
from secateurs.measure import accuracy
from secateurs.progress import Event
from secateurs.recovery import Recipe, repair
from secateurs.runs import Run, load
from test_jobs import FAST, interrupted_at, pruning, saved

pytestmark = pytest.mark.usefixtures("no_pictures")
images, trained, no_pictures = test_jobs.images, test_jobs.trained, test_jobs.no_pictures
NOT_TRAINED = replace(FAST, epochs=0)


@pytest.fixture(scope="module")
def pruned(trained: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Cut in two rounds, neither repaired nor trained."""
    settings = pruning(trained, recipe=NOT_TRAINED, final_epochs=0, repair="none")
    return prune_job(settings, tmp_path_factory.mktemp("runs") / "pruned").path


def until(monkeypatch: pytest.MonkeyPatch, accuracies: list[float]) -> None:
    """Each fine-tune ends with the next of these accuracies."""
    from secateurs.jobs import prune
    from secateurs.recovery import Epoch, History

    rest = iter(accuracies)

    def finetune(*_: Any, **__: Any) -> History:
        return History(start=Epoch(number=0, loss=None, score=next(rest), val_loss=None, seconds=0.0))

    monkeypatch.setattr(prune, "finetune", finetune)


def test_the_cut_that_costs_too_much_is_undone_and_is_the_last(
    trained: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    first = Run(trained).metrics()["after"]["val_accuracy"]
    rule = ("accuracy-drop", 0.1)
    settings = pruning(trained, iterations=4, final_epochs=0, until=rule, repair="none")
    until(monkeypatch, [first - 0.05, first - 0.1, first - 0.11, first])
    seen: list[Event] = []
    result = prune_job(settings, tmp_path / "pruned", observer=seen.append)
    assert [row.get("undone", False) for row in result.iterations] == [False, False, True]
    assert len(Run(result.path).plans()) == 2
    (stopped,) = (event.facts for event in seen if event.name == "stopped")
    assert stopped["cuts"] == 2 and "cut 3 leaves a validation accuracy" in stopped["why"]
    after = result.metrics["after"]
    assert after["stopped"] == stopped["why"]
    assert after["macs"] == result.iterations[1]["macs"]
    assert after["val_accuracy"] == pytest.approx(first - 0.1)
    assert not list(result.path.glob("*good*"))
    image = torch.randn(2, 3, 16, 16)
    assert load(result.path)(image).shape == (2, 3)


def test_what_is_kept_is_the_model_of_the_last_good_cut(trained: Path, tmp_path: Path) -> None:
    """With a drop that nothing reaches but the last cut, against the same job with fewer rounds to go."""
    settings = pruning(trained, remove=6, target=None, iterations=3, final_epochs=0, recipe=NOT_TRAINED)
    free = prune_job(replace(settings, repair="none"), tmp_path / "free")
    scores = [row["accuracy_tuned"] for row in free.iterations]
    first = free.metrics["before"]["val_accuracy"]
    last_good = next((n for n, score in enumerate(scores) if score < first - 0.05), len(scores))
    rule = ("accuracy-drop", 0.05)
    kept = prune_job(replace(settings, repair="none", until=rule), tmp_path / "kept")
    plans = Run(kept.path).plans()
    assert len(plans) == last_good
    assert plans == Run(free.path).plans()[:last_good]
    if last_good == 0:
        assert saved(kept.path)["model.safetensors"][-64:] == saved(trained)["model.safetensors"][-64:]


@pytest.mark.parametrize("final", [0, 1])
def test_a_fine_tune_that_goes_wrong_leaves_a_finished_run(trained: Path, tmp_path: Path, final: int) -> None:
    wild = Recipe(epochs=2, lr=1e30)
    settings = pruning(trained, recipe=wild, final_epochs=final)
    seen: list[Event] = []
    with pytest.raises(TrainingStoppedError, match=r"the loss became .*keeps the best weights"):
        prune_job(settings, tmp_path / "pruned", observer=seen.append)
    run = Run(tmp_path / "pruned")
    assert run.is_finished and len(run.plans()) == 1
    (row,) = run.table()
    assert row["accuracy_tuned"] == row["accuracy_repaired"]  # what the repair had left
    assert "the loss became" in run.metrics()["after"]["stopped"]
    assert all(bool(tensor.isfinite().all()) for tensor in run.model().state_dict().values())
    assert [event.name for event in seen][-3:] == ["healed", "doing", "finished"]
    again = prune_job(settings, tmp_path / "pruned", resume=True)
    assert again.metrics == run.metrics()


def test_recovering_later_is_repairing_from_the_network_before_all_cuts(
    trained: Path,
    pruned: Path,
    tmp_path: Path,
) -> None:
    settings = RecoverSettings(source=str(pruned), recipe=NOT_TRAINED, threads=1)
    seen: list[Event] = []
    result = recover_job(settings, tmp_path / "healed", observer=seen.append)
    first, second = Run(pruned).plans()
    assert Run(result.path).plans() == [first, second]

    from secateurs.jobs.workplace import Job, data_of

    source = data_of(Run(trained)).load()
    job = Job(Run(pruned), source, settings, lambda _: None)
    whole, small = load(trained), load(pruned)
    before = accuracy(small, job.validation_batches()).top1
    repair(whole, small, first.then(second), job.ranking_batches(None))
    found = accuracy(small, job.validation_batches()).top1
    told = next(event.facts for event in seen if event.name == "repaired")
    assert told["accuracy_before"] == before
    assert told["repair_kept"] == (found >= before)
    assert result.metrics["after"]["val_accuracy"] == max(found, before)
    expected = small if found >= before else load(pruned)
    for name, tensor in load(result.path).state_dict().items():
        torch.testing.assert_close(tensor, expected.state_dict()[name])


def test_a_recovered_run_can_be_recovered_again(trained: Path, pruned: Path, tmp_path: Path) -> None:
    settings = RecoverSettings(source=str(pruned), recipe=NOT_TRAINED, repair="batch-norm", threads=1)
    first = recover_job(settings, tmp_path / "first")
    recipe = replace(FAST, epochs=1, distill=0.5, distill_features=0.1)
    second = recover_job(replace(settings, source=str(first.path), recipe=recipe), tmp_path / "second")
    assert Run(second.path).config["settings"]["original"] == str(trained.resolve())
    assert second.metrics["before"]["val_accuracy"] == first.metrics["after"]["val_accuracy"]


@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
def test_recovering_stopped_at_any_file_ends_alike(
    pruned: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, after: bool
) -> None:
    recipe = replace(FAST, epochs=1, distill=0.5, checkpoint_minutes=0)
    settings = RecoverSettings(source=str(pruned), recipe=recipe, threads=1)
    expected = saved(recover_job(settings, tmp_path / "whole").path)
    write = 1
    while True:
        out = tmp_path / f"at-{write}"
        if not interrupted_at(write, after, monkeypatch, lambda out=out: recover_job(settings, out)):
            break
        assert saved(recover_job(settings, out, resume=True).path) == expected, write
        write += 3
    assert write > 6


def test_a_teacher_without_epochs_is_refused(pruned: Path, tmp_path: Path) -> None:
    settings = RecoverSettings(source=str(pruned), recipe=replace(NOT_TRAINED, distill=0.7), threads=1)
    with pytest.raises(TrainingError, match=r"distill=0.7, .* has no effect without a fine-tune") as caught:
        recover_job(settings, tmp_path / "recovered")
    assert caught.value.fix == "--epochs 5" and not (tmp_path / "recovered").exists()


def test_a_repair_that_costs_accuracy_is_not_kept(
    pruned: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from secateurs.jobs import healing
    from secateurs.recovery import Repair

    def ruin(whole: Any, smaller: Any, *_: Any, **__: Any) -> Repair:
        for parameter in smaller.parameters():
            parameter.data.zero_()
        return Repair(how="reconstruct")

    monkeypatch.setattr(healing, "repair", ruin)
    monkeypatch.setattr(healing, "top1", lambda *_: {"accuracy": 0.0})
    settings = RecoverSettings(source=str(pruned), recipe=NOT_TRAINED, threads=1)
    result = recover_job(settings, tmp_path / "healed")
    assert result.metrics["after"]["repair_kept"] is False
    for name, tensor in load(result.path).state_dict().items():
        assert torch.equal(tensor, load(pruned).state_dict()[name])


def test_what_cannot_be_recovered_is_said(trained: Path, pruned: Path, tmp_path: Path) -> None:
    settings = RecoverSettings(source=str(pruned), recipe=NOT_TRAINED)
    with pytest.raises(RunError, match="is of secateurs train, which cuts nothing to recover from"):
        recover_job(replace(settings, source=str(trained)), tmp_path / "out")
    with pytest.raises(RunError, match=r"was pruned from .*, which does not exist"):
        recover_job(replace(settings, original=str(tmp_path / "gone")), tmp_path / "out")
    with pytest.raises(RunError, match="has lost no units since"):
        recover_job(replace(settings, original=str(pruned)), tmp_path / "out")
    with pytest.raises(RunError, match=r"repair_images >= 1` must hold, got repair_images=0"):
        replace(settings, repair_images=0)
    with pytest.raises(TrainingError, match="must hold, got lr=-1"):
        replace(settings, recipe=Recipe(lr=-1))
    assert not (tmp_path / "out").exists()
    config = json.loads((pruned / "config.json").read_text())
    assert config["settings"]["repair"] == "none"
