"""The commands: what they print, how they exit, and that mistakes are met without a traceback."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner, Result

import secateurs
import tiny_net
from secateurs.cli import app, text
from secateurs.cli.display import Display
from secateurs.progress import Event
from secateurs.runs import load

TINY = ["--model", "tiny_net:TinyNet", "--image-size", "16", "--threads", "1"]


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def images(make_folder: Callable[..., Path]) -> Path:
    return make_folder({"train/cat": 10, "train/dog": 10, "test/cat": 3, "test/dog": 3})


def run(*arguments: object) -> Result:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result


def train_tiny(images: Path, out: str = "trained") -> Path:
    result = run("train", "--data", images, *TINY, "--epochs", 1, "--out", out)
    assert result.exit_code == 0, result.output
    return Path(out)


def test_without_more_words_a_target_is_one_cut_and_its_repair(images: Path) -> None:
    train_tiny(images)
    result = run("prune", "trained", "--target", "macs=0.5", "--threads", 1)
    assert result.exit_code == 0, result.output
    assert "cut 1/1: " in result.output and "after the repair" in result.output
    assert "epoch" not in result.output.partition("next: ")[0]
    assert "next: secateurs recover trained-pruned --epochs 1 --distill 0.7" in result.output
    asked = json.loads(Path("trained-pruned/config.json").read_text())["settings"]
    assert (asked["criterion"], asked["allocation"], asked["recipe"]["epochs"]) == (
        "reconstruction",
        "error",
        0,
    )
    again = run("recover", "trained-pruned", "--epochs", 1, "--distill", 0.7, "--threads", 1)
    assert again.exit_code == 0 and "epoch 1/1" in again.output, again.output


@pytest.mark.parametrize("command", [["prune", "trained", "--target", "macs=0.5"], ["recover", "trained"]])
def test_a_teacher_with_nothing_to_teach_is_refused(command: list[str]) -> None:
    result = run(*command, "--distill", 0.7)
    assert result.exit_code == 2 and "distill=0.7 has no effect: nothing is trained" in result.output
    assert "epochs 1" in result.output


def test_the_whole_way(images: Path) -> None:
    first = run("train", "--data", images, *TINY, "--epochs", 2)
    assert first.exit_code == 0
    assert "epoch 2/2" in first.output
    assert "next: secateurs prune runs/train-TinyNet --target macs=0.3" in first.output
    second = run(
        *("prune", "runs/train-TinyNet", "--remove", 4, "--iterations", 2),
        *("--finetune-epochs", 1, "--final-epochs", 2, "--threads", 1),
    )
    assert second.exit_code == 0, second.output
    lines = second.output.splitlines()
    assert sum("4 units leave" in line for line in lines) == 2
    assert sum(line.strip().startswith("verified:") for line in lines) == 2
    for part in ("test accuracy", "parameters", "MACs", "file size", "CPU time an image, 1 thread"):
        assert any(line.startswith(part) for line in lines), part
    assert any(line.split()[:2] == ["features.0", "12"] for line in lines)
    assert "fine-tune 2/2, epoch 1/1" in second.output
    assert "last fine-tune, epoch 2/2" in second.output
    assert lines[-1] == "run directory: runs/train-TinyNet-pruned"
    assert "\x1b" not in second.output
    third = run("bench", "runs/train-TinyNet", "runs/train-TinyNet-pruned", "--json", "--threads", 1)
    facts = json.loads(third.output)
    metrics = json.loads(Path("runs/train-TinyNet-pruned/metrics.json").read_text())
    assert facts["models"][1]["params"] == metrics["after"]["params"]
    assert facts["ratio"]["macs"] > 1
    fourth = run("inspect", "runs/train-TinyNet-pruned", "--json")
    assert json.loads(fourth.output)["params"] == metrics["after"]["params"]


@pytest.mark.parametrize(
    ("epochs", "best", "told"),
    [(0, 0, ""), (2, 1, "after the fine-tune (epoch 1 of 2 kept: the best validation)")],
)
def test_a_fine_tune_is_told_where_there_was_one(
    epochs: int, best: int, told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    facts = {"epochs_trained": epochs, "kept_epoch": best, "accuracy_tuned": 0.5}
    facts["kept"] = f"epoch {best} of {epochs} kept: the best validation"
    with Display() as display:
        display(Event("healed", facts))
    printed = capsys.readouterr().out
    assert told in printed and bool(printed.strip()) is bool(epochs)


def test_inspect_says_what_is_locked_and_why() -> None:
    result = run("inspect", "tiny_net:TinyNet", "--classes", 2, "--input-size", "3x16x16")
    assert result.exit_code == 0
    assert "2 groups of 28 units" in result.output
    assert "fc.weight dimension 0" in result.output
    facts = json.loads(
        run("inspect", "tiny_net:TinyNet", "--classes", 2, "--input-size", "3x16x16", "--json").output
    )
    group = facts["groups"][0]
    assert group["kind"] == "channel"
    assert {part["role"] for part in group["slices"]} == {"producer", "carrier", "consumer"}
    assert all(lock["reason"] for lock in facts["locked"])


def test_inspect_names_every_locked_dimension_and_what_is_tied_with_the_line_of_source() -> None:
    arguments = ("inspect", "tiny_net:TangledNet", "--classes", 2, "--input-size", "3x8x8")
    printed = run(*arguments).output
    facts = json.loads(run(*arguments, "--json").output)
    lines = Path(tiny_net.__file__).read_text().splitlines()

    def line(words: str) -> str:
        return f"tiny_net.py:{1 + next(n for n, text in enumerate(lines) if words in text)} in forward"

    by_double = {f"{each['parameter']}:{each['dim']}": each for each in facts["locked"]}
    for place in ("first.weight:0", "first.bias:0", "second.weight:1"):
        assert by_double[place]["reason"] == "secateurs_tests.double.default has no rule"
        assert by_double[place]["source"] == line("double(self.first(x))")
    assert facts["unknown"] == {"secateurs_tests.double.default": line("double(self.first(x))")}
    assert f"secateurs_tests.double.default has no rule ({line('double(self.first(x))')}):" in printed
    for lock in facts["locked"]:
        assert f"{lock['parameter']} dimension {lock['dim']}" in printed
        assert lock["reason"] in printed and lock["source"] in printed
    (tied,) = facts["tied"]
    assert tied["reason"] == "(a length of 8 // heads) where a length of 4 is expected"
    assert tied["groups"] == ["second", "second#2", "query"]
    assert tied["source"] == line("layer(x).unflatten").replace("forward", "<genexpr>")
    assert "counts that forward derives from one another:" in printed and tied["reason"] in printed
    (condition,) = (each for each in facts["conditions"] if each["reason"] == "a length of 8 == 3")
    assert (condition["outcome"], condition["source"]) == (False, line("if width != 3"))
    assert f"a length of 8 == 3 ({condition['source']}):" in printed


def test_inspect_lists_sizes_that_attributes_may_take_the_place_of() -> None:
    arguments = ("inspect", "tiny_net:FlatNet", "--classes", 2, "--input-size", "3x16x16")
    (size,) = json.loads(run(*arguments, "--json").output)["written"]
    assert size["reason"] == "'16 * 4 * 4' in the code" and size["groups"] == ["features.4"]
    assert f"{size['reason']} ({size['source']}):" in run(*arguments).output


def test_bench_prints_a_table() -> None:
    result = run(
        *("bench", "tiny_net:TinyNet", "tiny_net:TinyNet", "--classes", 2, "--input-size", "3x8x8"),
        *("--threads", 1),
    )
    assert result.exit_code == 0
    assert "parameters" in result.output
    assert "same" in result.output


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["prune", "nowhere", "--remove", 5], 2, "fix: name the run directory"),
        (["prune", "empty", "--remove", 5], 2, "empty is not a run directory"),
        (["prune", "trained"], 2, "say how much is to leave"),
        (["prune", "trained", "--remove", 5, "--target", "macs=0.5"], 2, "exactly one of remove and target"),
        (["prune", "trained", "--target", "macs=50"], 2, "got macs=50"),
        (["prune", "trained", "--target", "flops=0.5"], 2, "got flops=0.5"),
        (["prune", "trained", "--shares", "half"], 2, "shares are patterns with what remains, got 'half'"),
        (["prune", "trained", "--remove", 5, "--min-units", "few"], 2, "a share, got 'few'"),
        (["prune", "trained", "--remove", 5, "--selection", "gredy"], 2, "did you mean 'greedy'"),
        (["prune", "trained", "--target", "half"], 2, "--target is a name and a share, got 'half'"),
        (["prune", "trained", "--target", "latency=20min"], 2, "'min' is no unit of latency"),
        (["prune", "trained", "--target", "macs=3MB"], 2, "'MB' is no unit of macs"),
        (["prune", "trained", "--target", "latency=20"], 2, "or a number with its unit; got latency=20"),
        (["prune", "trained", "--target", "units=20k"], 2, "a share in (0, 1], or at most"),
        (["prune", "trained", "--remove", 5, "--criterion", "tailor"], 2, "did you mean 'taylor'"),
        (["prune", "trained", "--remove", 5, "--scope", "galactic"], 2, "scope is 'global' or 'local'"),
        (["prune", "trained", "--remove", 5, "--data", "nowhere"], 2, "nowhere"),
        (["prune", "trained", "--remove", 5, "--out", "full"], 2, "is not empty: it holds thesis.tex"),
        (["prune", "trained", "--remove", 5, "--lr", "-1"], 2, "got lr=-1.0"),
        (
            ["prune", "trained", "--remove", 5, "--distill", 1.5],
            2,
            "`0 <= distill <= 1` must hold, got distill=1.5",
        ),
        (["prune", "trained", "--remove", 5, "--temperature", 0], 2, "`0 < temperature` must hold"),
        (["prune", "trained", "--remove", 5, "--repair-images", 0], 2, "--repair-images"),
        (["prune", "trained", "--remove", 5, "--repair", "batchnorm"], 2, "did you mean 'batch-norm'"),
        (["prune", "trained", "--remove", 5, "--lr-steps", "half"], 2, "--lr-steps is shares such as"),
        (["prune", "trained", "--remove", 5, "--until", "0.01"], 2, "--until is a name and a share"),
        (["compare", "trained", "--layers", "nothing*"], 2, "layers 'nothing*' matches no group"),
        (["compare", "trained", "--criteria", "l2,l2"], 2, "criterion 'l2' is named twice"),
        (["rank", "trained", "--out", "nowhere/all.csv"], 2, "to write all.csv to"),
        (
            ["prune", "trained", "--target", "macs=0.5", "--sensitivity", "trained"],
            2,
            "sensitivity.json is not there",
        ),
        (["sensitivity", "trained", "--skip", "nothing*"], 2, "skip 'nothing*' matches no group"),
        (["recover", "trained"], 2, "which cuts nothing to recover from"),
        (["recover", "nowhere"], 2, "nowhere does not exist"),
        (["prune", "trained", "--remove", 5, "--kinds", "chanel"], 2, "did you mean 'channel'"),
        (["prune", "trained", "--remove", 5, "--kinds", "head"], 1, "no group is left to cut"),
        (["prune", "trained", "--remove", 5, "--skip", "featurs.0"], 2, "did you mean 'features.0'"),
        (
            ["prune", "trained", "--remove", 5, "--min-units", 0],
            2,
            "a share in (0, 1) of each group's; got 0",
        ),
        (["prune", "trained", "--remove", 5, "--out", "full/thesis.tex"], 2, "pass another --out"),
        (["sparsify", "trained", "--skip", "nothing*"], 2, "skip 'nothing*' matches no group"),
        (["sparsify", "trained", "--kinds", "chanel"], 2, "did you mean 'channel'"),
        (["sensitivity", "trained", "--kinds", "chanel"], 2, "did you mean 'channel'"),
        (["prune", "trained", "--remove", 5000], 1, "5000 units cannot leave: at most"),
        (["prune", "trained", "--target", "macs=0.0001"], 1, "macs=0.0001 is out of reach"),
        (["train", "--data", "nowhere"], 2, "nowhere"),
        (["train", "--model", "torchvision:vgg61"], 2, "vgg61"),
        (["train", "--model", "vgg16"], 2, "vgg16"),
        (["train", "--optimizer", "adam"], 2, "did you mean 'adamw'"),
        (["train", "--head", "articel"], 2, "did you mean 'article'"),
        (["train", "--weights", "gone.pth"], 2, "gone.pth"),
        (["train", "--mean", "grey"], 2, "--mean is numbers"),
        (["train", "--val-share", "2"], 2, "val_share"),
        (
            ["inspect", "resnet18"],
            2,
            "is neither a run directory that exists nor the name of an architecture",
        ),
        (["inspect", "torchvision:resnet18", "--input-size", "224"], 2, "three positive numbers"),
        (["bench", "trained", "nowhere"], 2, "neither a run directory"),
        (["demo", "--out", "full"], 2, "is not empty"),
        (["demo", "--threads", 0], 2, "threads"),
        (["prune"], 2, "Missing argument"),
        (["prun"], 2, "No such command"),
    ],
    ids=lambda value: " ".join(map(str, value)) if isinstance(value, list) else "",
)
def test_mistakes_get_one_clear_sentence(arguments: list[Any], code: int, message: str, images: Path) -> None:
    Path("empty").mkdir()
    Path("full").mkdir()
    Path("full/thesis.tex").write_text("x")
    if "trained" in arguments:
        train_tiny(images)
    before = set(Path().rglob("*"))
    result = run(*arguments)
    assert result.exit_code == code, result.output
    assert set(Path().rglob("*")) == before
    assert message in " ".join(result.stderr.replace("│", " ").split())
    assert "Traceback" not in result.output
    assert [path.name for path in Path("full").iterdir()] == ["thesis.tex"]


def test_divergence_exits_with_one(images: Path) -> None:
    result = run("train", "--data", images, *TINY, "--epochs", 3, "--lr", "1e30", "--out", "run")
    assert result.exit_code == 1
    assert "loss became" in result.stderr
    assert "fix:" in result.stderr


def test_a_failed_job_can_be_resumed(images: Path) -> None:
    train_tiny(images)
    again = run("train", "--data", images, *TINY, "--epochs", 1, "--out", "trained")
    assert again.exit_code == 2
    assert "--resume" in again.stderr
    resumed = run("train", "--data", images, *TINY, "--epochs", 1, "--out", "trained", "--resume")
    assert resumed.exit_code == 0
    other = run("train", "--data", images, *TINY, "--epochs", 2, "--out", "trained", "--resume")
    assert other.exit_code == 2
    assert "cannot be resumed with" in other.stderr


def test_a_running_job_keeps_others_out(images: Path) -> None:
    from secateurs.runs import Run

    train_tiny(images)
    holder = Run.resume("trained")
    result = run("train", "--data", images, *TINY, "--epochs", 1, "--out", "trained", "--resume")
    holder.release()
    assert result.exit_code == 2
    assert "another job" in result.stderr


def test_an_interrupt_says_how_to_go_on(images: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import secateurs.jobs

    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(secateurs.jobs, "train_job", interrupted)
    result = run("train", "--data", images, *TINY)
    assert result.exit_code == 130
    assert "--resume" in result.stderr


@pytest.mark.parametrize("command", ["demo", "train", "prune", "recover", "inspect", "bench"])
def test_help_has_an_example(command: str) -> None:
    result = run(command, "--help")
    assert result.exit_code == 0
    assert f"secateurs {command}" in result.output.replace("Usage: secateurs", "")


def test_progress_on_a_terminal_and_lines_in_a_pipe(images: Path) -> None:
    pty = pytest.importorskip("pty")
    places = [str(Path(secateurs.__file__).parents[1]), str(Path(__file__).parent)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(places), "TERM": "xterm-256color"}
    options = ["-m", "secateurs", "train", "--data", str(images), *TINY, "--epochs", "2", "--out", "run"]
    leader, follower = pty.openpty()
    with subprocess.Popen([sys.executable, *options], stdout=follower, env=environment) as job:
        os.close(follower)
        shown = b""
        try:
            while part := os.read(leader, 4096):
                shown += part
        except OSError:  # how Linux says that the other side has closed
            pass
        os.close(leader)
    assert job.returncode == 0
    assert b"\x1b[" in shown
    assert "━".encode() in shown
    assert b"validation" in shown


def test_help_is_quick_and_needs_no_torch() -> None:
    code = (
        "import sys; from secateurs.cli import app; from typer.testing import CliRunner;"
        "print(CliRunner().invoke(app, ['--help']).exit_code, 'torch' in sys.modules)"
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(secateurs.__file__).parents[1])}
    out = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, check=True)
    assert out.stdout.split() == [b"0", b"False"]


def test_the_demo_is_wired(images: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The real demonstration takes a minute: here it is given a smaller network and fewer images."""
    import secateurs.jobs.demo as module
    from secateurs.jobs import DataSettings, TrainSettings

    data = DataSettings(path=str(images), image_size=16)
    monkeypatch.setattr(module, "TrainSettings", partial(TrainSettings, model="tiny_net:TinyNet", data=data))
    result = run("demo", "--out", "runs/demo", "--threads", 1)
    assert result.exit_code == 0, result.output
    assert "run directory: runs/demo" in result.output
    metrics = json.loads(Path("runs/demo/metrics.json").read_text())
    assert metrics["after"]["macs"] <= metrics["before"]["macs"] / 10
    assert run("demo", "--out", "runs/demo", "--threads", 1).exit_code == 2
    assert run("demo", "--out", "runs/demo", "--threads", 1, "--resume").exit_code == 0


@pytest.mark.slow
def test_the_demo_keeps_its_promise() -> None:
    """A tenth of the MACs, about a point of accuracy, two minutes on two cores that have nothing else."""
    torch.set_num_threads(2)
    started = time.process_time()
    assert run("demo", "--out", "runs/demo").exit_code == 0
    assert time.process_time() - started < 2 * 120
    metrics = json.loads(Path("runs/demo/metrics.json").read_text())
    assert metrics["after"]["macs"] <= metrics["before"]["macs"] / 10
    assert metrics["after"]["accuracy"] > metrics["before"]["accuracy"] - 0.0125
    assert load("runs/demo")(torch.zeros(1, 1, 16, 16)).shape == (1, 10)


def test_tables_line_up() -> None:
    table = text.bars([{"name": "conv1", "size": 8, "removed": 8}, {"name": "b", "size": 512, "removed": 0}])
    assert [line.rstrip() for line in table.splitlines()] == [
        "  layer  units  removed    share",
        "  conv1      8        8  100.0 %  ##############################",
        "  b        512        0    0.0 %",
    ]


@pytest.mark.parametrize(
    ("after", "told"),
    [
        ({"latency_ms": 4.1, "latency_share": 0.4}, "2.5x less"),
        ({"latency_ms": 6.6, "latency_share": 0.4}, "2.5x less, by pairs of passes"),
        ({"latency_ms": 4.0}, "2.5x less"),
    ],
)
def test_a_ratio_of_times_says_where_it_is_not_that_of_the_medians(
    after: dict[str, float], told: str
) -> None:
    table = text.before_after({"threads": 1, "latency_ms": 10.0}, after)
    assert table.splitlines()[-1].endswith(f" ms  {told}")
