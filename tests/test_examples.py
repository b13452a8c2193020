"""The programs in examples/ run, end well and are as small as they say."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

import secateurs

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
NEEDS = {"own_loop": None, "lightning_module": "lightning", "hf_trainer": "transformers"}
PROMISES = {"own_loop": (0.85, 0.25), "lightning_module": (0.85, 0.33), "hf_trainer": (0.85, 0.5)}


def test_every_example_is_tested() -> None:
    assert {path.stem for path in EXAMPLES.glob("*.py")} == set(NEEDS)


@pytest.mark.parametrize(
    "name", ["own_loop", *(pytest.param(name, marks=pytest.mark.slow) for name in list(NEEDS)[1:])]
)
def test_an_example_keeps_its_promise(name: str, tmp_path: Path) -> None:
    package = NEEDS[name]
    if package is not None and find_spec(package) is None:
        pytest.skip(f"needs {package}: pip install 'secateurs[examples]'")
    environment = {**os.environ, "PYTHONPATH": str(Path(secateurs.__file__).parents[1])}
    environment["OMP_NUM_THREADS"] = "1"
    done = subprocess.run(
        [sys.executable, str(EXAMPLES / f"{name}.py")],
        env=environment,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found = re.search(r"accuracy (\S+) at (\S+) of the MACs\n$", done.stdout)
    assert found is not None, done.stdout
    least, share = PROMISES[name]
    assert float(found[1]) >= least
    assert share - 0.1 < float(found[2]) <= share
    assert not list(tmp_path.iterdir())
