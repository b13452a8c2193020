"""`compare`: which criterion ranks the units of this model, on this data, most like the oracle."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import torch
from torch import nn

from secateurs.criteria import NORMALIZATIONS, Scores, names, score
from secateurs.criteria.batches import LossFunction
from secateurs.criteria.scoring import AnyCriterion
from secateurs.errors import ScoreError
from secateurs.graph.groups import Graph
from secateurs.judging.agreement import Agreement, Values, agree
from secateurs.judging.truth import ORACLES, Oracle, OracleKind, oracle
from secateurs.progress import Event, Observer, ignore


@dataclass(frozen=True, slots=True, kw_only=True)
class Judgement:
    """What the oracle says of one criterion.

    Args:
        criterion: Its name.
        seconds: What a pass for this criterion alone took.
        agreement: By oracle (``"oracle-abs"``, ``"oracle-loss"``), the correlations with it.
    """

    criterion: str
    seconds: float
    agreement: Mapping[str, Agreement]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Comparison:
    """Criteria judged by the oracle.

    Args:
        oracle: The measured changes of the loss.
        judgements: One for each criterion, the best per-layer correlation with oracle-abs first.
        scores: The scores of each criterion, not normalised.
        failed: Criteria that cannot be computed for this model, with the reason.
    """

    oracle: Oracle
    judgements: tuple[Judgement, ...]
    scores: Mapping[str, Scores]
    failed: Mapping[str, str] = field(default_factory=dict)

    @property
    def unranked(self) -> dict[str, dict[str, str]]:
        """By criterion the measured layers that it has nothing to rank by, with the reason."""
        gaps = {
            criterion: {
                name: scores.missing[name].message for name in self.oracle.changes if name in scores.missing
            }
            for criterion, scores in self.scores.items()
        }
        return {criterion: found for criterion, found in gaps.items() if found}

    def to_dict(self) -> dict[str, Any]:
        """All but the scores of single units, as JSON can hold it; see `units` for those."""
        found = self.oracle
        return {
            "loss": found.loss,
            "examples": found.examples,
            "units": sum(1 for _ in self.units()),
            "oracle_seconds": round(found.seconds, 3),
            "ways": dict(found.ways),
            "left_out": dict(found.left_out),
            "criteria": [asdict(each) for each in self.judgements],
            "failed": dict(self.failed),
            "unranked": self.unranked,
        }

    def units(self) -> Iterator[dict[str, Any]]:
        """Each measured unit: its layer, its number, the change of the loss, and every criterion's score.

        A score is None where the criterion has nothing to rank the layer by.
        """
        for name, changes in self.oracle.changes.items():
            columns = {
                criterion: [None] * len(changes) if name in scores.missing else scores[name].tolist()
                for criterion, scores in self.scores.items()
            }
            for unit in (~changes.isnan()).nonzero().flatten().tolist():
                own = {criterion: column[unit] for criterion, column in columns.items()}
                yield {"layer": name, "unit": unit, "oracle-loss": float(changes[unit]), **own}


def compare(
    model: nn.Module,
    graph: Graph,
    *,
    data: Iterable[Any],
    loss_fn: LossFunction,
    criteria: Sequence[AnyCriterion] | str = "all",
    found: Oracle | None = None,
    seed: int = 0,
    observer: Observer = ignore,
) -> Comparison:
    """Judge criteria by Spearman's correlation of their scores with the oracle's, for a model and its data.

    Args:
        model: The model that the graph was traced from.
        graph: The graph.
        data: Batches ``(inputs, targets)`` that can be gone through again and again, as a list or a loader.
        loss_fn: ``loss_fn(outputs, targets)``, the mean over the batch.
        criteria: ``"all"`` that are registered, of which those that this model does not admit are named in
            `Comparison.failed`; or a list of names, criteria and functions.
        found: What `oracle` found before, perhaps for a sample of the units; measured here for all if None.
        seed: What the resampling for the confidence intervals follows from.
        observer: Called with an event ``judged`` after each criterion, and by the oracle.

    Returns:
        The correlations per layer and over all layers, with and without per-layer l2, and what each criterion
        cost. A criterion that has nothing to rank some layers by, as `bn-scale` where no batch norm is, is
        judged on the others; `Comparison.unranked` names them.

    Raises:
        ScoreError: The data cannot be gone through twice, or a criterion of the list cannot be computed.
        UnknownNameError: A criterion that is not known.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> import secateurs
        >>> _ = torch.manual_seed(0)
        >>> net = nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 2))
        >>> graph = secateurs.trace(net, torch.zeros(1, 4))
        >>> data = [(torch.randn(64, 4), torch.randint(2, (64,)))]
        >>> judged = secateurs.compare(net, graph, data=data, loss_fn=nn.functional.cross_entropy,
        ...                            criteria=["random", "taylor"])
        >>> [each.criterion for each in judged.judgements]
        ['taylor', 'random']

    References:
        Molchanov et al., https://arxiv.org/abs/1611.06440, judge criteria so, by oracle-abs.
    """
    if iter(data) is data:
        raise ScoreError(
            f"the data is gone through once for each criterion, but a {type(data).__name__} can be only once",
            fix="pass a list or a loader: data=list(batches)",
        )
    if found is None:
        found = oracle(model, graph, data=data, loss_fn=loss_fn, observer=observer)
    wanted: Sequence[AnyCriterion] = (
        names()
        if isinstance(criteria, str) and criteria == "all"
        else ([criteria] if isinstance(criteria, str) else criteria)
    )
    judgements, scores, failed = [], {}, {}
    for criterion in wanted:
        started = time.perf_counter()
        try:
            own = score(model, graph, criterion, data=data, loss_fn=loss_fn, normalization="none")
            _check_ranks_any(own, found)
        except ScoreError as error:
            if criteria != "all":
                raise
            failed[str(criterion)] = error.message
            continue
        seconds = time.perf_counter() - started
        scores[own.criterion] = own
        judgements.append(judge(own, found, seconds=seconds, seed=seed))
        observer(Event("judged", {"criterion": own.criterion, "seconds": round(seconds, 3)}))
    judgements.sort(key=_standing)
    scores = {each.criterion: scores[each.criterion] for each in judgements}
    return Comparison(oracle=found, judgements=tuple(judgements), scores=scores, failed=failed)


def judge(scores: Scores, found: Oracle, *, seconds: float = 0.0, seed: int = 0) -> Judgement:
    """Correlate scores that are not normalised with both forms of the oracle, on the layers that have scores.

    Args:
        scores: For each group one score a unit.
        found: The oracle.
        seconds: What the scores cost.
        seed: What the resampling follows from.
    """
    ranked = {name: values for name, values in found.changes.items() if name not in scores.missing}
    measured = {name: ~values.isnan() for name, values in ranked.items()}
    normalised = {name: NORMALIZATIONS["l2"](scores[name]) for name in measured}
    agreement: dict[str, Agreement] = {
        kind: agree(
            _measured(scores, measured),
            _measured(normalised, measured),
            _truth(found, kind, measured),
            seed=seed,
        )
        for kind in ORACLES
    }
    return Judgement(criterion=scores.criterion, seconds=seconds, agreement=agreement)


def _check_ranks_any(scores: Scores, found: Oracle) -> None:
    """Refuse scores of none of the measured layers, with the first layer's reason."""
    gaps = [scores.missing.get(name) for name in found.changes]
    if gaps and all(gaps) and gaps[0] is not None:
        raise gaps[0]


def _truth(found: Oracle, kind: OracleKind, measured: Mapping[str, torch.Tensor]) -> Values:
    return _measured(found.values(kind), measured)


def _measured(values: Mapping[str, torch.Tensor], measured: Mapping[str, torch.Tensor]) -> Values:
    return {name: np.asarray(values[name][mask], np.float64) for name, mask in measured.items()}


def _standing(each: Judgement) -> tuple[float, str]:
    value = each.agreement["oracle-abs"].per_layer.value
    return (2.0 if value is None else -value, each.criterion)
