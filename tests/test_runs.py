"""Run directories: whole files, refusals, locks, and models that come back to the bit."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import secateurs
from secateurs import files
from secateurs.errors import RunError
from secateurs.progress import Event, State
from secateurs.runs import Run, load
from tiny_net import SharedWeights, TinyNet


def config(factory: str = "TinyNet") -> dict[str, object]:
    architecture = {"name": f"tiny_net:{factory}", "num_classes": 2, "head": "keep", "input_size": [3, 8, 8]}
    return {"command": "prune", "architecture": architecture}


def pruned_run(path: Path, cuts: int = 2) -> tuple[nn.Module, Run]:
    """A finished run with some cuts, and the model that it holds."""
    run = Run.start(path, config())
    model: nn.Module = TinyNet().eval()
    for number in range(1, cuts + 1):
        graph = secateurs.trace(model, torch.zeros(1, 3, 8, 8))
        plan = secateurs.plan(graph, secateurs.score(model, graph, "l1"), secateurs.Remove(5))
        run.save_plan(number, plan)
        model = secateurs.apply(model, plan)
    run.save_model(model, cuts)
    run.save_metrics({"params": 2}, {"params": 1})
    run.release()
    return model, run


@pytest.mark.parametrize("cuts", [0, 1, 2])
def test_a_loaded_model_gives_the_same_bits(tmp_path: Path, cuts: int) -> None:
    model, run = pruned_run(tmp_path / "run", cuts)
    images = torch.randn(3, 3, 8, 8)
    before = torch.get_rng_state()
    loaded = load(run.path)
    assert torch.equal(torch.get_rng_state(), before)
    assert not loaded.training
    assert type(loaded) is TinyNet
    assert torch.equal(loaded(images), model(images))


def test_shared_weights_are_saved(tmp_path: Path) -> None:
    run = Run.start(tmp_path / "run", config("SharedWeights"))
    model = SharedWeights().eval()
    run.save_model(model, 0)
    run.release()
    images = torch.randn(2, 3, 8, 8)
    assert torch.equal(load(run.path)(images), model(images))


def test_the_configuration_says_what_the_numbers_depend_on(tmp_path: Path) -> None:
    run = Run.start(tmp_path / "run", config())
    written = json.loads((run.path / "config.json").read_text())
    assert written["versions"]["torch"] == torch.__version__.partition("+")[0]
    assert written["machine"]["cores"] == os.cpu_count()
    assert written["threads"] == torch.get_num_threads()
    run.release()


def test_a_directory_with_anything_in_it_is_refused(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("x")
    with pytest.raises(RunError, match=r"is not empty: it holds thesis\.tex"):
        Run.start(tmp_path, config())
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_folders_beside_are_allowed_by_name(tmp_path: Path) -> None:
    (tmp_path / "trained").mkdir()
    Run.start(tmp_path, config(), beside=("trained",)).release()
    assert Run(tmp_path).config["command"] == "prune"


def test_what_a_job_killed_at_its_start_leaves_is_no_obstacle(tmp_path: Path) -> None:
    (tmp_path / ".lock").write_text("1234")
    (tmp_path / ".tmp-1234-config.json").write_text('{"form')
    Run.start(tmp_path, config()).release()
    assert not list(tmp_path.glob(".tmp-*"))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        ("missing", "does not exist"),
        ("empty", "is not a run directory"),
        ("foreign json", "has format None"),
        ("not json", "cannot be read as JSON"),
        ("a list", "must hold a JSON object, but holds a list"),
        ("no architecture", "names no architecture"),
        ("unfinished", r"has no model\.safetensors: its job is not finished"),
        ("torn model", "is damaged"),
        ("other weights", "does not fit the model"),
        ("foreign weights", "was not written by Secateurs"),
        ("plan gone", r"plan-02\.json is missing, one of 2 plans"),
        ("torn plan", r"plan-01\.json is not a plan"),
        ("plans swapped", r"plan-01\.json does not fit"),
    ],
)
def test_a_damaged_run_is_one_clear_sentence(tmp_path: Path, damage: str, message: str) -> None:
    place = tmp_path / "run"
    if damage == "empty":
        place.mkdir()
    elif damage != "missing":
        _, run = pruned_run(place)
        spoil(run.path, damage)
    with pytest.raises(RunError, match=message) as caught:
        load(place)
    assert "\n" not in caught.value.message


def spoil(path: Path, damage: str) -> None:
    config_file, model, first, second = (
        path / name for name in ("config.json", "model.safetensors", "plan-01.json", "plan-02.json")
    )
    if damage == "foreign json":
        config_file.write_text('{"name": "someone else\'s"}')
    elif damage == "not json":
        config_file.write_text("{")
    elif damage == "a list":
        config_file.write_text("[]")
    elif damage == "no architecture":
        config_file.write_text('{"format": 1}')
    elif damage == "unfinished":
        model.unlink()
    elif damage == "torn model":
        os.truncate(model, model.stat().st_size // 2)
    elif damage == "other weights":
        files.write_tensors(model, TinyNet().state_dict(), {"secateurs": '{"plans": 2}'})
    elif damage == "foreign weights":
        files.write_tensors(model, TinyNet().state_dict(), {})
    elif damage == "plan gone":
        second.unlink()
    elif damage == "torn plan":
        os.truncate(first, 40)
    elif damage == "plans swapped":
        first.write_text(second.read_text())


def test_nothing_is_pickled(tmp_path: Path) -> None:
    _, run = pruned_run(tmp_path / "run")
    assert {path.suffix for path in run.path.iterdir()} <= {".json", ".jsonl", ".safetensors", ".png", ""}


def test_events_are_lines_and_a_torn_one_is_left_out(tmp_path: Path) -> None:
    run = Run.start(tmp_path / "run", config())
    run.log(Event("epoch", {"loss": 0.5}))
    run.log(Event("cut", {"removed": 3}))
    run.release()
    with (run.path / "events.jsonl").open("a") as file:
        file.write('{"event": "epo')
    assert [event["event"] for event in run.events()] == ["epoch", "cut"]
    again = Run.resume(run.path)
    again.log(Event("resumed"))
    again.release()
    assert [event["event"] for event in again.events()] == ["epoch", "cut", "resumed"]


def test_a_line_in_the_middle_that_is_no_json_is_damage(tmp_path: Path) -> None:
    run = Run.start(tmp_path / "run", config())
    (run.path / "events.jsonl").write_text('{"a": 1}\nhello\n{"a": 2}\n')
    with pytest.raises(RunError, match="a line that is not JSON"):
        run.events()
    run.release()


def test_a_state_is_replaced_as_a_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = Run.start(tmp_path / "run", config())
    assert run.load_state() is None
    run.save_state(State({"epoch": 1}, {"w": torch.ones(2)}))
    for failing in (1, 2):  # the write of the tensors, then that of the JSON
        calls = [0]

        def replace(source: Path, target: Path, calls: list[int] = calls, failing: int = failing) -> None:
            calls[0] += 1
            if calls[0] == failing:
                raise KeyboardInterrupt
            os.rename(source, target)

        with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
            patched.setattr("secateurs.files.os.replace", replace)
            run.save_state(State({"epoch": 2}, {"w": torch.zeros(2)}))
        state = run.load_state()
        assert state is not None
        assert state.facts == {"epoch": 1}
        assert torch.equal(state.tensors["w"], torch.ones(2))
    run.save_state(State({"epoch": 2}, {"w": torch.zeros(2)}))
    assert len(list(run.path.glob("state-*.safetensors"))) == 1
    run.drop_state()
    assert run.load_state() is None
    assert not list(run.path.glob("state*"))
    run.release()


def test_a_full_disk_is_said_and_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "metrics.json"
    files.write_json(target, {"a": 1})

    def no_space(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("secateurs.files.os.fsync", no_space)
    with pytest.raises(RunError, match="cannot be written: No space left on device"):
        files.write_json(target, {"a": 2})
    assert json.loads(target.read_text()) == {"a": 1}
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.json"]


def test_numbers_that_json_lacks_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="not JSON compliant"):
        files.write_json(tmp_path / "x.json", {"loss": float("nan")})
    assert not list(tmp_path.iterdir())


def test_two_jobs_do_not_write_to_one_run(tmp_path: Path) -> None:
    run = Run.start(tmp_path / "run", config())
    with pytest.raises(RunError, match="another job"):
        Run.resume(run.path)
    run.release()
    Run.resume(run.path).release()


def test_the_lock_holds_between_processes_and_ends_with_one(tmp_path: Path) -> None:
    Run.start(tmp_path / "run", config()).release()
    code = (
        "import sys, time; from pathlib import Path; from secateurs.locks import Lock;"
        f"Lock(Path({str(tmp_path / 'run' / '.lock')!r})); print('held', flush=True); time.sleep(60)"
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(secateurs.__file__).parents[1])}
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, env=environment) as other:
        assert other.stdout is not None
        other.stdout.readline()
        with pytest.raises(RunError, match=rf"another job \(process {other.pid}\) is writing"):
            Run.resume(tmp_path / "run")
        other.kill()
        other.wait()
    Run.resume(tmp_path / "run").release()


def test_unwritable_places_are_said(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(RunError, match="cannot be made"):
        Run.start(tmp_path / "file" / "run", config())
