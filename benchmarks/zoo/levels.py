"""What is asked of a pruned model: five levels, and facts beside them.

1. No exception from trace, score, plan and apply.
2. The pruned model's outputs have the original's structure and shapes.
3. Parameters and multiply-accumulates are both down by 40 % or more, counted on the models themselves.
4. A backward pass and an optimiser's step work, and every parameter that had a gradient has one still.
5. `verify` passes.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from benchmarks.zoo.example import Case, Example, output_shapes, seasoned, tensors_in
from benchmarks.zoo.failures import failure, lock_summary
from secateurs import Budget, Plan, apply, plan, score, trace, verify  # all of it before the forks
from secateurs.graph.running import call_model
from secateurs.measure import macs, parameters

SHARE = 0.6  # of parameters and of multiply-accumulates that may remain
Tell = Callable[[dict[str, Any]], None]


class Record:
    """The facts of one model; told at each stage, so that a killed process leaves what it had.

    Args:
        tell: Receives the facts whenever they change.
    """

    def __init__(self, tell: Tell) -> None:
        self._tell = tell
        self.facts: dict[str, Any] = {
            "levels": dict.fromkeys("12345"),
            "seconds": {},
            "errors": {},
            "stage": "build",
        }

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Time a stage by the processor's clock, which a busy machine does not slow; note its exception."""
        self.facts["stage"] = name
        self._tell(self.facts)
        started = time.process_time()
        try:
            yield
        except Exception as error:
            self.facts["errors"][name] = failure(error)
        self.facts["seconds"][name] = round(time.process_time() - started, 3)

    def level(self, number: int, passed: bool) -> None:
        """Note whether a level was reached."""
        self.facts["levels"][str(number)] = passed

    def went_well(self, stage: str) -> bool:
        """Whether a stage came to its end without an exception."""
        return stage in self.facts["seconds"] and stage not in self.facts["errors"]

    def done(self) -> dict[str, Any]:
        """The facts, no stage under way."""
        self.facts.pop("stage", None)
        self._tell(self.facts)
        return self.facts


def check(
    case: Case, tell: Tell, *, up_to: int = 5, extras: bool = False, export: bool = False
) -> dict[str, Any]:
    """Cut a model to half its width with Secateurs and see how far it gets.

    Args:
        case: Builds the model.
        tell: Receives the facts at each stage.
        up_to: The last level that is asked; the first three take a fraction of the time.
        extras: Whether to load the state into a fresh model that was cut by the same plan, too.
        export: Whether to export the result, too; slow.

    Returns:
        The facts, as JSON can hold them.
    """
    record = Record(tell)
    with record.stage("build"):
        example = build(case)
        outputs = call(example.model, example.inputs)
    if not record.went_well("build"):
        return record.done()
    before = size(record, example, outputs, "before")
    made = _cut(record, example)
    record.level(1, made is not None)
    if made is None:
        return record.done()
    chosen, small = made
    after = after_cut(record, example, small, before)
    if up_to < 4:
        return record.done()
    with record.stage("deepcopy"):
        call(copy.deepcopy(small), example.inputs)
    if extras:
        _reload(record, case, example, chosen, small)
    if export:
        _export(record, example, small)
    if up_to >= 5:  # before training, which changes the weights
        _verify(record, example, small, chosen)
    trains(record, small, after, gradients(record, example, example.model))
    return record.done()


def build(case: Case) -> Example:
    """The model of a case with varied weights, in evaluation mode."""
    torch.manual_seed(0)
    example = case()
    seasoned(example.model).eval()
    return example


def size(record: Record, example: Example, outputs: Any, when: str) -> dict[str, Any]:
    """Parameters, multiply-accumulates (None where these cannot be counted) and output shapes."""
    found: dict[str, Any] = {"params": parameters(example.model), "macs": None}
    found["shapes"] = output_shapes(outputs, varying=example.varying)
    record.facts[when] = found
    with record.stage(f"measure {when}"):
        found["macs"] = macs(example.model, example.inputs)
    return found


def call(model: nn.Module, inputs: Any) -> Any:
    """The outputs of a model in evaluation mode, from the same random state each time."""
    torch.manual_seed(1)
    with torch.no_grad():
        return call_model(model.eval(), inputs)


def _cut(record: Record, example: Example) -> tuple[Plan, nn.Module] | None:
    with record.stage("trace"):
        graph = trace(example.model, example.inputs)
        record.facts |= {
            "groups": len(graph.groups),
            "units": sum(group.size for group in graph.groups),
            "unknown": dict(graph.unknown),
            "locked": lock_summary(graph),
        }
    if record.went_well("trace"):
        with record.stage("score"):
            scores = score(example.model, graph, "l1")
    if record.went_well("score"):
        with record.stage("plan"):
            chosen = plan(graph, scores, Budget(units=0.5), scope="local")
            record.facts["forecast"] = {"params": chosen.after.params, "macs": chosen.after.macs}
    if record.went_well("plan"):
        with record.stage("apply"):
            return chosen, apply(example.model, chosen)
    return None


def after_cut(record: Record, example: Example, small: nn.Module, before: dict[str, Any]) -> Example:
    """Levels 2 and 3: run the pruned model and count what is left."""
    cut = Example(
        model=small,
        inputs=example.inputs,
        training_inputs=example.training_inputs,
        varying=example.varying,
    )
    with record.stage("forward"):
        after = size(record, cut, call(small, example.inputs), "after")
        record.level(2, after["shapes"] == before["shapes"])
        counted = {
            name: after[name] / before[name] for name in ("params", "macs") if before[name] and after[name]
        }
        record.facts["remain"] = {name: round(share, 4) for name, share in counted.items()}
        record.level(3, len(counted) == 2 and all(share <= SHARE for share in counted.values()))
    for number in (2, 3):
        record.level(number, bool(record.facts["levels"][str(number)]))
    return cut


def gradients(record: Record, example: Example, model: nn.Module) -> set[str] | None:
    """The names of the parameters that training gives gradients; None if the model cannot train."""
    names: set[str] | None = None
    with record.stage("train original"):
        _backward(model, example)
        names = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    model.zero_grad()
    if names is None:
        record.facts["cannot_train"] = record.facts["errors"].pop("train original")
    return names


def trains(record: Record, small: nn.Module, example: Example, wanted: set[str] | None) -> None:
    """Level 4: one training step of the pruned model; not asked where the original cannot train."""
    if wanted is None:
        return
    missing = wanted
    with record.stage("train"):
        optimiser = torch.optim.SGD(small.parameters(), lr=1e-4, momentum=0.9)
        _backward(small, example)
        missing = wanted - {name for name, each in small.named_parameters() if each.grad is not None}
        optimiser.step()
    record.level(4, not missing and record.went_well("train"))
    if missing and record.went_well("train"):
        record.facts["errors"]["train"] = {"message": f"no gradient reaches {', '.join(sorted(missing)[:3])}"}


def _backward(model: nn.Module, example: Example) -> None:
    inputs = example.inputs if example.training_inputs is None else example.training_inputs
    model.train()
    torch.manual_seed(2)
    outputs = call_model(model, inputs)
    parts = [t for _, t in tensors_in(outputs) if t.requires_grad and t.is_floating_point()]
    torch.stack([part.float().square().mean() + part.float().mean() for part in parts]).sum().backward()
    model.eval()


def _verify(record: Record, example: Example, small: nn.Module, chosen: Plan) -> None:
    with record.stage("verify"):
        report = verify(example.model, small, chosen, example.inputs)
        record.level(5, report.ok)
        record.facts["verify"] = {
            "exact": report.exact_expected,
            "relative_error": report.max_error / max(report.scale, 1e-300),
            "effect": report.effect / max(report.scale, 1e-300),
            "mixed": sorted(set(report.mixed.values())),
        }
        if not report.ok:
            record.facts["errors"]["verify"] = {"message": str(report)}
    record.level(5, bool(record.facts["levels"]["5"]))


def _reload(record: Record, case: Case, example: Example, chosen: Plan, small: nn.Module) -> None:
    with record.stage("state_dict"):
        fresh = apply(build(case).model, chosen)
        fresh.load_state_dict(small.state_dict())
        for (_, a), (_, b) in zip(
            tensors_in(call(small, example.inputs)), tensors_in(call(fresh, example.inputs)), strict=True
        ):
            torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)


def _export(record: Record, example: Example, small: nn.Module) -> None:
    """Export the result; where that fails, say whether the original can be exported."""
    inputs = tree_map_only(Tensor, torch.clone, example.inputs)
    named = inputs if isinstance(inputs, dict) else {}
    plain = () if named else (inputs,) if isinstance(inputs, Tensor) else tuple(inputs)
    with record.stage("export"):
        torch.export.export(small, plain, named)
    if "export" in record.facts["errors"]:
        with record.stage("export original"):
            torch.export.export(example.model, plain, named)
