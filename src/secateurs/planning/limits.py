"""What is asked of single groups: shares that are given, least numbers of units, groups left alone."""

from __future__ import annotations

import fnmatch
import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Self, TypeAlias, TypeVar

from secateurs.errors import PatternError, PlanError, nearest
from secateurs.graph.groups import Graph, Group
from secateurs.planning.schedules import paced_share

Least: TypeAlias = int | float | Mapping[str, int | float]
Value = TypeVar("Value")


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """How many units single groups keep, exactly or at least.

    Args:
        sizes: Units of each group that may be cut, by name.
        kept: Units that a group keeps, for groups whose number is given.
        least: Units that a group keeps at least.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> import secateurs
        >>> net = nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 6), nn.Linear(6, 2))
        >>> graph = secateurs.trace(net, torch.zeros(1, 4))
        >>> limits = Limits.of(graph, shares={"0": 0.25}, min_units=2)
        >>> limits.kept, limits.least, limits.after(0.5)
        ({'0': 2}, {'0': 2, '1': 2}, {'0': 4})
    """

    sizes: Mapping[str, int]
    kept: Mapping[str, int]
    least: Mapping[str, int]

    @classmethod
    def of(
        cls,
        graph: Graph,
        *,
        shares: Mapping[str, float] | None = None,
        min_units: Least = 1,
        allocation: Mapping[str, int] | None = None,
        kinds: Collection[str] | None = None,
        skip: Sequence[str] = (),
    ) -> Self:
        """Resolve what `secateurs.plan` is asked for to numbers of units.

        Raises:
            PlanError: Two wishes contradict each other, a pattern matches nothing, or a number is impossible.
        """
        groups = {group.name: group for group in candidates(graph, kinds=kinds, skip=skip)}
        least = _least(groups, min_units, graph)
        _check_contradictions(graph, shares or {}, skip)
        by_share = _by_pattern("shares", shares or {}, groups, graph)
        kept = {name: _kept(groups[name], share, least[name]) for name, share in by_share.items()}
        for name, count in (allocation or {}).items():
            kept[name] = _allocated(groups, graph, name, count, by_share, least)
        return cls(sizes={name: group.size for name, group in groups.items()}, kept=kept, least=least)

    def after(self, progress: float, pace: str = "geometric") -> dict[str, int]:
        """The numbers that are given, part of the way there.

        Args:
            progress: 0 at the beginning, 1 at the end.
            pace: See `secateurs.planning.schedules.paced_share`.
        """

        def part(size: int, count: int) -> int:
            return math.ceil(size * paced_share(pace, progress, count / size) - 1e-9)

        return {name: part(self.sizes[name], count) for name, count in self.kept.items()}

    def within(
        self, groups: Iterable[Group], progress: float = 1.0, pace: str = "geometric"
    ) -> tuple[dict[str, int], dict[str, int]]:
        """The same for a model that has been cut before, whose groups are smaller and perhaps fewer.

        Args:
            groups: Those of its groups that may be cut.
            progress: As `after` takes it.
            pace: As `after` takes it.

        Returns:
            What to pass to `secateurs.plan` as ``allocation`` and as ``min_units``.
        """
        now = {group.name: group.size for group in groups}
        kept = {
            name: min(count, now[name]) for name, count in self.after(progress, pace).items() if name in now
        }
        return kept, {name: min(count, now[name]) for name, count in self.least.items() if name in now}


def candidates(
    graph: Graph, *, kinds: Collection[str] | None = None, skip: Sequence[str] = ()
) -> list[Group]:
    """The groups that a plan may cut: those of some kinds, or all but positions.

    A position is a token of a sequence and no filter, so it leaves only where it is asked for.

    Raises:
        PlanError: None is left.
    """
    chosen = [
        group
        for group in graph.groups
        if (group.kind != "position" if kinds is None else group.kind in kinds)
        and not matching(group.name, skip)
    ]
    names = {group.name for group in chosen}
    if kinds is None:
        chosen = [group for group in chosen if not _yields(graph, group, names)]
    if not chosen:
        have = {group.kind for group in graph.groups}
        raise PlanError(
            f"no group is left to cut: kinds={kinds}, skip={list(skip)}, "
            f"the graph has {len(graph.groups)} groups of {sorted(have)}",
            fix="name positions in kinds if these learned tokens may leave"
            if have == {"position"}
            else "call secateurs inspect to see what is locked and why",
        )
    return chosen


def matching(name: str, patterns: Iterable[str]) -> str | None:
    """The last of some glob patterns that a name matches."""
    found = [pattern for pattern in patterns if fnmatch.fnmatchcase(name, pattern)]
    return found[-1] if found else None


def still_there(graph: Graph, skip: Sequence[str]) -> list[str]:
    """Those of the patterns that match: a group that is down to its last unit is no longer in the graph."""
    names = [group.name for group in graph.groups]
    return [pattern for pattern in skip if any(matching(name, [pattern]) for name in names)]


def check_skip(graph: Graph, skip: Sequence[str]) -> None:
    """Refuse a pattern that no group and no locked layer matches: it is likely a slip.

    Raises:
        PlanError: There is such a pattern.
    """
    names = {group.name for group in graph.groups} | {lock.name for lock in graph.locked}
    for pattern in skip:
        if not any(fnmatch.fnmatchcase(name, pattern) for name in names):
            raise no_match("skip", pattern, graph)


def _yields(graph: Graph, group: Group, names: Collection[str]) -> bool:
    return any(graph.sides[rival] < graph.sides[group.name] for rival in group.crosses if rival in names)


def _check_contradictions(graph: Graph, shares: Mapping[str, float], skip: Sequence[str]) -> None:
    for group in graph.groups:
        share, left = matching(group.name, shares), matching(group.name, skip)
        if share is not None and left is not None:
            raise PlanError(
                f"group {group.name!r} is given a share by {share!r} and left alone by {left!r}",
                fix="name it in one of shares and skip",
            )


def _by_pattern(
    option: str, values: Mapping[str, Value], groups: Iterable[str], graph: Graph
) -> dict[str, Value]:
    """The value of each group that a pattern names; the last pattern that matches counts."""
    for pattern in values:
        if not any(fnmatch.fnmatchcase(name, pattern) for name in groups):
            raise no_match(option, pattern, graph)
    found = {name: matching(name, values) for name in groups}
    return {name: values[pattern] for name, pattern in found.items() if pattern is not None}


def no_match(option: str, pattern: str, graph: Graph) -> PatternError:
    """The error for a pattern that matches no group.

    Where the pattern names a layer whose units go with others, it says with which.
    """
    for group in graph.groups:
        for part in group.by_role("producer"):
            if fnmatch.fnmatchcase(part.parameter.rpartition(".")[0], pattern):
                return PatternError(
                    f"{option} {pattern!r} matches no group that may be cut: "
                    f"the units of {part.parameter!r} are those of group {group.name!r}",
                    fix=f"name {group.name!r}",
                )
    names = [group.name for group in graph.groups]
    out = {group.kind for group in graph.groups if fnmatch.fnmatchcase(group.name, pattern)}
    if out:
        return PatternError(
            f"{option} {pattern!r} matches groups of kind {', '.join(map(repr, sorted(out)))} alone, "
            "which are left out",
            fix="name the kind in kinds, and none of them in skip",
        )
    return PatternError(
        f"{option} {pattern!r} matches no group{nearest(pattern, names)}",
        fix="secateurs inspect lists the groups",
    )


def _kept(group: Group, share: float, least: int) -> int:
    if not 0 < share <= 1:
        raise PlanError(
            f"0 < share <= 1 must hold, the share that remains; got {share} for group {group.name!r}",
            fix=f"shares={{{group.name!r}: 0.5}}",
        )
    return max(int(group.size * share + 1e-9), least)


def _allocated(
    groups: Mapping[str, Group],
    graph: Graph,
    name: str,
    count: int,
    by_share: Mapping[str, float],
    least: Mapping[str, int],
) -> int:
    if name not in groups and name in graph.by_name:
        raise PlanError(
            f"the allocation names {name!r} of kind {graph.by_name[name].kind!r}, which is left out",
            fix="name the kind in kinds, and not the group in skip",
        )
    if name not in groups:
        raise PlanError(
            f"the allocation names {name!r}, which is no group that may be cut{nearest(name, groups)}",
            fix="secateurs inspect lists the groups",
        )
    if name in by_share:
        raise PlanError(f"group {name!r} is given both a share and a number of units", fix="give one of them")
    size = graph.by_name[name].size
    if not least[name] <= count <= size:
        raise PlanError(f"group {name!r} keeps between {least[name]} and {size} units, got {count}")
    return int(count)


def _least(groups: Mapping[str, Group], wanted: Least, graph: Graph) -> dict[str, int]:
    """Units that each group keeps at least: a number, or a share of its units rounded up."""
    given = wanted if isinstance(wanted, Mapping) else {"*": wanted}
    values = _by_pattern("min_units", given, groups, graph)
    return {name: _least_of(group, values.get(name, 1)) for name, group in groups.items()}


def check_least(value: int | float) -> None:
    """Refuse a least number of units that is neither a number nor a share.

    Raises:
        PlanError: It is neither.
    """
    if not (0 < value < 1 or (isinstance(value, int) and value >= 1)):
        raise PlanError(
            f"min_units is a number of units, or a share in (0, 1) of each group's; got {value}",
            fix="min_units=8, or min_units=0.1",
        )


def _least_of(group: Group, value: int | float) -> int:
    check_least(value)
    if value < 1:
        return max(1, math.ceil(group.size * value - 1e-9))
    assert isinstance(value, int)
    if value > group.size:
        raise PlanError(
            f"min_units={value} is more than the {group.size} units of group {group.name!r}",
            fix=f"a smaller number, a share such as min_units=0.1, or skip=[{group.name!r}]",
        )
    return value
