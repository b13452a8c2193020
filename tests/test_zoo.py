"""The harness that runs lists of models: levels, lines, limits."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from benchmarks.zoo.example import output_shapes, seasoned
from benchmarks.zoo.lists import cases_of
from benchmarks.zoo.records import read
from benchmarks.zoo.table import causes, markdown
from benchmarks.zoo.workers import Limits, Work, resident_gb, run_all
from torch import nn

from secateurs.errors import UnknownNameError

ROOT = Path(__file__).resolve().parents[1]

MODELS = '''
import torch
from torch import nn

from benchmarks.zoo.example import Example


class Plain(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(3, 16, 3, padding=1)
        self.second = nn.Conv2d(16, 16, 3, padding=1)
        self.head = nn.Linear(16, 5)

    def forward(self, x):
        maps = self.second(self.first(x).relu()).relu()
        return {"logits": self.head(maps.mean((2, 3))), "extra": (x.sum((1, 2, 3)),)}


class MostlyLocked(nn.Module):
    """All of the weight lies in a layer whose width is that of the output."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(8, 4)
        self.second = nn.Linear(4, 8)
        self.large = nn.Linear(8, 500)

    def forward(self, x):
        return self.large(x + self.second(self.first(x)))


class Raises(nn.Module):
    def forward(self, x):
        raise RuntimeError("broken on purpose")


class Frozen(nn.Module):
    """Gradients do not reach the first layer, before the cut or after."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(8, 8)
        self.second = nn.Linear(8, 3)

    def forward(self, x):
        return self.second(self.first(x).detach())


MODELS = {
    "plain": lambda: (Plain(), torch.randn(1, 3, 8, 8)),
    "mostly-locked": lambda: Example(model=MostlyLocked(), inputs=torch.randn(1, 8)),
    "raises": lambda: (Raises(), torch.randn(1, 8)),
    "frozen": lambda: (Frozen(), torch.randn(1, 8)),
}
'''


@pytest.fixture(scope="module")
def zoo(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The facts of each model, from one run of the command in a process of its own."""
    folder = tmp_path_factory.mktemp("zoo")
    (folder / "own.py").write_text(MODELS)
    out = folder / "zoo.jsonl"
    told = command(folder / "own.py", "--out", out, "--jobs", 2, "--state-dict")
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    facts = {line["model"]: line["secateurs"] for line in lines}
    return {"facts": facts, "lines": lines, "told": told, "out": out, "list": folder / "own.py"}


def command(*arguments: object) -> str:
    path = os.pathsep.join([str(ROOT / "src"), str(ROOT)])
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "benchmarks.zoo", *map(str, arguments)],
        capture_output=True, text=True, cwd=ROOT, env={**os.environ, "PYTHONPATH": path}, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_every_model_becomes_one_line(zoo: dict[str, Any]) -> None:
    assert len(zoo["lines"]) == 4 == len(zoo["told"].splitlines())
    assert set(zoo["facts"]) == {"plain", "mostly-locked", "raises", "frozen"}


def test_a_plain_network_reaches_all_levels(zoo: dict[str, Any]) -> None:
    facts = zoo["facts"]["plain"]
    assert facts["levels"] == dict.fromkeys("12345", True)
    assert facts["errors"] == {}
    assert facts["before"]["params"] == 16 * 28 + 16 * 145 + 5 * 17
    assert facts["after"]["params"] == 8 * 28 + 8 * 73 + 5 * 9
    assert facts["before"]["macs"] == 64 * 16 * 27 + 64 * 16 * 144 + 16 * 5
    assert facts["before"]["shapes"] == {".logits": [1, 5], ".extra[0]": [1]}
    assert facts["verify"]["exact"]
    assert facts["verify"]["relative_error"] < 1e-12 < facts["verify"]["effect"]
    assert {"build", "trace", "score", "plan", "apply", "deepcopy", "state_dict", "train"} <= set(
        facts["seconds"]
    )


def test_too_small_a_cut_misses_the_third_level_and_says_what_is_locked(zoo: dict[str, Any]) -> None:
    facts = zoo["facts"]["mostly-locked"]
    assert facts["levels"] == {"1": True, "2": True, "3": False, "4": True, "5": True}
    assert facts["remain"]["params"] > 0.9
    assert facts["locked"]["dims"] > 0


def test_an_exception_is_recorded_with_its_place(zoo: dict[str, Any]) -> None:
    facts = zoo["facts"]["raises"]
    assert facts["levels"] == dict.fromkeys("12345")
    assert facts["errors"]["build"]["message"] == "broken on purpose"
    assert facts["errors"]["build"]["line"].endswith("in forward")


def one(work: Work, limits: Limits | None = None) -> dict[str, Any]:
    [(key, facts)] = run_all([("a", work, limits or Limits())])
    assert key == "a"
    return facts


def test_a_process_tells_its_facts() -> None:
    facts = one(lambda tell: {"answer": os.getpid()})
    assert facts["answer"] != os.getpid()
    assert "stopped" not in facts


def test_what_hangs_is_stopped_and_leaves_what_it_had() -> None:
    def work(tell: Callable[[dict[str, Any]], None]) -> dict[str, Any]:
        tell({"stage": "trace", "known": 3, "errors": {}})
        time.sleep(100)
        return {}

    facts = one(work, Limits(seconds=1))
    assert facts["known"] == 3
    assert facts["stopped"] == "took more than 1 s"
    assert facts["errors"]["trace"]["message"] == "took more than 1 s, in trace"
    assert 1 <= facts["wall_s"] < 50


@pytest.mark.skipif(
    not Path("/proc/self/status").exists(), reason="the system does not say how much memory a process has"
)
def test_what_takes_too_much_memory_is_stopped() -> None:
    def work(tell: Callable[[dict[str, Any]], None]) -> dict[str, Any]:
        blocks = []
        for _ in range(200):
            blocks.append(b"1" * 20_000_000)
            time.sleep(0.02)
        return {"bytes": sum(map(len, blocks))}

    limit = resident_gb(os.getpid())[0] + 0.3
    facts = one(work, Limits(gigabytes=limit, seconds=60))
    assert facts["stopped"].endswith("GB of memory")
    assert facts["peak_gb"] >= limit - 0.01


def test_what_dies_is_reported_with_its_end() -> None:
    def raises(tell: Callable[[dict[str, Any]], None]) -> dict[str, Any]:
        raise RuntimeError

    def is_killed(tell: Callable[[dict[str, Any]], None]) -> dict[str, Any]:
        os.kill(os.getpid(), signal.SIGKILL)
        return {}

    assert one(raises)["stopped"] == "ended with code 1"
    assert one(is_killed)["stopped"] == "died of SIGKILL", "as when the system runs out of memory"


def test_processes_run_side_by_side() -> None:
    work = [(number, lambda tell: {}, Limits()) for number in range(5)]
    assert sorted(key for key, _ in run_all(work, jobs=3)) == [0, 1, 2, 3, 4]


def test_gradients_are_asked_for_where_the_original_has_them(zoo: dict[str, Any]) -> None:
    assert zoo["facts"]["frozen"]["levels"]["4"]


def test_what_has_a_line_can_be_left_out(zoo: dict[str, Any]) -> None:
    assert command(zoo["list"], "--out", zoo["out"], "--skip-done") == ""


def test_the_table_counts_levels_and_the_causes_name_what_failed(zoo: dict[str, Any]) -> None:
    table = markdown(read([zoo["out"]]))
    assert "| 1 cut without an exception | 3 of 4 |" in table
    assert "| all of these | 2 of 4 |" in table
    assert "| plain | 12345 | " in table
    failed = causes(read([zoo["out"]]))
    assert "build: RuntimeError broken on purpose" in failed
    assert "plain" not in failed.partition("models that miss a level")[2]


def test_an_unknown_list_is_refused() -> None:
    with pytest.raises(UnknownNameError, match="did you mean 'timm-families'"):
        cases_of("timm-familie")


def test_seasoning_leaves_no_parameter_constant() -> None:
    net = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
    before = net[0].weight.clone()
    seasoned(net)
    assert len(set(net[1].weight.tolist())) == 4
    assert len(set(net[1].running_var.tolist())) == 4
    assert torch.equal(net[0].weight, before), "what varies already is left alone"


def test_output_shapes_reach_into_structures() -> None:
    value = {"a": torch.ones(2, 3), "b": [torch.ones(4), (torch.ones(()), "text", None)]}
    assert output_shapes(value) == {".a": (2, 3), ".b[0]": (4,), ".b[1][0]": ()}
    assert output_shapes(value, varying=True)[".a"] == (-1, 3)
