"""``secateurs inspect``."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer

from secateurs.cli import common, text

if TYPE_CHECKING:
    from secateurs.graph import Graph
    from secateurs.graph.counts import CountCondition, CountConstraint


def inspect(
    model: Annotated[str, typer.Argument(help="An architecture such as torchvision:resnet50, or a run.")],
    classes: common.Classes = None,
    input_size: common.InputSize = None,
    json: common.Json = False,
) -> None:
    """Show what can be cut out of a model, what a unit costs, which counts are tied, what is locked and why.

    [bold]secateurs inspect torchvision:resnet18[/bold]

    A unit is what leaves as a whole: a filter with all that goes with it. The last columns say how many
    parameters and multiply-accumulates one unit of the group saves. Each reason comes with the line of the
    model's source; names that differ in numbers alone are shown as one, [bold]--json[/bold] has all.
    """
    with common.clear_exits():
        import torch

        from secateurs.graph import trace

        network, shape = common.named_model(model, classes=classes, input_size=input_size)
        graph = trace(network, torch.zeros(1, *shape))
        facts = describe(graph)
        if json:
            common.print_json({"model": model, "input_size": list(shape), **facts})
        else:
            typer.echo(_as_text(model, facts))


def describe(graph: Graph) -> dict[str, Any]:
    """What a graph holds, as JSON can hold it."""
    cost = graph.cost()
    groups = []
    for group in graph.groups:
        one = graph.group_cost(group)
        groups.append(
            {
                "name": group.name,
                "kind": group.kind,
                "units": group.size,
                "params_per_unit": one.params,
                "macs_per_unit": one.macs,
                "slices": [
                    {"parameter": part.parameter, "dim": part.dim, "role": part.role} for part in group.slices
                ],
            }
        )
    locked = [
        {
            "name": lock.name,
            "parameter": lock.parameter,
            "dim": lock.dim,
            "size": lock.size,
            "reason": lock.reason,
            "source": lock.source,
        }
        for lock in graph.locked
    ]
    return {
        "params": cost.params,
        "macs": cost.macs,
        "groups": groups,
        "tied": [
            {**_of_counts(graph, each), "can_be_broken": bool(each.instead)} for each in graph.constraints
        ],
        "written": [
            {
                "reason": f"{tie.written.text!r} in the code",
                "source": tie.where,
                "groups": [graph.groups[place].name for place in sorted(tie.length.groups)],
            }
            for tie in graph.ties
            if tie.written is not None
        ],
        "conditions": [{**_of_counts(graph, each), "outcome": each.outcome} for each in graph.conditions],
        "locked": locked,
        "unknown": dict(graph.unknown),
        "example_only": list(graph.example_only),
        "state": dict(graph.state),
    }


def _of_counts(graph: Graph, each: CountConstraint | CountCondition) -> dict[str, Any]:
    names = [graph.groups[place].name for place in sorted(each.groups)]
    return {"reason": each.reason, "source": each.where, "groups": names}


def _as_text(model: str, facts: dict[str, Any]) -> str:
    units = sum(group["units"] for group in facts["groups"])
    lines = [
        f"{model}: {text.count(facts['params'])} parameters, {text.count(facts['macs'])} MACs, "
        f"{len(facts['groups'])} groups of {units} units",
        "",
        text.table(
            ("group", "kind", "units", "slices", "params a unit", "MACs a unit"),
            [
                (
                    group["name"],
                    group["kind"],
                    str(group["units"]),
                    str(len(group["slices"])),
                    text.count(group["params_per_unit"]),
                    text.count(group["macs_per_unit"]),
                )
                for group in facts["groups"]
            ],
        ),
        "",
    ]
    for broken, title in (
        (False, "counts that forward derives from one another:"),
        (True, "counts that agree, unless a cut leaves some of these groups alone and attributes stand in:"),
    ):
        lines += _counts_lines(title, [each for each in facts["tied"] if each["can_be_broken"] is broken])
    lines += _counts_lines("sizes that attributes take the place of where a cut needs it:", facts["written"])
    lines += _counts_lines("comparisons that must come out as they do:", facts["conditions"])
    if facts["example_only"]:
        lines.append(
            "values that depend on weights are read here; other inputs may take paths that are not shown:"
        )
        lines += [*(f"  {source}" for source in facts["example_only"]), ""]
    if facts["state"]:
        states = [f"{name} ({kind})" for name, kind in facts["state"].items()]
        lines += [f"state that the model returns for itself, which shrinks too: {', '.join(states)}", ""]
    lines.append("locked:" if facts["locked"] else "locked: nothing")
    by_place: dict[tuple[str, str], list[str]] = {}
    for lock in facts["locked"]:
        name = f"{lock['parameter']} dimension {lock['dim']}"
        by_place.setdefault((lock["reason"], lock["source"]), []).append(name)
    for (reason, source), names in by_place.items():
        lines += _entry(reason, source, names)
    return "\n".join(lines)


def _counts_lines(title: str, entries: Sequence[dict[str, Any]]) -> list[str]:
    """Constraints on counts by the line of the model's source, the first of each with its words."""
    by_line: dict[str, list[dict[str, Any]]] = {}
    for each in entries:
        by_line.setdefault(each["source"], []).append(each)
    lines = [title] if entries else []
    for source, alike in by_line.items():
        more = f" and {len(alike) - 1} like it" if len(alike) > 1 else ""
        names = [name for each in alike for name in each["groups"]]
        lines += _entry(alike[0]["reason"] + more, source, names)
    return [*lines, ""] if lines else []


def _entry(reason: str, source: str, names: Iterable[str]) -> list[str]:
    where = f" ({source})" if source else ""
    return [f"  {reason}{where}:", f"    {', '.join(_patterns(names))}"]


def _patterns(names: Iterable[str]) -> list[str]:
    """Names, each once; those that differ in the numbers of their paths alone as one, with their count.

    Example:
        >>> _patterns(["stem", "blocks.0.fc dimension 1", "blocks.1.fc dimension 1"])
        ['stem', 'blocks.*.fc dimension 1 (2)']
    """
    found: dict[str, list[str]] = {}
    for name in dict.fromkeys(names):
        found.setdefault(re.sub(r"(?<=[._])\d+(?=[.#])|(?<=\.)\d+$", "*", name), []).append(name)
    return [alike[0] if len(alike) == 1 else f"{pattern} ({len(alike)})" for pattern, alike in found.items()]
