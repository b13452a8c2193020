"""The article's loop: rank, cut, prove, fine-tune, again; and a longer fine-tune at the end."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from secateurs.errors import TrainingStoppedError
from secateurs.graph import trace
from secateurs.jobs.cuts import amounts_of, check_latency, layer_cuts, settled, sparing
from secateurs.jobs.healing import composed, repaired
from secateurs.jobs.measuring import sizes, speeds, top1
from secateurs.jobs.pictures import draw_all, draw_cut
from secateurs.jobs.settings import PruneSettings
from secateurs.jobs.steps import next_step
from secateurs.jobs.targets import as_share, limit_of
from secateurs.jobs.workplace import (
    Job,
    JobResult,
    StageCheckpoint,
    data_of,
    device,
    finish,
    first_images,
    images_for,
    open_run,
    threads,
)
from secateurs.measure import latency_ms, latency_share
from secateurs.planning import Plan
from secateurs.planning.limits import Limits
from secateurs.progress import Event, Observer, State, derive_seed, ignore
from secateurs.pruning import Amounts
from secateurs.recovery import Epoch, History, finetune
from secateurs.recovery.resuming import below
from secateurs.runs import Run


def prune_job(
    settings: PruneSettings,
    out: str | Path,
    *,
    resume: bool = False,
    observer: Observer = ignore,
    beside: tuple[str, ...] = (),
) -> JobResult:
    """Prune the model of a finished run, and leave the smaller one in a run directory of its own.

    Each iteration ranks the units in eval mode on training images as they are, cuts the lowest in one pass,
    proves the cut, repairs what stays in closed form, and fine-tunes all parameters; with ``recipe.distill``
    the model of ``source`` teaches. Images without labels get its answers for labels. With ``until``, a cut
    after which the validation accuracy is too low is undone, and is the last. Every choice rests on the
    validation images; the test images are read once before and once after.

    Args:
        settings: Which model, how much of it, and how.
        out: The run directory: absent or empty, unless ``resume``.
        resume: Continue a job that was killed, from its last finished cut or epoch. On a CPU it ends with the
            same plans and weights as one that was not.
        observer: Called with an :class:`~secateurs.progress.Event` for all that happens.
        beside: Names of folders that may be in ``out`` already.

    Returns:
        Where the run is, its metrics, and a row for each iteration.

    Raises:
        DataError: The images are missing, or of other classes than the model's.
        RunError: The run to prune is not finished, or ``out`` is taken.
        BudgetError: The target is out of reach.
        VerifyError: A cut was wrong.
        TrainingStoppedError: A fine-tune went wrong. The run is then finished with the best weights that it
            had, after the cuts until then.
    """
    settings = settings.resolved()
    origin = Run(settings.source)
    data = data_of(origin).at(settings.data)
    with threads(settings.threads):
        model = origin.model()
        source = images_for(origin, data, model, settings)
        graph = trace(model, torch.zeros(1, *source.input_size))
        asked = settings
        settings, limits, notes = settled(
            settings, graph, model, first_images(source), are_labelled=source.is_labelled
        )
        config = {
            "command": "prune",
            "architecture": origin.config.get("architecture"),
            "data": asdict(data),
            "class_names": list(source.class_names),
            "settings": replace(settings, target=asked.target).to_dict(),
        }
        if not resume:
            check_latency(settings, graph, limits, model.to(device()), first_images(source, 1).to(device()))
        with open_run(Path(out), config, resume=resume, beside=beside) as run:
            if not run.is_finished:
                work = _Pruning(Job(run, source, settings, observer), settings, origin, model, limits)
                work.run(notes)
                if work.trouble is not None:
                    raise work.trouble
            return JobResult(path=run.path, metrics=run.metrics(), iterations=tuple(run.table()))


class _Pruning:
    """One pruning job; stages 1 to ``iterations`` cut and fine-tune, a last one only fine-tunes."""

    def __init__(
        self, job: Job, settings: PruneSettings, origin: Run, model: nn.Module, limits: Limits
    ) -> None:
        self.job, self.settings, self.origin, self.model, self.limits = job, settings, origin, model, limits
        self.name = str(job.run.config["architecture"]["name"])
        self.inherited = origin.plans()
        self.final = settings.iterations + 1
        self.teacher = origin.model() if settings.recipe.needs_teacher else None
        self.state = job.run.load_state()
        self.facts: dict[str, Any] = {"stage": 0, "cuts": 0, "rows": [], "stopped": None}
        self.trouble: TrainingStoppedError | None = None

    def run(self, notes: list[str]) -> None:
        """All that is not done yet, after there is told what there is to tell."""
        self._begin(notes)
        if "whole_ms" in self.facts:
            share = as_share(self.settings.target, {"latency_ms": self.facts["whole_ms"]})
            self.settings = replace(self.settings, target=share)
        for stage in range(max(self.facts["stage"], 1), self.final):
            if stage > self.facts["stage"]:
                self._cut(stage)
            self._heal(stage)
            if self._must_stop():
                break
        if self.settings.last_epochs and self.facts["cuts"] and self.trouble is None:
            if self.facts["stage"] != self.final:
                self._enter_last()
            self._heal(self.final)
        self._finish()

    def _begin(self, notes: list[str]) -> None:
        """Measure the model to be pruned, or take up the state of a killed job."""
        self.job.tell_start(self.name, notes)
        if self.state is None:
            for number, plan in enumerate(self.inherited, 1):
                self.job.run.save_plan(number, plan)
            self.model.to(self.job.device)
            self.job.doing("measure the model on the test images")
            before = {**top1(self.model, self.job.test_batches()), **sizes(self.model, self.job.example(1))}
            before["val_accuracy"] = top1(self.model, self.job.validation_batches())["accuracy"]
            graph = trace(self.model.eval(), self.job.example())
            settings = sparing(self.settings, graph, self.model, self.job.example())
            whole = amounts_of(graph, settings)
            before["units"] = whole.units
            self.facts["before"], self.facts["whole"] = before, asdict(whole)
            if limit_of(self.settings.target) is not None:
                timed = latency_ms(self.model, self.job.example(1), repeats=None)
                self.facts["whole_ms"] = timed.median_ms
            self._keep()
            self.job.tell(Event("measured", {"when": "before", **before, **self.job.labels}))
            return
        self.facts = {key: value for key, value in self.state.facts.items() if key != "training"}
        if self.facts["stage"] == 0:
            self.model.to(self.job.device)
            return
        self.model = self.job.run.build(len(self.inherited) + self.facts["cuts"]).to(self.job.device)
        self.model.load_state_dict(below("model.", self.state.tensors))

    def _cut(self, stage: int) -> None:
        """Rank, cut, verify; then keep plan, picture and weights."""
        whole, speed = self.model, self._speed()
        step = next_step(
            self.job,
            self.settings,
            self.model,
            stage,
            limits=self.limits,
            whole=Amounts(**self.facts["whole"]),
            gone=sum(row["removed"] for row in self.facts["rows"]),
            speed=speed,
        )
        self.model = step.model
        measured = sizes(self.model, self.job.example(1))
        row = {
            "iteration": stage,
            "removed": len(step.plan),
            **measured,
            "macs_share": measured["macs"] / self.facts["before"]["macs"],
            "params_share": measured["params"] / self.facts["before"]["params"],
            "verified": str(step.verified),
            "max_error": step.verified.max_error,
            "accuracy_cut": top1(self.model, self.job.validation_batches())["accuracy"],
            "layers": layer_cuts(step.graph, step.plan, self.settings),
        }
        if "latency" in step.plan.source:
            row["latency_share"] = speed * step.plan.source["latency"]["measured"]
        row |= self._repair(whole, step.plan, row["accuracy_cut"])
        self.job.run.save_plan(len(self.inherited) + stage, step.plan)
        draw_cut(row, self.job.run.path, name=self.name, cuts=self.settings.iterations)
        self.facts |= {"stage": stage, "cuts": stage, "rows": [*self.facts["rows"], row]}
        self._keep()
        self.job.tell(Event("cut", {**row, "iterations": self.settings.iterations}))

    def _repair(self, whole: nn.Module, plan: Plan, accuracy: float) -> dict[str, Any]:
        """Heal the cut from what the network gave before it, or before all cuts while nothing was trained."""
        earlier = composed(self._own_plans())
        if earlier is not None and self.settings.recipe.epochs == 0:
            whole, plan = self.origin.model().to(self.job.device), earlier.then(plan)
        how, images = self.settings.repair, self.settings.repair_images
        return repaired(self.job, whole, self.model, plan, how=how, images=images, accuracy=accuracy)

    def _speed(self) -> float:
        """For a target in latency the time of the model as a share of what it was before the first cut."""
        if self.settings.target is None or self.settings.target[0] != "latency" or not self.facts["cuts"]:
            return 1.0
        return latency_share(self.origin.model().to(self.job.device), self.model, self.job.example(1))

    def _own_plans(self) -> list[Plan]:
        """The cuts of this job that the model has behind it."""
        return self.job.run.plans(len(self.inherited) + self.facts["cuts"])[len(self.inherited) :]

    def _enter_last(self) -> None:
        """The last stage cuts nothing."""
        row = {**self._good_rows()[-1], "iteration": None, "removed": 0, "layers": []}
        row = {key: value for key, value in row.items() if "repair" not in key}
        self.facts["stage"] = self.final
        self.facts["rows"] = [*self.facts["rows"], {**row, "accuracy_cut": row["accuracy_tuned"]}]

    def _heal(self, stage: int) -> None:
        """Fine-tune all parameters, resumed where a killed job was."""
        recipe = replace(self.settings.recipe, seed=derive_seed(self.settings.seed, "finetune", stage))
        if stage == self.final:
            recipe = replace(recipe, epochs=self.settings.last_epochs)
        checkpoint = StageCheckpoint(self.job.run, self.facts, self.state)
        try:
            history = finetune(
                self.model.requires_grad_(True),
                self.job.training_batches(),
                self.job.validation_batches(),
                recipe=recipe,
                teacher=self.teacher,
                plan=composed(self._own_plans()),
                observer=self._tell_epoch,
                checkpoint=checkpoint,
            )
        except TrainingStoppedError as error:
            self.trouble, history = error, error.history or self._as_it_is()
            self._say_stopped(error.message)
        self.state = None
        self._note(history)

    def _as_it_is(self) -> History:
        """A fine-tune that failed before it could measure."""
        accuracy = top1(self.model, self.job.validation_batches())["accuracy"]
        return History(start=Epoch(number=0, loss=None, score=accuracy, val_loss=None, seconds=0.0))

    def _must_stop(self) -> bool:
        """Whether this cut was the last; one that cost more accuracy than it may is undone."""
        row, run = self.facts["rows"][-1], self.job.run
        if self.settings.until is None:
            return self.trouble is not None
        allowed = self.facts["before"]["val_accuracy"] - self.settings.until[1]
        if row["accuracy_tuned"] >= allowed:
            run.save_good(self.model, len(self.inherited) + self.facts["cuts"])
            return self.trouble is not None
        cuts = self.facts["cuts"] - 1
        self.model = (run.load_good() if cuts else self.origin.model()).to(self.job.device)
        rows = [*self.facts["rows"][:-1], {**row, "undone": True}]
        self.facts |= {"cuts": cuts, "rows": rows}
        self._say_stopped(
            f"cut {row['iteration']} leaves a validation accuracy of {row['accuracy_tuned']:.4f}, below "
            f"{allowed:.4f}; it is undone, and {cuts} cuts are kept"
        )
        return True

    def _say_stopped(self, why: str) -> None:
        self.facts["stopped"] = why
        self.job.tell(Event("stopped", {"why": why, "cuts": self.facts["cuts"]}))

    def _good_rows(self) -> list[dict[str, Any]]:
        """The rows of what was not undone."""
        return [row for row in self.facts["rows"] if not row.get("undone")]

    def _tell_epoch(self, event: Event) -> None:
        stage = self.facts["stage"]
        where = {"stage": "final" if stage == self.final else "iteration", "iteration": stage}
        self.job.tell(Event(event.name, {**where, "iterations": self.settings.iterations, **event.facts}))

    def _note(self, history: History) -> None:
        """Write down what the fine-tune came to."""
        *others, row = self.facts["rows"]
        row = {**row, "accuracy_tuned": history.kept.score, "kept_epoch": history.best}
        row["kept"] = history.told(self.settings.recipe.patience)
        row["epochs"] = [asdict(epoch) for epoch in history.epochs]
        self.facts["rows"] = [*others, row]
        told = {key: value for key, value in row.items() if key not in ("epochs", "layers")}
        more = {"iterations": self.settings.iterations, "epochs_trained": len(history.epochs)}
        self.job.tell(Event("healed", {**told, **more}))

    def _finish(self) -> None:
        """Measure both models, draw, save."""
        job, rows = self.job, self._good_rows()
        job.doing("measure both models")
        after = {**top1(self.model, job.test_batches()), **sizes(self.model, job.example(1))}
        after["val_accuracy"] = rows[-1]["accuracy_tuned"] if rows else self.facts["before"]["val_accuracy"]
        if rows:
            after["kept"] = rows[-1]["kept"]
        after["units"] = self.facts["before"]["units"] - sum(row["removed"] for row in rows)
        speed = speeds({"before": self.origin.model(), "after": self.model}, job.example(1))
        before = self.facts["before"] | speed["before"]
        after |= speed["after"]
        if self.facts["stopped"] is not None:
            after["stopped"] = self.facts["stopped"]
        if rows:
            draw_all(before | job.labels, after, rows, job.run.path, name=self.name, data=job.source.name)
        job.run.save_table(self.facts["rows"])
        finish(job, self.model, before, after, plans=len(self.inherited) + self.facts["cuts"])

    def _keep(self) -> None:
        """Keep the model as it is between two trainings."""
        tensors: dict[str, Tensor] = {}
        if self.facts["stage"]:
            tensors = {f"model.{name}": tensor for name, tensor in self.model.state_dict().items()}
        self.state = None
        self.job.run.save_state(State({**self.facts, "training": None}, tensors))
