"""A job on the screen: progress bars on a terminal, plain lines in a pipe."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from types import TracebackType
from typing import Any, Self

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from secateurs.cli import text
from secateurs.progress import Event


class Display:
    """The observer that prints; use it as a context, so that its bar goes away at the end."""

    def __init__(self) -> None:
        self._console = Console(highlight=False, soft_wrap=True)
        self._live = self._console.is_terminal
        unicode = (sys.stdout.encoding or "").lower().startswith("utf")
        self._symbol = "█" if self._live and unicode else "#"
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.fields[note]}"),
            TimeRemainingColumn(),
            console=self._console,
            transient=True,
            disable=not self._live,
        )
        self._bar: TaskID | None = None

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.stop()

    def __call__(self, event: Event) -> None:
        """Print what there is to say of an event."""
        tell = getattr(self, f"_on_{event.name}", None)
        if tell is not None:
            tell(event.facts)

    def say(self, line: str = "", style: str | None = None) -> None:
        """One line, or several; brackets in it are no markup."""
        self._console.print(line, style=style, markup=False)
        sys.stdout.flush()

    def _on_section(self, facts: Mapping[str, Any]) -> None:
        self.say(f"\n{facts['title']}", "bold")

    def _on_started(self, facts: Mapping[str, Any]) -> None:
        self._remove_bar()
        plural = "" if facts["threads"] == 1 else "s"
        self.say(f"{facts['model']} on {facts['data']}")
        self._on_noted(facts)
        self.say(f"  run {facts['run']}, {facts['device']}, {facts['threads']} thread{plural}", "dim")

    def _on_noted(self, facts: Mapping[str, Any]) -> None:
        for note in facts["notes"]:
            self.say(f"  {note}", "dim")

    def _on_measured(self, facts: Mapping[str, Any]) -> None:
        self._remove_bar()
        numbers = f"{text.count(facts['params'])} parameters, {text.count(facts['macs'])} MACs"
        self.say(
            f"{facts['when']}: {text.measured_by(facts)} {text.share(facts['accuracy'])}, {numbers}, "
            f"{text.size(facts['file_bytes'])}"
        )

    def _on_doing(self, facts: Mapping[str, Any]) -> None:
        self._remove_bar()
        if self._live:
            self._bar = self._progress.add_task(facts["what"], total=None, note="")

    def _on_batch(self, facts: Mapping[str, Any]) -> None:
        if not self._live:
            return
        if self._bar is None:
            self._bar = self._progress.add_task("", note="")
        self._progress.update(
            self._bar,
            description=f"{_place(facts)}epoch {facts['epoch']}/{facts['epochs']}",
            completed=facts["batch"],
            total=facts["batches"],
            note=f"loss {facts['loss']:.3f}",
        )

    def _on_epoch(self, facts: Mapping[str, Any]) -> None:
        validation = "" if facts["score"] is None else f"  validation {text.share(facts['score'])}"
        self.say(
            f"  {_place(facts)}epoch {facts['epoch']}/{facts['epochs']}  loss {facts['loss']:.4f}{validation}"
            f"{_sparsity(facts)}  {facts['seconds']:.1f} s"
        )
        self._remove_bar()

    def _on_generation(self, facts: Mapping[str, Any]) -> None:
        if not self._live:
            return
        if self._bar is None:
            self._bar = self._progress.add_task("particles", note="")
        self._progress.update(
            self._bar,
            description="particles",
            completed=facts["number"],
            total=facts["generations"],
            note=f"{text.share(1 - facts['error'])} with the best mask",
        )

    def _on_point(self, facts: Mapping[str, Any]) -> None:
        place = f"group {facts['number']}/{facts['groups']}"
        if not self._live:
            left = f"{facts['kept']} of {facts['size']} units"
            fall = f"{-100 * facts['drop']:+.1f} points"
            self.say(f"  {place} {facts['group']}: {left}, {text.share(facts['accuracy'])} ({fall})")
            return
        if self._bar is None:
            self._bar = self._progress.add_task("", note="")
        self._progress.update(
            self._bar,
            description=place,
            completed=facts["number"],
            total=facts["groups"],
            note=facts["group"],
        )

    def _on_silenced(self, facts: Mapping[str, Any]) -> None:
        of = f"/{facts['batches']}" if facts["batches"] else ""
        place = f"oracle, batch {facts['batch']}{of}"
        if not self._live:
            if facts["done"] == facts["groups"]:
                self.say(f"  {place}: {facts['groups']} layers")
            return
        if self._bar is None:
            self._bar = self._progress.add_task("", note="")
        self._progress.update(
            self._bar,
            description=place,
            completed=facts["done"],
            total=facts["groups"],
            note=facts["group"],
        )

    def _on_judged(self, facts: Mapping[str, Any]) -> None:
        self._remove_bar()
        self.say(f"  {facts['criterion']}: {facts['seconds']:.1f} s")

    def _on_cut(self, facts: Mapping[str, Any]) -> None:
        self._remove_bar()
        self.say(
            f"\ncut {facts['iteration']}/{facts['iterations']}: {facts['removed']} units leave, "
            f"{text.share(facts['macs_share'])} of the MACs and {text.share(facts['params_share'])} of the "
            f"parameters remain{_timed(facts)}",
            "bold",
        )
        self.say(text.bars(facts["layers"], self._symbol))
        self.say(f"  {facts['verified']}")
        self.say(f"  validation {text.share(facts['accuracy_cut'])} after the cut{_repaired(facts)}")

    def _on_repaired(self, facts: Mapping[str, Any]) -> None:
        self._remove_bar()
        self.say(f"  validation {text.share(facts['accuracy_before'])} before the repair{_repaired(facts)}")

    def _on_stopped(self, facts: Mapping[str, Any]) -> None:
        self._remove_bar()
        self.say(f"stopped: {facts['why']}", "bold")

    def _on_healed(self, facts: Mapping[str, Any]) -> None:
        self._remove_bar()
        if facts["epochs_trained"]:
            self.say(
                f"  validation {text.share(facts['accuracy_tuned'])} after the fine-tune ({facts['kept']})"
            )

    def _on_finished(self, facts: Mapping[str, Any]) -> None:
        self._remove_bar()
        before, after = facts["before"], facts["after"]
        if before["params"] == after["params"]:
            self.say(f"after: {text.measured_by(after)} {text.share(after['accuracy'])}")
        else:
            self.say("\n" + text.before_after(before, after))

    def _remove_bar(self) -> None:
        if self._bar is not None:
            self._progress.remove_task(self._bar)
            self._bar = None


def _timed(facts: Mapping[str, Any]) -> str:
    """The time that was measured, where that is the target."""
    return f", {text.share(facts['latency_share'])} of the time" if "latency_share" in facts else ""


def _repaired(facts: Mapping[str, Any]) -> str:
    """What a repair did and gained, as the rest of a line."""
    if "repair" not in facts:
        return ""
    kept = "" if facts["repair_kept"] else " (which was worse, so it is not kept)"
    return f", {text.share(facts['accuracy_repaired'])} after the repair{kept}\n  {facts['repair']}"


def _place(facts: Mapping[str, Any]) -> str:
    """Which fine-tune an epoch belongs to."""
    if "stage" not in facts:
        return ""
    if facts["stage"] == "final":
        return "last fine-tune, "
    return f"fine-tune {facts['iteration']}/{facts['iterations']}, "


def _sparsity(facts: Mapping[str, Any]) -> str:
    """What training for sparsity tells of an epoch."""
    penalty = f"  penalty {facts['penalty']:.4g}" if "penalty" in facts else ""
    return penalty + (f"  {facts['zeroed']} units zero, {facts['regrown']} grew" if "zeroed" in facts else "")
