"""The run directory: all that a job decided, did and made, in files that need no pickle to read.

```
config.json         what was asked for, resolved, with versions and machine
events.jsonl        what happened, a line an event
plan-01.json ...    the cuts, in the order in which they were made
state.json          while the job runs: where it stands; names the tensor file that belongs to it
last-good.safetensors while a job runs that may undo its last cut: the model before it
iterations.json     what each cut removed, and accuracy before and after each fine-tune
model.safetensors   the weights of the result, with the number of its plans
metrics.json        {"before": {...}, "after": {...}}, written last: a run that has it is finished
*.png               pictures
```
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from secateurs import files
from secateurs.errors import ApplyError, RunError, SecateursError
from secateurs.locks import Lock
from secateurs.machine import surroundings
from secateurs.progress import Event, State

if TYPE_CHECKING:
    from secateurs.planning import Plan

FORMAT = 1
_CONFIG, _EVENTS, _STATE = "config.json", "events.jsonl", "state.json"
_GOOD = "last-good.safetensors"
_MODEL, _METRICS, _TABLE, _LOCK = "model.safetensors", "metrics.json", "iterations.json", ".lock"


class Run:
    """A run directory that exists; :meth:`start` and :meth:`resume` make one writable.

    Args:
        path: The directory.

    Raises:
        RunError: The directory is missing, or is no run directory.

    Example:
        >>> import tempfile
        >>> run = Run.start(Path(tempfile.mkdtemp()) / "first", {"command": "train"})
        >>> run.log(Event("epoch", {"loss": 0.5}))
        >>> run.release()
        >>> Run(run.path).events()[-1]["loss"]
        0.5
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._lock: Lock | None = None
        if not self.path.exists():
            raise RunError(
                f"{self.path} does not exist",
                where=str(self.path.absolute()),
                fix="name the run directory that secateurs train or prune printed last",
            )
        if not (self.path / _CONFIG).is_file():
            raise RunError(
                f"{self.path} is not a run directory: it has no {_CONFIG}",
                where=str(self.path.absolute()),
                fix="name the run directory that secateurs train or prune printed last",
            )
        self.config: dict[str, Any] = files.read_json(self.path / _CONFIG)
        if self.config.get("format") != FORMAT:
            raise RunError(
                f"{self.path / _CONFIG} has format {self.config.get('format')!r}, but this version of "
                f"Secateurs reads format {FORMAT}",
                where=str(self.path),
            )

    @classmethod
    def start(cls, path: str | Path, config: Mapping[str, Any], *, beside: Sequence[str] = ()) -> Run:
        """Make a run directory and write its configuration.

        Args:
            path: A directory that is absent or empty.
            config: What was asked for, as JSON can hold it; versions, machine and threads are added.
            beside: Names of folders that may be there already.

        Returns:
            The run, locked for writing until :meth:`release`.

        Raises:
            RunError: The directory holds something, cannot be made, or another job writes to it.
        """
        folder = Path(path)
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            message = f"{folder} cannot be made: {error.strerror}"
            fix = "pass another --out, in a folder that you may write to"
            raise RunError(message, where=str(folder.absolute()), fix=fix) from error
        if found := contents(folder, beside):
            raise RunError(
                f"{folder} is not empty: it holds {found[0]}",
                where=str(folder),
                fix="pass another --out, or --resume to continue the job that wrote it",
            )
        with Lock(folder / _LOCK).unless_failed() as lock:
            files.remove_leftovers(folder)
            files.write_json(folder / _CONFIG, {"format": FORMAT, **config, **surroundings()})
            run = cls(folder)
            run._lock = lock
        return run

    @classmethod
    def resume(cls, path: str | Path) -> Run:
        """Open a run directory to continue its job; what a killed job left half written is removed.

        Raises:
            RunError: The directory is missing or foreign, or another job writes to it.
        """
        run = cls(path)
        with Lock(run.path / _LOCK).unless_failed() as lock:
            files.remove_leftovers(run.path)
            files.drop_torn_line(run.path / _EVENTS)
            run._lock = lock
        return run

    def release(self) -> None:
        """Let other jobs write to the directory."""
        if self._lock:
            self._lock.release()

    @property
    def is_finished(self) -> bool:
        """Whether the job ran to its end."""
        return (self.path / _METRICS).is_file()

    def log(self, event: Event) -> None:
        """Add an event to ``events.jsonl``, with the time in seconds since 1970."""
        line = {"time": round(time.time(), 3), "event": event.name, **event.facts}
        files.append_line(self.path / _EVENTS, line)

    def events(self) -> list[dict[str, Any]]:
        """Every event so far; a line torn by a kill is left out."""
        return files.read_lines(self.path / _EVENTS)

    def save_state(self, state: State) -> None:
        """Replace the state: the tensors first, then the JSON that names them, so that both fit."""
        previous = sorted(self.path.glob("state-*.safetensors"))
        name = f"state-{int(previous[-1].stem[6:]) + 1 if previous else 1:06d}.safetensors"
        files.write_tensors(self.path / name, state.tensors, {})
        files.write_json(self.path / _STATE, {"tensors": name, "facts": state.facts})
        for old in previous:
            old.unlink()

    def load_state(self) -> State | None:
        """The last state that was saved, or ``None`` before the first."""
        if not (self.path / _STATE).exists():
            return None
        saved = files.read_json(self.path / _STATE)
        if not {"tensors", "facts"} <= saved.keys():
            raise RunError(f"{self.path / _STATE} lacks the state of a job", where=str(self.path))
        tensors = files.read_tensors(self.path / str(saved["tensors"]))
        return State(saved["facts"], tensors)

    def drop_state(self) -> None:
        """Remove the state of a job that is finished."""
        (self.path / _STATE).unlink(missing_ok=True)
        (self.path / _GOOD).unlink(missing_ok=True)
        for tensors in self.path.glob("state-*.safetensors"):
            tensors.unlink()

    def save_good(self, model: nn.Module, plans: int) -> None:
        """Keep a model that the job may come back to, which the first ``plans`` plans of this run lead to."""
        files.write_tensors(
            self.path / _GOOD, model.state_dict(), {"secateurs": json.dumps({"plans": plans})}
        )

    def load_good(self) -> nn.Module:
        """The model that :meth:`save_good` kept, on the CPU.

        Raises:
            RunError: The file is missing or damaged.
        """
        model = self.build(int(json.loads(files.read_metadata(self.path / _GOOD)["secateurs"])["plans"]))
        model.load_state_dict(files.read_tensors(self.path / _GOOD))
        return model

    def plan_path(self, number: int) -> Path:
        """Where the cut with this number, from 1, is kept."""
        return self.path / f"plan-{number:02d}.json"

    def save_plan(self, number: int, plan: Plan) -> None:
        """Write the cut with this number, from 1."""
        files.write_text(self.plan_path(number), plan.to_json() + "\n")

    def plans(self, count: int | None = None) -> list[Plan]:
        """The cuts in order: the first ``count``, or all that the finished model was made with.

        Raises:
            RunError: A plan is missing or damaged.
        """
        from secateurs.planning import Plan

        if count is None:
            count = int(self._model_facts().get("plans", 0))
        plans = []
        for path in map(self.plan_path, range(1, count + 1)):
            try:
                plans.append(Plan.from_json(path.read_text(encoding="utf-8")))
            except FileNotFoundError as error:
                raise RunError(f"{path} is missing, one of {count} plans", where=str(path)) from error
            except (SecateursError, OSError, ValueError, KeyError, TypeError) as error:
                raise RunError(f"{path} is not a plan: {error}", where=str(path)) from error
        return plans

    def save_model(self, model: nn.Module, plans: int) -> None:
        """Write the weights of ``model``, which the first ``plans`` plans of this run lead to."""
        facts = {"plans": plans}
        files.write_tensors(self.path / _MODEL, model.state_dict(), {"secateurs": json.dumps(facts)})

    def _model_facts(self) -> dict[str, Any]:
        path = self.path / _MODEL
        if not path.exists():
            fix = f"secateurs {self.config.get('command', 'prune')} ... --out {self.path} --resume"
            raise RunError(f"{self.path} has no {_MODEL}: its job is not finished", where=str(path), fix=fix)
        try:
            return dict(json.loads(files.read_metadata(path)["secateurs"]))
        except (KeyError, ValueError) as error:
            raise RunError(f"{path} was not written by Secateurs", where=str(path)) from error

    def build(self, plans: int) -> nn.Module:
        """The architecture of this run with its first ``plans`` plans applied, weights not loaded."""
        from secateurs.models import Architecture, build_architecture
        from secateurs.surgery import apply

        try:
            architecture = Architecture.from_dict(self.config["architecture"])
        except (SecateursError, KeyError, TypeError, ValueError) as error:
            raise RunError(f"{self.path / _CONFIG} names no architecture", where=str(self.path)) from error
        with torch.random.fork_rng(devices=[]):
            model = build_architecture(architecture)
        for number, plan in enumerate(self.plans(plans), 1):
            try:
                model = apply(model, plan, inplace=True)
            except ApplyError as error:
                message = f"{self.plan_path(number)} does not fit this architecture: {error.message}"
                raise RunError(message, where=str(self.path)) from error
        return model

    def model(self) -> nn.Module:
        """The model that the job ended with, on the CPU, in eval mode.

        Raises:
            RunError: The job is not finished, or its files do not fit together.
        """
        count = int(self._model_facts().get("plans", 0))
        model = self.build(count)
        try:
            model.load_state_dict(files.read_tensors(self.path / _MODEL), strict=True)
        except RuntimeError as error:
            message = f"{self.path / _MODEL} does not fit the model that config.json and {count} plans give"
            raise RunError(message, where=str(error).splitlines()[-1].strip()) from error
        return model.eval()

    def save_table(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Write ``iterations.json``: one entry for each cut."""
        files.write_json(self.path / _TABLE, {"iterations": list(rows)})

    def table(self) -> list[dict[str, Any]]:
        """The entries of ``iterations.json``; none for a run that cut nothing."""
        path = self.path / _TABLE
        return list(files.read_json(path)["iterations"]) if path.exists() else []

    def save_metrics(self, before: Mapping[str, Any], after: Mapping[str, Any]) -> None:
        """Write ``metrics.json``, which makes the run a finished one."""
        files.write_json(self.path / _METRICS, {"before": dict(before), "after": dict(after)})

    def metrics(self) -> dict[str, Any]:
        """``{"before": {...}, "after": {...}}`` of a finished run."""
        return files.read_json(self.path / _METRICS)


def load(run: str | Path) -> nn.Module:
    """The model that a finished run ended with, rebuilt from architecture, plans and weights.

    Nothing is unpickled; the factory that ``config.json`` names is called, so load runs of people whom you
    would let name a module for you to import.

    Args:
        run: The run directory.

    Returns:
        The model on the CPU in eval mode; its outputs are bit-identical to those of the one that was saved.

    Raises:
        RunError: The directory is missing, foreign, damaged or unfinished.
    """
    return Run(run).model()


def contents(folder: Path, beside: Sequence[str] = ()) -> list[str]:
    """Names in ``folder``, but for those in ``beside`` and what a job killed at its very start leaves."""
    return sorted(
        path.name
        for path in folder.iterdir()
        if path.name not in {_LOCK, *beside} and not files.is_leftover(path)
    )


def has_begun(folder: Path) -> bool:
    """Whether a job got as far as writing its configuration, so that there is something to resume."""
    return (folder / _CONFIG).is_file()
