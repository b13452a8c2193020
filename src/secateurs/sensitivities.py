"""How much accuracy each group costs when it alone is pruned, and what follows for a plan (Li et al.)."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, Self

from torch import nn

from secateurs import files
from secateurs.criteria.batches import LossFunction
from secateurs.criteria.protocol import Scores
from secateurs.criteria.scoring import AnyCriterion, score
from secateurs.errors import PlanError, RunError
from secateurs.graph.groups import Graph, Group
from secateurs.measure.accuracy import accuracy
from secateurs.planning.limits import candidates, check_skip
from secateurs.planning.plan import Plan
from secateurs.planning.ranking import plan
from secateurs.progress import Event, Observer, ignore
from secateurs.surgery.silence import without

RATIOS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
_FORMAT = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Point:
    """One group at one number of units.

    Args:
        group: The group.
        size: Its units.
        kept: Those that are left.
        accuracy: Top-1 without retraining.
        loss: Mean cross-entropy.
        macs: Multiply-accumulates of the model with this cut.
        way: ``silenced`` where that computes what the cut model does, or else ``cut``.
        along: Groups that had to shrink with it, because their counts are tied.
    """

    group: str
    size: int
    kept: int
    accuracy: float
    loss: float
    macs: int
    way: Literal["silenced", "cut"]
    along: tuple[str, ...] = ()

    @property
    def ratio(self) -> float:
        """The share of the units that left."""
        return 1 - self.kept / self.size


@dataclass(frozen=True, slots=True, kw_only=True)
class Sensitivity:
    """The curves of all groups.

    Args:
        accuracy: Top-1 of the model as it is.
        loss: Its mean cross-entropy.
        macs: Its multiply-accumulates.
        images: Samples that all accuracies were measured on.
        criterion: What decided which units of a group leave first.
        points: By group, in the order of the network, and by rising prune ratio.
    """

    accuracy: float
    loss: float
    macs: int
    images: int
    criterion: str
    points: tuple[Point, ...]

    def curves(self) -> dict[str, list[Point]]:
        """The points of each group."""
        found: dict[str, list[Point]] = {}
        for point in self.points:
            found.setdefault(point.group, []).append(point)
        return found

    def within(self, max_drop: float) -> tuple[dict[str, float], list[str]]:
        """How far each group can be pruned alone before accuracy falls by more than `max_drop`.

        Groups that are pruned together cost more than each alone, so this is where to begin, and no promise.

        Args:
            max_drop: The largest fall of the accuracy as a share, such as 0.01.

        Returns:
            ``shares`` and ``skip`` for `secateurs.plan`: what may remain of each group, up to the last point
            before the first that falls further; and the groups where every point does.

        Raises:
            PlanError: `max_drop` is negative, or so small that all groups are left alone.
        """
        if not 0 <= max_drop < 1:
            raise PlanError(
                f"0 <= max_drop < 1 must hold, a share of all images; got {max_drop}", fix="max_drop=0.01"
            )
        shares, skip = {}, []
        for name, points in self.curves().items():
            bad = [place for place, point in enumerate(points) if self.accuracy - point.accuracy > max_drop]
            good = points[: bad[0]] if bad else points
            if good:
                shares[name] = good[-1].kept / good[-1].size
            else:
                skip.append(name)
        if not shares:
            raise PlanError(
                f"every group loses more than {max_drop} of the accuracy at its first point",
                fix="allow a larger max_drop",
            )
        return shares, skip

    def save(self, path: str | Path) -> None:
        """Write all as JSON; the file appears whole or not at all."""
        files.write_json(Path(path), {"format": _FORMAT, **asdict(self)})

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Read what `save` wrote.

        Raises:
            RunError: The file is missing or holds something else.
        """
        place = Path(path)
        if place.is_dir():
            place = place / "sensitivity.json"
        if not place.is_file():
            raise RunError(
                f"{place} is not there", where=str(place), fix="secateurs sensitivity RUN writes such a file"
            )
        facts = files.read_json(place)
        try:
            if facts.pop("format") != _FORMAT:
                raise ValueError("another format")
            points = tuple(Point(**{**each, "along": tuple(each["along"])}) for each in facts.pop("points"))
            return cls(**facts, points=points)
        except (KeyError, TypeError, ValueError) as error:
            raise RunError(
                f"{place} holds no sensitivities: {error}",
                where=str(place),
                fix="secateurs sensitivity RUN writes such a file",
            ) from error


def sensitivity(
    model: nn.Module,
    graph: Graph,
    batches: Iterable[Any],
    *,
    criterion: AnyCriterion | Scores = "l1",
    ratios: Sequence[float] = RATIOS,
    data: Iterable[Any] | None = None,
    loss_fn: LossFunction | None = None,
    kinds: Collection[str] | None = None,
    skip: Sequence[str] = (),
    known: Iterable[Point] = (),
    observer: Observer = ignore,
) -> Sensitivity:
    """Prune each group alone at several ratios and measure the accuracy, without any retraining.

    The units of a group leave in the order of the criterion. They are silenced, which needs no surgery, in
    groups where that is proved to equal the cut; where an operator mixes units, the model is cut.

    Args:
        model: A classifier.
        graph: Its graph.
        batches: Pairs ``(inputs, labels)`` to measure on: validation images, never the test images. Gone
            through once for each point, so a list, or a loader that does not shuffle.
        criterion: What decides who leaves, as in `score`; or scores at hand.
        ratios: Shares of the units that leave, each in (0, 1).
        data: Batches for a criterion that needs data.
        loss_fn: The loss for a criterion that needs data.
        kinds: See `plan`.
        skip: See `plan`.
        known: Points that were measured before, to be taken over.
        observer: Told of each point as a ``"point"`` event.

    Returns:
        The curves.

    Raises:
        PlanError: A ratio is out of range.
        DataError: There are no images.

    Example:
        >>> import torch
        >>> import secateurs
        >>> _ = torch.manual_seed(0)
        >>> net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
        >>> x = torch.randn(50, 4)
        >>> graph = secateurs.trace(net, x)
        >>> found = sensitivity(net, graph, [(x, net(x).argmax(1))], ratios=[0.5, 0.75])
        >>> found.accuracy, [(point.kept, point.way) for point in found.points]
        (1.0, [(4, 'silenced'), (2, 'silenced')])

    References:
        Li et al., Pruning Filters for Efficient ConvNets, section 3.2, https://arxiv.org/abs/1608.08710
    """
    for ratio in ratios:
        if not 0 < ratio < 1:
            raise PlanError(
                f"0 < ratio < 1 must hold, the share that leaves; got {ratio}", fix="ratios=[0.5]"
            )
    check_skip(graph, skip)
    groups = candidates(graph, kinds=kinds, skip=skip)
    scores = criterion
    if not isinstance(scores, Scores):
        scores = score(model, graph, scores, data=data, loss_fn=loss_fn)
    whole = accuracy(model, batches)
    done = {(point.group, point.kept): point for point in known}
    points: dict[tuple[str, int], Point] = {}
    for number, group in enumerate(groups, 1):
        for kept in _counts(group, ratios):
            point = done.get((group.name, kept)) or _measured(model, graph, scores, group, kept, batches)
            key = point.group, point.kept  # tied counts may have gone up, to what another ratio came to
            if point.kept == group.size or key in points:
                continue
            points[key] = point
            drop = whole.top1 - point.accuracy
            observer(Event("point", {**asdict(point), "drop": drop, "number": number, "groups": len(groups)}))
    return Sensitivity(
        accuracy=whole.top1,
        loss=whole.loss,
        macs=graph.cost().macs,
        images=whole.count,
        criterion=scores.criterion,
        points=tuple(points.values()),
    )


def _counts(group: Group, ratios: Sequence[float]) -> list[int]:
    """The numbers of units that are left, falling; several ratios of a small group may come to the same."""
    kept = {max(1, group.size - int(group.size * ratio + 1e-9)) for ratio in ratios}
    return sorted(kept - {group.size}, reverse=True)


def _measured(
    model: nn.Module, graph: Graph, scores: Scores, group: Group, kept: int, batches: Iterable[Any]
) -> Point:
    decided = plan(graph, scores, allocation={group.name: kept}, kinds={g.kind for g in graph.groups})
    remaining, way = without(model, decided)
    found = accuracy(remaining, batches)
    return Point(
        group=group.name,
        size=group.size,
        kept=_left(decided, group),
        accuracy=found.top1,
        loss=found.loss,
        macs=decided.after.macs,
        way=way,
        along=tuple(cut.name for cut in decided.groups if cut.name != group.name),
    )


def _left(decided: Plan, group: Group) -> int:
    return next((cut.kept for cut in decided.groups if cut.name == group.name), group.size)
