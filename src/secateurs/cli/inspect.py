"""``secateurs inspect``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from secateurs.cli import common, text

if TYPE_CHECKING:
    from secateurs.graph import Graph

_SHOWN = 4


def inspect(
    model: Annotated[str, typer.Argument(help="An architecture such as torchvision:resnet50, or a run.")],
    classes: common.Classes = None,
    input_size: common.InputSize = None,
    json: common.Json = False,
) -> None:
    """Show what can be cut out of a model, what each unit costs, and what is locked and why.

    [bold]secateurs inspect torchvision:resnet18[/bold]

    A unit is what leaves as a whole: a filter with all that goes with it. The last columns say how many
    parameters and multiply-accumulates one unit of the group saves.
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
    return {"params": cost.params, "macs": cost.macs, "groups": groups, "locked": locked}


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
    lines.append("locked:" if facts["locked"] else "locked: nothing")
    lines += _locked_lines(facts["locked"])
    return "\n".join(lines)


def _locked_lines(locked: list[dict[str, Any]]) -> list[str]:
    """The locked dimensions by reason, and where in the model's source it lies; many names are cut short."""
    by_reason: dict[str, list[str]] = {}
    places: dict[str, list[str]] = {}
    for lock in locked:
        by_reason.setdefault(lock["reason"], []).append(f"{lock['parameter']} dimension {lock['dim']}")
        if lock["source"] and lock["source"] not in places.setdefault(lock["reason"], []):
            places[lock["reason"]].append(lock["source"])
    lines = []
    for reason, names in by_reason.items():
        where = f" ({_some(places[reason])})" if places.get(reason) else ""
        lines += [f"  {reason}{where}:", f"    {_some(names)}"]
    return lines


def _some(names: list[str]) -> str:
    """The first few of many; ``--json`` has all."""
    rest = len(names) - _SHOWN
    return ", ".join(names[:_SHOWN]) + (f" and {rest} more" if rest > 0 else "")
