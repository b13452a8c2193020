"""One process a model, forked from a parent that has imported everything, under limits of time and memory."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

Facts = dict[str, Any]
Work = Callable[[Callable[[Facts], None]], Facts]
_FORK = multiprocessing.get_context("fork")
_POLL_SECONDS = 0.05


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What one process may take.

    Args:
        seconds: Wall time.
        gigabytes: Resident memory, that of the imported libraries included.
    """

    seconds: float = 300
    gigabytes: float = 8


@dataclass(slots=True)
class _Running:
    key: Any
    process: multiprocessing.process.BaseProcess
    pipe: Connection
    limits: Limits
    started: float = field(default_factory=time.monotonic)
    facts: Facts = field(default_factory=dict)
    peak_gb: float = 0.0
    stopped: str = ""
    finished: bool = False

    def look(self) -> None:
        """Read what came in, and stop the process if it is over a limit."""
        self.read()
        now, peak = resident_gb(self.process.pid)
        self.peak_gb = max(self.peak_gb, peak)
        seconds = time.monotonic() - self.started
        if now > self.limits.gigabytes:
            self.stop(f"took more than {self.limits.gigabytes:g} GB of memory")
        elif seconds > self.limits.seconds:
            self.stop(f"took more than {self.limits.seconds:g} s")

    def read(self) -> None:
        """Take the newest facts out of the pipe."""
        try:
            while self.pipe.poll():
                self.finished, self.facts = self.pipe.recv()
        except (EOFError, OSError):
            pass

    def stop(self, why: str) -> None:
        """End the process, and remember why."""
        self.stopped = why
        self.process.kill()

    def result(self) -> Facts:
        """The facts of a process that ended, with the reason if it ended badly."""
        self.process.join()
        self.read()
        facts = dict(self.facts)
        facts["peak_gb"] = round(self.peak_gb, 2)
        if not self.finished:
            stage = facts.pop("stage", "start")
            why = self.stopped or _death(self.process.exitcode)
            errors = {**facts.get("errors", {}), stage: {"type": "Stopped", "message": f"{why}, in {stage}"}}
            facts |= {"errors": errors, "stopped": why}
        facts["wall_s"] = round(time.monotonic() - self.started, 2)
        self.pipe.close()
        return facts


def run_all(work: Iterable[tuple[Any, Work, Limits]], jobs: int = 1) -> Iterator[tuple[Any, Facts]]:
    """Run each piece of work in a process of its own.

    Args:
        work: Keys, functions that return facts (and tell the facts so far), and their limits.
        jobs: How many run at once.

    Yields:
        Each key with its facts, in the order in which they end. A process that was stopped or died leaves the
        facts that it told, with ``stopped`` and an entry in ``errors``.
    """
    todo, running = iter(work), list[_Running]()
    waiting = True
    try:
        while waiting or running:
            while waiting and len(running) < jobs:
                item = next(todo, None)
                waiting = item is not None
                if item is not None:
                    running.append(_start(*item))
            wait([each.process.sentinel for each in running], timeout=_POLL_SECONDS)
            for each in running[:]:
                each.look()
                if not each.process.is_alive():
                    running.remove(each)
                    yield each.key, each.result()
    finally:
        for each in running:
            each.stop("interrupted")


def _start(key: Any, work: Work, limits: Limits) -> _Running:
    ours, theirs = _FORK.Pipe(duplex=False)
    process = _FORK.Process(target=_inside, args=(work, theirs))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of forking beside threads; the parent runs none
        process.start()
    theirs.close()
    return _Running(key=key, process=process, pipe=ours, limits=limits)


def _inside(work: Work, pipe: Connection) -> None:
    """In the new process: no output, no interrupts of the terminal, facts into the pipe."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    warnings.simplefilter("ignore")
    silence = os.open(os.devnull, os.O_WRONLY)
    os.dup2(silence, 1)
    os.dup2(silence, 2)
    facts = work(lambda facts: pipe.send((False, facts)))
    pipe.send((True, facts))
    pipe.close()
    os._exit(0)  # the parent's exit handlers are not ours


def resident_gb(pid: int | None) -> tuple[float, float]:
    """Resident memory of a process now and at its peak; zeros where the system does not say."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0.0, 0.0
    found = {line.split(":")[0]: line.split()[1] for line in lines if line.startswith(("VmRSS", "VmHWM"))}
    return int(found.get("VmRSS", 0)) / 1e6, int(found.get("VmHWM", 0)) / 1e6


def _death(code: int | None) -> str:
    return (
        f"died of {signal.Signals(-code).name}"
        if code is not None and code < 0
        else f"ended with code {code}"
    )
