"""The lines of a zoo file as markdown: the coverage page, and what failed by cause."""

from __future__ import annotations

import re
import statistics
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from benchmarks.zoo.records import Records

Facts = Mapping[str, Any]
_LEVELS = {
    "1": "cut without an exception",
    "2": "output shapes kept",
    "3": "parameters and MACs down by 40 %",
    "4": "trains",
    "5": "verified",
}
_STAGES = {  # -> the level that fails with it; other stages stand for themselves
    **dict.fromkeys(("trace", "score", "plan", "apply", "prune"), "1"),
    "forward": "2",
    "measure before": "3",
    "measure after": "3",
    "train": "4",
    "verify": "5",
}
_OTHERS = ("deepcopy", "state_dict", "export", "train original", "build", "start")
_SHOWN = 6
_MOST_ROWS = 200  # of a list that is shown model by model


def markdown(records: Records) -> str:
    """The coverage page: totals of each list and level, then one row a model."""
    lists = _by_list(records)
    first = next(iter(records.values()), {})
    versions = ", ".join(f"{name} {number}" for name, number in first.get("software", {}).items())
    parts = [
        "# Coverage",
        "Every model of a list at half its width (`Budget(units=0.5)`, every group the same share), with "
        "random weights: how many reach each level. Printed by `python -m benchmarks.zoo`. " + versions + ".",
        "\n".join(f"{number}. {text}" for number, text in _LEVELS.items()),
        *(_totals(name, facts) for name, facts in lists.items()),
        *(_libraries(facts) for name, facts in lists.items() if name == "others"),
        *(_models(name, facts) for name, facts in lists.items()),
    ]
    return "\n\n".join(parts)


def _by_list(records: Records) -> dict[str, dict[str, Facts]]:
    lists: dict[str, dict[str, Facts]] = defaultdict(dict)
    for (name, model), facts in records.items():
        lists[name][model] = facts
    return lists


def _totals(name: str, models: Mapping[str, Facts]) -> str:
    tools = [
        tool for tool in ("secateurs", "torch_pruning") if any(tool in facts for facts in models.values())
    ]
    rows = []
    for number, text in _LEVELS.items():
        cells = [f"{number} {text}"]
        for tool in tools:
            reached = [_level(facts[tool], number) for facts in models.values() if tool in facts]
            asked = any(value is not None for value in reached)
            cells.append(f"{sum(map(bool, reached))} of {len(reached)}" if asked else "-")
        rows.append(cells)
    rows.append(["all of these", *(_complete(models, tool) for tool in tools)])
    rows.append(["processor seconds to cut, median (worst)", *(_times(models, tool) for tool in tools)])
    return f"## {name}\n\n" + _grid(["level", *tools], rows)


def _libraries(models: Mapping[str, Facts]) -> str:
    """A row for each library of the list of others, whose models are named ``library.model``."""
    libraries: dict[str, list[tuple[str, Facts]]] = defaultdict(list)
    for model, facts in sorted(models.items()):
        library, _, name = model.partition(".")
        libraries[library].append((name, facts.get("secateurs", {})))
    rows = []
    for library, having in sorted(libraries.items()):
        reached = [str(sum(passed(facts, number) for _, facts in having)) for number in _LEVELS]
        whole = sum(all(passed(facts, number) for number in _LEVELS) for _, facts in having)
        left = {
            name: facts["remain"]["params"] for name, facts in having if "params" in facts.get("remain", {})
        }
        most = max(left, key=lambda name: left[name])
        share = f"{statistics.median(left.values()):.0%} ({left[most]:.0%}, {most})"
        rows.append([library, str(len(having)), *reached, str(whole), share])
    head = ["library", "models", *_LEVELS, "all", "parameters left, median (most)"]
    return "### others, library by library\n\n" + _grid(head, rows)


def _level(facts: Facts, number: str) -> bool | None:
    reached: bool | None = facts.get("levels", {}).get(number)
    return reached


def _complete(models: Mapping[str, Facts], tool: str) -> str:
    """How many reach every level that the tool is asked for; a model that cannot train is not asked to."""
    having = [facts[tool] for facts in models.values() if tool in facts]
    asked = [number for number in _LEVELS if any(_level(facts, number) is not None for facts in having)]
    whole = sum(all(passed(facts, number) for number in asked) for facts in having)
    return f"{whole} of {len(having)}"


def passed(facts: Facts, number: str) -> bool:
    """Whether a level was reached, or cannot be asked of the original either."""
    return bool(_level(facts, number)) or (number == "4" and "cannot_train" in facts)


def seconds(facts: Facts) -> float | None:
    """Seconds from the model to the smaller model; None if it was not reached."""
    spent = facts.get("seconds", {})
    if not _level(facts, "1"):
        return None
    return float(sum(spent.get(stage, 0) for stage in ("trace", "score", "plan", "apply", "prune")))


def _times(models: Mapping[str, Facts], tool: str) -> str:
    found = {name: seconds(facts[tool]) for name, facts in models.items() if tool in facts}
    known = {name: value for name, value in found.items() if value is not None}
    if not known:
        return "-"
    worst = max(known, key=lambda name: known[name])
    return f"{statistics.median(known.values()):.2f} ({known[worst]:.1f}, {worst})"


def _models(name: str, models: Mapping[str, Facts]) -> str:
    rivals = any("torch_pruning" in facts for facts in models.values())
    title = f"## {name}, model by model"
    if len(models) > _MOST_ROWS:
        title, models = f"## {name}, what misses a level", {m: f for m, f in models.items() if _misses(f)}
    head = [
        "model",
        "levels",
        "params left",
        "MACs left",
        "error",
        "cut, s",
        "verify, s",
        "groups",
        "what failed",
    ]
    head += ["Torch-Pruning", "its cut, s"] if rivals else []
    rows = []
    for model, facts in sorted(models.items()):
        row = _row(model, facts.get("secateurs", {}))
        if rivals:
            theirs = facts.get("torch_pruning", {})
            row += [marks(theirs), _number(seconds(theirs), "{:.2f}")]
        rows.append(row)
    return f"{title}\n\n" + _grid(head, rows)


def _misses(facts: Facts) -> bool:
    """Whether a level that was asked for was not reached."""
    ours = facts.get("secateurs", {})
    return any(_level(ours, number) is False and not passed(ours, number) for number in _LEVELS)


def _row(model: str, facts: Facts) -> list[str]:
    remain, proof = facts.get("remain", {}), facts.get("verify", {})
    error = f"{proof['relative_error']:.0e}" if proof.get("exact") else "mixed" if proof else ""
    return [
        model,
        marks(facts),
        _number(remain.get("params"), "{:.0%}"),
        _number(remain.get("macs"), "{:.0%}"),
        error,
        _number(seconds(facts), "{:.2f}"),
        _number(facts.get("seconds", {}).get("verify"), "{:.1f}"),
        str(facts.get("groups", "")),
        "; ".join(dict.fromkeys(map(str, complaints(facts)))).replace("|", "/")[:160],
    ]


def marks(facts: Facts) -> str:
    """The levels that were reached, such as ``12-45``."""
    return "".join(number if _level(facts, number) else "-" for number in _LEVELS) if facts else ""


def _number(value: float | None, form: str) -> str:
    return "" if value is None else form.format(value)


def _grid(head: list[str], rows: Iterable[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


@dataclass(frozen=True, slots=True)
class Complaint:
    """One thing that went wrong: the level that it cost, what it was, and the line of source."""

    level: str
    what: str
    where: str

    @property
    def general(self) -> str:
        """What it was without the numbers and names of one model, so that like causes meet."""
        text = re.sub(r"\[\[?[\d, ]+\]?\]|\d[\d.,]*", "N", self.what)
        text = re.sub(r"'[^']*'", "'...'", text)
        text = re.sub(r"( after the cut)+$", " after the cut", text)
        return re.sub(r"^(trace: \w+ )\w+ could", r"\1X could", text)[:260]

    def __str__(self) -> str:
        return f"{self.what} [{self.where}]" if self.where else self.what


def complaints(facts: Facts) -> list[Complaint]:
    """What went wrong with a model: exceptions, and the locks behind a cut that saves little."""
    found = []
    for stage, error in facts.get("errors", {}).items():
        lines = (error.get("model_line"), error.get("secateurs_line"))
        place = " from ".join(line for line in lines if line) or error.get("line") or ""
        text = error["message"].splitlines()[0] if error["message"] else ""
        what = " ".join(part for part in (f"{stage}:", error.get("type", ""), text) if part)
        found.append(Complaint(_STAGES.get(stage, stage), what, place))
    reached = facts.get("levels", {})
    if reached.get("2") is False and "forward" not in facts.get("errors", {}):
        shapes = f"shapes {facts['after']['shapes']} instead of {facts['before']['shapes']}"
        found.append(Complaint("2", shapes, ""))
    if reached.get("3") is False and facts.get("remain"):
        reasons = facts.get("locked", {}).get("reasons", [])
        found += [Complaint("3", f"locked: {each['reason']}", each["source"]) for each in reasons]
        found += [Complaint("3", f"no rule for {name}", at) for name, at in facts.get("unknown", {}).items()]
    return found


def causes(records: Records, tool: str = "secateurs") -> str:
    """What failed, grouped by cause, the most frequent first, for those who improve the engine."""
    parts = []
    for name, models in _by_list(records).items():
        having = {model: facts[tool] for model, facts in models.items() if tool in facts}
        parts += [_totals(name, models), _unfinished(having)]
        for level in (*_LEVELS, *_OTHERS):
            grouped: dict[str, dict[str, set[str]]] = defaultdict(lambda: defaultdict(set))
            for model, facts in having.items():
                for each in complaints(facts):
                    if each.level == level:
                        grouped[each.general][each.where].add(model)
            if grouped:
                parts.append(f"### level {level} ({_LEVELS.get(level, 'beside the levels')})")
                parts.append("\n".join(_ranked(grouped)))
    return "\n\n".join(parts)


def _ranked(grouped: Mapping[str, Mapping[str, set[str]]]) -> Iterable[str]:
    """A line for each cause, the one of most models first, and below it its lines of source."""
    models = {what: set().union(*places.values()) for what, places in grouped.items()}
    for what in sorted(grouped, key=lambda what: -len(models[what])):
        yield f"- **{len(models[what])}** {what}"
        for where, who in sorted(grouped[what].items(), key=lambda item: -len(item[1])):
            yield f"  - {where or 'no line of source'}: {_names(sorted(who))}"


def _unfinished(having: Mapping[str, Facts]) -> str:
    rows = []
    for model, facts in having.items():
        if not all(passed(facts, number) for number in _LEVELS):
            remain = facts.get("remain", {})
            left = ", ".join(f"{name} {share:.0%}" for name, share in remain.items())
            rows.append([model, marks(facts), left, str(facts.get("groups", ""))])
    return "### models that miss a level\n\n" + _grid(["model", "levels", "left", "groups"], rows)


def _names(models: list[str]) -> str:
    more = f" and {len(models) - _SHOWN} more" if len(models) > _SHOWN else ""
    return ", ".join(models[:_SHOWN]) + more
