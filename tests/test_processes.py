"""Two processes train as one does, and as they would have done had nobody killed them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader

import secateurs
from secateurs import files
from secateurs.progress import Event, State
from secateurs.recovery import History, Recipe, finetune
from test_finetune import data, network

RECIPE = Recipe(epochs=3, lr=0.05, clip_norm=1.0, checkpoint_minutes=0.0, distill=0.5)


class OnDisk:
    """A checkpoint in two files, written as a run directory's is."""

    def __init__(self, folder: Path) -> None:
        self.facts, self.tensors = folder / "facts.json", folder / "tensors.safetensors"

    def load(self) -> State | None:
        if not self.facts.exists():
            return None
        return State(files.read_json(self.facts), files.read_tensors(self.tensors))

    def save(self, state: State) -> None:
        files.write_tensors(self.tensors, state.tensors, {})
        files.write_json(self.facts, dict(state.facts))


def train(recipe: Recipe, folder: Path, die_at: int | None = None) -> tuple[dict[str, Tensor], History]:
    """Batches of 8 samples for a cut network, with a teacher, whose outputs and inner values count.

    Dropout is off, because two processes draw two masks.
    """
    whole = network()
    whole.drop.p = 0.0
    graph = secateurs.trace(whole, torch.zeros(2, 6))
    plan = secateurs.Plan.of(graph, {graph.groups[0].name: [0, 1]})
    model = secateurs.apply(whole, plan)
    steps = [0]

    def watch(event: Event) -> None:
        steps[0] += event.name == "batch"
        if steps[0] == die_at:
            os._exit(9)

    loader = DataLoader(data(), batch_size=8, shuffle=True)
    held_out = list(DataLoader(data(), batch_size=16))
    history = finetune(
        model, loader, held_out, recipe=recipe, teacher=whole, plan=plan, observer=watch,
        checkpoint=OnDisk(folder),
    )  # fmt: skip
    return model.state_dict(), history


def launch(folder: Path, die_at: int | None = None) -> list[dict[str, Any]]:
    """Two gloo processes in ``folder``; what each of them ended with."""
    code = (
        "from accelerate import Accelerator; from test_processes import *;"
        f"weights, history = train(RECIPE, Path('.'), {die_at!r}); here = Accelerator();"
        "files.write_tensors(Path(f'model-{here.process_index}.safetensors'), weights, {});"
        "facts = {'count': here.num_processes, 'losses': [epoch.loss for epoch in history.epochs]};"
        "files.write_json(Path(f'result-{here.process_index}.json'), facts)"
    )
    script = folder / "train.py"
    script.write_text(code)
    places = [str(Path(secateurs.__file__).parents[1]), str(Path(__file__).parent)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(places), "ACCELERATE_USE_CPU": "1"}
    environment["OMP_NUM_THREADS"] = "1"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*command, str(script)], env=environment, cwd=folder, capture_output=True, text=True
    )
    assert (done.returncode == 0) == (die_at is None), done.stderr
    return [json.loads(path.read_text()) for path in sorted(folder.glob("result-*"))]


@pytest.mark.slow
def test_two_processes_end_as_one_does_also_when_they_were_killed(tmp_path: Path) -> None:
    whole, killed, alone = (tmp_path / name for name in ("whole", "killed", "alone"))
    for folder in (whole, killed, alone):
        folder.mkdir()
    first, second = launch(whole)
    assert first == second and first["count"] == 2
    weights = files.read_tensors(whole / "model-0.safetensors")
    for name, tensor in files.read_tensors(whole / "model-1.safetensors").items():
        assert torch.equal(tensor, weights[name]), name

    assert launch(killed, die_at=5) == []  # within the second epoch
    assert files.read_json(killed / "facts.json")["batches"] > 0
    assert launch(killed) == [first, second]
    for name, tensor in files.read_tensors(killed / "model-0.safetensors").items():
        assert torch.equal(tensor, weights[name]), name

    one, history = train(replace(RECIPE, accumulate=2), alone)
    assert [epoch.loss for epoch in history.epochs] == pytest.approx(first["losses"], rel=1e-5)
    for name, tensor in one.items():
        if "running" not in name and "tracked" not in name:  # each process sees the batches that it gets
            torch.testing.assert_close(weights[name], tensor, rtol=1e-4, atol=1e-5)
